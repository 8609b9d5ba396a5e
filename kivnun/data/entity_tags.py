"""From words with BIO tags to a text with character spans: the words joined by single spaces, B- and its I- tags one entity.

B-X begins an entity of the label X, I-X goes on with it, O is outside. An I- that goes on with nothing is refused: the older
schemes that write it would be read as something else than they mean. Next: `entity_spans.py`.

Source: Ramshaw and Marcus 1995, "Text Chunking using Transformation-Based Learning" (IOB); CoNLL-2003's files in their IOB2 form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kivnun.data.entity_spans import Span

OUTSIDE = "O"


def text_and_spans(tokens: Sequence[str], tags: Sequence[str], complain: Callable[[str], None]) -> tuple[str, list[Span]] | None:
    """Return the text and its entities, or None after complaints, which name places and never words."""
    if len(tokens) != len(tags):
        complain(f"there are {len(tokens)} tokens and {len(tags)} tags; each token has one tag")
        return None
    good = True
    spans: list[Span] = []
    start = 0
    inside = False
    for number, (token, tag) in enumerate(zip(tokens, tags, strict=True)):
        if not token or token != token.strip() or "\n" in token:
            complain(f"tokens[{number}] is empty, holds a line break, or has white space at an end")
            good = False
        mark, _, label = tag.partition("-")
        trouble = _trouble(mark, label, tag, spans[-1].label if inside and spans else None, number)
        if trouble:
            complain(trouble)
            good = False
        elif mark == "B":
            spans.append(Span(start, start + len(token), label))
        elif mark == "I":
            spans[-1] = Span(spans[-1].start, start + len(token), label)
        inside = mark in ("B", "I") and not trouble
        start += len(token) + 1
    return (" ".join(tokens), spans) if good else None


def _trouble(mark: str, label: str, tag: str, open_label: str | None, number: int) -> str | None:
    if tag == OUTSIDE:
        return None
    if mark not in ("B", "I") or not label:
        return f"tags[{number}] must be O, or B- or I- before a label"
    if mark == "I" and open_label != label:
        return f"tags[{number}] is I- of an entity that was not begun; the first word of each entity has B-"
    return None
