"""Kivnun's LoRA engine beside what a user would pick instead: `python -m benchmarks.engine`. Start reading in `cases.py`."""
