"""The entity scenario: names and values of a text as character spans. Start with `recipe.py`."""
