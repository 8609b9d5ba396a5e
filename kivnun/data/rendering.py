"""Chat templates: from messages to text, in a sandbox, with what templates written for transformers expect to find.

A template is a small program that comes with a base, so it runs in Jinja's immutable sandbox and whatever goes wrong inside it
is reported as a sentence. The environment follows transformers 5.23's `utils/chat_template_utils.py` (functions, filters, tags
and block trimming), so that the text is the same, character for character; `tests/parity/test_template_parity.py` holds it to
that. Next: `tokenizer.py` (text to ids), `template.py` (which of the text is trained).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from kivnun.errors import BaseModelError, DataError

Message = Mapping[str, Any]

# A date that never moves: a template that prints today's date would otherwise give a resumed run other token ids than the run it
# resumes. The value is the one Llama 3.1's template falls back to when it is given no clock.
PINNED_DATE = datetime(2024, 7, 26)

# A template may come from anywhere, and is run where others wait: what it writes has an end, and so has its counting.
MAX_LETTERS = 64 << 20
MAX_TURNS = 1_000_000

# Names a message's reasoning goes by. Templates read the first; older data writes the others.
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One compiled template. `uses_clock` says whether it asks for the date.

    `variables` are the special tokens by name; `now` is the only clock a template sees. Raises BaseModelError where the source
    is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str], now: datetime = PINNED_DATE) -> None:
        self.source = source
        self.now = now
        self.uses_clock = "strftime_now" in source
        self._variables = dict(variables)
        try:
            self._compiled = _environment(now).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BaseModelError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
                hint="give a working template with data.template",
            ) from None

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, *, add_generation_prompt: bool) -> str:
        """Return the text of a conversation. Raises DataError with the template's own message where it refuses or fails."""
        try:
            pieces = self._compiled.generate(
                messages=[_plain_message(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                range=_Ranges(),
                **self._variables,
            )
            return "".join(_capped(pieces))
        except Exception as error:
            # The template is a program from outside: any exception in it is a fact about the row or the template.
            raise DataError(f"the chat template refuses this conversation: {error}", hint=_RENDER_HINT) from None


class _Ranges:
    """`range` for one rendering, with an end: loops within loops of it count together."""

    def __init__(self) -> None:
        self._left = MAX_TURNS

    def __call__(self, *bounds: int) -> range:
        made = range(*bounds)
        self._left -= len(made)
        if self._left < 0:
            raise jinja2.TemplateError(f"it counts further than {MAX_TURNS:,}")
        return made


def _capped(pieces: Iterable[str]) -> Iterator[str]:
    """Yield what a template writes, up to MAX_LETTERS."""
    letters = 0
    for piece in pieces:
        letters += len(piece)
        if letters > MAX_LETTERS:
            raise jinja2.TemplateError(f"it writes more than {MAX_LETTERS:,} letters")
        yield piece


_RENDER_HINT = "change the row to what the template allows, or give another template with data.template"


def _plain_message(message: Message) -> dict[str, Any]:
    """Return what a template is shown of a message: no `weight` (ours), no null fields, the reasoning under its usual names."""
    plain = {key: value for key, value in message.items() if value is not None and key != "weight"}
    reasoning = next((plain[name] for name in _REASONING_NAMES if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _environment(now: datetime) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    # Jinja's own annotation of these two dictionaries is incomplete.
    environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=now.strftime, dict=_Dict(), namespace=_Namespace)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML; a model must see them as they are.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}...{% endgeneration %}` and renders what is inside.

    Where masks come from is `template.py`, with or without the tag; many templates lack it or place it wrongly.
    """

    tags = {"generation"}  # noqa: RUF012 (the name and type that Jinja reads)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers, so that variables set inside stay inside.
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class _Dict:
    """The `dict` that templates may call; the class itself would open a way out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, without names that begin with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        values: dict[Any, Any] = dict(*args, **kwargs)
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)
