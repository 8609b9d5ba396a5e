"""One file per revision, `NUMBER_what_it_does.py`; written by `scripts/migration.py`, then read by a person."""
