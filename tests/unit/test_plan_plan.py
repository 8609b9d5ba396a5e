"""The plan of a run: what it foretells, what it decides so that a run fits, and what it names where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from kivnun.data.order import order_of
from kivnun.data.packing import micro_batches
from kivnun.errors import DataError, IntegrityError, SpecError, WontFitError
from kivnun.plan.bases import base_files
from kivnun.plan.changes import changed
from kivnun.plan.cost import Prices, cost_of, read_prices
from kivnun.plan.devices import Device, _limits, find_device, machine_memory, this_machine
from kivnun.plan.forecast import steps_of
from kivnun.plan.plan import make_plan, question_of
from kivnun.plan.rows import RunRows
from kivnun.plan.verdict import Plan, Question
from kivnun.spec import LoraSpec, PassChoice, TuneSpec, parse_spec
from runs import chats, pairs, stranger, write_rows

MINI = "microsoft/Phi-4-mini-instruct"


@pytest.fixture
def spec_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TuneSpec]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write_rows(tmp_path / "train.jsonl", chats(120))

    def make(*overrides: str, base: str = "kivnun/tiny-phi") -> TuneSpec:
        text = f"version: 1\nbase: {base}\ndata: {{train: train.jsonl}}\n"
        return parse_spec(text, folder=tmp_path, overrides=overrides)

    return make


def cpu(mib: float, count: int = 1) -> Device:
    return Device("a machine", "cpu", mib * 2**20, 2, None, count)


def gpu(gib: float) -> Device:
    return Device("a GPU", "cuda", gib * 2**30, 0, 312e12)


def plan_of(spec: TuneSpec, device: Device, **changes: Any) -> Plan:
    return make_plan(replace(question_of(spec, device), **changes))


def long_rows(spec: TuneSpec, device: Device, lengths: list[int]) -> Question:
    """Return a question about rows of these lengths."""
    question, all_of = question_of(spec, device), np.asarray(lengths)
    rows = RunRows("messages", all_of, all_of, all_of[:12], all_of[:12] // 2, (len(lengths),), None, sum(lengths) // 2)
    return replace(question, rows=rows, facts=replace(question.facts, longest_row=max(lengths)))


def test_where_all_fits_the_plan_leaves_every_choice_as_it_was(spec_of: Callable[..., TuneSpec]) -> None:
    plan = plan_of(spec_of(), cpu(8192))
    assert (plan.verdict, plan.refusal(), plan.changes) == ("fits", None, ())
    assert (plan.spec.compute.micro_batch_tokens, plan.spec.compute.activation_checkpointing) == (4096, False)
    figures = plan.figures()
    assert figures is not None
    assert sum(figures["parts"].values()) == figures["peak_bytes"]
    assert set(figures["parts"]) == {"process", "weights", "adapter", "gradients", "moments", "activations", "workspace"}
    assert (figures["steps"], plan.spec.schedule.epochs) == (21, 3)  # 108 rows in steps of 16
    assert figures["seconds"] > 0


def test_short_memory_takes_shorter_passes_first_and_then_layers_again_and_then_refuses(spec_of: Callable[..., TuneSpec]) -> None:
    spec = spec_of("schedule.batch_rows=32", base=MINI)

    def plan(gib: float) -> Plan:
        return make_plan(long_rows(spec, gpu(gib), [500] * 320))

    peaks = [plan(gib).forecast.peak / 2**30 for gib in (60, 1)]  # type: ignore[union-attr]
    roomy, tight = plan(60), plan(1)
    assert (roomy.spec.compute.micro_batch_tokens, roomy.spec.compute.activation_checkpointing) == (4096, False)
    assert (tight.verdict, tight.spec.compute.activation_checkpointing) == ("does_not_fit", True)
    found: list[tuple[int | None, bool | None]] = []
    for gib in np.linspace(peaks[0] + 0.01, peaks[1] + 0.01, 30):
        its = plan(float(gib))
        assert its.verdict == "fits", gib
        compute = its.spec.compute
        found.append((compute.micro_batch_tokens, compute.activation_checkpointing))
        if found[-1] != found[0]:
            assert its.reasons["compute.micro_batch_tokens"].startswith("else the run would take ")
    assert list(dict.fromkeys(found)) == [(4096, False), (2048, False), (1024, False), (512, False), (512, True)]


def test_what_a_spec_says_of_its_passes_is_kept_and_what_a_run_was_begun_with_too(spec_of: Callable[..., TuneSpec]) -> None:
    given = spec_of("compute.micro_batch_tokens=3000", "compute.activation_checkpointing=false", base=MINI)
    plan = make_plan(long_rows(given, gpu(7.6), [500] * 320))
    assert plan.verdict == "does_not_fit"
    assert (plan.spec.compute.micro_batch_tokens, plan.spec.compute.activation_checkpointing) == (3000, False)
    begun = long_rows(spec_of(base=MINI), gpu(60), [500] * 320)
    begun = replace(begun, facts=replace(begun.facts, passes=PassChoice(1024, True, "as the run was begun with")))
    resumed = make_plan(begun)
    assert (resumed.spec.compute.micro_batch_tokens, resumed.spec.compute.activation_checkpointing) == (1024, True)
    assert resumed.reasons["compute.activation_checkpointing"] == "as the run was begun with"


@pytest.mark.parametrize(
    ("overrides", "gib", "what"),
    [
        (("adapter.kind=full",), 23, {"LoRA instead of full tuning", "state divided over 8 devices"}),
        ((), 7.0, {"the base in nf4"}),
        (
            ("compute.micro_batch_tokens=8000", "compute.activation_checkpointing=false"),
            10.5,
            {"passes of", "layers computed again"},
        ),
        (("adapter.kind=full",), 6, {"LoRA instead of full tuning, the base in nf4"}),
        (("adapter.kind=ia3", "compute.micro_batch_tokens=500"), 3.0, {"the base in nf4"}),
    ],
)
def test_every_change_that_a_refusal_names_makes_the_run_fit(
    spec_of: Callable[..., TuneSpec], overrides: tuple[str, ...], gib: float, what: set[str]
) -> None:
    question = long_rows(spec_of(*overrides, base=MINI), gpu(gib), [500] * 320)
    plan = make_plan(question)
    assert plan.verdict == "does_not_fit"
    named = [change.what for change in plan.changes]
    assert all(any(name.startswith(words) for name in named) for words in what), named
    for change in plan.changes:
        again = long_rows(changed(question.spec, change.overrides), gpu(gib), [500] * 320)
        cut = next((int(it.partition("=")[2]) for it in change.overrides if it.startswith("data.max_seq_len=")), None)
        if cut is not None:
            again = long_rows(again.spec, gpu(gib), [cut] * 320)
        found = make_plan(again)
        assert found.verdict == "fits", change
        assert found.forecast is not None
        assert found.forecast.peak == pytest.approx(change.peak)
    refusal = plan.refusal()
    assert isinstance(refusal, WontFitError)
    assert refusal.hint is not None
    assert all(override in refusal.hint for change in plan.changes for override in change.overrides)


def test_where_nothing_helps_the_refusal_says_so(spec_of: Callable[..., TuneSpec]) -> None:
    refusal = plan_of(spec_of(), cpu(20)).refusal()
    assert refusal is not None
    assert "no change of the spec makes it fit: take a smaller base, or a device with more memory" in str(refusal)


def test_processes_share_a_machine_and_have_a_gpu_each(spec_of: Callable[..., TuneSpec]) -> None:
    spec = spec_of("compute.kind=multi_process", "compute.processes=4")
    assert plan_of(spec, cpu(4096)).limit == 1024 * 2**20
    assert plan_of(spec, cpu(4096, count=2)).limit == 2048 * 2**20
    assert plan_of(spec, replace(gpu(8), count=4)).limit == 8 * 2**30


def test_a_base_of_unknown_layers_is_planned_without_figures_and_never_refused(
    spec_of: Callable[..., TuneSpec], tmp_path: Path
) -> None:
    folder = stranger(tmp_path / "stranger")
    plan = plan_of(spec_of(base=str(folder)), cpu(1))
    assert (plan.verdict, plan.refusal(), plan.figures(), plan.result()) == ("unknown", None, None, None)
    assert "model_type 'stranger'" in plan.unknown
    assert plan.steps.count == 21


def test_seconds_that_nobody_knows_are_null_in_a_result(spec_of: Callable[..., TuneSpec]) -> None:
    result = plan_of(spec_of(), replace(gpu(8), flops=None)).result()
    assert result is not None
    assert result["seconds"] is None
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("more", [(), ("schedule.batch_tokens=200",), ("schedule.steps=5",)])
def test_steps_and_passes_are_those_that_training_makes(spec_of: Callable[..., TuneSpec], more: tuple[str, ...]) -> None:
    from kivnun.data.loader import load_dataset
    from kivnun.data.template import load_tokenizer
    from kivnun.model.families import find_base

    given = spec_of("compute.micro_batch_tokens=150", *more)
    plan = plan_of(given, cpu(8192))
    data = load_dataset(given.data, load_tokenizer(find_base("kivnun/tiny-phi")), given.seed, 2048)
    order = order_of(plan.spec.schedule, plan.spec.seed, data.train.lengths, data.train.sizes, data.train.shares)
    items = [[data.train.rows[row] for row in order.rows_of(step)] for step in range(1, order.steps + 1)]
    passes = [sum(row.length for row in run) for its in items for run in micro_batches(its, 150)]
    first = [its for step, its in enumerate(items, 1) if order.epoch_of(step) == 0]
    in_first = [sum(row.length for row in run) for its in first for run in micro_batches(its, 150)]
    assert plan.steps.count == order.steps
    assert plan.steps.largest_pass == max(in_first)
    assert max(in_first) <= max(passes) <= 150
    assert plan.steps.tokens == pytest.approx(sum(row.length for its in items for row in its), rel=0.05)


def test_processes_get_about_their_part_of_a_step(spec_of: Callable[..., TuneSpec]) -> None:
    alone, four = (
        plan_of(spec_of("schedule.batch_rows=100", *more), cpu(8192)).steps
        for more in ((), ("compute.kind=multi_process", "compute.processes=4"))
    )
    assert alone.tokens == four.tokens
    assert alone.largest_pass / 4 <= four.largest_pass <= 1.2 * alone.largest_pass / 4


def test_preferences_count_both_replies(spec_of: Callable[..., TuneSpec], tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", pairs(30))
    plan = plan_of(spec_of("data.train=pairs.jsonl"), cpu(8192))
    assert plan.spec.objective is not None
    assert plan.spec.objective.kind == "dpo"
    assert plan.spec.schedule.learning_rate == 1e-4


def test_rows_are_estimated_where_there_is_no_tokenizer(spec_of: Callable[..., TuneSpec], tmp_path: Path) -> None:
    counted, estimated = (question_of(spec_of(base=base), gpu(80)).rows for base in ("kivnun/tiny-phi", MINI))
    assert (counted.counted, estimated.counted) == (True, False)
    assert (len(estimated.lengths), len(estimated.held_out)) == (len(counted.lengths), len(counted.held_out))
    assert any("estimated from letters" in it for it in plan_of(spec_of(base=MINI), gpu(80)).cautions)
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match="cannot be used"):
        question_of(spec_of("data.train=bad.jsonl", base=MINI), gpu(80))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.validation=null",), "no row is held out"),
        (("data.validation=0.02",), "2 held-out rows are too few for an interval"),
        (("schedule.batch_rows=500",), "schedule.batch_rows is 500, more than the 108 training rows"),
        (("schedule.epochs=1",), "the whole run makes 7 steps, too few"),
        (("schedule.learning_rate=0.1",), "schedule.learning_rate is 0.1, 50 times the usual rate for lora (0.002)"),
        (("schedule.learning_rate=1e-5",), "schedule.learning_rate is 1e-05, 200 times below the usual rate for lora (0.002)"),
        (("adapter.alpha=1",), "adapter.alpha / rank is 0.0625, where 1 to 2 is usual"),
        (("adapter.rslora=true", "adapter.alpha=64"), "adapter.alpha / sqrt(rank) is 16"),
        (("data.validation=held.jsonl",), "12 of the held-out records are also training records"),
        (("data.max_seq_len=20", "data.over_long=truncate"), "rows are cut to data.max_seq_len"),
        (("data.train=few.jsonl",), "18 training rows are few"),
    ],
)
def test_what_is_likely_to_disappoint_is_told(
    spec_of: Callable[..., TuneSpec], tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    write_rows(tmp_path / "held.jsonl", chats(12))
    write_rows(tmp_path / "few.jsonl", chats(20))
    assert plan_of(spec_of("schedule.epochs=9"), cpu(8192)).cautions == ()
    assert any(said in it for it in plan_of(spec_of("schedule.epochs=9", *overrides), cpu(8192)).cautions)


def test_rows_on_both_sides_of_a_longrope_border_are_told(spec_of: Callable[..., TuneSpec]) -> None:
    def told(lengths: list[int], *overrides: str) -> bool:
        spec = spec_of("schedule.epochs=9", *overrides, base=MINI)
        return any("LongRoPE" in it for it in make_plan(long_rows(spec, gpu(80), lengths)).cautions)

    assert base_files(MINI).turns_from == 4096
    assert told([4000] * 60 + [4097] * 3)
    assert not told([4000] * 60)
    assert not told([4097] * 60)
    assert not told([4000] * 60 + [4097] * 3, "base.rope_factors=long")


def test_a_run_that_barely_fits_is_told(spec_of: Callable[..., TuneSpec]) -> None:
    spec = spec_of()
    roomy = plan_of(spec, cpu(8192))
    assert roomy.forecast is not None
    tight = plan_of(spec, cpu(roomy.forecast.peak / 2**20 * 1.02))
    assert tight.verdict == "fits"
    assert any("may be off by a tenth" in it for it in tight.cautions)


def test_longrope_is_read_from_any_spelling(tmp_path: Path) -> None:
    for rope in (
        {"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096},
        {"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 4096},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", **rope}), encoding="utf-8")
        assert base_files(str(tmp_path)).turns_from == 4096
    assert base_files("kivnun/tiny-phi").turns_from is None


def test_a_machine_has_no_more_than_its_control_group_allows(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("max\n", encoding="ascii")
    (tmp_path / "b").write_text("1048576\n", encoding="ascii")
    assert list(_limits([tmp_path / "a", tmp_path / "b", tmp_path / "none"])) == [1048576.0]
    assert this_machine().memory_bytes == machine_memory() > find_device("cpu").memory_bytes


def test_an_adapter_that_a_run_goes_on_with_is_planned_as_it_is_stored(spec_of: Callable[..., TuneSpec], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    name = "base_model.model.model.layers.{}.self_attn.qkv_proj.lora_{}.weight"
    tensors = {name.format(layer, side): np.zeros((5, 5), np.float32) for layer in range(4) for side in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 7, "use_dora": False, "use_rslora": False, "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    adapter = plan_of(spec_of(f"adapter.start_from={folder}"), cpu(8192)).spec.adapter
    assert isinstance(adapter, LoraSpec)
    assert (adapter.rank, adapter.alpha, adapter.target_modules) == (5, 7.0, ("qkv_proj",))
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(IntegrityError, match="cannot be read: 'r'"):
        plan_of(spec_of(f"adapter.start_from={folder}"), cpu(8192))


PRICES = "currency: EUR\nhours: {l4: 0.8, cpu: 0.05}\nmillion_trained_tokens: 1.5\n"


def test_a_run_costs_hours_and_tokens(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(PRICES, encoding="utf-8")
    prices = read_prices(tmp_path / "prices.yaml")
    assert prices == Prices("EUR", {"l4": 0.8, "cpu": 0.05}, 1.5)
    (tmp_path / "prices.json").write_text(json.dumps({"currency": "EUR", "hours": {"l4": 0.8}}), encoding="utf-8")
    assert read_prices(tmp_path / "prices.json").hours == {"l4": 0.8}
    cost = cost_of(prices, "l4", 4, 1800, 2_000_000)
    assert (cost.by_hours, cost.by_tokens) == (pytest.approx(1.6), pytest.approx(3.0))
    unknown = cost_of(prices, "h100", 1, float("nan"), None)
    assert (unknown.by_hours, unknown.by_tokens) == (None, None)
    with pytest.raises(SpecError, match="has none for h100"):
        cost_of(read_prices(tmp_path / "prices.json"), "h100", 1, 1.0, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1", "must hold a mapping, got list"),
        ("currency: EUR\nper_hour: 3", "per_hour is no key of a list of prices"),
        ("hours: {l4: 1}", "currency must be a name such as EUR, got None"),
        ("currency: EUR", "holds no price"),
        ("currency: EUR\nhours: 3", "hours must map devices to prices, got 3"),
        ("currency: EUR\nhours: {h300: 3}", "hours.h300 is no device"),
        ("currency: EUR\nhours: {l4: -3}", "hours.l4 must be a number of 0 or more, got -3"),
        ("currency: EUR\nmillion_trained_tokens: '3'", "million_trained_tokens must be a number of 0 or more, got '3'"),
        ("currency: [", "is no YAML or JSON"),
    ],
)
def test_a_list_of_prices_is_read_strictly(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "prices.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match="hint: ") as refused:
        read_prices(tmp_path / "prices.yaml")
    assert said in str(refused.value)


def test_prices_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        read_prices(tmp_path / "none.yaml")


def test_steps_of_files_with_shares_are_those_of_the_order(spec_of: Callable[..., TuneSpec], tmp_path: Path) -> None:
    write_rows(tmp_path / "more.jsonl", chats(30))
    plan = plan_of(spec_of("data.train=[{path: train.jsonl, share: 1}, {path: more.jsonl, share: 3}]"), cpu(8192))
    question = question_of(plan.spec, cpu(8192))
    assert question.rows.shares == (1.0, 3.0)
    assert steps_of(plan.spec, question.rows) == plan.steps
