"""The commands of `pipeline`, one file each."""
