"""`kivnun chat`: talk to the tuned model, in a terminal or in one turn from a script."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import click

from kivnun.cli.completion import run_folders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kivnun.data.template import ChatTokenizer
    from kivnun.model.generate import SamplingParams

Messages: TypeAlias = list[dict[str, str]]


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
@click.option("--json", "as_json", is_flag=True, help="With --once: print {reply, tokens, finish_reason} as one JSON object.")
def chat(
    run: Path, once: str | None, system: str | None, base: bool, temperature: float, top_p: float, max_new_tokens: int, seed: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Talk to the model of RUN. An empty line or Ctrl-D ends the conversation; /new forgets it.

    A run on chats goes on with the conversation; one on prompts or running text takes each line as a prompt of its own.
    """
    if as_json and once is None:
        raise click.UsageError("--json needs --once")
    from kivnun.cli.process import keep_freed_memory
    from kivnun.cli.screen import working

    keep_freed_memory()
    with working("loading the run"):
        from kivnun.model.generate import SamplingParams
        from kivnun.opened import open_run

        opened = open_run(run)
        params = SamplingParams(max_new_tokens, opened.tokenizer.stop_ids, temperature, top_p, seed)
        templated = opened.spec.data.format not in ("prompt_completion", "text") and opened.tokenizer.has_template
        talk = Talk(opened.base_model if base else opened.tuned, opened.tokenizer, params, templated)
    if system is not None and not templated:
        raise click.UsageError("--system needs a run on chats; this one was trained on plain prompts or text")
    opening = [] if system is None else [_message("system", system)]
    if once is not None:
        _answer_once(talk, [*opening, _message("user", once)], as_json)
    else:
        _converse(talk, opening)


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


def _answer_once(talk: Talk, messages: Messages, as_json: bool) -> None:
    from kivnun.cli.screen import print_json

    text, ids = talk.reply(messages, _ignore if as_json else _write)
    if as_json:
        reason = "length" if len(ids) == talk.params.max_new_tokens else "stop"
        print_json({"reply": text, "tokens": len(ids), "finish_reason": reason})
    else:
        _write("\n")


def _converse(talk: Talk, opening: Messages) -> None:
    messages = list(opening)
    while text := _next_line():
        if text == "/new":
            messages = list(opening)
            continue
        messages.append(_message("user", text))
        reply, _ = talk.reply(messages, _write)
        _write("\n")
        messages.append(_message("assistant", reply))


def _next_line() -> str:
    """Return what the user typed, without outer white space; "" at the end of the input."""
    try:
        return input("you> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise click.UsageError("stdin is not UTF-8") from None


def _message(role: str, content: str) -> dict[str, str]:
    """Return a message. Arguments that are not UTF-8 reach Python as lone surrogates, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise click.UsageError(f"the {role} message is not UTF-8")
    return {"role": role, "content": content}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(_text: str) -> None:
    """With --json the text is written once, whole."""
