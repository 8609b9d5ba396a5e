"""The melody scenario: tunes in ABC notation. Start with `recipe.py`."""
