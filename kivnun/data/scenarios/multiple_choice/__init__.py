"""A multiple-choice set that every machine can make: no download, split by topic. Start with `questions.py`."""
