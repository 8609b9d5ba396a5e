"""`kivnun chat`: talk to the tuned model, to its base, or to both at once, in a terminal or in one turn from a script."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import click

from kivnun.cli.completion import run_folders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kivnun.data.template import ChatTokenizer
    from kivnun.model.generate import SamplingParams

Messages: TypeAlias = list[dict[str, str]]

BASE, TUNED = "base", "tuned"
SPEAKERS = {"/base": (BASE,), "/tuned": (TUNED,), "/both": (BASE, TUNED)}
HELP = """\
/base, /tuned, /both   who answers from now on
/new                   forget the conversation
/system TEXT           begin anew with this system message; without a text with none
/help                  these lines
//...                  a message that begins with a slash
An empty line or Ctrl-D ends."""


class Sampler(Protocol):
    """What chat needs of a model: a trainee, or the bare base."""

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, on_token: Callable[[int, int], None] | None = None
    ) -> list[list[int]]: ...


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False), shell_complete=run_folders)
@click.option("--once", metavar="TEXT", help="Answer this one message on stdout and end.")
@click.option("--system", metavar="TEXT", help="A system message before the conversation.")
@click.option("--base", is_flag=True, help="Talk to the base, without the adapter.")
@click.option("--compare", is_flag=True, help="Ask base and tuned alike, and show both answers side by side.")
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens of this share.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="The longest reply.")
@click.option("--seed", type=int, default=0, show_default=True, help="The draws' seed, where the temperature is above 0.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="With --once: print {reply, tokens, finish_reason} as JSON; with --compare one for each.",
)
def chat(
    run: Path, once: str | None, system: str | None, base: bool, compare: bool, temperature: float, top_p: float,
    max_new_tokens: int, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Talk to the model of RUN. An empty line or Ctrl-D ends the conversation; /help lists what else there is.

    A run on chats goes on with the conversation; one on prompts or running text takes each line as a prompt of its own. Base and
    tuned share one model in memory, but for full tuning, whose result is a second one.
    """
    if as_json and once is None:
        raise click.UsageError("--json needs --once")
    if base and compare:
        raise click.UsageError("--compare asks the base too: leave --base out")
    from kivnun.cli.process import keep_freed_memory
    from kivnun.cli.screen import stderr, working

    keep_freed_memory()
    speakers = SPEAKERS["/both" if compare else "/base" if base else "/tuned"]
    with working("loading the run"):
        from kivnun.model.generate import SamplingParams
        from kivnun.opened import open_run

        opened = open_run(run)
        params = SamplingParams(max_new_tokens, opened.tokenizer.stop_ids, temperature, top_p, seed)
        templated = opened.trained_on_chats
        models: dict[str, Callable[[], Sampler]] = {BASE: lambda: opened.base_model, TUNED: lambda: opened.tuned}
        talks = Talks(models, opened.tokenizer, params, templated)
        for speaker in speakers:
            talks.of(speaker)
    if system is not None and not templated:
        raise click.UsageError("--system needs a run on chats; this one was trained on plain prompts or text")
    if compare and opened.is_full:
        stderr().print("every weight was trained: two models are in memory")
    opening = [] if system is None else [_message("system", system)]
    if once is not None:
        _answer_once(talks, speakers, [*opening, _message("user", once)], as_json)
    else:
        _Conversation(talks, speakers, opening).go_on()


@dataclass(slots=True)
class Talks:
    """Base and tuned, each made ready when it is first asked."""

    models: dict[str, Callable[[], Sampler]]
    tokenizer: ChatTokenizer
    params: SamplingParams
    templated: bool
    _made: dict[str, Talk] = field(default_factory=dict[str, "Talk"])

    def of(self, speaker: str) -> Talk:
        if speaker not in self._made:
            self._made[speaker] = Talk(self.models[speaker](), self.tokenizer, self.params, self.templated)
        return self._made[speaker]


