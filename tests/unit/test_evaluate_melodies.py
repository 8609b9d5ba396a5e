"""Novelty of tunes against values counted by hand, and the picture of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kivnun.data.abc_notation import parse
from kivnun.errors import RunFolderError
from kivnun.evaluate.melodies import grams, novelty, novelty_of_run, piano_rolls, run_samples
from kivnun.events import Evaluated, EventLog

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
HEAD = "X:1\nT:A <tune>\nM:4/4\nL:1/8\nK:C\n"
SCALE = HEAD + "C2 D2 E2 F2 | G8 |]"
RAISED = HEAD.replace("K:C", "K:G") + "G2 A2 B2 c2 | d8 |]"
OTHER = HEAD + "C2 E2 G2 c2 | c8 |]"


def test_runs_of_four_notes_are_the_same_in_every_key() -> None:
    assert len(grams(parse(SCALE))) == 2
    assert grams(parse(SCALE)) == grams(parse(RAISED))
    assert grams(parse(SCALE)) != grams(parse(OTHER))


def test_novelty_counts_runs_that_training_lacks_over_the_replies_that_are_tunes() -> None:
    mixed = HEAD + "C2 D2 E2 F2 | A8 |]"  # the first of its two runs is known
    found = novelty([RAISED, OTHER, mixed, "no tune"], [SCALE, "no tune either"])
    assert found.share == pytest.approx((0 + 2 + 1) / 6)
    assert (found.replies, found.tunes, found.copies, found.interval) == (4, 3, 1, None)


def test_novelty_has_an_interval_from_ten_tunes_on_and_none_without_a_tune() -> None:
    assert novelty([OTHER] * 10, [SCALE]).interval == (1.0, 1.0)
    assert novelty(["", "C"], [SCALE]).share is None


def test_the_picture_has_a_box_for_each_note_and_says_what_is_no_tune() -> None:
    picture = piano_rolls([{"reference": SCALE, "reply": OTHER}, {"reference": SCALE, "reply": "no <tune>"}])
    root = ElementTree.fromstring(picture)
    boxes = [element for element in root.iter() if element.tag.endswith("rect") and element.get("rx")]
    assert len(boxes) == 15
    captions = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "A <tune>, C, 4/4" in captions
    assert any(caption and caption.startswith("no tune: ") for caption in captions)


def test_a_run_without_replies_is_refused(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl", lambda: NOON) as log:
        log.append(Evaluated("tuned", 3, 1.0, 4, {}, {}, []))
    with pytest.raises(RunFolderError, match="holds no replies"):
        run_samples(tmp_path)


def test_novelty_of_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Tune"}, {"role": "assistant", "content": SCALE}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    spec = {"version": 1, "base": "kivnun/tiny-phi", "data": {"train": str(tmp_path / "train.jsonl")}, "adapter": {"kind": "full"}}
    (tmp_path / "resolved.yaml").write_text(
        json.dumps(spec | {"schedule": {"steps": 1, "batch_rows": 1}, "seed": 1}), encoding="utf-8"
    )
    sample = {"prompt": "Tune", "reference": OTHER}
    with EventLog(tmp_path / "events.jsonl", lambda: NOON) as log:
        log.append(Evaluated("base", 0, 1.0, 1, {}, {}, [{**sample, "reply": "?"}]))
        log.append(Evaluated("tuned", 1, 1.0, 1, {}, {}, [{**sample, "reply": RAISED}]))
    found = novelty_of_run(tmp_path)
    assert (found["base"].tunes, found["tuned"].share, found["references"].share) == (0, 0.0, 1.0)
