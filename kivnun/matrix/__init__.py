"""The table of scenarios by techniques, measured. Start with `matrix.py`."""
