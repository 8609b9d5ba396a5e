"""From what was asked to what will be done: every `auto` and null that stands for a choice is made, each with its reason.

What is still null afterwards means none: no validation, no limit on gradients, no checkpoints by steps. Resolving again with the
same facts changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from pydantic import ValidationError

from kivnun.spec.adapters import AdaloraSpec, FullSpec, LohaSpec, LokrSpec, LowRank, dropout_of
from kivnun.spec.base import is_hub_id
from kivnun.spec.catalogue import fields_of, why_of
from kivnun.spec.data import DataFormat
from kivnun.spec.objectives import ObjectiveKind
from kivnun.spec.problems import Problem, problems_of, spec_error
from kivnun.spec.read import validate
from kivnun.spec.section import Section
from kivnun.spec.sharding import sharding_choices, sharding_mismatches
from kivnun.spec.starting import StoredAdapter, start_choices, start_mismatches
from kivnun.spec.tune import TuneSpec
from kivnun.spec.yaml_text import write_yaml

SMALL_BASE = 500_000_000
TINY_BASE = 100_000_000
RSLORA_ALPHA = 8.0
KERNELS_OF = {"cpu": "native", "cuda": "triton"}
MIN_MICRO_BATCH = 4096
# Tokens of a pass on a CPU: products over more are no faster (docs/LOG.md, 2026-11-25). A pass of a small base is all overhead.
CPU_MICRO_BATCH = {"fp32": 512, "bf16": 640, "nf4": 4096, "int8": 4096}  # codes are decoded anew for each pass
CPU_MICRO_BATCH_FROM = 50_000_000  # parameters
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
MEMORY_SHARE = 8  # packed weights may take this part of the machine's memory
WHOLE_MODEL_RATE: dict[ObjectiveKind, float] = {"supervised": 2e-5, "pretraining": 2e-5, "dpo": 1e-6}
# A low-rank adapter's best rate is about ten times that of the whole model (Schulman et al. 2025, "LoRA Without Regret"). The fewer
# numbers are trained, the larger it is: measured on the built-in base (docs/LOG.md, 2026-11-27).
RATE_FACTOR = {
    **dict.fromkeys(("full",), 1),
    **dict.fromkeys(("lora", "dora"), 10),
    **dict.fromkeys(("adalora", "loha", "lokr", "ia3", "ln_tuning"), 100),
    **dict.fromkeys(("vera", "prompt", "prefix"), 500),
}


@dataclass(frozen=True, slots=True)
class PassChoice:
    """How a step's passes are computed where that is decided already: by the plan, to fit in memory, or when the run was begun.

    It holds where the spec leaves these options open; None leaves the usual choice."""

    micro_batch_tokens: int | None
    activation_checkpointing: bool
    reason: str


@dataclass(frozen=True, slots=True)
class ResolveFacts:
    """What is known of data, base and machine when a run starts.

    `objective_kind` is what the data's format is for, `max_seq_len` the longest row the base takes, `longest_row` the longest
    trainable row (for preferences, pair) in tokens, `device` what there is, `threads` how many cores the process may use,
    `data_format` the format the rows turned out to have (auto: not told), `stored_precision` the codes that the base's files hold
    (None: plain weights), `no_native_reason` and `no_triton_reason` why the kernels in C or in
    Triton cannot be used here (None: they can), `memory_bytes` the machine's memory (0: not known),
    `packs` the precisions whose weights the kernels in C read packed on this processor, `rows_turn_from` the length above which
    rows take LongRoPE's long factors (None: no row of the data is so long), `local_processes` how many processes of the run share
    this machine, `threads_before` what each had where the run was begun with another number of them, `deepspeed` the content of
    compute.deepspeed, `passes` what is decided of a step's passes already, `start` the adapter that adapter.start_from names.
    """

    objective_kind: ObjectiveKind
    max_seq_len: int
    longest_row: int
    base_parameters: int
    device: Literal["cpu", "cuda"]
    threads: int
    data_format: DataFormat = "auto"
    stored_precision: Literal["int8", "nf4"] | None = None
    no_native_reason: str | None = None
    no_triton_reason: str | None = None
    memory_bytes: int = 0
    packs: frozenset[str] = frozenset()
    rows_turn_from: int | None = None
    local_processes: int = 1
    threads_before: int | None = None
    deepspeed: Mapping[str, object] | None = None
    passes: PassChoice | None = None
    start: StoredAdapter | None = None

    def no_kernels_reason(self, kernels: str) -> str | None:
        """Return why kernels of this name cannot be used here; None: they can."""
        return {"native": self.no_native_reason, "triton": self.no_triton_reason}.get(kernels)


@dataclass(frozen=True, slots=True)
class _Choice:
    path: str
    value: object
    reason: str


def resolve(spec: TuneSpec, facts: ResolveFacts) -> tuple[TuneSpec, dict[str, str]]:
    """Return the spec with every open choice made, and for each option that was not given the reason for its value.

    Raises SpecError where the spec asks for what data, base or machine do not have.
    """
    problems = list(_mismatches(spec, facts))
    if problems:
        raise spec_error("spec", problems)
    tree = spec.to_tree()
    reasons = dict(_default_reasons(spec, ""))
    for choice in _choices(spec, facts):
        _put(tree, choice)
        reasons[choice.path] = choice.reason
    try:
        resolved = validate(tree)
    except ValidationError as error:
        raise spec_error("resolved spec", problems_of(error)) from None
    if spec.objective is None and resolved.objective is not None:
        reasons |= _default_reasons(resolved.objective, "objective.")
    return resolved, reasons


def resolved_yaml(spec: TuneSpec, reasons: Mapping[str, str]) -> str:
    """Return a resolved spec as YAML, with the reason behind every value that was not given."""
    return write_yaml(spec.to_tree(), reasons)


def _mismatches(spec: TuneSpec, facts: ResolveFacts) -> Iterator[Problem]:
    """Yield what the spec asks for that the facts do not allow."""
    objective, longest, budget = spec.objective, spec.data.max_seq_len, spec.compute.micro_batch_tokens
    if objective is not None and objective.kind != facts.objective_kind:
        text = f"objective is {objective.kind}, but the data's format is for {facts.objective_kind}"
        yield Problem("objective", text, "leave objective out, or train on data of the format it needs")
    if longest is not None and longest > facts.max_seq_len:
        text = f"data.max_seq_len must be at most {facts.max_seq_len}, the longest row this base takes, got {longest}"
        yield Problem("data.max_seq_len", text, "leave it out to use all that the base takes")
    if budget is not None and budget < facts.longest_row:
        text = f"compute.micro_batch_tokens must be at least {facts.longest_row}, the longest row of the data, got {budget}"
        yield Problem(
            "compute.micro_batch_tokens", text, "raise it, or lower data.max_seq_len and say in data.over_long what happens"
        )
    yield from _kernel_mismatches(spec, facts)
    yield from _packing_mismatches(spec, facts)
    yield from _sharing_mismatches(spec, facts)
    yield from start_mismatches(spec.adapter, facts.start)
    yield from sharding_mismatches(spec, _device(spec, facts), _precision_of(spec, facts), facts.deepspeed)
    stored, precision = facts.stored_precision, spec.base.precision
    if stored is not None and precision not in ("auto", stored):
        text = f"base.precision is {precision}, but the base is stored in {stored} and loads as it is"
        yield Problem("base.precision", text, f"leave it out or set it to {stored}, or use the model it was made from")
    if stored is not None and isinstance(spec.adapter, FullSpec):
        text = f"adapter is full, but the base is stored in {stored}, which cannot be trained"
        yield Problem("adapter", text, "choose an adapter such as lora, or use the model it was made from")
    if spec.compute.device == "cuda" and facts.device != "cuda":
        text = "compute.device is cuda, but no CUDA device was found"
        hint = "choose auto or cpu; kivnun doctor says what this machine offers"
        yield Problem("compute.device", text, hint, page="16-cuda-without-gpu")


def _kernel_mismatches(spec: TuneSpec, facts: ResolveFacts) -> Iterator[Problem]:
    compute, device = spec.compute, _device(spec, facts)
    if compute.kernels in ("auto", "torch"):
        return
    reason = facts.no_kernels_reason(compute.kernels) if compute.kernels == KERNELS_OF[device] else f"the run computes on {device}"
    if reason is not None:
        text = f"compute.kernels is {compute.kernels}, but {reason}"
        yield Problem("compute.kernels", text, f"leave it out: {KERNELS_OF[device]} or torch is chosen for {device}")


def _packing_mismatches(spec: TuneSpec, facts: ResolveFacts) -> Iterator[Problem]:
    if spec.compute.packed_weights and (reason := _never_packed(spec, facts)) is not None:
        yield Problem("compute.packed_weights", f"compute.packed_weights is true, but {reason}", "leave it out")


def _sharing_mismatches(spec: TuneSpec, facts: ResolveFacts) -> Iterator[Problem]:
    if not spec.compute.share_prefixes:
        return
    path, off = "compute.share_prefixes", "leave compute.share_prefixes out"
    dropout = dropout_of(spec.adapter)
    if dropout:
        text = f"{path} is true, but adapter.dropout is {dropout:g}: every row draws for itself, so that no two begin alike"
        yield Problem(path, text, f"set adapter.dropout to 0, or {off}")
    turns = facts.rows_turn_from
    if turns is not None and spec.base.rope_factors == "per_row":
        text = f"{path} is true, but rows of more than {turns:,} tokens take other rope factors than shorter ones"
        yield Problem(path, text, f"set base.rope_factors to long or short, lower data.max_seq_len to {turns}, or {off}")


def _choices(spec: TuneSpec, facts: ResolveFacts) -> Iterator[_Choice]:
    """Yield a value and a reason for each option that was left open."""
    device = _device(spec, facts)
    if spec.base.revision is None and is_hub_id(spec.base.model):
        yield _Choice("base.revision", "main", "the hub's default branch; the manifest records the hash of the weights themselves")
    if spec.base.precision == "auto":
        yield _precision(device, facts)
    if spec.data.format == "auto" and facts.data_format != "auto":
        yield _Choice("data.format", facts.data_format, "what the keys of the rows say")
    if spec.data.max_seq_len is None:
        yield _Choice("data.max_seq_len", facts.max_seq_len, "the longest row this base takes")
    if spec.objective is None:
        yield _Choice("objective", {"kind": facts.objective_kind}, "what the format of the data is for")
    if facts.start is None:
        yield from _adapter_choices(spec)
    for choice in start_choices(spec.adapter, facts.start):
        yield _Choice(*choice)
    yield from _schedule_choices(spec, facts)
    if spec.compute.device == "auto":
        found = "a CUDA device was found" if device == "cuda" else "no CUDA device was found"
        yield _Choice("compute.device", device, found)
    if spec.compute.kernels == "auto":
        best = KERNELS_OF[device]
        reason = facts.no_kernels_reason(best)
        yield _Choice("compute.kernels", best if reason is None else "torch", reason or "built on this machine and found right")
    if spec.compute.threads is None:
        yield _threads(facts)
    if spec.compute.micro_batch_tokens is None:
        yield _micro_batch(spec, facts)
    if spec.compute.activation_checkpointing is None:
        yield _checkpointing(facts.passes)
    if spec.compute.packed_weights is None:
        yield _packed_weights(spec, facts)
    for choice in sharding_choices(spec, facts.base_parameters, facts.deepspeed):
        yield _Choice(*choice)


def _threads(facts: ResolveFacts) -> _Choice:
    if facts.threads_before is not None:
        return _Choice("compute.threads", facts.threads_before, "as the run was begun with")
    if facts.local_processes > 1:
        share = max(1, facts.threads // facts.local_processes)
        return _Choice("compute.threads", share, f"{facts.threads} cores shared by {facts.local_processes} processes")
    return _Choice("compute.threads", facts.threads, "cores this process may use; pinned, since sums depend on it")


def _device(spec: TuneSpec, facts: ResolveFacts) -> str:
    return facts.device if spec.compute.device == "auto" else spec.compute.device


def _precision_of(spec: TuneSpec, facts: ResolveFacts) -> str:
    return str(_precision(_device(spec, facts), facts).value) if spec.base.precision == "auto" else spec.base.precision


def _checkpointing(passes: PassChoice | None) -> _Choice:
    if passes is None:
        return _Choice("compute.activation_checkpointing", False, "nothing says that memory is short")
    return _Choice("compute.activation_checkpointing", passes.activation_checkpointing, passes.reason)


def _micro_batch(spec: TuneSpec, facts: ResolveFacts) -> _Choice:
    if facts.passes is not None and facts.passes.micro_batch_tokens is not None:
        return _Choice("compute.micro_batch_tokens", facts.passes.micro_batch_tokens, facts.passes.reason)
    share = spec.compute.share_prefixes
    small = _device(spec, facts) == "cpu" and facts.base_parameters >= CPU_MICRO_BATCH_FROM and not share
    least = CPU_MICRO_BATCH[_precision_of(spec, facts)] if small else MIN_MICRO_BATCH
    why = "; more are no faster on a CPU" if small else "; each pass computes shared beginnings anew" if share else ""
    tokens = max(least, facts.longest_row)
    return _Choice(
        "compute.micro_batch_tokens", tokens, f"the larger of {least} and the longest row ({facts.longest_row} tokens){why}"
    )


def _packed_weights(spec: TuneSpec, facts: ResolveFacts) -> _Choice:
    reason = _never_packed(spec, facts)
    if reason is not None:
        return _Choice("compute.packed_weights", False, reason)
    size = 2 * WEIGHT_BYTES[_precision_of(spec, facts)] * facts.base_parameters
    fits, sizes = size * MEMORY_SHARE <= facts.memory_bytes, f"{size / 2**30:.1f} of {facts.memory_bytes / 2**30:.0f} GiB of memory"
    return _Choice(
        "compute.packed_weights", fits, f"they take {sizes}" if fits else f"they would take {sizes}, more than an eighth"
    )


def _never_packed(spec: TuneSpec, facts: ResolveFacts) -> str | None:
    """Return why weights cannot be packed in this run; None: they can."""
    precision = _precision_of(spec, facts)
    if isinstance(spec.adapter, FullSpec):
        return "weights that are trained are not packed"
    if precision not in WEIGHT_BYTES:
        return f"weights in {precision} are decoded before every product"
    if _device(spec, facts) != "cpu" or spec.compute.kernels == "torch" or facts.no_native_reason is not None:
        return "only kernels in C read packed weights"
    if precision not in facts.packs:
        return f"this processor lacks the instructions for packed products in {precision}"
    return None


def _precision(device: str, facts: ResolveFacts) -> _Choice:
    if facts.stored_precision is not None:
        return _Choice("base.precision", facts.stored_precision, "as the base is stored")
    size = f"{facts.base_parameters / 1e6:.1f} M parameters"
    if device == "cpu" and facts.base_parameters < SMALL_BASE:
        return _Choice(
            "base.precision", "fp32", f"on a CPU, and the base has {size}: below 500 M memory is no concern and exactness is"
        )
    where = "on a GPU" if device == "cuda" else f"on a CPU, and the base has {size}: from 500 M on memory is the concern"
    return _Choice("base.precision", "bf16", f"{where}; half the memory of fp32")


def _adapter_choices(spec: TuneSpec) -> Iterator[_Choice]:
    adapter = spec.adapter
    if not isinstance(adapter, LowRank | LohaSpec | LokrSpec | AdaloraSpec) or adapter.alpha is not None:
        return
    if isinstance(adapter, LowRank) and adapter.rslora:
        reason = "with rslora alpha does not follow the rank; 8 scales rank 16 as plain LoRA's default does, by 2"
        yield _Choice("adapter.alpha", RSLORA_ALPHA, reason)
    else:
        yield _Choice("adapter.alpha", 2.0 * adapter.rank, "2 * rank: the update's scale alpha / rank is 2 whatever the rank")


def _schedule_choices(spec: TuneSpec, facts: ResolveFacts) -> Iterator[_Choice]:
    schedule = spec.schedule
    if schedule.epochs is None and schedule.steps is None:
        yield _Choice("schedule.epochs", 3, "neither epochs nor steps was given: small sets need a few passes")
    if schedule.batch_rows is None and schedule.batch_tokens is None:
        yield _Choice("schedule.batch_rows", 16, "neither batch_rows nor batch_tokens was given: steady gradients, enough steps")
    if schedule.learning_rate is None:
        yield _learning_rate(spec, facts)


def default_rate(objective: ObjectiveKind, kind: str, *, tiny: bool) -> float:
    """Return the learning rate used when none is given.

    The usual one for tuning a whole model, times the adapter's factor, times ten for a base below 100 M parameters (the built-in
    base's best with LoRA was measured near 4e-3).
    """
    return float(f"{WHOLE_MODEL_RATE[objective] * RATE_FACTOR[kind] * (10 if tiny else 1):.3g}")


def rate_table() -> list[tuple[str, str, float, float]]:
    """Return (objective, adapters, rate, rate for a tiny base) for every default there is."""
    rows: list[tuple[str, str, float, float]] = []
    for objective in WHOLE_MODEL_RATE:
        for factor in dict.fromkeys(RATE_FACTOR.values()):
            kinds = [kind for kind, its in RATE_FACTOR.items() if its == factor]
            large, small = (default_rate(objective, kinds[0], tiny=tiny) for tiny in (False, True))
            rows.append((objective, ", ".join(kinds), large, small))
    return rows


def _learning_rate(spec: TuneSpec, facts: ResolveFacts) -> _Choice:
    kind, tiny = spec.adapter.kind, facts.base_parameters < TINY_BASE
    why = [f"the usual rate for {facts.objective_kind} tuning of a whole model"]
    if RATE_FACTOR[kind] != 1:
        why.append(f"times {RATE_FACTOR[kind]} for {kind}")
    if tiny:
        why.append("times 10 for a base below 100 M parameters")
    return _Choice("schedule.learning_rate", default_rate(facts.objective_kind, kind, tiny=tiny), ", ".join(why))


def _default_reasons(section: Section, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield, for every option that was not given, the reason for its default."""
    for name, field in fields_of(type(section)).items():
        value = cast("object", getattr(section, name))
        if isinstance(value, Section):
            yield from _default_reasons(value, f"{prefix}{name}.")
        elif name not in section.model_fields_set and why_of(field):
            yield prefix + name, why_of(field)


def _put(tree: dict[str, object], choice: _Choice) -> None:
    *sections, name = choice.path.split(".")
    here = tree
    for section in sections:
        here = cast("dict[str, object]", here[section])
    here[name] = choice.value