@dataclass(frozen=True, slots=True)
class Talk:
    """A model with what it needs to answer. `templated`: the conversation is rendered as training rendered it; else the last
    message alone is the prompt, as it is."""

    model: Sampler
    tokenizer: ChatTokenizer
    params: SamplingParams
    templated: bool

    def reply(self, messages: Messages, write: Callable[[str], None]) -> tuple[str, list[int]]:
        """Return the reply's text and ids; `write` gets the text as it grows."""
        prompt = self.tokenizer.prompt_ids(messages) if self.templated else self.tokenizer.encode(messages[-1]["content"])
        if not prompt:
            raise click.UsageError("the prompt is empty: nothing would predict the first token")
        stream = self.tokenizer.stream_decoder()
        pieces: list[str] = []

        def take(text: str) -> None:
            pieces.append(text)
            write(text)

        ids = self.model.sample([prompt], self.params, lambda _row, token: take(stream.push(token)))[0]
        take(stream.finish())
        return "".join(pieces), ids


def _answer_once(talks: Talks, speakers: Sequence[str], messages: Messages, as_json: bool) -> None:
    from kivnun.cli.columns import shown
    from kivnun.cli.screen import print_json, stdout

    if not as_json:
        with shown(speakers, stdout()) as show:
            for speaker in speakers:
                talks.of(speaker).reply(messages, _to(show, speaker))
        return
    answers: dict[str, dict[str, object]] = {}
    for speaker in speakers:
        text, ids = talks.of(speaker).reply(messages, _ignore)
        reason = "length" if len(ids) == talks.params.max_new_tokens else "stop"
        answers[speaker] = {"reply": text, "tokens": len(ids), "finish_reason": reason}
    print_json(answers if len(speakers) > 1 else answers[speakers[0]])


class _Conversation:
    """A conversation with one or both: each goes on from its own replies, and hears what was said while it answered."""

    def __init__(self, talks: Talks, speakers: tuple[str, ...], opening: Messages) -> None:
        self._talks, self._speakers, self._opening = talks, speakers, opening
        self._messages: dict[str, Messages] = {}

    def go_on(self) -> None:
        """Answer line after line until an empty one or the end of the input."""
        while text := _next_line():
            if text.startswith("/") and not text.startswith("//"):
                self._obey(text)
            else:
                self._answer(text.removeprefix("/") if text.startswith("//") else text)

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in SPEAKERS:
            self._speakers = SPEAKERS[word]
        elif word == "/new":
            self._messages.clear()
        elif word == "/system":
            self._begin_with(rest.strip())
        elif word == "/help":
            _tell(HELP)
        else:
            _tell(f"there is no command {word}; there are {', '.join((*SPEAKERS, '/new', '/system TEXT', '/help'))}")

    def _begin_with(self, system: str) -> None:
        if not self._talks.templated:
            _tell("/system needs a run on chats; this one was trained on plain prompts or text")
            return
        self._opening = [_message("system", system)] if system else []
        self._messages.clear()

    def _answer(self, text: str) -> None:
        from kivnun.cli.columns import shown
        from kivnun.cli.screen import stdout

        with shown(self._speakers, stdout()) as show:
            for speaker in self._speakers:
                messages = self._messages.setdefault(speaker, list(self._opening))
                messages.append(_message("user", text))
                reply, _ = self._talks.of(speaker).reply(messages, _to(show, speaker))
                messages.append(_message("assistant", reply))


def _to(show: Callable[[str, str], None], speaker: str) -> Callable[[str], None]:
    return lambda text: show(speaker, text)


def _next_line() -> str:
    """Return what the user typed, without outer white space; "" at the end of the input."""
    try:
        return input("you> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise click.UsageError("stdin is not UTF-8") from None


def _tell(text: str) -> None:
    from kivnun.cli.screen import stderr

    stderr().print(text)


def _message(role: str, content: str) -> dict[str, str]:
    """Return a message. Arguments that are not UTF-8 reach Python as lone surrogates, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise click.UsageError(f"the {role} message is not UTF-8")
    return {"role": role, "content": content}


def _ignore(_text: str) -> None:
    """With --json the text is written once, whole."""
