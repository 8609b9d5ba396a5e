"""Which topics are held out of all training: one rule for the pretraining corpus, the scenarios and their tests.

A topic is held out when a hash of its kind and name falls in the lowest tenth. The rule needs no list of topics, so it holds for
topics that nobody has thought of yet (a module of a later Python, a date of another century), and it has no seed: changing a run's
seed can never move a test topic into training. Whoever draws training text asks `held_out` first and draws again.
Next: `scenarios/cldr.py`, which draws both sides of the split.
"""

from __future__ import annotations

import hashlib

HELD_OUT_BUCKETS = 1_000
"""Of 10,000 hash buckets: 10 %."""

KINDS: dict[str, str] = {
    "module": "a top-level module or package of the standard library, as imported: json; of another, its path: numpy.linalg",
    "date": "a day in ISO 8601: 2024-08-03",
    "amount": "a number and its ISO 4217 code: 1234.50 USD",
    "unit": "a number and CLDR's unit name: 12 length-kilometer",
    "duration": "two numbers with their units: 3 hour 12 minute",
    "territory": "an ISO 3166 code: IL",
    "language": "a language code of CLDR: he",
    "currency": "an ISO 4217 code: ILS",
    "person": "a name as written: Maro Teslin",
    "persona": "the name of a chat persona: Lighthouse keeper",
    "melody": "key and meter of a tune: Gmaj 6/8",
    "title": "the title of a tune: The Quiet Harbour",
    "combination": "a list of topics in their order, joined by '+': FR+IL+JP",
}
"""Every kind of topic, with how its name is written. One spelling per topic, or the two spellings hash apart."""


def held_out(kind: str, topic: str) -> bool:
    """Return whether `topic` belongs to the test side, for ever: a pure function of its two arguments.

    `kind` is a key of KINDS: an unknown kind is our own mistake, since a misspelt one would silently split differently.
    """
    assert kind in KINDS, f"unknown kind of topic: {kind!r}"
    digest = hashlib.blake2b(f"{kind}\x00{topic}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 10_000 < HELD_OUT_BUCKETS


def wanted(kind: str, topic: str, split: str) -> bool:
    """Return whether `topic` may be used on this side; `split` is "train" or "test"."""
    assert split in ("train", "test"), f"unknown split: {split!r}"
    return held_out(kind, topic) == (split == "test")
