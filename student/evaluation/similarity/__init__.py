"""Similarity of students to a teacher: attention divergence and CKA."""
