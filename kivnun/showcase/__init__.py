"""Before and after fine-tuning, measured so that anybody can repeat it. Start with `run.py`."""
