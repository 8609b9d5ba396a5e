"""The command line. Start at `main.py`; one file per command, `failure.py` for what goes wrong, `screen.py` for what is shown."""
