"""The planner's laws beside what runs take: `python -m benchmarks.plan`. Start with `cases.py`."""
