"""Scenarios: a task with its data, drawn from what every machine has. Start with `cldr.py`, the demo."""
