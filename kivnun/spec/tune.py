"""`TuneSpec`: the whole of what a run is, in one frozen value. Two runs of equal specs on equal data give equal results.

Each section is in a file of its own; `read.py` makes a spec from a file, `resolve.py` fills what was left open.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from kivnun.spec.adapters import AdapterSpec, FullSpec, LoraSpec, LowRank
from kivnun.spec.base import QUANTISED, BaseSpec
from kivnun.spec.compute import ComputeSpec, LocalSpec, MultiProcessSpec
from kivnun.spec.data import DataSpec
from kivnun.spec.evaluation import CheckpointSpec, EvaluationSpec
from kivnun.spec.objectives import ObjectiveKind, ObjectiveSpec
from kivnun.spec.schedule import MuonSpec, ScheduleSpec
from kivnun.spec.section import Section, Why, broken_rule, wrong_value
from kivnun.spec.yaml_text import write_yaml

OBJECTIVE_OF_FORMAT: dict[str, ObjectiveKind] = {
    "messages": "supervised",
    "sharegpt": "supervised",
    "prompt_completion": "supervised",
    "prompt_response": "supervised",
    "instruction": "supervised",
    "classification": "supervised",
    "entities": "supervised",
    "multiple_choice": "supervised",
    "text": "pretraining",
    "preference": "dpo",
}


def _whole(version: object) -> object:
    """Refuse true and 1.0, which Python, and pydantic with it, hold to be equal to 1."""
    if type(version) is not int:
        raise wrong_value()
    return version


class TuneSpec(Section, frozen=True):
    """A run: a base, data, what is trained, how, and what is measured."""

    version: Annotated[Literal[1], BeforeValidator(_whole)] = Field(
        description="Version of this format. A later version of the program reads older ones or says why not."
    )
    base: BaseSpec = Field(description="The pretrained model; a bare name or folder is shorthand for `{model: ...}`.")
    data: DataSpec = Field(description="The examples.")
    adapter: Annotated[AdapterSpec, Why("LoRA is the adapter every server and tool loads")] = Field(
        default=LoraSpec(), description="What is trained."
    )
    objective: Annotated[
        ObjectiveSpec | None,
        Why("what the format of the data is for: replies, texts or preferences"),
    ] = Field(default=None, description="What the loss rewards.")
    schedule: Annotated[ScheduleSpec, Why("each of its options has its own reason")] = Field(
        default=ScheduleSpec(), description="How long, in what portions, how fast."
    )
    evaluation: Annotated[EvaluationSpec, Why("each of its options has its own reason")] = Field(
        default=EvaluationSpec(), description="What is measured on the held-out rows."
    )
    checkpoints: Annotated[CheckpointSpec, Why("each of its options has its own reason")] = Field(
        default=CheckpointSpec(), description="When the state is written."
    )
    seed: Annotated[int, Why("any number does; it is fixed so that a run repeats")] = Field(
        default=0, ge=0, lt=2**63, description="Key of every random draw: order of rows, initial weights, dropout, sampling."
    )
    compute: Annotated[ComputeSpec, Why("one process needs nothing set up")] = Field(
        default=LocalSpec(), description="The shape of the engine."
    )

    @field_validator("adapter")
    @classmethod
    def _codes_are_not_trained(cls, adapter: AdapterSpec, info: ValidationInfo) -> AdapterSpec:
        base = info.data.get("base")
        if isinstance(adapter, FullSpec) and isinstance(base, BaseSpec) and base.precision in QUANTISED:
            raise broken_rule(
                f"is full, but weights held in {base.precision} cannot be trained",
                "choose an adapter such as lora, or base.precision bf16",
            )
        return adapter

    @field_validator("objective")
    @classmethod
    def _objective_fits_the_format(cls, objective: ObjectiveSpec | None, info: ValidationInfo) -> ObjectiveSpec | None:
        data = info.data.get("data")
        if objective is None or not isinstance(data, DataSpec) or data.format == "auto":
            return objective
        fitting = OBJECTIVE_OF_FORMAT[data.format]
        if objective.kind != fitting:
            raise broken_rule(f"is {objective.kind}, but rows in the format {data.format} are for {fitting}", "leave objective out")
        return objective

    @field_validator("schedule")
    @classmethod
    def _rates_of_their_own(cls, schedule: ScheduleSpec, info: ValidationInfo) -> ScheduleSpec:
        adapter = info.data.get("adapter")
        if isinstance(adapter, LowRank) and adapter.loraplus_lr_ratio != 1 and isinstance(schedule.optimizer, MuonSpec):
            raise broken_rule(
                "has the optimizer muon, which takes no rates of their own for adapter.loraplus_lr_ratio",
                "choose adamw, or leave adapter.loraplus_lr_ratio out",
            )
        return schedule

    @field_validator("compute")
    @classmethod
    def _adapters_that_are_divided(cls, compute: ComputeSpec, info: ValidationInfo) -> ComputeSpec:
        adapter = info.data.get("adapter")
        if not isinstance(compute, MultiProcessSpec) or compute.zero_stage == 0 or adapter is None:
            return compute
        plain = isinstance(adapter, LowRank) and adapter.init not in ("pissa", "olora") and adapter.loraplus_lr_ratio == 1
        if not plain and not isinstance(adapter, FullSpec):
            raise broken_rule(
                "divides its state (zero_stage above 0), which is offered for full, lora and dora, without pissa, olora and LoRA+",
                "set compute.zero_stage to 0, which keeps the state whole in each process, or choose lora",
            )
        return compute

    @field_validator("evaluation")
    @classmethod
    def _metrics_have_rows_to_score(cls, evaluation: EvaluationSpec, info: ValidationInfo) -> EvaluationSpec:
        data, objective = info.data.get("data"), info.data.get("objective")
        if isinstance(evaluation.forgetting, Path) and isinstance(data, DataSpec) and data.validation is None:
            raise broken_rule(
                "names a file for forgetting, but data.validation is null: nothing is scored",
                "hold rows out, or leave evaluation.forgetting out",
            )
        if not evaluation.metrics:
            return evaluation
        if isinstance(data, DataSpec) and data.validation is None:
            raise broken_rule(
                "has metrics, but data.validation is null: there are no held-out rows", "hold rows out, or ask for no metrics"
            )
        if objective is not None and objective.kind == "pretraining" and set(evaluation.metrics) != {"perplexity"}:
            raise broken_rule(
                "has metrics, but pretraining has no replies to compare",
                "ask for perplexity or for no metrics: likelihood is always measured",
            )
        return evaluation

    def to_tree(self) -> dict[str, object]:
        """Return the spec as plain JSON values; `TuneSpec.model_validate` of it gives an equal spec."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the spec as YAML, every option written out; reading it back gives an equal spec."""
        return write_yaml(self.to_tree())

    def content_hash(self) -> str:
        """Return the SHA-256 (hex) of the canonical JSON: equal for equal specs, whatever their files looked like."""
        canonical = json.dumps(self.to_tree(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()
