"""What `pipeline evaluate` prints and draws, one file a protocol."""
