"""The recipe of `kivnun/tiny-phi`, the built-in base. Start with `build.py`, which runs every stage in order."""
