"""Benchmarks: side by side with a peer in one run, as ratios of CPU time. `python -m benchmarks` writes a dated file."""
