"""Copying: repeat, quote, spell, reverse and pick words that nobody could guess. The skill that everything else stands on.

Short strings come many times and long ones seldom, so that the easy case is learned first. Random text costs loss that no model
can avoid, so each string is used more than once. Next: `lookup.py`.
"""

from __future__ import annotations

from kivnun.data.scenarios.draws import Draws
from recipes.tiny_phi.chat import Task, chat, conversation
from recipes.tiny_phi.stocks import stock, stock_of_pairs
from recipes.tiny_phi.words import Words

REPEAT = stock("copying.repeat")
TWICE = stock("copying.twice")
UPPER = stock("copying.upper")
LOWER = stock("copying.lower")
WRAP = stock_of_pairs("copying.wrap")
NTH = ("first", "second", "third", "fourth", "fifth", "sixth")
PICK_WORD = stock("copying.pick_word")
REVERSE = stock("copying.reverse")
SPELL = stock("copying.spell")
AFTER = stock("copying.after")
EXAMPLES = stock_of_pairs("copying.examples")


def span(draws: Draws, words: Words, longest: int = 12) -> str:
    """Return words of one kind, or a mixture, as one line."""
    count = draws.short(longest)
    if draws.chance(0.12):
        return " ".join(words.word(draws, words.kind(draws)) for _ in range(count))
    line = words.words(draws, count)
    if draws.chance(0.15):
        line = [word.capitalize() for word in line]
    joint = draws.pick((" ", " ", " ", " ", ", ", " / ", "-"))
    return joint.join(line) + (draws.pick(".!") if draws.chance(0.08) else "")


def task(draws: Draws, words: Words) -> Task:
    """Return one copying task. Plain repeating is every second one."""
    if draws.chance(0.5):
        text = span(draws, words)
        return Task(draws.pick(REPEAT).format(text), text)
    make = draws.pick((_twice, _case, _wrap, _nth, _nth, _reverse, _spell, after, after, _lines))
    return make(draws, words)


def pattern(draws: Draws, words: Words) -> str:
    """Return a few-shot document: one small rule over new words each time, as lines or as a chat whose last turn answers."""
    rule = draws.pick(("same", "same", "same", "upper", "first", "last", "twice", "swap", "quote", "plus", "drop"))
    kind = words.kind(draws)
    if rule == "upper" and kind in ("hebrew", "hebrew_pseudo"):
        rule = "same"
    count = draws.pick((1, 1, 2, 2, 3)) if rule in ("same", "upper", "quote", "plus") else draws.pick((2, 2, 3))
    constant = draws.pick(words.english)
    pairs = []
    for _ in range(draws.between(3, 7)):
        line = words.words(draws, count, kind)
        pairs.append((" ".join(line), _apply(rule, line, constant)))
    if draws.chance(0.5):
        left, right = draws.pick(EXAMPLES)
        return "\n".join(f"{left}: {a}\n{right}: {b}" for a, b in pairs)
    return chat(draws, [Task(a, b) for a, b in pairs])


def repeats(draws: Draws, words: Words) -> str:
    """Return a line of random words written two to four times, with nothing else: pure induction."""
    kind = draws.pick(("pieces", "pieces", "pseudo", "word", "hebrew_pseudo", "hebrew", "code", "noun"))
    line = " ".join(words.words(draws, draws.between(2, 14), kind))
    copies = draws.between(2, 4) if len(line) < 90 else 2
    return draws.pick(("\n", "\n", " | ", " ", "\n\n")).join([line] * copies)


def document(draws: Draws, words: Words) -> str:
    """Return one document of the copying source."""
    kind = draws.unit()
    if kind < 0.2:
        return repeats(draws, words)
    if kind < 0.35:
        return pattern(draws, words)
    if kind < 0.5:
        return same_text(draws, words)
    return conversation(draws, lambda d: task(d, words))


