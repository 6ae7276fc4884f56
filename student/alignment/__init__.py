"""Alignment: which layers, heads, patches and tokens of teacher and student meet."""
