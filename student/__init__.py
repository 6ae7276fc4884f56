"""From the store to a model: stream, alignment, losses, trainer and evaluation."""
