"""Recipes that make what the package ships. Run from the repository's root."""
