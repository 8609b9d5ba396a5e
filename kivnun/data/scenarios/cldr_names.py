"""Names of territories, languages and currencies as CLDR (Babel) has them, by language and by side of the split.

Next: the recipes that ask for them: `classification/`, `entities/`, `question_answering/`.
"""

from __future__ import annotations

from functools import cache

from babel import Locale

from kivnun.data.splits import wanted

KINDS = ("territory", "language", "currency")
LONGEST = 32
NO_COUNTRIES = {"EU", "EZ", "UN", "ZZ", "QO", "XA", "XB"}
_LENGTHS = {"territory": (2,), "language": (2, 3), "currency": (3,)}


@cache
def names(kind: str, locale: str) -> dict[str, str]:
    """Return code -> name for one kind of thing, in one language; territories are countries, not regions."""
    data = Locale.parse(locale)
    table: dict[str, str] = dict({"territory": data.territories, "language": data.languages, "currency": data.currencies}[kind])
    usable = (code for code in sorted(table) if len(code) in _LENGTHS[kind] and code not in NO_COUNTRIES)
    return {code: table[code] for code in usable if len(table[code]) <= LONGEST and "(" not in table[code]}


@cache
def codes(kind: str, split: str, *locales: str) -> tuple[str, ...]:
    """Return the codes of one side that have a name in all these languages."""
    tables = [names(kind, locale) for locale in locales]
    return tuple(code for code in tables[0] if wanted(kind, code, split) and all(code in table for table in tables))
