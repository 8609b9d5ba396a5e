"""`python -m benchmarks.gpu`: is it right, then how fast: LoRA and QLoRA of Phi's shapes on a CUDA device, beside TRL or PEFT.

Small models are compared with float64 on the CPU first, and nothing is measured unless they agree. `--quick` stays under eight
minutes. With `--device cpu` tiny shapes are trained, to try the command where no device is: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import trl
from benchmarks.gpu.correct import check_all
from benchmarks.gpu.measure import FULL, QUICK, Measured, measure
from benchmarks.gpu.shapes import LENGTHS, MODELS, STEP_TOKENS, TINY, draw_rows, peak_flops
from benchmarks.gpu.sides import Absent, Ours, Peft, Side
from benchmarks.gpu.table import Report
from kivnun.model.varlen import varlen_or_reason

RESULTS = Path(__file__).parents[1] / "results"
PADDED, PADDING_FREE = "padded", "padding-free"


@dataclass(frozen=True, slots=True)
class Section:
    """A model that one side opens once, and the rows it then trains on."""

    model: str
    precision: str
    recompute: bool
    side: str
    lengths: Sequence[str]

    @property
    def method(self) -> str:
        return "QLoRA" if self.precision == "nf4" else "LoRA"

    def __str__(self) -> str:
        return f"{self.side}, {self.model} {self.method}, activations {'computed again' if self.recompute else 'kept'}"


def sections(peers: Sequence[str], quick: bool) -> list[Section]:
    """Return what is measured, the most asked-for first: a run that is cut off has that."""
    phi4, mixed = "phi-4-mini", ("4096", "mixed")
    sides = ("Kivnun", *peers)
    asked = [Section(phi4, "bf16", False, side, LENGTHS) for side in sides]
    asked += [Section(phi4, "bf16", True, side, mixed) for side in sides]
    asked += [Section(phi4, "nf4", recompute, "Kivnun", mixed) for recompute in (False, True)]
    asked += [Section("phi-3-medium", precision, True, "Kivnun", mixed) for precision in ("bf16", "nf4")]
    asked += [Section("phi-3-mini", "bf16", False, side, mixed) for side in sides]
    if quick:
        return asked
    asked += [Section(phi4, "nf4", True, side, mixed) for side in peers]
    asked += [Section("phi-3-mini", "bf16", True, side, LENGTHS) for side in sides]
    asked += [Section("phi-3-mini", "nf4", True, side, mixed) for side in sides]
    asked += [Section("phi-3-medium", precision, True, side, mixed) for precision in ("bf16", "nf4") for side in peers]
    return [*asked, Section("phi-3-medium", "bf16", False, "Kivnun", mixed)]


def opener(section: Section, device: str) -> Callable[[], Side]:
    """Return what opens a section's side."""
    shape = TINY if device == "cpu" else MODELS[section.model]
    given = (shape, section.model == "phi-4-mini", section.precision, section.recompute, device)
    if section.side == "Kivnun":
        return lambda: Ours(*given)
    padding_free = section.side.endswith(PADDING_FREE)
    return lambda: (trl.Trl if section.side.startswith("TRL") else Peft)(*given, padding_free)


def main(arguments: list[str] | None = None) -> int:
    began, options = time.monotonic(), _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here (torch.cuda.is_available() is false)", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", category=FutureWarning)
    report = _opened_report(options)
    report.checks = check_all(options.device, ("fp32", "bf16") if options.device == "cpu" else ("fp32", "bf16", "nf4"))
    print(*report.checks, sep="\n", flush=True)
    if not all(check.passed for check in report.checks):
        print(f"wrong results: nothing is measured; {report.save(options.output)}", file=sys.stderr)
        return 2
    if not options.check_only:
        _measure_all(report, options, began)
    path = report.save(options.output)
    print(f"\n{report.markdown()}\nwritten to {path}")
    return 1 if report.failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under eight minutes: fewer cases, three steps each")
    parser.add_argument("--check-only", action="store_true", help="compare with the CPU, measure nothing")
    parser.add_argument("--skip-peers", action="store_true", help="measure Kivnun alone")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), help="of these shapes only")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes, to try the command")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the dated files go")
    parser.add_argument("--budget-s", type=float, default=None, help="begin nothing after so many seconds (420 with --quick)")
    return parser.parse_args(arguments)


