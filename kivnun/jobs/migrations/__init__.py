"""The revisions of the tables, in `versions/`. One that was released is never changed. Next: `../migrate.py`."""
