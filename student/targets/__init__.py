"""Stored targets: what a recipe needs of a store, and which targets fit."""
