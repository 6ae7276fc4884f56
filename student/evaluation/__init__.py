"""Evaluations of a trained student: accuracy, frozen features, localisation, cost. Each by its own module."""
