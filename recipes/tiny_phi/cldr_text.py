"""What CLDR knows, in nine languages: names of territories, languages and currencies, and values as each locale writes them.

Values (dates, amounts, measures, durations) come from the demo's own `draw_value`, training side only, and no row shows one value
in English and in Hebrew: that pairing is what the demo teaches. Names may pair, in other forms than the demo's. Questions whose
answer is a territory, language or currency use those of the training side. Next: `chats.py`.
"""

from __future__ import annotations

from functools import cache

from babel import Locale

from kivnun.data.scenarios.cldr import TOPICS, Value, draw_value, iso, render
from kivnun.data.scenarios.draws import Draws
from kivnun.data.splits import held_out
from recipes.tiny_phi.chat import Task, chat
from recipes.tiny_phi.stocks import stock

LOCALES = ("en", "fr", "de", "es", "it", "pt", "he", "ru", "ar")
WEIGHTED = ("en", "en", "en", "he", "he", "he", "fr", "de", "es", "it", "pt", "ru", "ar")
LANGUAGE_NAMES = {
    "en": "English",
    "fr": "French",
    "de": "German",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "he": "Hebrew",
    "ru": "Russian",
    "ar": "Arabic",
}
KINDS = ("territory", "territory", "language", "currency")
LIST_FORMS = ("{} = {}", "{}: {}", "{} - {}", "{} ({})", "{} / {}", "{} | {}")
ASK_NAME = stock("cldr_text.ask_name")
ASK_CODE = stock("cldr_text.ask_code")
ASK_ISO = stock("cldr_text.ask_iso")


@cache
def names(kind: str, locale: str) -> dict[str, str]:
    """Return code -> name for one kind of thing in one language; territories are countries, not regions."""
    data = Locale.parse(locale)
    table = {"territory": data.territories, "language": data.languages, "currency": data.currencies}[kind]
    length = {"territory": (2,), "language": (2, 3), "currency": (3,)}[kind]
    return {code: table[code] for code in sorted(table) if len(code) in length and len(table[code]) < 40}


def glossary(draws: Draws) -> str:
    """Return four to twelve names in two to four languages, as a list. All names: this is where they are learned."""
    kind = draws.pick(KINDS)
    locales = _some_locales(draws, draws.pick((2, 2, 2, 3, 4)))
    codes = [code for code in names(kind, locales[0]) if all(code in names(kind, locale) for locale in locales)]
    form, head = draws.pick(LIST_FORMS), draws.chance(0.7)
    lines = []
    for code in draws.sample(codes, draws.between(4, 12 // len(locales) + 3)):
        said = [names(kind, locale)[code] for locale in locales]
        lines.append(form.format(said[0], said[1]) + "".join(f" | {name}" for name in said[2:]))
        if draws.chance(0.1):
            lines[-1] = f"{code} {lines[-1]}"
    return (f"{kind} {'-'.join(locales)}\n" if head else "") + "\n".join(lines)


def codes(draws: Draws) -> str:
    """Return codes with their names in one language."""
    kind, locale = draws.pick(KINDS), draws.pick(WEIGHTED)
    table = names(kind, locale)
    form = draws.pick(LIST_FORMS)
    chosen = draws.sample(list(table), draws.between(4, 10))
    return f"{kind} {locale}\n" + "\n".join(form.format(code, table[code]) for code in chosen)


def name_chat(draws: Draws) -> str:
    """Return questions for names, in another language or by code; the subjects are of the training side."""
    tasks = []
    for _ in range(draws.between(1, 5)):
        kind = draws.pick(KINDS)
        source, target = _some_locales(draws, 2)
        code = draws.pick([c for c in names(kind, source) if c in names(kind, target) and not held_out(kind, c)])
        if draws.chance(0.75):
            ask = draws.pick(ASK_NAME).format(names(kind, source)[code], LANGUAGE_NAMES[target])
            tasks.append(Task(ask, names(kind, target)[code]))
        else:
            tasks.append(Task(draws.pick(ASK_CODE).format(code, kind), names(kind, "en").get(code, code)))
    return chat(draws, tasks)


def sheet(draws: Draws) -> str:
    """Return values in the neutral notation with the words of one language."""
    locale = draws.pick(WEIGHTED)
    topics = [draws.pick(TOPICS)] if draws.chance(0.4) else list(TOPICS)
    form = draws.pick(("{} = {}", "{}: {}", "{} -> {}", "{} | {}"))
    lines = []
    for _ in range(draws.between(3, 8)):
        value, said = _said(draws, draws.pick(topics), (locale,))
        lines.append(form.format(iso(value), said[0]))
    return f"locale {locale}\n" + "\n".join(lines)


def parallel(draws: Draws) -> str:
    """Return values in three languages, never English together with Hebrew."""
    locales = _some_locales(draws, 3)
    while {"en", "he"} <= set(locales):
        locales = _some_locales(draws, 3)
    topics = [draws.pick(TOPICS)] if draws.chance(0.4) else list(TOPICS)
    lines = []
    for _ in range(draws.between(1, 4)):
        _, said = _said(draws, draws.pick(topics), tuple(locales))
        lines.append("\n".join(f"{locale}: {text}" for locale, text in zip(locales, said, strict=True)))
    return draws.pick(("\n\n", "\n--\n")).join(lines)


def iso_chat(draws: Draws) -> str:
    """Return requests to write a value of the neutral notation in words."""
    locale = draws.pick(WEIGHTED)
    tasks = []
    for _ in range(draws.between(1, 4)):
        value, said = _said(draws, draws.pick(TOPICS), (locale,))
        tasks.append(Task(draws.pick(ASK_ISO).format(iso(value), LANGUAGE_NAMES[locale]), said[0]))
    return chat(draws, tasks)


def calendar(draws: Draws) -> str:
    """Return the months or weekdays of some languages."""
    width = draws.pick(("months", "days"))
    lines = []
    locales = _some_locales(draws, draws.between(1, 3))
    for locale in locales:
        data = Locale.parse(locale)
        table = data.months["format"]["wide"] if width == "months" else data.days["format"]["wide"]
        lines.append(f"{locale}: " + ", ".join(table[key] for key in sorted(table)))
    return "\n".join(lines)


def glossary_document(draws: Draws) -> str:
    return draws.pick((glossary, glossary, glossary, codes, name_chat, name_chat))(draws)


def values_document(draws: Draws) -> str:
    if draws.chance(0.02):
        return calendar(draws)
    return draws.pick((sheet, sheet, sheet, parallel, parallel, iso_chat))(draws)


def _some_locales(draws: Draws, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draws.pick(WEIGHTED)] = None
    return list(found)


def _said(draws: Draws, topic: str, locales: tuple[str, ...]) -> tuple[Value, list[str]]:
    """Return a value of the training side and its words in each language; values that one of them cannot say are drawn again."""
    while True:
        value = draw_value(topic, "train", draws.unit)
        said = [text for locale in locales if (text := render(value, locale)) is not None]
        if len(said) == len(locales):
            return value, said
