"""What a run is: one frozen, versioned `TuneSpec`. Start reading at `tune.py`."""

from kivnun.spec.adapters import (
    AdaloraSpec,
    AdapterSpec,
    DoraSpec,
    FullSpec,
    Ia3Spec,
    LnTuningSpec,
    LohaSpec,
    LokrSpec,
    LoraSpec,
    PrefixSpec,
    PromptSpec,
    VeraSpec,
)
from kivnun.spec.base import BaseSpec, is_hub_id
from kivnun.spec.catalogue import Option, count_options, options
from kivnun.spec.compute import ComputeSpec, LocalSpec, MultiProcessSpec
from kivnun.spec.data import DataSpec, SourceSpec
from kivnun.spec.evaluation import CheckpointSpec, EvaluationSpec, Metric
from kivnun.spec.objectives import DpoSpec, ObjectiveKind, ObjectiveSpec, PretrainingSpec, SupervisedSpec
from kivnun.spec.read import load_spec, parse_spec, read_spec_text
from kivnun.spec.resolve import PassChoice, ResolveFacts, rate_table, resolve, resolved_yaml
from kivnun.spec.schedule import AdamWSpec, MuonSpec, OptimizerSpec, ScheduleSpec
from kivnun.spec.schema import json_schema
from kivnun.spec.tune import TuneSpec

__all__ = [
    "AdaloraSpec",
    "AdamWSpec",
    "AdapterSpec",
    "BaseSpec",
    "CheckpointSpec",
    "ComputeSpec",
    "DataSpec",
    "DoraSpec",
    "DpoSpec",
    "EvaluationSpec",
    "FullSpec",
    "Ia3Spec",
    "LnTuningSpec",
    "LocalSpec",
    "LohaSpec",
    "LokrSpec",
    "LoraSpec",
    "Metric",
    "MultiProcessSpec",
    "MuonSpec",
    "ObjectiveKind",
    "ObjectiveSpec",
    "OptimizerSpec",
    "Option",
    "PassChoice",
    "PrefixSpec",
    "PretrainingSpec",
    "PromptSpec",
    "ResolveFacts",
    "ScheduleSpec",
    "SourceSpec",
    "SupervisedSpec",
    "TuneSpec",
    "VeraSpec",
    "count_options",
    "is_hub_id",
    "json_schema",
    "load_spec",
    "options",
    "parse_spec",
    "rate_table",
    "read_spec_text",
    "resolve",
    "resolved_yaml",
]
