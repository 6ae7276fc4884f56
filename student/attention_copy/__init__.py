"""Attention copy: a student that attends with its teacher's attention."""
