"""The chat scenario: a persona that keeps to a format. Start with `recipe.py`."""
