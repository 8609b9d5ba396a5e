"""The rows in the documentation are rows."""

from __future__ import annotations

import re
from pathlib import Path

from kivnun.data.formats import FORMATS, read_records

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "data.md"


def test_every_documented_row_is_read_and_every_format_is_shown(tmp_path: Path) -> None:
    shown: set[str] = set()
    for number, block in enumerate(re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(block, encoding="utf-8")
        name, records, problems = read_records(path)
        assert problems == []
        assert len(records) == block.count("\n")
        shown.add(name)
    assert shown == set(FORMATS)
