"""Row 7 of the table: the peak bytes of a training step, by part, over rows and tokens, each point in a process of its own.

One JSON file a point, written when it is known, so that a measurement that was stopped goes on where it was. The processes are
forks of one that has imported the libraries (`memory_probe.py`); this file loads no torch.
Next: `memory_summary.py` (laws, crossings and the cells of the table), `charts.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from kivnun.artifacts import atomic_write, make_folder
from kivnun.errors import IntegrityError
from kivnun.plan.techniques import TECHNIQUES

PARTS = ("weights", "adapter", "gradients", "moments", "activations", "workspace")
MAIN = ("full", "lora", "qlora", "dora")
REFERENCE = (8, 128)  # rows and tokens a row at which ratios are told
REPEATS = 3
# What the command line sets from within (`kivnun/cli/process.py`); glibc reads these from outside.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1), "MALLOC_TOP_PAD_": str(64 << 20)}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
TIMEOUT_S = 600  # of one point

OnProgress = Callable[[str, int, int], None]  # what is measured next, how many points are done, of how many


@dataclass(frozen=True, slots=True)
class Form:
    """What points have in common that may be laid beside one another: all but the technique, the pass and the repeat."""

    model: str
    precision: str
    kernels: str = "auto"
    packed: bool = False
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """What one process does: steps of a technique on a model, of so many rows of so many tokens in one pass.

    `precision` is what the model computes in; a technique on codes holds its base in NF4 beside that. `kernels` are "auto" or
    "torch", `packed` says whether frozen weights are kept as the kernels read them, for twice their bytes, `recompute` whether
    layers keep their inputs alone and are computed again in the backward pass (what they keep meanwhile counts as workspace).
    """

    model: str
    technique: str
    precision: str
    rows: int
    tokens: int
    kernels: str = "auto"
    packed: bool = False
    recompute: bool = False
    repeat: int = 0

    @property
    def form(self) -> Form:
        return Form(self.model, self.precision, self.kernels, self.packed, self.recompute)

    @property
    def pass_tokens(self) -> int:
        return self.rows * self.tokens

    @property
    def name(self) -> str:
        form = "-packed" * self.packed + "-recompute" * self.recompute
        return f"{self.model}-{self.precision}-{self.kernels}{form}-{self.technique}-{self.rows}x{self.tokens}-{self.repeat}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a process found out. All memory is in bytes above the same process at rest, before it had a model.

    `parts` add up to `peak`: gradients, moments and activations as they stood when these were the most together, and as workspace
    the rest of the peak (what operations need for a moment, copies made for products, what the allocator keeps between). `whole`
    are gradients, moments and activations in full, which need not be there at once: a backward pass uses activations up while
    it makes gradients.
    """

    peak: int
    parts: dict[str, int]
    whole: dict[str, int]
    parameters: int  # of the base
    trained: int  # numbers that the optimizer updates
    wall_s: float  # of the last step
    cpu_s: float
    loss: float


@dataclass(frozen=True, slots=True)
class Surface:
    """All points that were measured."""

    points: dict[Point, Measured]

    @classmethod
    def load(cls, folder: Path) -> Surface:
        """Return what a folder holds, in the order of names. Raises IntegrityError for a file that is no point."""
        found = (_read(file) for file in sorted(folder.glob("*.json")))
        return cls(dict(pair for pair in found if pair is not None))

    def of(self, technique: str, form: Form) -> dict[Point, Measured]:
        """Return a technique's points of a form, by rows, tokens and repeat."""
        found = [p for p in self.points if p.technique == technique and p.form == form]
        return {point: self.points[point] for point in sorted(found, key=lambda p: (p.rows, p.tokens, p.repeat))}


def plan(quick: bool) -> list[Point]:
    """Return the points to measure, the reference first, in an order that never changes."""
    return _quick_plan() if quick else _full_plan()


def _quick_plan() -> list[Point]:
    """Return what takes about a minute: the reference, repeated for the table's own techniques, and a smaller and a larger pass."""
    repeats = [
        Point("9m", name, "bf16", *REFERENCE, repeat=repeat)
        for repeat in range(REPEATS)
        for name in TECHNIQUES
        if repeat == 0 or name in MAIN
    ]
    small = [Point("9m", name, "bf16", 2, 128) for name in TECHNIQUES]
    return [*repeats, *small, *(Point("9m", name, "bf16", 32, 128) for name in MAIN)]


