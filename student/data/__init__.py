"""Data: from shards and stored targets to batches, in a fixed order."""
