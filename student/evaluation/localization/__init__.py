"""Localization: how well attention finds the object in a box."""
