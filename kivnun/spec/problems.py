"""From what validation found to what the user reads: every problem with its path, line, value, what is allowed, and a hint."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from kivnun.errors import SpecError
from kivnun.spec.catalogue import Model, allowed_text, fields_of, holds_many, kind_of, models_in, options
from kivnun.spec.section import as_list, as_mapping
from kivnun.spec.tune import TuneSpec
from kivnun.spec.yaml_text import Location, write_scalar

ELSEWHERE = {
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "base_model": "base",
    "batch_size": "batch_rows",
    "bf16": "precision",
    "chat_template": "template",
    "chat_template_jinja": "template",
    "chat_template_path": "template",
    "cosine_min_lr_ratio": "schedule.final_share",
    "cutoff_len": "max_seq_len",
    "dataset": "train",
    "dataset_dir": "train",
    "dataset_name": "train",
    "datasets": "train",
    "dpo_beta": "beta",
    "eval_dataset": "validation",
    "eval_steps": "evaluation.every_steps",
    "evals_per_epoch": "evaluation.every_steps",
    "excess_length_strategy": "over_long",
    "finetuning_type": "adapter.kind",
    "fp16": "precision",
    "gradient_accumulation_steps": "batch_rows",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_clipping": "max_grad_norm",
    "init_lora_weights": "init",
    "interleave_probs": "share",
    "load_in_4bit": "precision",
    "load_in_8bit": "precision",
    "lora_alpha": "alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_target": "target_modules",
    "lora_target_linear": "target_modules",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "lr_scheduler": "decay",
    "lr_scheduler_type": "decay",
    "max_length": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "max_steps": "steps",
    "method": "adapter",
    "micro_batch_size": "batch_rows",
    "model_name": "base",
    "model_name_or_path": "base",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "peft_use_dora": "adapter.kind",
    "peft_use_rslora": "rslora",
    "per_device_train_batch_size": "batch_rows",
    "pissa_init": "init",
    "pref_beta": "beta",
    "quantization_bit": "precision",
    "r": "rank",
    "revision_of_model": "revision",
    "rl": "objective",
    "rl_beta": "beta",
    "save_steps": "checkpoints.every_steps",
    "save_total_limit": "keep",
    "saves_per_epoch": "checkpoints.every_steps",
    "scheduler": "decay",
    "sequence_len": "max_seq_len",
    "stage": "objective",
    "test_datasets": "validation",
    "tf32": "precision",
    "train_file": "train",
    "use_dora": "adapter.kind",
    "use_rslora": "rslora",
    "val_set_size": "validation",
    "val_size": "validation",
    "warmup_ratio": "warmup_share",
    "warmup_steps": "warmup_share",
}
"""Names that other tools give to our options (docs/guides/moving.md): a path's last part, or all of it where several end so."""

MISSPELT, WRONG_TYPE = "01-misspelt-key", "02-wrong-type"  # pages of docs/mistakes
BOOLEAN_WORDS = ("on", "off", "yes", "no", "y", "n", "true", "false")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a spec. `message` begins with the dotted path."""

    path: str
    message: str
    hint: str | None = None
    line: int = 0
    page: str | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a validation error stands: the path as the user writes it, the section around it, its field."""

    path: Location
    model: Model
    field: FieldInfo | None


def spec_error(source: str, problems: Sequence[Problem]) -> SpecError:
    """Return one error that tells all problems of `source`."""
    pages = tuple(dict.fromkeys(problem.page for problem in problems if problem.page is not None))
    if len(problems) == 1:
        (only,) = problems
        place = f"{source}:{only.line}" if only.line else source
        return SpecError(f"{place}: {only.message}", hint=only.hint, pages=pages)
    lines = [f"{source}: {len(problems)} problems"]
    for problem in problems:
        lines.append(f"  {f'line {problem.line}: ' if problem.line else ''}{problem.message}")
        if problem.hint is not None:
            lines.append(f"    hint: {problem.hint}")
    return SpecError("\n".join(lines), pages=pages)


def problems_of(error: ValidationError, lines: Mapping[Location, int] | None = None) -> list[Problem]:
    """Return what pydantic found in our own words, in the order of the file where lines are known."""
    problems = [_problem(details, lines or {}) for details in error.errors(include_url=False)]
    unique = {(problem.path, problem.message): problem for problem in problems}
    return sorted(unique.values(), key=lambda problem: problem.line)


def _problem(details: ErrorDetails, lines: Mapping[Location, int]) -> Problem:
    place = _place(details["loc"])
    path = dotted(place.path)
    line = _line_of(place.path, lines)
    context = as_mapping(details.get("ctx")) or {}
    hint = cast("str | None", context.get("hint"))
    if details["type"] == "rule":
        return Problem(path, f"{path} {context['text']}", hint, line)
    if details["type"] == "missing":
        return Problem(
            path, f"{path} is missing: {_expected(place)}", f"add {place.path[-1]}: to {_section_name(place.path)}", line
        )
    if details["type"] == "extra_forbidden":
        return Problem(path, *_unknown(place.path, place.model), line, MISSPELT)
    value = cast("object", details["input"])
    text = f"{path} must be {_expected(place)}, got {shown(value)}"
    page = cast("str | None", context.get("page")) or WRONG_TYPE
    return Problem(path, text, hint or _hint(place, value), line, page)


