"""What a run will take before it is begun, and which one to begin: sizes, memory, time, advice. Loads no torch. Start with
`advise.py`."""
