"""The result: a dated table and its numbers, written anew after every row, so that a run that is cut off loses nothing."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from benchmarks.gpu.correct import Check
from benchmarks.gpu.measure import Measured

ROOT = Path(__file__).parents[2]
COLUMNS = ("model", "method", "lengths", "side", "activations", "tokens a pass", "tokens/s (lowest, highest)", "MFU",
           "peak GiB (reserved)", "first loss")  # fmt: skip


@dataclass(slots=True)
class Report:
    """What has been found so far. `facts` are lines about the machine and what computes."""

    device: str
    command: str
    facts: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    rows: list[Measured] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        wrong = [check for check in self.checks if not check.passed]
        lines = [
            f"# LoRA and QLoRA on {self.device}",
            "",
            f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}, Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}. Made by `{self.command}`.",
            "",
            *(f"- {fact}" for fact in self.facts),
            f"- Against float64 on the CPU: {len(self.checks) - len(wrong)} of {len(self.checks)} comparisons hold"
            + (
                f"; largest share of its tolerance {max(c.difference / c.tolerance for c in self.checks):.2f}"
                if self.checks
                else ""
            ),
            *(f"- {check}" for check in wrong),
            "",
            "Tokens are those of rows, padding is not counted. MFU counts 4 operations per weight and token and the causal half of "
            "attention, of the dense bfloat16 peak; neither the adapter's operations nor what is computed twice.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * 5 + "---:|" * (len(COLUMNS) - 5),
            *("| " + " | ".join(_cells(row)) + " |" for row in self.rows),
            "",
            *ratios(self.rows),
            *(f"- Not measured: {what}" for what in self.left_out),
            *(f"- Failed: {what}" for what in self.failed),
        ]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, object]:
        return {
            "device": self.device, "date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit(), "command": self.command,
            "facts": self.facts, "left_out": self.left_out, "failed": self.failed, "rows": [row.as_json() for row in self.rows],
            "checks": [{"name": c.name, "difference": c.difference, "tolerance": c.tolerance} for c in self.checks],
        }  # fmt: skip

    def save(self, folder: Path) -> Path:
        """Write both files; return the table's."""
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        path = folder / f"gpu_{name}_{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text(self.markdown(), encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        return path


def ratios(rows: Sequence[Measured]) -> list[str]:
    """Return, for each case of ours that a peer was measured on, how many times its tokens per second ours are."""
    lines = []
    for ours in (row for row in rows if row.side == "Kivnun" and row.tokens_per_s):
        case = (ours.model, ours.method, ours.lengths)
        peers: dict[str, float] = {}
        for row in rows:
            if (row.model, row.method, row.lengths) == case and row.side != "Kivnun" and row.tokens_per_s:
                peers[row.side] = max(peers.get(row.side, 0.0), row.tokens_per_s)
        if peers:
            share = ", ".join(f"{ours.tokens_per_s / peer:.2f} x {side}" for side, peer in peers.items())  # type: ignore[operator]
            lines.append(f"- {' '.join(case)}, activations {_activations(ours)}: {share} (each peer at its best)")
    return lines


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _activations(row: Measured) -> str:
    return "computed again" if row.recompute else "kept"


def _cells(row: Measured) -> list[str]:
    named = [row.model, row.method, row.lengths, row.side, _activations(row)]
    if row.tokens_per_s is None or row.slowest is None or row.fastest is None:
        return [*named, "", row.note, "", "", ""]
    memory = "" if row.allocated_bytes is None else f"{row.allocated_bytes / 2**30:.1f} ({(row.reserved_bytes or 0) / 2**30:.1f})"
    return [
        *named, f"{row.pass_tokens:,}", f"{row.tokens_per_s:,.0f} ({row.slowest:,.0f}, {row.fastest:,.0f})",
        "" if row.mfu is None else f"{row.mfu:.1%}", memory, "" if row.loss is None else f"{row.loss:.4f}",
    ]  # fmt: skip
