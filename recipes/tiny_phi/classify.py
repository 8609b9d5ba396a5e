"""Choosing a label among listed ones, by a definition, by a key word or by the examples before. Next: `cldr_text.py`."""

from __future__ import annotations

from kivnun.data.scenarios.draws import Draws
from recipes.tiny_phi.chat import Task, chat
from recipes.tiny_phi.stocks import stock
from recipes.tiny_phi.words import ADJECTIVES, NOUNS, VERBS, Words

TOPIC_WORDS = {
    "food": "apple bread cheese cook dinner fish hungry kitchen lunch meal milk orange oven pepper rice salt soup sugar tasty wine",
    "weather": "cloud cold fog frost heat ice rain snow storm sunny temperature thunder warm wet wind windy winter",
    "travel": "airport bus flight hotel journey luggage map passport road ship station ticket tour train trip",
    "money": "bank bill cash coin cost dollar invoice loan pay price rent salary tax wallet",
    "sport": "ball coach game goal match medal player race referee run score swim team tennis win",
    "music": "band choir concert drum guitar melody note opera piano rhythm sing song tune violin",
    "school": "book class exam homework lesson pencil pupil read student study teacher write",
    "garden": "bee bush dig flower grass leaf plant rose seed soil spade tree water",
    "health": "ache bandage cough doctor fever hospital medicine nurse pain pill sick sleep",
    "computer": "code file keyboard memory network password program screen server software",
}
TOPIC_LISTS = {topic: text.split() for topic, text in TOPIC_WORDS.items()}
FRAMES = stock("classify.frames")
ASKS = stock("classify.asks")


def topic_sentence(draws: Draws) -> tuple[str, str]:
    """Return (sentence, topic): the sentence holds a word or two of the topic."""
    topic = draws.pick(list(TOPIC_LISTS))
    text = draws.pick(FRAMES).replace("{adj}", draws.pick(ADJECTIVES)).replace("{verb}", draws.pick(VERBS))
    return text.format(*draws.sample(TOPIC_LISTS[topic], 2)), topic


def by_topic(draws: Draws, words: Words) -> str:
    """Return sentences to be labelled with one of the listed topics."""
    rows = [topic_sentence(draws) for _ in range(draws.between(1, 4))]
    extra = draws.sample(list(TOPIC_LISTS), 3)
    options = draws.shuffled(list(dict.fromkeys([topic for _, topic in rows] + extra)))
    ask = f"{draws.pick(ASKS)} Options: {', '.join(options)}"
    if draws.chance(0.4):
        return chat(draws, [Task(text, topic) for text, topic in rows], system=ask)
    return chat(draws, [Task(f"{ask}\n{text}", topic) for text, topic in rows[:2]])


def by_definition(draws: Draws, words: Words) -> str:
    """Return items to be put in invented classes that are defined in the prompt by their members."""
    labels = words.words(draws, draws.between(2, 4), draws.pick(("pseudo", "noun", "code")))
    topics = draws.sample(list(TOPIC_LISTS), len(labels))
    members = [draws.sample(TOPIC_LISTS[topic], draws.between(3, 5)) for topic in topics]
    text = "\n".join(f"{label}: {', '.join(group)}" for label, group in zip(labels, members, strict=True))
    tasks = []
    for _ in range(draws.between(1, 4)):
        place = draws.below(len(labels))
        ask = draws.pick(("Which class has {}?", "{}?", "Label for {}:", "Where does {} belong?", "Class of {}?", "Sort {}."))
        tasks.append(Task(ask.format(draws.pick(members[place])), labels[place]))
    return chat(draws, [Task(f"{text}\n{tasks[0].user}", tasks[0].reply), *tasks[1:]])


def by_examples(draws: Draws, words: Words) -> str:
    """Return a few-shot document: two invented labels for two rules that can be seen in the examples."""
    one, two = words.words(draws, 2, draws.pick(("pseudo", "noun", "code", "hebrew")))
    rule = draws.pick(("script", "digit", "upper", "length", "topic", "topic"))
    topics = draws.sample(list(TOPIC_LISTS), 2)
    rows = []
    for _ in range(draws.between(5, 10)):
        first = draws.chance(0.5)
        rows.append((_example(draws, words, rule, topics[0 if first else 1], first), one if first else two))
    if draws.chance(0.5):
        return "\n".join(f"{text} -> {label}" for text, label in rows)
    return chat(draws, [Task(text, label) for text, label in rows])


def document(draws: Draws, words: Words) -> str:
    return draws.pick((by_topic, by_definition, by_definition, by_examples))(draws, words)


def _example(draws: Draws, words: Words, rule: str, topic: str, first: bool) -> str:
    if rule == "topic":
        return draws.pick(TOPIC_LISTS[topic])
    if rule == "script":
        return draws.pick(NOUNS) if first else words.hebrew_pseudo(draws)
    if rule == "digit":
        return words.digits(draws, 2, 4) if first else draws.pick(NOUNS)
    if rule == "upper":
        return draws.pick(NOUNS).upper() if first else draws.pick(NOUNS)
    return " ".join(words.words(draws, 1 if first else 3, "noun"))
