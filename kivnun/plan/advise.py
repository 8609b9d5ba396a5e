"""Which technique to begin with: those that fit the device, as good on the measured task as any, the quickest of them.

    measured table + sizes + device -> candidates -> those that fit -> as good as the best -> the quickest -> a spec, with reasons

Next: `measured.py` (what was measured), `memory.py` and `time.py` (what is predicted).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kivnun.errors import SpecError
from kivnun.plan.bases import KnownBase
from kivnun.plan.devices import GIB, Device
from kivnun.plan.measured import MeasuredTable, Score, Task, told_apart
from kivnun.plan.memory import Shape, StepMemory, step_memory
from kivnun.plan.rows import TrainingRows
from kivnun.plan.techniques import TECHNIQUES, adapter_of
from kivnun.plan.time import AGAIN, GPU_SHARE, Work, cpu_seconds, gpu_seconds
from kivnun.plan.trained import trained_of
from kivnun.spec.adapters import AdapterSpec
from kivnun.spec.resolve import CPU_MICRO_BATCH, CPU_MICRO_BATCH_FROM, MIN_MICRO_BATCH, SMALL_BASE, TINY_BASE

SHARDABLE = ("full", "lora", "dora")  # that ZeRO divides (docs/concepts/zero.md)
NEAR = 1.1  # times the least: predictions differ from measurements by as much
OTHERS = 3
STEP_SPREAD = 1.2  # the largest step over the mean one


@dataclass(frozen=True, slots=True)
class Candidate:
    """A technique on the device: what it takes and what it got. Memory is of one process, above one at rest."""

    technique: str
    adapter: AdapterSpec
    shape: Shape
    memory: StepMemory
    seconds: float
    trained: int
    score: Score
    fits: bool

    @property
    def label(self) -> str:
        return TECHNIQUES[self.technique].label

    @property
    def how(self) -> str:
        """Return how a step is computed, in words."""
        parts = [f"{self.shape.pass_tokens:,} tokens a pass"]
        parts += ["layers again"] if self.shape.recompute else []
        return ", ".join([*parts, "ZeRO 3"] if self.shape.zero_stage else parts)

    @property
    def file_bytes(self) -> int:
        """Return what the result takes on a disk: a whole model in the precision it computes in, or an adapter in float32."""
        width = {"fp32": 4, "bf16": 2}.get(self.shape.precision, 4) if self.technique == "full" else 4
        return width * self.trained


@dataclass(frozen=True, slots=True)
class Advice:
    """What to begin with and why, three others, and all that were looked at."""

    chosen: Candidate
    others: tuple[tuple[str, Candidate], ...]
    reasons: tuple[str, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: a task like which one, on which base and device, with rows, epochs and rows a step. `speed` is this machine's
    beside one core of the reference's."""

    task: Task
    table: MeasuredTable
    base: KnownBase
    device: Device
    rows: TrainingRows
    epochs: int
    batch_rows: int
    speed: float = 1.0

    @property
    def timed(self) -> bool:
        """Return whether what the device computes a second is known."""
        return self.device.kind == "cpu" or self.device.flops is not None

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.rows.count // self.batch_rows)


def advise(question: Question) -> Advice:
    """Return the technique to begin with, and three others. Raises SpecError where nothing helps, or nothing that does fits."""
    candidates = tuple(_first_that_fits(question, technique) for technique in question.task.methods)
    helping = [candidate for candidate in candidates if candidate.score.gain_interval[0] > 0]
    if not helping:
        raise SpecError(
            f"no technique of the table of {question.table.date} beat the base on {question.task.name}",
            hint="give a table with more seeds or tokens (--matrix), or choose a task more like yours",
        )
    fitting = [candidate for candidate in helping if candidate.fits]
    if not fitting:
        raise _too_small(question, helping)
    best = max(fitting, key=lambda it: it.score.to_full)
    good = [it for it in fitting if it is best or not told_apart(it.score, best.score)]
    least = min(it.seconds for it in good)
    chosen = max((it for it in good if it.seconds <= NEAR * least), key=lambda it: it.score.to_full) if question.timed else best
    others = tuple(_others(question, chosen, best, helping))[:OTHERS]
    return Advice(chosen, others, tuple(_reasons(question, chosen, best, candidates)), candidates)


