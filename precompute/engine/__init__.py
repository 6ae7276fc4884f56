"""The engine: runs a teacher over shards, in this process or on a dask cluster."""
