"""Fifty losses of a small run, as they were when they were written down: numbers that drift are seen.

`golden_losses.json` names the versions and the CPU it was made with. There the losses must agree to 1e-6; elsewhere, where
libraries or kernels sum in another order, to 1e-4 (Muon, which orthogonalises in bfloat16, to 1e-3), and the difference is
printed. After a change that is meant to alter the numbers: `python tests/integration/test_tune_golden.py` writes the file anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kivnun.artifacts import environment_difference, numeric_environment
from kivnun.randomness import generator
from runs import Tree, chats, pairs, run_spec, steps_of, write_spec
from tiny_task import make_base

GOLDEN = Path(__file__).with_name("golden_losses.json")
FIFTY = {"epochs": None, "steps": 50, "batch_rows": 4}
KINDS: dict[str, Tree] = {
    "lora": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}, "schedule": FIFTY},
    "dora": {"adapter": {"kind": "dora", "rank": 4}, "schedule": {**FIFTY, "decay": "cosine"}},
    "full_muon": {
        "adapter": {"kind": "full"},
        "schedule": {**FIFTY, "learning_rate": 0.002, "optimizer": {"kind": "muon", "weight_decay": 0.01}},
    },
    "dpo": {"adapter": {"kind": "lora", "rank": 4}, "schedule": {**FIFTY, "learning_rate": 0.002}},
}


# Measured with the kernels of older CPUs (AVX2, SSE4): LoRA, DoRA and DPO stay within 5e-7, Muon goes to 1.8e-4.
ELSEWHERE = {"full_muon": 1e-3}


def golden_base(folder: Path) -> Path:
    """Write a base whose weights come from this project's own draws, so that no library's generator can change them."""
    make_base(folder)
    file = folder / "model.safetensors"
    drawn = {
        name: (np.ones(value.shape) if value.ndim == 1 else 0.08 * generator(3, "golden", name).standard_normal(value.shape))
        for name, value in load_file(file).items()
    }
    save_file({name: value.astype(np.float32) for name, value in drawn.items()}, file, metadata={"format": "pt"})
    return folder


def losses(kind: str, base: Path, place: Path) -> list[float]:
    rows = pairs() if kind == "dpo" else chats()
    run_spec(write_spec(place, base, rows, data={"validation": None}, **KINDS[kind]), place / "run")
    return [step.loss for step in steps_of(place / "run")]


def environment() -> dict[str, Any]:
    """Return what decides the last bits, without this package's own version."""
    return {name: value for name, value in numeric_environment(1, "cpu").items() if name not in ("version.kivnun", "python")}


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_losses_are_as_they_were(tmp_path: Path, kind: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = losses(kind, golden_base(tmp_path / "base"), tmp_path)
    changed = environment_difference(golden["environment"], environment())
    tolerance = ELSEWHERE.get(kind, 1e-4) if changed else 1e-6
    if changed:
        print(f"compared to {tolerance}, for the environment is another: {'; '.join(changed)}", file=sys.stderr)
    assert len(found) == 50
    np.testing.assert_allclose(found, golden["losses"][kind], rtol=0, atol=tolerance)


def write_golden() -> None:
    with tempfile.TemporaryDirectory() as place:
        base = golden_base(Path(place, "base"))
        found = {kind: losses(kind, base, Path(place, kind)) for kind in KINDS}
    content = {"environment": environment(), "losses": found}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
