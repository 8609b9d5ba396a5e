"""The translation scenario: English values into Hebrew. Start with `recipe.py`."""
