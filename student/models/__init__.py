"""Models: making, initializing, saving and loading students."""