def _first_that_fits(question: Question, technique: str) -> Candidate:
    """Return a technique computed in the first of the ways that fits; where none does, in the one that takes least."""
    found = [_candidate(question, technique, shape) for shape in _shapes(question, technique)]
    return next((it for it in found if it.fits), min(found, key=lambda it: it.memory.peak))


def _candidate(question: Question, technique: str, shape: Shape) -> Candidate:
    sizes, device, adapter = question.base.sizes, question.device, adapter_of(technique)
    memory = step_memory(sizes, adapter, shape)
    work = Work(question.rows.tokens * question.epochs, question.steps, shape.pass_tokens)
    if device.kind == "cpu":
        slower = question.table.slower.get(technique, 1.0)
        seconds = cpu_seconds(sizes, adapter, shape.precision, work, slower=slower, speed=question.speed)
    elif device.flops is None:
        seconds = float("nan")
    else:
        seconds = gpu_seconds(sizes, adapter, work, GPU_SHARE[technique] * device.flops * device.count)
    seconds *= AGAIN if shape.recompute else 1.0
    numbers, fits = trained_of(sizes, adapter).numbers, memory.peak <= device.memory_bytes
    return Candidate(technique, adapter, shape, memory, seconds, numbers, question.task.methods[technique], fits)


def _shapes(question: Question, technique: str) -> Iterator[Shape]:
    """Yield the ways to compute a step, what costs nothing first: as `tune` would choose, in shorter passes, layers computed again,
    divided over all devices."""
    longest, device = min(question.rows.longest, question.base.sizes.longest), question.device
    # A pass holds no more than a step has, which varies with its rows.
    of_a_step = max(longest, round(STEP_SPREAD * question.batch_rows * question.rows.tokens / question.rows.count))
    usual, small = min(max(_micro_batch(question, technique), longest), of_a_step), max(512, longest)
    first = Shape(_precision(question, technique), usual, device.kind, processes=device.count)
    ways = [first, replace(first, pass_tokens=min(usual, small)), replace(first, pass_tokens=min(usual, small), recompute=True)]
    yield from ways
    if device.count > 1 and TECHNIQUES[technique].kind in SHARDABLE:
        yield from (replace(way, zero_stage=3) for way in ways)


def _precision(question: Question, technique: str) -> str:
    """Return the precision that `tune` chooses (`spec/resolve.py`), NF4 for a technique on codes."""
    if TECHNIQUES[technique].coded:
        return "nf4"
    return "fp32" if question.device.kind == "cpu" and question.base.sizes.numbers < SMALL_BASE else "bf16"


def _micro_batch(question: Question, technique: str) -> int:
    small = question.device.kind == "cpu" and question.base.sizes.numbers >= CPU_MICRO_BATCH_FROM
    return CPU_MICRO_BATCH[_precision(question, technique)] if small else MIN_MICRO_BATCH


def _others(
    question: Question, chosen: Candidate, best: Candidate, helping: Sequence[Candidate]
) -> Iterator[tuple[str, Candidate]]:
    """Yield other techniques, each with what speaks for it: first those that are first in something, then by score, those that do
    not fit last."""
    fitting = [candidate for candidate in helping if candidate.fits]
    smallest = [_candidate(question, it.technique, shape) for it in fitting for shape in _shapes(question, it.technique)]
    ranked = sorted(helping, key=lambda it: (not it.fits, -it.score.to_full))
    first = [
        ("the best score", best),
        ("the least memory", min(smallest, key=lambda it: it.memory.peak)),
        ("the fewest trained numbers", min(fitting, key=lambda it: it.trained)),
        *((("the next best score" if it.fits else "does not fit this device"), it) for it in ranked),
    ]
    if question.timed:
        first.insert(2, ("the least time", min(fitting, key=lambda it: it.seconds)))
    given = {chosen.technique}
    for why, candidate in first:
        if candidate.technique not in given:
            given.add(candidate.technique)
            yield why, candidate


