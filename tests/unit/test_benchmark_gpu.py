"""The GPU benchmark's own arithmetic, its rows and its table, where no device is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.engine.workload import Model
from benchmarks.gpu import trl
from benchmarks.gpu.__main__ import sections
from benchmarks.gpu.correct import Check
from benchmarks.gpu.measure import Effort, Measured, measure
from benchmarks.gpu.shapes import LONGEST, MODELS, STEP_TOKENS, TINY, config_of, draw_rows, mfu, needed_flops, peak_flops
from benchmarks.gpu.sides import Absent, Step, _quantise, packed, padded, padded_passes
from benchmarks.gpu.table import Report, ratios
from kivnun.data.rows import TokenRow

CPU = torch.device("cpu")


def test_full_rows_fill_a_step_and_mixed_rows_are_the_same_every_time() -> None:
    assert [row.length for row in draw_rows(TINY, "2048")] == [2048] * 8
    mixed = draw_rows(TINY, "mixed")
    lengths = [row.length for row in mixed]
    assert lengths == [row.length for row in draw_rows(TINY, "mixed")]
    assert 2 * STEP_TOKENS <= sum(lengths) < 2 * STEP_TOKENS + LONGEST
    assert max(lengths) > 4 * sorted(lengths)[len(lengths) // 2]
    assert all(row.weights[0] == 0 and row.weights[1:].all() and row.ids.max() < TINY.vocab for row in mixed)


def test_operations_and_mfu_by_hand() -> None:
    model = Model(hidden=8, layers=2, heads=2, kv_heads=1, mlp=16, vocab=10)
    # Per layer: qkv 8 x 16, o 8 x 8, gate and up 8 x 32, down 16 x 8; the head 8 x 10.
    weights = 2 * (8 * 16 + 8 * 8 + 8 * 32 + 16 * 8) + 8 * 10
    # Rows of 3 and 1: 6 x layers 2 x heads 2 x width 4 x (3 x 4 + 1 x 2).
    by_hand = 4 * weights * 4 + 6 * 2 * 2 * 4 * 14
    assert needed_flops(model, [3, 1]) == by_hand
    assert mfu(model, [3, 1], 2.0, by_hand) == 0.5
    assert mfu(model, [3, 1], 2.0, None) is None


def test_peaks_are_known_by_name_or_not_claimed() -> None:
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA T4") is None


@pytest.mark.parametrize(("name", "parameters"), [("phi-3-mini", 3.82e9), ("phi-4-mini", 3.84e9), ("phi-3-medium", 13.96e9)])
def test_shapes_have_the_published_numbers_of_parameters(name: str, parameters: float) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(MODELS[name], name == "phi-4-mini"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)


def test_padded_passes_count_padding_and_packed_ones_start_positions_anew() -> None:
    rows = draw_rows(TINY, "mixed", 64)
    longest = max(row.length for row in rows)
    for part in padded_passes(rows, 4 * longest):
        batch = padded(part, CPU)
        assert batch["input_ids"].numel() <= 4 * longest
        assert int(batch["attention_mask"].sum()) == sum(row.length for row in part)
    batch = packed(rows[:2], CPU)
    first, second = rows[0].length, rows[1].length
    assert batch["position_ids"][0].tolist() == [*range(first), *range(second)]
    assert batch["cu_seq_lens_q"].tolist() == [0, first, first + second]
    assert batch["labels"][0, first] == -100


def test_what_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert trl.missing() == "trl, datasets, accelerate not installed"
    with pytest.raises(Absent, match="bitsandbytes"):
        _quantise(torch.nn.Linear(2, 2))


class _Narrow:
    """A side whose device holds 64 positions."""

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}

    def step(self, rows: Sequence[TokenRow], pass_tokens: int) -> Step:
        if pass_tokens > 64:
            raise torch.cuda.OutOfMemoryError
        return Step(7.0, 0.5)


def test_passes_shrink_until_they_fit_and_the_row_says_so() -> None:
    rows, named = draw_rows(TINY, "2048", 64), Measured("phi-4-mini", "LoRA", "2048", "Kivnun", False)
    found = measure(_Narrow(), rows, Effort(1, 3), named, TINY, None, 256)
    assert (found.pass_tokens, found.tokens_per_s, found.loss, found.mfu) == (64, 2 * 256, 7.0, None)
    wide = draw_rows(TINY, "4096", 32)
    assert "does not fit" in measure(_Narrow(), wide, Effort(1, 3), named, TINY, None, 256).note


def test_the_table_holds_rows_ratios_and_what_was_left_out(tmp_path: Path) -> None:
    def row(side: str, speed: float) -> Measured:
        return Measured("phi-4-mini", "LoRA", "mixed", side, False, 64, speed, speed, speed, 0.25, 2**30, 2**31, 7.0)

    report = Report("NVIDIA H200", "python -m benchmarks.gpu", rows=[row("Kivnun", 300.0), row("PEFT padded", 100.0)])
    report.checks, report.left_out = [Check("x", 0.5, 1.0)], ["PEFT QLoRA: bitsandbytes is not installed"]
    assert ratios(report.rows) == ["- phi-4-mini LoRA mixed, activations kept: 3.00 x PEFT padded (each peer at its best)"]
    path = report.save(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert path.name.startswith("gpu_nvidia-h200_")
    assert "| phi-4-mini | LoRA | mixed | Kivnun | kept | 64 | 300 (300, 300) | 25.0% | 1.0 (2.0) | 7.0000 |" in text
    assert "1 of 1 comparisons hold" in text
    assert "Not measured: PEFT QLoRA" in text
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["rows"][0]["tokens_per_s"] == 300.0


def test_a_comparison_that_is_not_a_number_does_not_pass() -> None:
    assert not Check("x", float("nan"), 1.0).passed


def test_what_is_asked_first_is_measured_first_and_quick_is_a_part() -> None:
    quick, full = sections(["TRL padded"], True), sections(["TRL padded"], False)
    assert str(full[0]) == "Kivnun, phi-4-mini LoRA, activations kept"
    assert full[: len(quick)] == quick
    assert {section.method for section in full if section.model == "phi-3-medium"} == {"LoRA", "QLoRA"}