def _place(loc: Location) -> _Place:
    """Walk the models along pydantic's location, leaving out the tags of unions that it puts between the keys."""
    path: list[str | int] = []
    model: Model = TuneSpec
    field: FieldInfo | None = None
    choices: tuple[Model, ...] = ()
    for step in loc:
        tagged = [choice for choice in choices if kind_of(choice) == step]
        if len(choices) > 0 and tagged and field is not None and kind_of(choices[0]) is not None and model not in choices:
            model, field, choices = tagged[0], None, ()
            continue
        path.append(step)
        if isinstance(step, int):
            continue
        if len(choices) == 1:
            model = choices[0]
        field = fields_of(model).get(step)
        choices = () if field is None else models_in(field.annotation)
    return _Place(tuple(path), model, field)


def _expected(place: _Place) -> str:
    if place.field is None:
        return f"a mapping with the keys {', '.join(fields_of(place.model))}"
    if isinstance(place.path[-1], int):
        items = allowed_text(place.field)
        return "a path or a mapping {path, share}" if holds_many(place.field.annotation) else f"one of {items.partition(': ')[2]}"
    return allowed_text(place.field)


def _hint(place: _Place, value: object) -> str | None:
    """Return advice for the mistakes that are made most: a misspelt choice, a YAML 1.1 boolean, a quoted number."""
    expected = _expected(place)
    if expected == "true or false" and str(value).lower() in BOOLEAN_WORDS:
        return "only true and false, without quotes, are booleans here"
    if isinstance(value, str) and "number" in expected:
        return "write the number without quotes"
    if isinstance(value, str) and expected.startswith(("one of", "a mapping with kind")):
        choices = re.findall(r"\w+", expected.partition("kind:")[2] or expected.removeprefix("one of"))
        near = difflib.get_close_matches(value, choices, 1)
        return f"did you mean {near[0]}?" if near else None
    if isinstance(value, dict) and "kind" in expected:
        kind = (as_mapping(cast("object", value)) or {}).get("kind")
        return None if kind is None else f"there is no kind {shown(kind)}"
    return None


def _unknown(path: Location, model: Model) -> tuple[str, str]:
    """Return the message and the hint for a key that `model` does not have."""
    key = str(path[-1])
    allowed = list(fields_of(model))
    section = _section_name(path)
    kind = kind_of(model)
    if kind is not None:
        owners = [other for other in _kinds_with(path) if other != kind]
        if owners:
            hint = f"remove {key}, or choose kind {' or '.join(owners)}; {kind} allows {', '.join(allowed)}"
            return f"{dotted(path)} is no option of {section} with kind {kind}", hint
    near = nearest_path(path)
    return f"{dotted(path)} is not an option", f"{f'did you mean {near}? ' if near else ''}{section} allows {', '.join(allowed)}"


def _kinds_with(path: Location) -> list[str]:
    """Return the members of a tagged union that have the option at `path`."""
    return [option.kind for option in options() if option.path == dotted(path) and option.kind is not None]


def nearest_path(path: Location) -> str | None:
    """Return the option that was most likely meant by an unknown path: a name elsewhere, another tool's, a misspelling."""
    key = str(path[-1])
    name = ELSEWHERE.get(key.lower().replace("-", "_"), key.lower().replace("-", "_"))
    known = list(dict.fromkeys(_all_paths()))
    siblings = [candidate for candidate in known if candidate.rpartition(".")[0] == dotted(path[:-1])]
    for group in (siblings, known):
        exact = [candidate for candidate in group if name in (candidate, candidate.rpartition(".")[2])]
        if exact:
            return exact[0]
        names = difflib.get_close_matches(name, [candidate.rpartition(".")[2] for candidate in group], 1, cutoff=0.7)
        if names:
            return next(candidate for candidate in group if candidate.rpartition(".")[2] == names[0])
    whole = difflib.get_close_matches(dotted(path), known, 1)
    return whole[0] if whole else None


def _all_paths() -> list[str]:
    """Return the dotted paths of all options and sections."""
    leaves = [option.path for option in options()]
    sections = [leaf.rpartition(".")[0] for leaf in leaves if "." in leaf]
    return [*leaves, *sections]


def _section_name(path: Location) -> str:
    return dotted(path[:-1]) if len(path) > 1 else "the spec"


def dotted(path: Location) -> str:
    return ".".join(map(str, path)) if path else "the spec"


def _line_of(path: Location, lines: Mapping[Location, int]) -> int:
    """Return the line of a path, or of the nearest section around it that is in the file; 0 where nothing is known."""
    return next((lines[path[:size]] for size in range(len(path), 0, -1) if path[:size] in lines), 0)


def shown(value: object) -> str:
    """Return a value as the user would write it, at most 60 characters of it."""
    items = as_list(value)
    plain = items if items is not None else as_mapping(value) or value
    try:
        text = write_scalar(plain)
    except TypeError:
        text = repr(value)
    if isinstance(value, str) and not text.startswith('"'):
        text = f'"{text}"'
    return text if len(text) <= 60 else f"{text[:57]}..."
