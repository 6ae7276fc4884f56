"""Training: `setup` builds a run, `train` runs it."""
