"""Options of runs in several processes: what is refused, what is chosen, and what a DeepSpeed configuration says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kivnun.errors import SpecError
from kivnun.spec import MultiProcessSpec, ResolveFacts, TuneSpec, parse_spec, resolve
from kivnun.spec.deepspeed_fields import FIXED, REFUSED, TAKEN

FACTS = ResolveFacts("supervised", 2048, 300, 94_800_000, "cpu", 8, "messages")
GPU = replace(FACTS, device="cuda")
SPEC = "version: 1\nbase: kivnun/tiny-phi\ndata: {train: a.jsonl}\ncompute: {kind: multi_process}\n"


def resolved(*overrides: str, facts: ResolveFacts = FACTS, ds: dict[str, Any] | None = None) -> tuple[TuneSpec, dict[str, str]]:
    given = [*overrides, *([] if ds is None else ["compute.deepspeed=ds.json"])]
    return resolve(parse_spec(SPEC, folder=Path("/specs"), overrides=given), replace(facts, deepspeed=ds))


def compute_of(spec: TuneSpec) -> MultiProcessSpec:
    assert isinstance(spec.compute, MultiProcessSpec)
    return spec.compute


def test_sizes_follow_from_the_base_and_threads_are_shared() -> None:
    spec, reasons = resolved(facts=replace(FACTS, local_processes=4))
    compute = compute_of(spec)
    assert (compute.processes, compute.zero_stage, compute.threads) == (2, 3, 2)
    assert (compute.bucket_elements, compute.sub_group_elements) == (1_896_000, 4_740_000)
    assert (compute.live_elements, compute.persistent_elements) == (1_896_000, 10_000)
    assert reasons["compute.bucket_elements"] == "the larger of half a million and a fiftieth of 94.8 M parameters"
    assert not spec.compute.packed_weights


def test_resolving_again_changes_nothing() -> None:
    spec, _ = resolved()
    assert resolve(spec, FACTS)[0] == spec


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["compute.offload=optimizer"], "the run computes on a CPU"),
        (["compute.offload=parameters"], "15 % more memory"),
        (["compute.offload=parameters", "compute.zero_stage=2"], "needs zero_stage 3 or more, got 2"),
        (["compute.offload=optimizer", "compute.zero_stage=0"], "needs zero_stage 1 or more, got 0"),
        (["schedule.optimizer={kind: muon}"], "Muon turns whole matrices"),
        (["adapter.kind=full", "base.precision=bf16", "compute.zero_stage=1"], "keeps its float32 weights in another form"),
        (["compute.deepspeed=ds.json", "compute.zero_stage=0"], "zero_stage 0 does without DeepSpeed"),
        (["compute.zero_stage=4"], "compute.zero_stage must be one of 0, 1, 2, 3"),
        (["compute.processes=0"], "compute.processes must be"),
        (["compute.packed_weights=true"], "compute.packed_weights"),
        (["compute.kind=local", "compute.processes=2"], "compute.processes"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(changes: list[str], text: str) -> None:
    with pytest.raises(SpecError, match=text.replace("(", r"\(")):
        resolved(*changes)


def test_muon_runs_where_nothing_but_rows_is_divided() -> None:
    assert compute_of(resolved("schedule.optimizer={kind: muon}", "compute.zero_stage=0")[0]).zero_stage == 0


def test_a_file_of_hugging_face_s_is_taken_over() -> None:
    """The ZeRO-3 example of transformers' DeepSpeed page, without what belongs to float16 and to printing."""
    file = {
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": "auto", "weight_decay": 0.02}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": False,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    spec, reasons = resolved(ds=file, facts=GPU)
    compute = compute_of(spec)
    assert (compute.offload, compute.zero_stage) == ("parameters", 3)
    assert (compute.sub_group_elements, compute.live_elements, compute.bucket_elements) == (10**9, 10**9, 1_896_000)
    assert (spec.schedule.max_grad_norm, spec.schedule.batch_rows) == (0.5, 8)
    assert (spec.schedule.optimizer.beta2, spec.schedule.optimizer.weight_decay) == (0.95, 0.02)
    assert reasons["compute.sub_group_elements"] == "as ds.json says"
    assert "compute.bucket_elements" in reasons
    assert resolve(spec, replace(GPU, deepspeed=file))[0] == spec


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, but compute.zero_stage says 3"),
        ({"scheduler": {"type": "WarmupLR"}}, "the learning rate follows schedule.decay"),
        ({"fp16": {"enabled": True}}, "there is no float16 here"),
        ({"fp16": {"enabled": False, "loss_scale": 0}}, "fp16.loss_scale is 0, which is refused"),
        ({"optimizer": {"type": "Adam"}}, "only 'AdamW' is allowed"),
        ({"gradient_accumulation_steps": 4}, "passes follow from compute.micro_batch_tokens"),
        ({"zero_optimization": {"overlap_comm": True}}, "a second set of buffers"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "allowed are cpu and none"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "the run computes on a CPU"),
        ({"steps_per_print": 2000}, "events.jsonl is the record"),
        ({"zero_optimisation": {"stage": 3}}, "it is not known here"),
        ({"zero_optimization": {"reduce_bucket_size": 5, "allgather_bucket_size": 6}}, "another field of the file says 5"),
        ({"optimizer": {"params": {"betas": 0.9}}}, "a list of two numbers is allowed"),
        ({"zero_optimization": {"sub_group_size": "many"}}, "compute.sub_group_elements must be"),
    ],
)
def test_a_field_that_is_not_so_here_is_refused(file: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError) as refused:
        resolved("compute.zero_stage=3", ds=file)
    assert text in str(refused.value)


def test_every_taken_field_changes_the_resolved_spec() -> None:
    values = {"schedule.optimizer.eps": 1e-6, "schedule.optimizer.weight_decay": 0.3, "compute.zero_stage": 2}
    plain = resolved()[0]
    for field, taken in TAKEN.items():
        file: Any = values.get(taken.option, 77)
        for name in reversed(field.split(".")):
            file = {name: file}
        assert resolved(ds=file)[0].content_hash() != resolved("compute.deepspeed=ds.json")[0].content_hash(), field
    assert plain.compute != resolved("compute.deepspeed=ds.json")[0].compute


def test_the_page_shows_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "many-processes.md").read_text(encoding="utf-8")
    for field, taken in TAKEN.items():
        assert f"| `{field}` | `{taken.option}` |" in page
    for field, (value, reason) in FIXED.items():
        assert f"| `{field}` | `{json.dumps(value)}` | {reason} |" in page
    for field, reason in REFUSED.items():
        assert f"| `{field}` | {reason} |" in page
