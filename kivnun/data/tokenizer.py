"""Text and token ids, with no model library: a base folder's `tokenizer.json` and the special tokens around it.

`Tokenizer` turns text into ids as transformers does and back, and can go on from ids that are there already (`extend`): what
comes before is never touched, so the ids of a prompt are the first ids of every row that begins with it. `StreamDecoder` turns
ids into text as they arrive. Next: `template.py` (conversations to rows with masks).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers

from kivnun.errors import BaseModelError, DataError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A base's tokenizer. `special_tokens` maps names such as `eos_token` to their text, as templates see them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._raw = _read_bytes(folder / "tokenizer.json")
        self._fast = _parse(folder, self._raw)
        config = read_json(folder / "tokenizer_config.json")
        self.config = config
        self.special_tokens = _special_tokens(config, folder)
        _add_missing_tokens(self._fast, config, self.special_tokens)
        self.added_tokens = {token.content: index for index, token in self._fast.get_added_tokens_decoder().items()}
        self._added_ids = frozenset(self.added_tokens.values())
        self._token_lengths = sorted({len(text) for text in self.added_tokens}, reverse=True)
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        generation_ids = _generation_eos_ids(folder)
        self.eos_id = self._find_eos_id(generation_ids)
        self.end_ids = tuple(dict.fromkeys((self.eos_id, *generation_ids)))
        self.bos_ids = self._find_bos_ids()
        self._anchor = self._find_anchor()
        self._space_after_special = self._find_space_after_special()

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return the ids of a text. Special tokens written in it are parsed, as transformers does.

        With `add_bos` the tokens that the tokenizer puts before every text come first, once: a text that begins with them gets
        no second copy. Without, the text goes on from one before it, so no space is put in front. Never adds an EOS.
        Raises DataError where the text holds half a surrogate pair.
        """
        if not add_bos:
            return self._go_on(text, after_special=False)
        ids = self.encode_plain(text)
        return ids if ids[: len(self.bos_ids)] == list(self.bos_ids) else [*self.bos_ids, *ids]

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text alone: nothing put before or after (`add_special_tokens=False` in transformers)."""
        return self._encode(text).ids

    def as_json(self) -> str:
        """Return the tokenizer as a tokenizer.json, with the tokens that config files add."""
        return self._fast.to_str()

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of ids; with `skip_special`, without special tokens."""
        return self._fast.decode(list(ids), skip_special_tokens=skip_special)

    def extend(self, context: str, text: str) -> list[int]:
        """Return ids for `text` such that ids(context) + these are the ids of both, whatever comes later.

        They are what `text` gets when both are encoded at once; a special token that ends `context` may swallow the whitespace
        that `text` begins with. Where both at once change the ids of `context`, `text` is encoded by itself.
        """
        return self._extend(context, text, swallow=True)

    def extend_exactly(self, context: str, text: str) -> list[int]:
        """Return ids as `extend` does, but nothing of `text` goes into a token of `context`: they decode to `text`."""
        return self._extend(context, text, swallow=False)

    def _extend(self, context: str, text: str, *, swallow: bool) -> list[int]:
        if not text:
            return []
        if not context:
            return self.encode_plain(text)
        before, both = self._encode(context), self._encode(context + text)
        size = len(before.ids)
        if both.ids[:size] == before.ids and (swallow or not _straddles(both.offsets, size, len(context))):
            return both.ids[size:]
        return self._go_on(text, after_special=bool(before.ids) and before.ids[-1] in self._added_ids)

    def text_after(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that `ids` add after `context`: spaces at the seam are kept as they were encoded.

        Decoding ids alone loses a leading space with some tokenizers, and with others shows one that nobody wrote.
        """
        after_special = bool(context) and context[-1] in self._added_ids
        text = self._decode_inside(ids)
        return text.removeprefix(" ") if after_special and self._space_after_special else text

    def first_token(self, text: str) -> str:
        """Return the longest added token that `text` begins with, "" if there is none."""
        return next((text[:size] for size in self._token_lengths if text[:size] in self.added_tokens), "")

    def last_token(self, text: str) -> str:
        """Return the longest added token that `text` ends with, "" if there is none."""
        return next((text[-size:] for size in self._token_lengths if text[-size:] in self.added_tokens), "")

    def content_hash(self, *more: str) -> str:
        """Return the SHA-256 (hex) of everything that decides ids, with `more` (the templates)."""
        decides = [self.special_tokens, list(self.end_ids), list(self.bos_ids), sorted(self.added_tokens.items()), list(more)]
        return hashlib.sha256(self._raw + json.dumps(decides, ensure_ascii=False).encode()).hexdigest()

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            return self._fast.encode(text, add_special_tokens=False)
        except TypeError:
            # tokenizers takes UTF-8, which half a surrogate pair (possible in JSON) does not have.
            raise DataError("the text holds half a surrogate pair, which is no character", hint="mend the text") from None

    def _go_on(self, text: str, *, after_special: bool) -> list[int]:
        """Return ids that decode to `text` when they follow others, trying the ways a tokenizer may put a space in front."""
        wanted = " " + text if after_special and self._space_after_special else text
        ways = [self.encode_plain(text)]
        for anchor in (self._anchor, "\n"):
            if anchor:
                head, both = self.encode_plain(anchor), self.encode_plain(anchor + text)
                if both[: len(head)] == head:
                    ways.append(both[len(head) :])
        return next((ids for ids in ways if self._decode_inside(ids) == wanted), ways[0])

    def _decode_inside(self, ids: Sequence[int]) -> str:
        """Return the text of ids in the middle of others: decoders that strip the first space strip none here."""
        if not self._anchor:
            return self.decode(ids)
        head = self.added_tokens[self._anchor]
        return self.decode([head, *ids]).removeprefix(self.decode([head]))

    def _find_eos_id(self, generation_ids: Sequence[int]) -> int:
        text = self.special_tokens.get("eos_token")
        found = self._fast.token_to_id(text) if text else None
        if found is not None:
            return found
        if generation_ids:
            return generation_ids[0]
        raise BaseModelError(
            f"the tokenizer in {self.folder} names no end-of-text token",
            hint="set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
        )

    def _find_bos_ids(self) -> tuple[int, ...]:
        """Return the ids that the post-processor puts before every text.

        It alone decides: transformers 5 ignores a config's `add_bos_token` where there is a tokenizer.json.
        """
        plain, full = self._encode("a").ids, self._fast.encode("a", add_special_tokens=True).ids
        start = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
        return tuple(full[:start])

    def _find_anchor(self) -> str:
        """Return an added token that leaves the spaces around it alone, "" if there is none."""
        tokens = self._fast.get_added_tokens_decoder().values()
        plain = [t.content for t in tokens if t.special and not (t.lstrip or t.rstrip or t.single_word or t.normalized)]
        return next((text for text in plain if self.encode_plain(text) == [self.added_tokens[text]]), "")

    def _find_space_after_special(self) -> bool:
        """Return whether text after a special token gets a space in front, as older Llama and Phi-3 tokenizers do."""
        if not self._anchor:
            return False
        return self._decode_inside(self.encode_plain(self._anchor + "a")[1:]) == " a"


class StreamDecoder:
    """Text from ids as they arrive: each piece is complete UTF-8, and the pieces joined are the text of all ids.

    A character may take several tokens; its text comes with the last of them. `finish` gives what is left.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that this id completes, "" while a character is unfinished."""
        self._pending.append(token_id)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        # What was shown last is the context of what follows: it ends where a character ends, and it keeps spaces in place.
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """Return the rest; bytes that make no character come as U+FFFD."""
        text = self._new_text()
        self._context, self._pending = [], []
        return text

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._context, self._skip_special)
        return self._tokenizer.decode([*self._context, *self._pending], self._skip_special)[len(shown) :]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, {} where the file is absent. Raises BaseModelError where it is not a JSON object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BaseModelError(f"{path} cannot be read: {error}", hint="download the base again") from None
    if not isinstance(value, dict):
        raise BaseModelError(f"{path} must hold a JSON object, got {type(value).__name__}", hint="download the base again")
    return cast(dict[str, Any], value)


def token_text(value: Any) -> str | None:
    """Return the text of a special token as config files write it: a string, or an object with `content`."""
    content = cast(dict[str, Any], value).get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _straddles(offsets: Sequence[tuple[int, int]], size: int, cut: int) -> bool:
    """Return whether the characters of the tokens on either side of number `size` lie over position `cut`."""
    return (size > 0 and offsets[size - 1][1] > cut) or (size < len(offsets) and offsets[size][0] < cut)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise BaseModelError(
            f"{path.parent} has no tokenizer.json that can be read",
            hint="convert a slow tokenizer once: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) in transformers",
        ) from None


def _parse(folder: Path, raw: bytes) -> tokenizers.Tokenizer:
    try:
        fast = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # tokenizers raises the bare Exception class
        raise BaseModelError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}", hint="download the base again") from None
    fast.no_truncation()
    fast.no_padding()
    return fast


def _special_tokens(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the named special tokens in transformers' order of precedence."""
    source = dict(config)
    if "added_tokens_decoder" not in config:
        source.update(read_json(folder / "special_tokens_map.json"))
    extra = source.get("extra_special_tokens")
    if isinstance(extra, dict):
        source.update(cast(dict[str, Any], extra))
    texts = {name: token_text(source.get(name)) for name in (*_NAMED_TOKENS, *source) if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _add_missing_tokens(fast: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Add the tokens that config files name and tokenizer.json does not list as added, as transformers does on loading."""
    known = {token.content for token in fast.get_added_tokens_decoder().values()}
    listed = cast(dict[str, dict[str, Any]], config.get("added_tokens_decoder") or {})
    for index, fields in sorted(listed.items(), key=lambda item: int(item[0])):
        if fields["content"] in known:
            continue
        cast(Any, fast).add_tokens([tokenizers.AddedToken(**fields)])
        known.add(fields["content"])
        if fast.token_to_id(fields["content"]) != int(index):
            raise BaseModelError(
                f"tokenizer_config.json gives token {index} another id than tokenizer.json does", hint="download the base again"
            )
    # A token outside the vocabulary has no embedding; only its text is used, in templates.
    named = [text for text in special_tokens.values() if text not in known and fast.token_to_id(text) is not None]
    cast(Any, fast).add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in named])


def _generation_eos_ids(folder: Path) -> tuple[int, ...]:
    """Return the `eos_token_id`s of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        value: Any = read_json(folder / name).get("eos_token_id")
        values = cast(list[Any], value) if isinstance(value, list) else [value]
        ids = tuple(item for item in values if isinstance(item, int))
        if ids:
            return ids
    return ()
