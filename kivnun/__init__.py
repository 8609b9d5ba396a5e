"""Kivnun: fine-tunes language models, from a file of examples to a tuned model in use. Start reading at `pipeline.py`."""

__version__ = "0.1.0"
