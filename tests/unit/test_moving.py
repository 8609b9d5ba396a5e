"""The page for those who come from other tools: each of their options leads to ours, and what the page says of it is so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kivnun.data.formats import read_records
from kivnun.spec import load_spec, parse_spec
from kivnun.spec.catalogue import options
from kivnun.spec.problems import ELSEWHERE, nearest_path
from pages import ROOT, blocks

PAGE = ROOT / "docs" / "guides" / "moving.md"
PATHS = {option.path for option in options()}
SECTIONS = {path.rpartition(".")[0] for path in PATHS} | {"base", "data", "adapter", "objective"}


def table(tool: str) -> list[tuple[list[str], str]]:
    """Return (their names, what stands beside them) of each row of a tool's table."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {tool}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ", 1) for line in section.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`(\w+)`", theirs), ours.strip()) for theirs, ours in rows]


ROWS = [(names, ours) for tool in ("TRL", "Axolotl", "LLaMA-Factory") for names, ours in table(tool)]
LEADING = [(name, re.match(r"`([\w.]+)`", ours)[1]) for names, ours in ROWS for name in names if re.match(r"`[\w.]+`", ours)]  # type: ignore[index]


def test_every_row_names_an_option_of_ours_a_command_or_says_that_it_is_not_offered() -> None:
    assert len(ROWS) > 80
    for names, ours in ROWS:
        assert names, ours
        assert ours.startswith(("`", "not offered")), ours
    assert {path for _, path in LEADING} - PATHS - SECTIONS == set()


@pytest.mark.parametrize(("name", "path"), sorted(set(LEADING)), ids=lambda value: str(value))
def test_their_name_in_a_spec_leads_to_ours(name: str, path: str) -> None:
    if (name, path) == ("adapter", "adapter.kind"):
        return  # a section of ours has that name
    found = nearest_path((name,))
    assert found is not None
    assert found == path, f"{name} leads to {found}"


def test_names_that_are_known_are_on_the_page_or_are_other_spellings() -> None:
    listed = {name for names, _ in ROWS for name in names}
    other = {"gradient_clipping", "lr", "max_seq_length", "method", "model_name", "scheduler"}
    assert set(ELSEWHERE) - listed - other == set()


@pytest.fixture
def specs(tmp_path: Path) -> dict[str, Any]:
    named = [block for block in blocks(PAGE) if block.name is not None]
    for block in named:
        (tmp_path / str(block.name)).write_text(block.text, encoding="utf-8")
    return {str(block.name): load_spec(tmp_path / str(block.name)) for block in named if block.language == "yaml"}


def test_the_worked_examples_say_what_the_originals_say(specs: dict[str, Any]) -> None:
    trl, axolotl, factory = (specs[f"from-{tool}.yaml"] for tool in ("trl", "axolotl", "llama-factory"))
    script = next(block.text for block in blocks(PAGE) if "SFTTrainer(" in block.text)
    given = dict(re.findall(r"(\w+)=([\w.\"/-]+)", script))
    assert trl.schedule.batch_rows == int(given["per_device_train_batch_size"]) * int(given["gradient_accumulation_steps"])
    assert (trl.schedule.epochs, trl.data.max_seq_len) == (int(given["num_train_epochs"]), int(given["max_length"]))
    assert (trl.schedule.learning_rate, trl.schedule.warmup_share) == (float(given["learning_rate"]), float(given["warmup_steps"]))
    assert (trl.adapter.rank, trl.adapter.alpha) == (int(given["r"]), float(given["lora_alpha"]))
    assert trl.adapter.dropout == float(given["lora_dropout"])
    assert f'"{trl.schedule.decay}"' == given["lr_scheduler_type"]
    theirs = [parse_plain(block.text) for block in blocks(PAGE) if block.language == "yml"]
    for spec, tree in zip((axolotl, factory), theirs, strict=True):
        rows = tree.get("micro_batch_size", tree.get("per_device_train_batch_size"))
        assert spec.schedule.batch_rows == rows * tree["gradient_accumulation_steps"]
        assert spec.schedule.epochs == tree.get("num_epochs", tree.get("num_train_epochs"))
        assert spec.schedule.learning_rate == tree["learning_rate"]
        assert spec.data.max_seq_len == tree.get("sequence_len", tree.get("cutoff_len"))
        assert spec.data.validation == tree.get("val_set_size", tree.get("val_size"))
        assert spec.adapter.rank == tree.get("lora_r", tree.get("lora_rank"))
        assert spec.base.model == tree.get("base_model", tree.get("model_name_or_path"))
        assert spec.schedule.decay == tree.get("lr_scheduler", tree.get("lr_scheduler_type"))
    assert axolotl.adapter.alpha == theirs[0]["lora_alpha"]
    assert axolotl.base.precision == "int8"
    assert factory.adapter.alpha is None, "2 * rank, as theirs"


def parse_plain(text: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(text)


def test_rows_of_other_tools_are_read_as_they_are(tmp_path: Path) -> None:
    alpaca = {"instruction": "Translate", "input": "tea", "output": "תה"}
    sharegpt = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
    for row in (alpaca, sharegpt):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        _, records, problems = read_records(tmp_path / "rows.jsonl")
        assert (len(records), problems) == (1, [])


def test_what_the_page_says_of_our_defaults_is_so(tmp_path: Path) -> None:
    spec = parse_spec("version: 1\nbase: kivnun/tiny-phi\ndata: {train: rows.jsonl}\n", folder=tmp_path)
    assert (spec.adapter.kind, spec.adapter.rank, spec.adapter.target_modules) == ("lora", 16, "all-linear")  # type: ignore[union-attr]
    assert (spec.schedule.decay, spec.schedule.warmup_share, spec.data.over_long) == ("linear", 0.03, "refuse")
    text = PAGE.read_text(encoding="utf-8")
    assert "16, 2 x rank, all linear but the head" in text
    assert "linear, 3 % of the steps" in text
