"""The domain scenario: NumPy's documentation as running text. Start with `recipe.py`."""
