"""What is at rest, and its contracts: shards, views, codecs and the store. No torch at module level."""
