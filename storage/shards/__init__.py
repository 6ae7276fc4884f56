"""Shards: WebDataset tars, their indexes, and how images become shards."""
