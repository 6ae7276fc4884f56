"""Recipes as YAML files, and their loader."""
