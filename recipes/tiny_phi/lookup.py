"""Looking up: tables, glossaries, records and passages whose facts are invented, so that the answer can only be read off.

Next: `entities.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from kivnun.data.scenarios.draws import Draws
from recipes.tiny_phi.chat import Task, chat
from recipes.tiny_phi.stocks import stock, stock_of_triples
from recipes.tiny_phi.words import ADJECTIVES, COLOURS, NOUNS, Words

FIELDS = stock("lookup.fields")
TABLE_FORMS = ("{} = {}", "{}: {}", "{} -> {}", "{} | {}", "{} - {}", "{}\t{}", "- {}: {}")
ASK_VALUE = stock("lookup.ask_value")
ASK_KEY = stock("lookup.ask_key")
INTRO = stock("lookup.intro")
PASSAGE_ASK = stock("lookup.passage_ask")
QUOTE_ASK = stock("lookup.quote_ask")
PLACE_FACTS = stock_of_triples("lookup.place_facts")
PERSON_FACTS = stock_of_triples("lookup.person_facts")


def table(draws: Draws, words: Words) -> str:
    """Return a conversation over one table of two columns: several questions, so that most of the reply tokens are look-ups."""
    size = draws.between(2, 4) if draws.chance(0.5) else draws.between(4, 9)
    keys = words.words(draws, size)
    kind = words.kind(draws)
    longest = 1 if size > 5 else draws.pick((1, 1, 2, 3))
    values = [" ".join(words.words(draws, longest, kind)) for _ in keys]
    form = draws.pick(TABLE_FORMS)
    text = "\n".join(form.format(key, value) for key, value in zip(keys, values, strict=True))
    intro = draws.pick(INTRO)
    tasks: list[Task] = []
    for place in draws.sample(range(len(keys)), min(len(keys), draws.between(1, 4))):
        backwards = draws.chance(0.25) and values.count(values[place]) == 1
        ask = draws.pick(ASK_KEY).format(values[place]) if backwards else draws.pick(ASK_VALUE).format(keys[place])
        tasks.append(Task(ask, keys[place] if backwards else values[place]))
    head = f"{intro}\n{text}" if intro else text
    if draws.chance(0.2):
        return chat(draws, tasks, system=head)
    first = Task(f"{head}\n{tasks[0].user}", tasks[0].reply)
    return chat(draws, [first, *tasks[1:]])


def record(draws: Draws, words: Words) -> str:
    """Return questions about one or two records of named fields."""
    fields = draws.sample(FIELDS, draws.between(3, 6))
    owners = words.words(draws, draws.pick((1, 1, 2)), "pseudo")
    blocks, asks = [], []
    for owner in owners:
        values = {name: _field_value(draws, words, name) for name in fields}
        joint = draws.pick(("\n", "; "))
        head = f"[{owner}]\n" if len(owners) > 1 else ""
        blocks.append(head + joint.join(f"{name}: {value}" for name, value in values.items()))
        for name, value in values.items():
            of = f" of {owner}" if len(owners) > 1 else ""
            form = draws.pick(
                (
                    "What is the {}{}?",
                    "{}{}?",
                    "Give the {}{}.",
                    "Find the field {}{}.",
                    "Value of {}{}:",
                    "The {}{}, please.",
                    "Read off the {}{}.",
                )
            )
            asks.append(Task(form.format(name, of), value))
    chosen = draws.sample(asks, draws.between(1, 4) if len(asks) > 3 else 1)
    text = "\n".join(blocks)
    return chat(draws, [Task(f"{text}\n{chosen[0].user}", chosen[0].reply), *chosen[1:]])


def passage(draws: Draws, words: Words) -> str:
    """Return two to five invented facts as running text with questions: short answers, and quotations of whole sentences."""
    facts = _facts(draws, words, draws.between(2, 3) if draws.chance(0.5) else draws.between(3, 5))
    joint = draws.pick((" ", " ", "\n"))
    text = joint.join(sentence for sentence, _, _, _ in facts)
    tasks: list[Task] = []
    for sentence, question, answer, subject in draws.sample(facts, min(len(facts), draws.between(1, 3))):
        if draws.chance(0.35):
            tasks.append(Task(draws.pick(QUOTE_ASK).format(subject if _once(text, subject) else answer), sentence))
        else:
            asked = draws.pick(PASSAGE_ASK).format(question)
            tasks.append(Task(asked[0].upper() + asked[1:], answer if draws.chance(0.8) else sentence))
    if draws.chance(0.12):
        tasks.append(_unanswerable(draws, words))
    if draws.chance(0.5):
        return chat(draws, [Task(f"{text}\n{tasks[0].user}", tasks[0].reply), *tasks[1:]])
    return chat(draws, [Task(f"{tasks[0].user}\n{text}", tasks[0].reply), *tasks[1:]])


def glossary(draws: Draws, words: Words) -> str:
    """Return a glossary of invented words given in the prompt, then a text to translate word by word with it."""
    source = words.words(draws, draws.between(3, 8), "pseudo")
    target = words.words(draws, len(source), draws.pick(("noun", "word", "hebrew", "hebrew_pseudo", "pieces")))
    pairs = list(zip(source, target, strict=False))
    form = draws.pick(TABLE_FORMS)
    text = "\n".join(form.format(left, right) for left, right in pairs)
    tasks = []
    for _ in range(draws.between(1, 3)):
        chosen = draws.sample(pairs, min(len(pairs), draws.short(4)))
        ask = draws.pick(
            (
                "Translate with the glossary: {}",
                "Use the glossary: {}",
                "Replace each word: {}",
                "Translate: {}",
                "Word by word: {}",
                "Look up each word: {}",
            )
        )
        tasks.append(Task(ask.format(" ".join(left for left, _ in chosen)), " ".join(right for _, right in chosen)))
    return chat(draws, [Task(f"{text}\n{tasks[0].user}", tasks[0].reply), *tasks[1:]])


def document(draws: Draws, words: Words) -> str:
    """Return one document of the look-up source."""
    make: Callable[[Draws, Words], str] = draws.pick((table, table, table, record, passage, passage, passage, glossary))
    return make(draws, words)


def _facts(draws: Draws, words: Words, count: int) -> list[tuple[str, str, str, str]]:
    """Return (sentence, question, answer, subject), no question twice."""
    about_places = draws.chance(0.5)
    subjects = [words.place(draws) if about_places else words.person(draws) for _ in range(draws.between(1, count))]
    found: dict[str, tuple[str, str, str, str]] = {}
    kinds: set[tuple[str, str]] = set()
    for _ in range(10 * count):
        if len(found) == count:
            break
        kind, sentence, question = draws.pick(PLACE_FACTS if about_places else PERSON_FACTS)
        subject = draws.pick(subjects)
        if (kind, subject) in kinds:
            continue
        kinds.add((kind, subject))
        answer = _answer(draws, words, kind)
        asked = question.format(subject)
        found[asked] = (sentence.format(subject, answer), asked, answer, subject)
    return list(found.values())


def _answer(draws: Draws, words: Words, kind: str) -> str:
    if kind in ("capital", "place", "neighbour"):
        return words.place(draws)
    if kind == "person":
        return words.person(draws)
    if kind == "organisation":
        return words.organisation(draws)
    if kind == "thing":
        return f"a {draws.pick(ADJECTIVES)} {draws.pick(NOUNS)}" if draws.chance(0.6) else f"the {words.pseudo(draws)}"
    if kind == "number":
        return f"{draws.between(2, 999)},{draws.below(1000):03d}" if draws.chance(0.5) else words.digits(draws, 1, 4)
    if kind == "code":
        return words.code(draws)
    if kind == "year":
        return str(draws.between(1100, 2020))
    if kind == "colour":
        return " and ".join(draws.sample(COLOURS, draws.pick((1, 1, 2))))
    if kind == "language":
        return words.pseudo(draws).capitalize() + draws.pick(("ish", "ian", "ese", "i", ""))
    return words.pseudo(draws).capitalize() if kind in ("river", "mountain") else words.pseudo(draws)


def _field_value(draws: Draws, words: Words, name: str) -> str:
    if name in ("name", "owner"):
        return words.person(draws)
    if name in ("city", "country"):
        return words.place(draws)
    if name in ("code", "number", "key", "price", "room", "level"):
        return words.code(draws)
    if name == "date":
        return f"{draws.pick(('spring', 'summer', 'autumn', 'winter'))} {draws.between(1900, 2020)}"
    return " ".join(words.words(draws, draws.pick((1, 2, 2))))


def _unanswerable(draws: Draws, words: Words) -> Task:
    subject = words.pseudo(draws).capitalize()
    asked = draws.pick(("What does the text say about {}?", "Who is {}?", "Where is {}?", "Quote the sentence about {}."))
    return Task(asked.format(subject), draws.pick(("The text does not say.", "Not in the text.")))


def _once(text: str, name: str) -> bool:
    return text.count(name) == 1
