"""From shards to the store: teachers, their taps, the exported graphs and the engine that runs them once."""
