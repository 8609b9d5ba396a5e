"""Names of files: kept for people, never a path, safe in a header whatever they hold."""

from __future__ import annotations

import unicodedata
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.service.filenames import MAX_LETTERS, content_disposition, kept_name


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("train.jsonl", "train.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("/etc/shadow", "shadow"),
        ("\\\\server\\share\\x.jsonl", "x.jsonl"),
        ("C:\\data\\x.jsonl", "x.jsonl"),
        ("a\r\nset-cookie: b=c.jsonl", "a__set-cookie: b=c.jsonl"),
        ("nul\x00.jsonl", "nul_.jsonl"),
        ("photo\u202egpj.exe", "photo_gpj.exe"),
        ("נתונים.jsonl", "נתונים.jsonl"),
        ("😀.jsonl", "😀.jsonl"),
        ("", "upload"),
        ("..", "upload"),
        ("\ud800.jsonl", "_.jsonl"),
        ("x" * 4096 + ".jsonl", "x" * (MAX_LETTERS - 6) + ".jsonl"),
        ("." * 4096, "upload"),
    ],
)
def test_a_name_is_kept_without_what_would_mislead(given: str, kept: str) -> None:
    assert kept_name(given) == kept


@given(st.text(max_size=400))
def test_every_name_is_one_line_of_a_header_and_comes_back_whole(given: str) -> None:
    name = kept_name(given)
    assert 1 <= len(name) <= MAX_LETTERS
    assert not {"/", "\\", "\r", "\n", "\x00"} & set(name)
    header = content_disposition(name)
    header.encode("ascii")
    assert not any(unicodedata.category(letter).startswith("C") for letter in header)
    assert header.count('"') == 2
    assert unquote(header.partition("UTF-8''")[2]) == name
