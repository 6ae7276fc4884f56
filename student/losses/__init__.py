"""Losses: one small module a paper, each with its equation, shapes and reductions.

Each is a `student.losses.base.Loss`, listed in `student/losses/registry.py`. What a loss keeps of a step for later ones
goes into a `student.losses.parts.queue.Queue`. docs/adding-a-method.md adds one.
"""
