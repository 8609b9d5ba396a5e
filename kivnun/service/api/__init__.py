"""The routes, a module for each kind of object. Paths are relative: `app.py` puts them under each dialect's."""
