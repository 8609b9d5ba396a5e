"""The classification scenario: which language a line is in. Start with `recipe.py`."""