def _full_plan() -> list[Point]:
    """Return the reference, repeated; a grid of rows by tokens; and parts of it with layers computed again, on torch's own
    operations, in float32, with packed weights, and on a larger model."""

    def at(*places: tuple[int, int], names: Iterable[str] = MAIN, **form: Any) -> list[Point]:
        given = {"model": "28m", "precision": "bf16", **form}
        return [Point(technique=name, rows=rows, tokens=tokens, **given) for rows, tokens in places for name in names]

    corner, far, small, long = (32, 128), (64, 128), (2, 128), (2, 1024)
    others = [name for name in TECHNIQUES if name not in MAIN]
    single = ("full", "lora", "dora")  # codes compute in bfloat16 alone
    return [
        *(point for repeat in range(REPEATS) for point in at(REFERENCE, repeat=repeat)),
        *at(small, corner, long),
        *at(small, REFERENCE, corner, long, names=("full", "lora"), recompute=True),
        # Where LoRA, keeping all it needs, takes more than full tuning that does not: the published case.
        *at(far, names=("lora", "full")),
        *at(far, names=("full",), recompute=True),
        *at(REFERENCE, long, kernels="torch"),
        *at(REFERENCE, corner, small, names=single, precision="fp32"),
        *at(REFERENCE, names=("lora", "dora"), packed=True),
        *at(REFERENCE, model="71m"),
        *at(REFERENCE, names=single, model="71m", precision="fp32"),
        *at(REFERENCE, small, names=others),
        *at((32, 32)),
        *at((2, 32), names=TECHNIQUES),
        *at(corner, names=others),
        *(point for repeat in range(1, REPEATS) for point in at(REFERENCE, names=others, repeat=repeat)),
    ]


def measure_memory(folder: Path, quick: bool, on_progress: OnProgress = lambda *_: None) -> Surface:
    """Measure the plan's points that the folder lacks, write each as it is known, and return all of the plan's."""
    return measure(folder, plan(quick), on_progress)


def measure(folder: Path, points: Sequence[Point], on_progress: OnProgress = lambda *_: None) -> Surface:
    """Measure those of the points that the folder lacks. Raises ProbeFailed with what the process said."""
    make_folder(folder)
    missing = [point for point in points if not (folder / f"{point.name}.json").exists()]
    if missing:
        with _probe() as ask:
            for number, point in enumerate(missing):
                on_progress(point.name, len(points) - len(missing) + number, len(points))
                text = {"point": asdict(point), "measured": asdict(ask(point))}
                atomic_write(folder / f"{point.name}.json", json.dumps(text, indent=1) + "\n")
    known = Surface.load(folder).points
    return Surface({point: known[point] for point in points})


class ProbeFailed(RuntimeError):
    """A measuring process ended without a result; the message is the last line of what it said."""


@contextmanager
def _probe() -> Iterator[Callable[[Point], Measured]]:
    """Give a function that measures a point in a process of its own, one after the other."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryFile("w+") as said:
        probe = subprocess.Popen(
            [sys.executable, "-m", "kivnun.matrix.memory_probe", work],
            env=inherited | ALLOCATOR | ONE_THREAD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        assert probe.stdin is not None
        assert probe.stdout is not None
        to_probe, from_probe = probe.stdin, probe.stdout

        def ask(point: Point) -> Measured:
            to_probe.write(json.dumps(asdict(point)) + "\n")
            to_probe.flush()
            answer = from_probe.readline()
            if not answer:
                raise ProbeFailed(f"{point.name}: {_last_line(said)}")
            return Measured(**json.loads(answer))

        try:
            yield ask
        finally:
            to_probe.close()
            from_probe.close()
            probe.kill()
            probe.wait()


def _last_line(said: IO[str]) -> str:
    said.seek(0)
    lines = [line for line in said.read().splitlines() if line.strip()]
    return lines[-1] if lines else "the process ended without a word"


def _read(file: Path) -> tuple[Point, Measured] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return (Point(**content["point"]), Measured(**content["measured"])) if "point" in content else None
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{file} is no point of a memory surface: {error}", hint="delete it: it is measured anew") from error
