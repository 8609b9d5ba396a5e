"""Options of what is measured and what is kept on the way: evaluation and checkpoints. Next: `compute.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator

from kivnun.spec.section import Allowed, Section, Why, broken_rule, path_from, tuple_from_list, wrong_value

Metric: TypeAlias = Literal[
    "exact_match",
    "chrf",
    "macro_f1",
    "entity_f1",
    "qa_f1",
    "format_compliance",
    "ended_turn",
    "tune_validity",
    "perplexity",
]
METRICS: tuple[str, ...] = get_args(Metric)


Forgetting: TypeAlias = Literal["builtin"] | Path


def _builtin_or_path(value: object, info: ValidationInfo) -> object:
    """Return null and the word `builtin` as they are, any other text as a path from the spec's folder."""
    if value is None or value == "builtin":
        return value
    if not isinstance(value, str | Path):
        raise wrong_value()
    return path_from(value, info)


class EvaluationSpec(Section, frozen=True):
    """Base against tuned, on the held-out rows."""

    every_steps: Annotated[
        int | None,
        Why("at the end of each epoch, where the rows have all been seen equally often"),
    ] = Field(default=None, ge=1, description="Steps between evaluations during the run; null evaluates at the end of each epoch.")
    metrics: Annotated[
        tuple[Metric, ...],
        BeforeValidator(tuple_from_list),
        Allowed(f"a list of: {', '.join(METRICS)}"),
        WithJsonSchema({"type": "array", "uniqueItems": True, "items": {"enum": list(METRICS), "type": "string"}}),
        Why("the likelihood of the held-out rows needs no generation; whether replies can be compared is the user's knowledge"),
    ] = Field(
        default=(),
        description="Scores of generated replies against the held-out ones, beside the likelihood; perplexity needs no replies.",
    )
    generate_rows: Annotated[int, Why("an interval of at most 7 points either way, at a bearable cost on a CPU")] = Field(
        default=200, ge=1, description="Held-out rows for which a reply is generated, at most."
    )
    max_new_tokens: Annotated[int, Why("a paragraph; most replies end earlier by themselves")] = Field(
        default=128, ge=1, description="Tokens of a generated reply, at most."
    )
    samples: Annotated[int, Why("what a reader takes in at a glance")] = Field(
        default=5, ge=0, description="Replies of base and tuned that are kept side by side for reading."
    )
    bootstrap: Annotated[int, Why("its ends are steady to about 2 % of its width")] = Field(
        default=1000, ge=100, le=100_000, description="Resamplings behind each 95 % interval."
    )

    forgetting: Annotated[
        Forgetting | None,
        BeforeValidator(_builtin_or_path),
        Allowed("builtin, a path, or null"),
        WithJsonSchema({"anyOf": [{"const": "builtin", "type": "string"}, {"type": "string", "minLength": 1}, {"type": "null"}]}),
        Why("48 short rows in nine languages and code cost seconds, and forgetting is seen nowhere else"),
    ] = Field(
        default="builtin",
        description="Text that has nothing to do with the task, on which base and tuned are scored apart from the held-out rows: "
        "the rows that come along, a file of texts, prompts with completions or conversations, or null for none. "
        "Rows longer than `data.max_seq_len` are cut to it.",
    )

    @field_validator("metrics")
    @classmethod
    def _each_once(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        if len(set(metrics)) != len(metrics):
            raise broken_rule("names a metric more than once", "name each once")
        return metrics

    @field_validator("samples")
    @classmethod
    def _samples_are_generated(cls, samples: int, info: ValidationInfo) -> int:
        rows = info.data.get("generate_rows")
        if rows is not None and samples > rows:
            raise broken_rule(
                f"is {samples}, more than evaluation.generate_rows ({rows})", "samples are taken from the generated rows"
            )
        return samples


class CheckpointSpec(Section, frozen=True):
    """When the state of the run is written, so that it can be resumed exactly."""

    every_steps: Annotated[int | None, Why("time and epochs set the pace")] = Field(
        default=None, ge=1, description="Steps between checkpoints; null for none by steps."
    )
    every_epoch: Annotated[bool, Why("the natural places to come back to")] = Field(
        default=True, description="Write a checkpoint at the end of each epoch."
    )
    every_seconds: Annotated[float | None, Why("a minute is the most that a crash can cost")] = Field(
        default=60.0, gt=0, description="Seconds between checkpoints; null for none by time."
    )
    keep: Annotated[int, Why("the newest, and one more should it turn out to be damaged")] = Field(
        default=2, ge=1, description="How many checkpoints stay on disk."
    )
