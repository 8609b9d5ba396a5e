"""`python -m recipes.tiny_phi`: make the built-in base."""

from recipes.tiny_phi.build import build

build()
