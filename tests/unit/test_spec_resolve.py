"""Resolving a spec: every choice is made, with a reason, and every accepted option is felt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kivnun.errors import SpecError
from kivnun.spec import (
    LoraSpec,
    ResolveFacts,
    TuneSpec,
    count_options,
    load_spec,
    options,
    parse_spec,
    rate_table,
    resolve,
    resolved_yaml,
)
from kivnun.spec.catalogue import DEFAULT_KINDS
from kivnun.spec.yaml_text import read_yaml

FACTS = ResolveFacts("supervised", 2048, 300, 3_800_000, "cpu", 2, "messages")
LARGE = replace(FACTS, base_parameters=3_800_000_000)
MINIMAL = "version: 1\nbase: kivnun/tiny-phi\ndata: {train: a.jsonl}\n"


def spec_of(*overrides: str, text: str = MINIMAL) -> TuneSpec:
    return parse_spec(text, folder=Path("/specs"), overrides=overrides)


def resolved(*overrides: str, facts: ResolveFacts = FACTS) -> tuple[TuneSpec, dict[str, str]]:
    return resolve(spec_of(*overrides), facts)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


NONE_MEANS_NONE = {
    "base.revision",
    "data.columns",
    "data.instruction",
    "base.content_hash",
    "data.template",
    "adapter.start_from",
    "schedule.steps",
    "schedule.batch_tokens",
    "evaluation.every_steps",
    "checkpoints.every_steps",
}


def test_every_open_choice_is_made() -> None:
    spec, _ = resolved()
    left_open = {path for path, value in leaves(spec.to_tree()) if value in (None, "auto")}
    assert left_open == NONE_MEANS_NONE


def test_every_value_that_was_not_given_has_a_reason_and_no_given_one_has() -> None:
    spec, reasons = resolved("schedule.epochs=2", "adapter.alpha=3", "base.precision=fp32", "objective={kind: supervised}")
    given = {"version", "base.model", "data.train", "schedule.epochs", "adapter.alpha", "base.precision", "objective.kind"}
    expected = {path for path, _ in leaves(spec.to_tree())} - given
    assert set(reasons) == expected
    assert all(reason and reason == reason.strip() for reason in reasons.values())


def test_the_options_of_an_objective_that_was_chosen_have_reasons() -> None:
    spec, reasons = resolved(facts=replace(FACTS, objective_kind="dpo", data_format="preference"))
    text = resolved_yaml(spec, reasons)
    assert "objective:  # what the format of the data is for\n  kind: dpo\n  beta: 0.1  # the paper's value" in text


def test_resolving_again_changes_nothing() -> None:
    spec, _ = resolved()
    again, _ = resolve(spec, FACTS)
    assert again == spec


def test_the_resolved_file_reads_back_as_the_resolved_spec_and_says_why(tmp_path: Path) -> None:
    spec, reasons = resolved("base=microsoft/phi-4", "data.train=[{path: 'a b.jsonl', share: 1}, {path: עברית.jsonl, share: 2}]")
    text = resolved_yaml(spec, reasons)
    path = tmp_path / "resolved.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_spec(path) == spec
    assert load_spec(path).content_hash() == spec.content_hash()
    assert "alpha: 32.0  # 2 * rank: the update's scale alpha / rank is 2 whatever the rank\n" in text
    assert "device: cpu  # no CUDA device was found\n" in text
    assert all(
        "  # " in line for line in text.splitlines() if line.strip().startswith(("rank", "precision", "epochs", "seed", "threads"))
    )


def test_a_spec_reads_back_from_its_own_yaml() -> None:
    for spec in (
        spec_of(),
        spec_of("adapter={kind: full}", "schedule.optimizer={kind: muon}", "objective={kind: dpo}"),
        resolved()[0],
    ):
        assert parse_spec(spec.to_yaml(), folder=Path("/elsewhere")) == spec
        assert TuneSpec.model_validate(spec.to_tree()) == spec


@pytest.mark.parametrize(
    ("device", "parameters", "precision"),
    [("cpu", 3_800_000, "fp32"), ("cpu", 499_999_999, "fp32"), ("cpu", 500_000_000, "bf16"), ("cuda", 3_800_000, "bf16")],
)
def test_precision_is_fp32_on_a_cpu_below_500_million_parameters_else_bf16(device: Any, parameters: int, precision: str) -> None:
    spec, reasons = resolved(facts=replace(FACTS, device=device, base_parameters=parameters))
    assert spec.base.precision == precision
    assert ("CPU" if device == "cpu" else "GPU") in reasons["base.precision"]


@pytest.mark.parametrize("stored", ["nf4", "int8"])
def test_a_base_that_is_stored_in_codes_is_loaded_in_them(stored: Any) -> None:
    facts = replace(FACTS, stored_precision=stored)
    spec, reasons = resolved(facts=facts)
    assert (spec.base.precision, reasons["base.precision"]) == (stored, "as the base is stored")
    assert resolved(f"base.precision={stored}", facts=facts)[0].base.precision == stored
    with pytest.raises(SpecError, match=f"base.precision is bf16, but the base is stored in {stored}"):
        resolved("base.precision=bf16", facts=facts)
    with pytest.raises(SpecError, match=f"adapter is full, but the base is stored in {stored}"):
        resolved("adapter.kind=full", facts=facts)


def test_a_device_that_is_asked_for_decides_the_precision() -> None:
    spec, reasons = resolved("compute.device=cpu", facts=replace(FACTS, device="cuda"))
    assert (spec.compute.device, spec.base.precision) == ("cpu", "fp32")
    assert "compute.device" not in reasons


@pytest.mark.parametrize(
    ("overrides", "alpha"),
    [((), 32.0), (("adapter.rank=8",), 16.0), (("adapter.rslora=true",), 8.0), (("adapter.alpha=5",), 5.0)],
)
def test_alpha_is_twice_the_rank_and_fixed_with_rslora(overrides: tuple[str, ...], alpha: float) -> None:
    adapter = resolved(*overrides)[0].adapter
    assert isinstance(adapter, LoraSpec)
    assert adapter.alpha == alpha


def test_the_learning_rate_follows_adapter_objective_and_size() -> None:
    def rate(*overrides: str, facts: ResolveFacts = LARGE) -> float | None:
        return resolved(*overrides, facts=facts)[0].schedule.learning_rate

    assert rate() == rate("adapter.kind=dora") == 2e-4
    assert rate("adapter={kind: full}") == 2e-5
    assert rate(facts=replace(LARGE, objective_kind="dpo", data_format="preference")) == 1e-5
    assert rate(facts=FACTS) == 2e-3
    assert rate("schedule.learning_rate=0.5") == 0.5
    assert rate("adapter={kind: ia3}") == 2e-3
    assert rate("adapter={kind: prompt}") == 1e-2
    assert ("supervised", "lora, dora", 2e-4, 2e-3) in rate_table()
    assert ("supervised", "vera, prompt, prefix", 1e-2, 0.1) in rate_table()


def test_epochs_and_rows_are_the_defaults_only_when_nothing_else_is_given() -> None:
    plain = resolved()[0].schedule
    assert (plain.epochs, plain.steps, plain.batch_rows, plain.batch_tokens) == (3, None, 16, None)
    other = resolved("schedule.steps=9", "schedule.batch_tokens=512")[0].schedule
    assert (other.epochs, other.steps, other.batch_rows, other.batch_tokens) == (None, 9, None, 512)


def test_the_data_decide_the_objective() -> None:
    for kind in ("supervised", "pretraining", "dpo"):
        objective = resolved(facts=replace(FACTS, objective_kind=kind, data_format="auto"))[0].objective  # type: ignore[arg-type]
        assert objective is not None
        assert objective.kind == kind


def test_a_micro_batch_holds_the_longest_row() -> None:
    assert resolved()[0].compute.micro_batch_tokens == 4096
    assert resolved(facts=replace(FACTS, longest_row=5000))[0].compute.micro_batch_tokens == 5000
    assert resolved("compute.micro_batch_tokens=300")[0].compute.micro_batch_tokens == 300


def test_a_hub_id_without_a_revision_takes_the_main_branch() -> None:
    assert resolved("base=microsoft/phi-4")[0].base.revision == "main"
    assert resolved()[0].base.revision is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective={kind: dpo}"], "objective is dpo, but the data's format is for supervised"),
        (["data.max_seq_len=4096"], "data.max_seq_len must be at most 2048, the longest row this base takes, got 4096"),
        (
            ["compute.micro_batch_tokens=299"],
            "compute.micro_batch_tokens must be at least 300, the longest row of the data, got 299",
        ),
        (["compute.device=cuda"], "compute.device is cuda, but no CUDA device was found"),
    ],
)
def test_what_data_base_or_machine_do_not_have_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(SpecError, match="hint: ") as caught:
        resolved(*overrides)
    assert said in str(caught.value)


def test_all_that_does_not_fit_is_told_together() -> None:
    with pytest.raises(SpecError, match="2 problems"):
        resolved("data.max_seq_len=4096", "compute.device=cuda")


def test_metrics_on_texts_are_refused_once_the_data_are_known() -> None:
    with pytest.raises(SpecError, match="evaluation has metrics, but pretraining has no replies"):
        resolved("evaluation.metrics=[chrf]", facts=replace(FACTS, objective_kind="pretraining", data_format="text"))


CHANGES: dict[str, list[str]] = {
    "base.model": ["base.model=microsoft/phi-4"],
    "base.revision": ["base=microsoft/phi-4", "base.revision=v2"],
    "base.content_hash": ["base.content_hash=" + "a" * 64],
    "base.precision": ["base.precision=nf4"],
    "base.rope_factors": ["base.rope_factors=long"],
    "data.train": ["data.train=b.jsonl"],
    "data.train.0.path": ["data.train=[{path: b.jsonl}]"],
    "data.train.0.share": ["data.train=[{path: a, share: 1}, {path: b, share: 1}]"],
    "data.validation": ["data.validation=null"],
    "data.format": ["data.format=prompt_completion"],
    "data.columns": ["data.columns={text: review}"],
    "data.instruction": ["data.instruction=Which mood?"],
    "data.template": ["data.template=t.jinja"],
    "data.max_seq_len": ["data.max_seq_len=1024"],
    "data.bad_rows": ["data.bad_rows=skip"],
    "data.over_long": ["data.over_long=truncate"],
    "adapter.kind full": ["adapter.kind=full"],
    "adapter.kind dora": ["adapter.kind=dora"],
    "adapter.rank": ["adapter.rank=4", "adapter.alpha=32"],
    "adapter.alpha": ["adapter.alpha=1"],
    "adapter.dropout": ["adapter.dropout=0.1"],
    "adapter.target_modules": ["adapter.target_modules=[qkv_proj]"],
    "adapter.rslora": ["adapter.rslora=true", "adapter.alpha=32"],
    "adapter.start_from": ["adapter.start_from=runs/first"],
    "adapter.init": ["adapter.init=gaussian"],
    "schedule.epochs": ["schedule.epochs=4"],
    "schedule.steps": ["schedule.steps=4"],
    "schedule.batch_rows": ["schedule.batch_rows=4"],
    "schedule.batch_tokens": ["schedule.batch_tokens=400"],
    "schedule.learning_rate": ["schedule.learning_rate=0.1"],
    "schedule.warmup_share": ["schedule.warmup_share=0"],
    "schedule.decay": ["schedule.decay=cosine"],
    "schedule.decay_start_share": ["schedule.decay_start_share=0.5"],
    "schedule.final_share": ["schedule.final_share=0.5"],
    "schedule.max_grad_norm": ["schedule.max_grad_norm=null"],
    "schedule.optimizer.kind muon": ["schedule.optimizer.kind=muon"],
    "schedule.optimizer.beta1": ["schedule.optimizer.beta1=0.5"],
    "schedule.optimizer.beta2": ["schedule.optimizer.beta2=0.5"],
    "schedule.optimizer.eps": ["schedule.optimizer.eps=1e-6"],
    "schedule.optimizer.weight_decay": ["schedule.optimizer.weight_decay=0.5"],
    "schedule.optimizer.momentum": ["schedule.optimizer={kind: muon, momentum: 0.5}"],
    "schedule.optimizer.adamw_share": ["schedule.optimizer={kind: muon, adamw_share: 0.5}"],
    "evaluation.every_steps": ["evaluation.every_steps=5"],
    "evaluation.metrics": ["evaluation.metrics=[chrf]"],
    "evaluation.generate_rows": ["evaluation.generate_rows=10"],
    "evaluation.max_new_tokens": ["evaluation.max_new_tokens=10"],
    "evaluation.samples": ["evaluation.samples=0"],
    "evaluation.bootstrap": ["evaluation.bootstrap=200"],
    "evaluation.forgetting": ["evaluation.forgetting=null"],
    "checkpoints.every_steps": ["checkpoints.every_steps=5"],
    "checkpoints.every_epoch": ["checkpoints.every_epoch=false"],
    "checkpoints.every_seconds": ["checkpoints.every_seconds=null"],
    "checkpoints.keep": ["checkpoints.keep=3"],
    "adapter.loraplus_lr_ratio": ["adapter.loraplus_lr_ratio=4"],
    "adapter.decompose_factor": ["adapter.kind=lokr", "adapter.decompose_factor=8"],
    "adapter.decompose_both": ["adapter.kind=lokr", "adapter.decompose_both=true"],
    "adapter.d_initial": ["adapter.kind=vera", "adapter.d_initial=0.2"],
    "adapter.target_rank": ["adapter.kind=adalora", "adapter.target_rank=4"],
    "adapter.initial_share": ["adapter.kind=adalora", "adapter.initial_share=0.2"],
    "adapter.final_share": ["adapter.kind=adalora", "adapter.final_share=0.2"],
    "adapter.allocate_every_steps": ["adapter.kind=adalora", "adapter.allocate_every_steps=5"],
    "adapter.orth_reg_weight": ["adapter.kind=adalora", "adapter.orth_reg_weight=0.1"],
    "adapter.num_virtual_tokens": ["adapter.kind=prompt", "adapter.num_virtual_tokens=7"],
    "seed": ["seed=1"],
    "compute.threads": ["compute.threads=1"],
    "compute.micro_batch_tokens": ["compute.micro_batch_tokens=512"],
    "compute.activation_checkpointing": ["compute.activation_checkpointing=true"],
    "compute.share_prefixes": ["compute.share_prefixes=true"],
    "compute.kernels": ["compute.kernels=torch"],
    "compute.kind": ["compute.kind=multi_process"],
    "compute.processes": ["compute.kind=multi_process", "compute.processes=4"],
    "compute.zero_stage": ["compute.kind=multi_process", "compute.zero_stage=2"],
    "compute.bucket_elements": ["compute.kind=multi_process", "compute.bucket_elements=1000"],
    "compute.sub_group_elements": ["compute.kind=multi_process", "compute.sub_group_elements=1000"],
    "compute.live_elements": ["compute.kind=multi_process", "compute.live_elements=1000"],
    "compute.persistent_elements": ["compute.kind=multi_process", "compute.persistent_elements=1000"],
    "compute.deepspeed": ["compute.kind=multi_process", "compute.deepspeed=ds.json"],
}
ELSEWHERE = {
    "version": "only 1 is accepted",
    "objective.kind": "must be what the data are for",
    "objective.beta": "needs preference data",
    "compute.device": "on a machine without a GPU cuda is refused",
    "compute.offload": "on a machine without a GPU it is refused",
    "compute.packed_weights": "needs a processor that reads them",
}
"""Options that the facts of this file leave no second value; each has a test of its own."""


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_every_accepted_option_changes_the_resolved_spec(changes: list[str]) -> None:
    chosen = ("base=", "adapter.kind=", "compute.kind=")
    before = resolved(*changes[:-1])[0] if changes[0].startswith(chosen) and len(changes) > 1 else resolved()[0]
    after = resolved(*changes)[0]
    assert after.content_hash() != before.content_hash()


@pytest.mark.parametrize(
    ("precision", "parameters", "tokens"),
    [("fp32", 71_000_000, 512), ("bf16", 71_000_000, 640), ("nf4", 71_000_000, 4096), ("bf16", 3_800_000, 4096)],
)
def test_a_pass_on_a_cpu_is_as_small_as_is_fast(precision: str, parameters: int, tokens: int) -> None:
    facts = replace(FACTS, base_parameters=parameters)
    assert resolved(f"base.precision={precision}", facts=facts)[0].compute.micro_batch_tokens == tokens
    assert resolved(f"base.precision={precision}", facts=replace(facts, device="cuda"))[0].compute.micro_batch_tokens == 4096
    shared, reasons = resolved(f"base.precision={precision}", "compute.share_prefixes=true", facts=facts)
    assert shared.compute.micro_batch_tokens == 4096
    assert reasons["compute.micro_batch_tokens"].endswith("; each pass computes shared beginnings anew")
    longer = replace(facts, longest_row=6000)
    assert resolved(f"base.precision={precision}", facts=longer)[0].compute.micro_batch_tokens == 6000


@pytest.mark.parametrize(
    ("change", "facts", "told"),
    [
        ("adapter.dropout=0.1", FACTS, r"adapter.dropout is 0.1: every row draws for itself"),
        ("seed=1", replace(FACTS, rows_turn_from=4096), r"rows of more than 4,096 tokens take other rope factors"),
    ],
)
def test_prefixes_are_not_shared_where_rows_that_begin_alike_differ(change: str, facts: ResolveFacts, told: str) -> None:
    resolved(change, facts=facts)
    with pytest.raises(SpecError, match=told):
        resolved(change, "compute.share_prefixes=true", facts=facts)
    resolved("base.rope_factors=long", "compute.share_prefixes=true", facts=facts)


def test_weights_are_packed_where_that_serves_and_there_is_room() -> None:
    roomy = replace(FACTS, memory_bytes=24 << 30, packs=frozenset({"fp32", "bf16"}))
    spec, reasons = resolved(facts=roomy)
    assert spec.compute.packed_weights
    assert reasons["compute.packed_weights"] == "they take 0.0 of 24 GiB of memory"
    large = replace(roomy, base_parameters=3_800_000_000)
    assert resolved(facts=large)[1]["compute.packed_weights"] == "they would take 14.2 of 24 GiB of memory, more than an eighth"
    for change in ("adapter.kind=full", "base.precision=nf4", "compute.kernels=torch"):
        assert resolved(change, facts=roomy)[0].compute.packed_weights is False
        with pytest.raises(SpecError, match=r"compute.packed_weights is true, but"):
            resolved(change, "compute.packed_weights=true", facts=roomy)
    assert resolved("compute.packed_weights=false", facts=roomy)[0].content_hash() != spec.content_hash()
    lesser = replace(roomy, packs=frozenset({"fp32"}))
    assert resolved("base.precision=fp32", facts=lesser)[0].compute.packed_weights
    told = "this processor lacks the instructions for packed products in bf16"
    assert resolved("base.precision=bf16", facts=lesser)[1]["compute.packed_weights"] == told


def test_options_bound_to_other_facts_change_the_resolved_spec_too() -> None:
    dpo, gpu = replace(FACTS, objective_kind="dpo", data_format="preference"), replace(FACTS, device="cuda")
    assert resolved("objective={kind: dpo, beta: 0.2}", facts=dpo)[0].content_hash() != resolved(facts=dpo)[0].content_hash()
    assert resolved("compute.device=cpu", facts=gpu)[0].content_hash() != resolved(facts=gpu)[0].content_hash()
    several = "compute.kind=multi_process"
    offloaded = resolved(several, "compute.offload=optimizer", facts=gpu)[0]
    assert offloaded.content_hash() != resolved(several, facts=gpu)[0].content_hash()


def test_no_option_is_forgotten_by_the_test_of_changes() -> None:
    covered = {name.split(" ")[0] for name in CHANGES} | set(ELSEWHERE)
    assert covered == {option.path for option in options()}


def test_there_are_fewer_than_90_options() -> None:
    assert count_options() < 90


def test_every_option_is_described_and_every_default_has_a_reason() -> None:
    for option in options():
        assert option.description.endswith("."), option.path
        assert option.required or option.why, option.path
        assert option.required or not option.why.endswith("."), option.path
        assert option.required == (option.default == ""), option.path


def test_the_kinds_that_may_be_left_out_are_the_defaults_of_their_unions() -> None:
    spec = spec_of()
    assert (spec.adapter.kind, spec.schedule.optimizer.kind, spec.compute.kind) == DEFAULT_KINDS


def test_two_specs_written_differently_have_one_hash() -> None:
    one = spec_of("adapter={rank: 16}", "data.validation=0.1", "schedule.warmup_share=3e-2")
    assert one.content_hash() == spec_of().content_hash()
    assert len(one.content_hash()) == 64


def test_a_spec_made_in_python_is_checked_like_a_file() -> None:
    with pytest.raises(ValidationError):
        LoraSpec(rank=0)


def test_resolved_yaml_is_yaml_for_any_reader() -> None:
    import yaml

    spec, reasons = resolved()
    assert yaml.safe_load(resolved_yaml(spec, reasons))["adapter"] == read_yaml(spec.to_yaml()).value["adapter"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("device", "missing", "found", "why"),
    [
        ("cpu", {}, "native", "built on this machine and found right"),
        ("cpu", {"no_native_reason": "there is no C compiler"}, "torch", "there is no C compiler"),
        ("cuda", {}, "triton", "built on this machine and found right"),
        ("cuda", {"no_triton_reason": "Triton cannot be imported"}, "torch", "Triton cannot be imported"),
    ],
)
def test_kernels_are_the_best_there_are_for_the_device(device: str, missing: dict[str, str], found: str, why: str) -> None:
    spec, reasons = resolved(facts=replace(FACTS, device=device, **missing))
    assert (spec.compute.kernels, reasons["compute.kernels"]) == (found, why)


@pytest.mark.parametrize(
    ("kernels", "facts", "message"),
    [
        ("triton", FACTS, "compute.kernels is triton, but the run computes on cpu"),
        ("native", replace(FACTS, device="cuda"), "compute.kernels is native, but the run computes on cuda"),
        ("native", replace(FACTS, no_native_reason="there is no C compiler"), "native, but there is no C compiler"),
    ],
)
def test_kernels_that_cannot_be_had_are_refused_with_the_reason(kernels: str, facts: ResolveFacts, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolved(f"compute.kernels={kernels}", facts=facts)
