"""The document's table of scenarios by techniques, every cell measured. Start at `table.py`."""