def same_text(draws: Draws, words: Words) -> str:
    """Return one conversation about one string: every turn copies it, or a part of it, again."""
    line = words.words(draws, draws.between(2, 7))
    text = " ".join(line)
    place = draws.below(min(len(line), len(NTH)))
    asks = [
        Task(draws.pick(REPEAT).format(text), text),
        Task(
            draws.pick(
                (
                    "Again.",
                    "Once more.",
                    "Repeat it.",
                    "Say it again.",
                    "Copy it again.",
                    "And again?",
                    "Same again.",
                    "One more time.",
                    "שוב.",
                    "Again, please.",
                )
            ),
            text,
        ),
        Task(f"The {NTH[place]} word?", line[place]),
        Task(draws.pick(("The last word?", "Which word is last?", "Only the last word.", "Last one?")), line[-1]),
        Task(draws.pick(("In quotes.", "With quotation marks.", "Now quote it.")), f'"{text}"'),
        Task(draws.pick(("Backwards.", "In reverse order.", "Now the other way round.")), " ".join(reversed(line))),
    ]
    return chat(draws, [asks[0], *draws.sample(asks[1:], draws.between(1, 3))])


def _twice(draws: Draws, words: Words) -> Task:
    text = span(draws, words, 6)
    return Task(draws.pick(TWICE).format(text), f"{text}\n{text}")


def _case(draws: Draws, words: Words) -> Task:
    text = " ".join(words.words(draws, draws.short(4), draws.pick(("word", "noun", "pseudo"))))
    return (
        Task(draws.pick(UPPER).format(text), text.upper())
        if draws.chance(0.5)
        else Task(draws.pick(LOWER).format(text.upper()), text)
    )


def _wrap(draws: Draws, words: Words) -> Task:
    text = span(draws, words, 6)
    ask, form = draws.pick(WRAP)
    return Task(ask.format(text), form.format(text))


def _nth(draws: Draws, words: Words) -> Task:
    line = words.words(draws, draws.between(2, 6))
    place = draws.below(len(line))
    name = "last" if place == len(line) - 1 and draws.chance(0.6) else NTH[place]
    return Task(draws.pick(PICK_WORD).format(name, draws.pick((" ", ", ")).join(line)), line[place])


def _reverse(draws: Draws, words: Words) -> Task:
    line = words.words(draws, draws.between(2, 6))
    joint = draws.pick((" ", ", "))
    return Task(draws.pick(REVERSE).format(joint.join(line)), joint.join(reversed(line)))


def _spell(draws: Draws, words: Words) -> Task:
    word = words.word(draws, draws.pick(("noun", "word", "pseudo", "hebrew")))
    return Task(draws.pick(SPELL).format(word), "-".join(word))


def after(draws: Draws, words: Words) -> Task:
    line = words.words(draws, draws.between(3, 9))
    place = draws.below(len(line) - 1)
    return Task(draws.pick(AFTER).format(" ".join(line), line[place]), line[place + 1])


def _lines(draws: Draws, words: Words) -> Task:
    lines = [" ".join(words.words(draws, draws.between(1, 4))) for _ in range(draws.between(2, 4))]
    place = draws.below(len(lines))
    name = "last" if place == len(lines) - 1 and draws.chance(0.5) else NTH[place]
    ask = draws.pick(
        (
            "Copy the {} line.",
            "Write the {} line only.",
            "What does the {} line say?",
            "Repeat line number {}.",
            "Give me the {} line.",
        )
    )
    if "number" in ask:
        name = str(place + 1)
    text = "\n".join(lines)
    question = ask.format(name)
    return Task(f"{question}\n{text}" if draws.chance(0.5) else f"{text}\n{question}", lines[place])


def _apply(rule: str, line: list[str], constant: str) -> str:
    text = " ".join(line)
    results = {
        "same": text,
        "upper": text.upper(),
        "first": line[0],
        "last": line[-1],
        "twice": f"{text} {text}",
        "swap": " ".join(reversed(line)),
        "quote": f'"{text}"',
        "plus": f"{text} {constant}",
        "drop": " ".join(line[1:]),
    }
    return results[rule]
