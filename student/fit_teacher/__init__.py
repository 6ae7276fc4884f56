"""Fit a class head on a stored teacher, so that it answers in the dataset's classes."""
