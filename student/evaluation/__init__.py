"""Evaluations of a trained student: accuracy, frozen features, localization, cost. Each by its own module."""
