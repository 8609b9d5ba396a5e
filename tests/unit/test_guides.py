"""Figures in the guides are those of the results that they name; predictions are what the plan says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kivnun.plan.bases import known_base
from kivnun.plan.measured import read_table, told_apart
from kivnun.plan.memory import Shape, step_memory
from kivnun.spec import DoraSpec, FullSpec, LoraSpec
from pages import ROOT

GUIDES = ROOT / "docs" / "guides"
CHOOSING = (GUIDES / "choosing-a-technique.md").read_text(encoding="utf-8")
ON_A_GPU = (GUIDES / "phi-on-a-gpu.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
MATRIX = json.loads((RESULTS / "matrix_2026-11-27" / "matrix.json").read_text(encoding="utf-8"))
H100 = (RESULTS / "gpu_nvidia-h100-80gb-hbm3_2026-11-27.md").read_text(encoding="utf-8")
PHI = known_base("microsoft/Phi-4-mini-instruct").sizes


def rows(text: str, head: str) -> list[list[str]]:
    """Return the cells of the table whose heading line begins so."""
    lines = text[text.index(f"\n| {head} |") :].split("\n\n")[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("row", rows(CHOOSING, "task"), ids=lambda row: row[0])
def test_scores_are_those_of_the_matrix(row: list[str]) -> None:
    scores = next(score for score in MATRIX["scores"] if score["task"] == row[0])
    digits = 1 if row[0] == "domain" else 2
    found = [scores["base"], *(scores["methods"][name]["score"] for name in ("full", "lora", "qlora", "dora", "loha"))]
    assert row[1] == ("yes" if scores["higher_is_better"] else "no")
    assert row[2:] == [f"{value:.{digits}f}" for value in found]


def test_what_is_said_of_the_scores_is_so() -> None:
    table = read_table(None)
    best, lora_equal, loha_good, qlora_below = [], [], [], []
    for task in table.tasks.values():
        top = max(task.methods, key=lambda name: task.methods[name].to_full)
        best.append(top)
        low, high = task.methods["lora"].to_full_interval
        lora_equal.append(low <= 0 <= high)
        loha_good.append(top == "loha" or not told_apart(task.methods["loha"], task.methods[top]))
        qlora_below.append(task.methods["qlora"].to_full < task.methods["lora"].to_full)
    assert (len(best), best.count("full")) == (7, 5)
    assert "Full tuning scored best on five of seven tasks" in CHOOSING
    assert (sum(lora_equal), sum(loha_good), sum(qlora_below)) == (2, 5, 5)
    times = [score["train_seconds_cpu"]["loha"] / score["train_seconds_cpu"]["lora"] for score in MATRIX["scores"]]
    assert f"{min(times):.1f} to {max(times):.1f} times LoRA's CPU time" in CHOOSING


def test_memory_of_the_guide_is_that_of_the_matrix() -> None:
    said = {(cell["row"], cell["technique"]): cell["measured"] for cell in MATRIX["cells"]}
    assert f"{said[7, 'QLoRA']['ratio_to_full']:.2f} of full tuning's memory" in CHOOSING
    assert f"LoRA takes {said[7, 'LoRA']['ratio_to_full']:.2f}" in CHOOSING
    assert "2059 to 748 MiB" in str(said[9, "ZeRO"]["said"])
    assert "748 MiB for each of four processes in place of 2,059 alone" in CHOOSING
    assert "2,304 of 3,803,392" in str(said[8, "PEFT"]["said"])


@pytest.mark.parametrize("row", rows(ON_A_GPU, "rows of"), ids=lambda row: row[0])
def test_what_was_measured_on_a_gpu_is_what_the_table_has(row: list[str]) -> None:
    length, speed, peak, times = row
    line = next(line for line in H100.splitlines() if f"| LoRA | {length} | Kivnun | kept |" in line)
    assert f" {speed} (" in line
    assert f"| {peak} (" in line
    assert f"- phi-4-mini LoRA {length}, activations kept: {times} PEFT padded" in H100


def test_predictions_are_what_the_plan_says() -> None:
    kinds = {
        "LoRA": (LoraSpec(), "bf16"), "QLoRA": (LoraSpec(), "nf4"), "DoRA": (DoraSpec(), "bf16"), "full": (FullSpec(), "bf16"),
    }  # fmt: skip
    for name, *said in rows(ON_A_GPU, "method"):
        adapter, precision = kinds[name]
        shapes = [Shape(precision, tokens, "cuda", recompute=again) for tokens in (4096, 16384) for again in (False, True)]
        assert said == [f"{step_memory(PHI, adapter, shape).peak / 2**30:.1f}" for shape in shapes]


def test_the_steps_of_a_runs_life_name_files_that_are_there() -> None:
    page = (ROOT / "docs" / "concepts" / "life-of-a-run.md").read_text(encoding="utf-8")
    steps = [int(number) for number in re.findall(r"^(\d+)\. \*\*", page, re.MULTILINE)]
    assert steps == list(range(1, 16))
    named = set(re.findall(r"`(?:kivnun/)?([\w/]+\.py)`", page))
    assert [name for name in sorted(named) if not (Path(ROOT) / "kivnun" / name).is_file()] == []
    assert len(named) > 20
