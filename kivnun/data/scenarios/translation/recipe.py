"""Machine translation: English dates, amounts, measures and durations into Hebrew, with CLDR as the authority.

The rows are those of `../cldr.py`, which the built-in base's corpus and the demo draw from too. The words are a closed list; what
is new in a held-out row is the combination. Next: `../question_answering/recipe.py`.
"""

from __future__ import annotations

from kivnun.data.scenarios.cldr import row, values
from kivnun.data.scenarios.scenario import Example, Row, chat
from kivnun.errors import DataError


def examples(split: str, count: int, seed: int) -> list[Example]:
    """Return rows with the four kinds of values in turn, no value twice."""
    return [Example(row(value), ((value.topic, value.name),)) for value in values(split, count, seed)]


def convert(record: Row) -> Row:
    """Return the row of a record {"source", "target", "language"}: a text, its translation, the target's name. Raises DataError."""
    parts = [record.get(key) for key in ("source", "target", "language")]
    if not all(isinstance(part, str) and part for part in parts):
        raise DataError("a record holds the strings 'source', 'target' and 'language', the name of the language to write in")
    source, target, language = map(str, parts)
    return chat(f"Write in {language}: {source}", target)
