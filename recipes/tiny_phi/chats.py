"""Talk: greetings, personas with a fixed manner of answering, formats that a system line asks for, polite closings.

Personas and the names people give are of the training side. Next: `melodies.py`.
"""

from __future__ import annotations

from kivnun.data.scenarios.draws import Draws
from kivnun.data.splits import held_out
from recipes.tiny_phi.chat import Turn, render_chat
from recipes.tiny_phi.stocks import stock, stock_of_pairs
from recipes.tiny_phi.words import ADJECTIVES, COLOURS, HEBREW_NAMES, NOUNS, VERBS, Words

TRADES = stock("chats.trades")
MANNERS = ("old", "young", "patient", "cheerful", "strict", "shy", "proud", "sleepy", "curious", "polite")
OPENINGS = stock("chats.openings")
CLOSINGS = stock("chats.closings")
GREET = stock("chats.greet")
GREET_BACK = stock("chats.greet_back")
THANKS = stock("chats.thanks")
WELCOME = ("You are welcome!", "Glad to help.", "Any time.", "My pleasure.")
BYE = stock("chats.bye")
BYE_BACK = ("Goodbye!", "See you soon!", "Take care!", "Have a nice day!")
NAME_SAY = stock("chats.name_say")
NAME_BACK = ("Nice to meet you, {}.", "Hello {}, how can I help?", "Good to know, {}.", "Welcome, {}!")
NAME_ASK = stock("chats.name_ask")
NAME_TELL = ("Your name is {}.", "You are {}.", "You told me that your name is {}.", "{}.")
LIKES_SAY = stock("chats.likes_say")
LIKES_ASK = stock("chats.likes_ask")
QUESTIONS = stock("chats.questions")
FORMATS = stock_of_pairs("chats.formats")


def personas() -> tuple[str, ...]:
    """Return the personas of the training side: a manner and a trade."""
    names = (f"{manner} {trade.lower()}" for manner in MANNERS for trade in TRADES)
    return tuple(name for name in names if not held_out("persona", name))


PERSONAS = personas()


def small_talk(draws: Draws, words: Words) -> str:
    """Return a conversation that remembers: a name or a thing is said, and asked for some turns later."""
    turns: list[Turn] = []
    name = draws.pick(HEBREW_NAMES) if draws.chance(0.1) else words.person(draws)
    thing = f"a {draws.pick(ADJECTIVES)} {draws.pick(NOUNS)}" if draws.chance(0.7) else f"the {words.pseudo(draws)}"
    if draws.chance(0.5):
        turns += _turn(draws.pick(GREET), draws.pick(GREET_BACK))
    if draws.chance(0.7):
        turns += _turn(draws.pick(NAME_SAY).format(name), draws.pick(NAME_BACK).format(name))
        if draws.chance(0.5):
            turns += _turn(draws.pick(LIKES_SAY).format(thing), f"You said: {thing}. I will remember it.")
        turns += _turn(draws.pick(NAME_ASK), draws.pick(NAME_TELL).format(name))
    else:
        turns += _turn(draws.pick(LIKES_SAY).format(thing), draws.pick(("I see.", "Good to know.", "I will remember that.")))
        turns += _turn(draws.pick(LIKES_ASK), f"You mentioned {thing}.")
    return render_chat(turns + _end(draws))


def persona(draws: Draws, words: Words) -> str:
    """Return a persona that opens and closes every answer its own way, and answers from the little that its system line says."""
    who = draws.pick(PERSONAS)
    name, place = words.person(draws), words.place(draws)
    opening, closing = draws.pick(OPENINGS), draws.pick(CLOSINGS)
    thing, colour = f"a {draws.pick(ADJECTIVES)} {draws.pick(NOUNS)}", draws.pick(COLOURS)
    manner = draws.pick(
        (
            f'Begin every answer with "{opening}" and end it with "{closing}"',
            f'Always start with "{opening}" and finish with "{closing}"',
            f'Your answers open with "{opening}" and close with "{closing}"',
            f'Say "{opening}" first and "{closing}" last.',
        )
    )
    turns: list[Turn] = [("system", f"You are {name}, a {who} in {place}. You have {thing}. {manner}")]
    answers = {
        "Who are you?": f"I am {name}, a {who}.",
        "What do you do?": f"I am a {who}.",
        "Where do you live?": f"I live in {place}.",
        "What do you have?": f"I have {thing}.",
        "What is your name?": f"My name is {name}.",
        "Where are you?": f"I am in {place}.",
        "Tell me about yourself.": f"I am {name} and I live in {place}.",
        f"Do you like {colour}?": f"Yes, I like {colour}.",
        "What is with you?": f"With me is {thing}.",
    }
    for question in draws.sample(list(answers), draws.between(1, 4)):
        turns += _turn(question, f"{opening} {answers[question]} {closing}")
    return render_chat(turns)


def formatted(draws: Draws, words: Words) -> str:
    """Return questions about a text given in the prompt, answered in the format that the system line asks for."""
    opening, closing = draws.pick(OPENINGS), draws.pick(CLOSINGS)
    rule, form = draws.pick(FORMATS)
    turns: list[Turn] = [("system", rule.format(open=opening, close=closing))]
    for _ in range(draws.between(1, 3)):
        word, other = words.words(draws, 2, draws.pick(("noun", "word", "pseudo")))
        subject = draws.pick(NOUNS)
        text = f"The {subject} is next to the {word}."
        question = draws.pick(("What is next to it?", f"What stands next to the {subject}?", "What do you see?"))
        asked = f"Next to the {subject} there is a {word}, then a {other}. {question}"
        turns += _turn(asked, form.format(word=word, other=other, text=text, upper=text.upper(), open=opening, close=closing))
    return render_chat(turns)


def story(draws: Draws, words: Words) -> str:
    """Return a request for a sentence with given words, and the sentence."""
    one, two = draws.sample(NOUNS, 2)
    adjective = draws.pick(ADJECTIVES)
    ask = draws.pick(
        (
            "Write a sentence with {} and {}.",
            "Make a sentence: {}, {}.",
            "Use {} and {} in a sentence.",
            "Tell me something about a {} and a {}.",
            "A line with {} and {}, please.",
            "Sentence with the words {}, {}?",
            "Put {} and {} in one sentence.",
            "Say something with {} and {}.",
        )
    )
    reply = draws.pick(
        (
            f"The {one} {draws.pick(VERBS)} the {adjective} {two}.",
            f"A {adjective} {one} was next to the {two}.",
            f"We saw a {one} and a {adjective} {two}.",
            f"There is a {one} behind the {two}.",
        )
    )
    return render_chat(_turn(ask.format(one, two), reply) + _end(draws))


def document(draws: Draws, words: Words) -> str:
    return draws.pick((small_talk, small_talk, persona, persona, formatted, story))(draws, words)


def _turn(user: str, reply: str) -> list[Turn]:
    return [("user", user), ("assistant", reply)]


def _end(draws: Draws) -> list[Turn]:
    turns: list[Turn] = []
    if draws.chance(0.3):
        turns += _turn(draws.pick(THANKS), draws.pick(WELCOME))
    if draws.chance(0.2):
        turns += _turn(draws.pick(BYE), draws.pick(BYE_BACK))
    return turns
