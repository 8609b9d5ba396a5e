"""How quick the hosted service is while it works: `python -m benchmarks.service`. Next: `__main__.py`, `measure.py`."""