def _reasons(question: Question, chosen: Candidate, best: Candidate, candidates: Sequence[Candidate]) -> Iterator[str]:
    task, table, device = question.task, question.table, question.device
    score, full = chosen.score, task.methods["full"]
    began = f"On {task.name} ({task.metric}) {chosen.label} came from {task.base:.3g} to {score.score:.3g}"
    gain = f"The gain over the base is {_interval(score.gain, score.gain_interval)}"
    if chosen.technique == "full":
        yield f"{began}. {gain}."
    else:
        beside = f"over full tuning {_interval(score.to_full, score.to_full_interval)}"
        yield f"{began}; full tuning came to {full.score:.3g}. {gain}, {beside}."
    if chosen is not best:
        yield (
            f"{best.label} scored best ({best.score.score:.3g}) and is not told apart from {chosen.label}; of those as "
            f"good, {chosen.label} takes the least time, or nearly."
        )
    size = question.base.sizes.numbers
    numbers = f"{chosen.trained:,} of {size:,} numbers are trained ({100 * chosen.trained / size:.3g} %)"
    yield f"{numbers}; the result is a file of {words_of_bytes(chosen.file_bytes)}."
    taken, there = words_of_bytes(chosen.memory.peak), words_of_bytes(device.memory_bytes)
    need = f"A step takes about {taken} above a process at rest, of {there}"
    whole = next((it for it in candidates if it.technique == "full"), None)
    if whole is not None and whole is not chosen:
        need += f"; full tuning would take {words_of_bytes(whole.memory.peak)}" + ("." if whole.fits else ", which does not fit.")
    else:
        need += "."
    yield need
    too_large = [it.label for it in candidates if not it.fits and it.technique != "full"]
    if too_large:
        yield f"Do not fit: {', '.join(too_large)}."
    if chosen.shape.recompute:
        yield "Layers are computed again in the backward pass, or it would not fit: a third more time."
    if chosen.shape.zero_stage:
        yield f"Weights, gradients and moments are divided over {device.count} devices (ZeRO 3), or it would not fit."
    rows, many = question.rows, f" x {device.count}" if device.count > 1 else ""
    how = "counted" if rows.counted else "estimated from letters: the base's tokenizer is not on this machine"
    yield (
        f"{_counted(rows.count, 'row')} with {rows.tokens:,} tokens ({how}), {_counted(question.epochs, 'epoch')}, "
        f"{_counted(question.steps, 'step')}: about {words_of_seconds(chosen.seconds)} of training on {device.name}{many}."
    )
    other = "" if question.base.name == table.base else " Another base may rank techniques otherwise: try the others, too."
    seeds = "one seed" if table.seeds == 1 else f"{table.seeds} seeds"
    yield f"Scores are of {table.base}, {seeds}, measured {table.date} ({table.command}).{other}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _interval(point: float, interval: tuple[float, float]) -> str:
    return f"{point:+.3g} ({interval[0]:.3g} to {interval[1]:.3g})"


def _too_small(question: Question, candidates: Sequence[Candidate]) -> SpecError:
    least = min(candidates, key=lambda it: it.memory.peak)
    device = question.device
    return SpecError(
        f"no technique fits {device.name} with {words_of_bytes(device.memory_bytes)}: {least.label} takes the least, "
        f"{words_of_bytes(least.memory.peak)} for passes of {least.shape.pass_tokens:,} tokens",
        hint="take a larger device, more of them (--devices), a smaller base, or shorter rows",
    )


def spec_tree(question: Question, candidate: Candidate, data: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of a candidate as a tree: what differs from what `tune` chooses by itself, and no more."""
    shape, kind, device = candidate.shape, TECHNIQUES[candidate.technique].kind, question.device
    tree: dict[str, Any] = {"version": 1, "base": question.base.name, "data": data, "adapter": {"kind": kind}}
    if shape.precision == "nf4":
        tree["base"] = {"model": question.base.name, "precision": "nf4"}
    schedule: dict[str, Any] = {"epochs": question.epochs, "batch_rows": question.batch_rows}
    if question.base.sizes.numbers < TINY_BASE:  # the rates of the sweep are for bases like the one it was made on
        schedule["learning_rate"] = candidate.score.learning_rate
    compute: dict[str, Any] = {}
    if device.count > 1:
        compute |= {"kind": "multi_process", "processes": device.count, "zero_stage": shape.zero_stage}
    if shape != next(_shapes(question, candidate.technique)):
        compute["micro_batch_tokens"] = shape.pass_tokens
    if shape.recompute:
        compute["activation_checkpointing"] = True
    tree |= {"schedule": schedule, "evaluation": evaluation, "seed": 7}
    return {**tree, "compute": compute} if compute else tree


def words_of_bytes(count: float) -> str:
    """Return a number of bytes as people read it."""
    if count >= 0.95 * GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


def words_of_seconds(seconds: float) -> str:
    """Return a duration as people read it."""
    if seconds != seconds:  # NaN
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} seconds" if seconds >= 1 else "a second"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