def _opened_report(options: argparse.Namespace) -> Report:
    on_cuda = options.device == "cuda"
    name = torch.cuda.get_device_name() if on_cuda else f"CPU {platform.machine()} (tiny shapes, only tried)"
    facts = [*_device_facts(name)] if on_cuda else []
    why = trl.missing()
    facts.append(f"peers: {'transformers and PEFT in a plain loop (' + why + ')' if why else 'TRL'}")
    words = [word for word in ("--quick",) if options.quick]
    return Report(name, " ".join(["python -m benchmarks.gpu", *words]), facts)


def _device_facts(name: str) -> list[str]:
    peak, whole = peak_flops(name), varlen_or_reason(torch.device("cuda"))
    shown = "unknown, so no MFU" if peak is None else f"{peak / 1e12:.0f} TFLOP/s"
    facts = [f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB, dense bfloat16 peak {shown}"]
    if isinstance(whole, str):
        return [*facts, f"attention row by row: {whole}"]
    heads = "grouped heads as they are" if whole.groups is not None else "keys repeated for grouped heads"
    return [*facts, f"attention: torch's variable-length, {heads}, windows {'served' if whole.windows else 'row by row'}"]


def _measure_all(report: Report, options: argparse.Namespace, began: float) -> None:
    budget = options.budget_s or (420.0 if options.quick else 1e9)
    library = "PEFT" if trl.missing() else "TRL"
    # PEFT without padding is there in any case: with torch's attention for packs it may be the stronger one.
    peers = (
        []
        if options.skip_peers
        else list(dict.fromkeys([f"{library} {PADDED}", f"{library} {PADDING_FREE}", f"PEFT {PADDING_FREE}"]))
    )
    for section in sections(peers, options.quick):
        if options.models and section.model not in options.models:
            continue
        if time.monotonic() - began > budget:
            report.left_out.append(f"{section}: the time was up")
            continue
        try:
            _measure_section(report, section, options)
        except Exception as error:  # others' rows are worth having all the same; the exit status tells
            traceback.print_exc()
            report.failed.append(f"{section}: {type(error).__name__}: {str(error)[:200]}")
        gc.collect()  # models are cycles, and the next one needs the memory
        if options.device == "cuda":
            torch.cuda.empty_cache()


def _measure_section(report: Report, section: Section, options: argparse.Namespace) -> None:
    on_cuda = options.device == "cuda"
    shape = MODELS[section.model] if on_cuda else TINY
    effort, shrink = QUICK if options.quick else FULL, 1 if on_cuda else 64
    try:
        side = opener(section, options.device)()
    except (Absent, torch.cuda.OutOfMemoryError) as error:
        report.left_out.append(f"{section}: {error if isinstance(error, Absent) else 'the model does not fit into memory'}")
        return
    for lengths in section.lengths:
        named = Measured(section.model, section.method, lengths, section.side, section.recompute)
        rows = draw_rows(shape, lengths, shrink)
        row = measure(side, rows, effort, named, shape, peak_flops(report.device), STEP_TOKENS // shrink)
        report.rows.append(row)
        report.save(options.output)
        print(f"{section}, {lengths}: {row.note or f'{row.tokens_per_s:,.0f} tokens/s'}", flush=True)
    fact = f"{section.side}: " + ", ".join(f"{name} {value}" for name, value in side.facts.items())
    report.facts = list(dict.fromkeys([*report.facts, fact]))


if __name__ == "__main__":
    sys.exit(main())
