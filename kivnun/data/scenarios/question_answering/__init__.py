"""The question scenario: answers that stand in a given passage. Start with `recipe.py`."""
