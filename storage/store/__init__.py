"""The store: banks, targets and teachers at rest, and what proves that they are complete."""
