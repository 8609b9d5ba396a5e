"""The stable code of each problem of a file's lines: what programs tell problems by, whatever words people are told.

The words are those of `kivnun/data`; a test holds each rule of the upload against its code. Next: `judging.py`.
"""

from __future__ import annotations

import re

_RULES: tuple[tuple[str, str], ...] = (
    # What is wrong with a line before it is a row: these words begin a message.
    (
        "invalid_encoding",
        r"^(holds a NUL|a string holds a NUL|byte \d+ is not UTF-8|starts with a byte order mark)|UTF-16|^the file holds (?!no)",
    ),
    (
        "invalid_json",
        r"^(not valid JSON|the key .{1,90} is given twice|\S+ is not JSON;|is nested deeper|is longer than|an integer does not fit|"
        r"a number is too large|a string holds half|holds an? [a-z]+; each row|holds null; each row)|begins with a list",
    ),
    ("empty_file", r"holds no rows$"),
    ("mixed_formats", r"one file holds one format$"),
    ("unsupported_format", r"is not trained here;"),
    # What is wrong with a row.
    ("unrecognized_key", r"^unknown key |^keys that would have no effect| cannot be trained: "),
    ("invalid_weight", r"\bweight\b"),
    ("invalid_image", r" is an image, which cannot be trained"),
    ("invalid_role", r"^(input\.)?messages\[\d+\]\.role "),
    ("invalid_tool_call", r"tool_call|\btools\b|\.function\b|tool message|tool call|parallel_tool_calls"),
    ("missing_assistant", r"no assistant message|the last message must be the assistant's"),
    (
        "invalid_preference",
        r"^((non_)?preferred_output|chosen|rejected|input)\b|'(input|preferred_output|non_preferred_output|chosen|rejected)\b",
    ),
    ("invalid_message", r"^messages\b"),
    ("invalid_prompt", r"^(prompt|completion) |'(prompt|completion)'"),
)  # fmt: skip
_PATTERNS = tuple((code, re.compile(pattern)) for code, pattern in _RULES)
OTHER = "invalid_row"

JUDGING_FAILED = "judging_failed"
BATCH_CODES = ("invalid_request", "duplicate_custom_id", "invalid_method", "invalid_url", "too_many_requests")
WARNING_CODES = ("duplicate_rows", "few_examples", "unused_key")
CODES = (*(code for code, _ in _RULES), OTHER, JUDGING_FAILED, *BATCH_CODES, *WARNING_CODES)


def code_of(message: str) -> str:
    """Return the code of a problem by its words."""
    return next((code for code, pattern in _PATTERNS if pattern.search(message)), OTHER)
