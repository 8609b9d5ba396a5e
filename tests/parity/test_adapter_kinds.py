"""Every adapter that is PEFT's, or has PEFT's form, against PEFT with equal tensors: logits, gradients, and what training adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import tiny
from kivnun.data.packing import pack
from kivnun.errors import BaseModelError, IntegrityError, SpecError
from kivnun.model.adapter_folder import load_peft
from kivnun.model.generate import SamplingParams
from kivnun.model.load import Base, load_base
from kivnun.spec import AdaloraSpec, AdapterSpec, Ia3Spec, LnTuningSpec, LohaSpec, LokrSpec, PrefixSpec, PromptSpec, VeraSpec
from kivnun.train.new_weights import new_weights
from kivnun.train.weights import AdapterWeights

TinyBase = Callable[[str], Path]
KINDS: dict[str, AdapterSpec] = {
    "ia3": Ia3Spec(),
    "loha": LohaSpec(rank=3, alpha=7.0),
    "lokr": LokrSpec(rank=3, alpha=7.0),
    "lokr_both": LokrSpec(rank=1, alpha=1.0, decompose_factor=8, decompose_both=True),
    "vera": VeraSpec(rank=16),
    "adalora": AdaloraSpec(rank=4, target_rank=2, alpha=9.0),
    "ln_tuning": LnTuningSpec(),
    "prompt": PromptSpec(num_virtual_tokens=5),
    "prefix": PrefixSpec(num_virtual_tokens=5),
}
FAMILIES = ["phi3", "llama_biased", "qwen3", "phi"]
ROWS = [tiny.random_ids(length) for length in (3, 17, 30)]
STEPS = 10

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.*have invalid shape"),
]


def stirred(base: Base, spec: AdapterSpec) -> AdapterWeights:
    """Return an adapter with every trained number moved away from its start."""
    weights = new_weights(spec, base, tiny.random_rows((1, 7, 30)), STEPS, seed=3)
    assert isinstance(weights, AdapterWeights)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in weights.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.1)
    return weights


def twin(folder: Path, weights: AdapterWeights, place: Path, trainable: bool = False) -> nn.Module:
    """Return PEFT's own model of the adapter, from the folder that we write."""
    place.mkdir(exist_ok=True)
    weights.export(place, str(folder))
    virtual = "prompt_embeddings" in weights.parameters()
    model = peft.PeftModel.from_pretrained(tiny.reference(folder), place, is_trainable=trainable and not virtual)
    for name, parameter in model.named_parameters():
        if virtual and name.startswith("prompt_encoder"):
            parameter.requires_grad_(trainable)
    return model.eval()


def adapted(base: Base, weights: AdapterWeights) -> list[torch.Tensor]:
    with base.using(weights.sites()):
        return tiny.packed_logits(base, ROWS)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_pefts(kind: str, name: str, tiny_base: TinyBase, tmp_path: Path) -> None:
    base = load_base(tiny_base(name), "fp32")
    weights = stirred(base, KINDS[kind])
    theirs = twin(tiny_base(name), weights, tmp_path)
    for ids, ours, plain in zip(ROWS, adapted(base, weights), tiny.packed_logits(base, ROWS), strict=True):
        expected = tiny.reference_logits(theirs, ids)[-len(ids) :]
        assert tiny.relative_difference(ours, expected) < 3e-6
        assert tiny.relative_difference(plain, expected) > 1e-2


def test_a_table_that_does_more_than_look_up_takes_no_prompt(tiny_base: TinyBase) -> None:
    with pytest.raises(BaseModelError, match="Gemma2TextScaledWordEmbedding"):
        stirred(load_base(tiny_base("gemma2"), "fp32"), KINDS["prompt"])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_pefts_whatever_the_packs(kind: str, tiny_base: TinyBase, tmp_path: Path) -> None:
    folder = tiny_base("phi3")
    base = load_base(folder, "fp32")
    weights = stirred(base, KINDS[kind])
    rows = tiny.random_rows((1, 7, 30))
    total = sum(row.total_weight for row in rows)
    trainee = tiny.new_trainee(base, weights)
    together, alone = {}, {}
    for gathered, packs in ((together, [rows]), (alone, [[row] for row in rows])):
        loss = sum(trainee.forward_backward(pack(part), total) for part in packs)
        gathered |= {"loss": torch.tensor(loss), **tiny.gradients(trainee)}
        trainee._clear()
    assert together.keys() == alone.keys()
    theirs = _gradients(twin(folder, weights, tmp_path, trainable=True), rows, weights)
    for name, gradient in together.items():
        assert tiny.relative_difference(alone[name], gradient) < 2e-6, name
        assert tiny.relative_difference(gradient, theirs[name]) < 2e-5, name


def _gradients(model: nn.Module, rows: list[Any], weights: AdapterWeights) -> dict[str, torch.Tensor]:
    """Return PEFT's loss, each row alone, and its gradients under our names."""
    total = sum(row.total_weight for row in rows)
    summed = torch.tensor(0.0)
    for row in rows:
        ids = torch.from_numpy(row.ids).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :]
        nll = nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        summed = summed + (nll * torch.from_numpy(row.weights[1:])).sum() / total
    summed.backward()
    found = {
        name.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", "").removesuffix(".default"): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    gradients = {"loss": summed.detach()}
    for name in weights.parameters():
        gradient = found.get(name if name != "prompt_embeddings" else "prompt_encoder.default.embedding.weight")
        assert gradient is not None, name
        gradients[name] = gradient
    return gradients


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["phi3", "phi3_window", "phi4_mini", "phi"])
def test_an_answer_with_a_cache_is_that_of_the_whole_row(kind: str, name: str, tiny_base: TinyBase, tmp_path: Path) -> None:
    """phi4_mini's rows cross LongRoPE's original length while they are written: virtual tokens count."""
    base = load_base(tiny_base(name), "fp32")
    weights = stirred(base, KINDS[kind])
    prompts = [tiny.random_ids(length) for length in (2, 9, 16)]
    with base.using(weights.sites()):
        from kivnun.model.generate import generate

        answers = generate(base, prompts, SamplingParams(8, ()))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer:
            with base.using(weights.sites()):
                assert int(tiny.packed_logits(base, [ids])[0][-1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_count_for_longrope(kind: str, tiny_base: TinyBase, tmp_path: Path) -> None:
    base = load_base(tiny_base("phi4_mini"), "fp32")
    weights = stirred(base, KINDS[kind])
    theirs = twin(tiny_base("phi4_mini"), weights, tmp_path)
    rows = [tiny.random_ids(length) for length in (4, tiny.ORIGINAL_LENGTH - 6, tiny.ORIGINAL_LENGTH - 2, 40)]
    with base.using(weights.sites()):
        found = tiny.packed_logits(base, rows)
    for ids, ours in zip(rows, found, strict=True):
        assert tiny.relative_difference(ours, tiny.reference_logits(theirs, ids)[-len(ids) :]) < 3e-6


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_rows_that_share_a_beginning_share_virtual_tokens_too(kind: str, tiny_base: TinyBase) -> None:
    base = load_base(tiny_base("phi3"), "fp32")
    weights = stirred(base, KINDS[kind])
    trainee = tiny.new_trainee(base, weights)
    common = tiny.random_ids(40)
    rows = [tiny.token_row([*common, *tiny.random_ids(6, row)], row, 6) for row in range(3)]
    assert max(pack(rows, True).parents) >= 0
    apart, shared = (trainee.forward(pack(rows, share)) for share in (False, True))
    assert abs(apart - shared).max() < 1e-5


def test_a_changed_token_of_one_row_changes_no_other_row_under_virtual_tokens(tiny_base: TinyBase) -> None:
    base = load_base(tiny_base("phi3"), "fp32")
    for kind in ("prompt", "prefix"):
        weights = stirred(base, KINDS[kind])
        with base.using(weights.sites()):
            before = tiny.packed_logits(base, ROWS)
            changed = tiny.packed_logits(base, [ROWS[0], [(t + 1) % tiny.VOCAB for t in ROWS[1]], ROWS[2]])
        assert torch.equal(before[0], changed[0])
        assert torch.equal(before[2], changed[2])
        assert not torch.equal(before[1], changed[1])


def test_adalora_trains_as_peft_does(tiny_base: TinyBase, tmp_path: Path) -> None:
    """Penalty, updates, importance and the ranks given up, over a whole schedule; ours in one pack per row."""
    folder, spec = tiny_base("phi3"), KINDS["adalora"]
    base = load_base(folder, "fp32")
    weights = stirred(base, spec)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=9, tinit=1, tfinal=3, deltaT=1, orth_reg_weight=0.5, total_step=STEPS,
        target_modules=list(weights.sites()), task_type="CAUSAL_LM",
    )  # fmt: skip
    model: Any = peft.get_peft_model(tiny.reference(folder), config)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in weights.parameters().items():
            theirs[f"base_model.model.{name}.default"].copy_(parameter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    trainee, rows = tiny.new_trainee(base, weights), tiny.random_rows((9, 7, 30))
    total = sum(row.total_weight for row in rows)
    for step in range(1, STEPS + 1):
        for row in rows:
            trainee.forward_backward(pack([row]), total)
        trainee.optim_step(0.01)
        tiny.reference_loss(model, rows).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    left = 0
    for name, parameter in weights.parameters().items():
        expected = theirs[f"base_model.model.{name}.default"]
        if name.endswith("lora_E"):
            assert torch.equal(parameter == 0, expected == 0), name
            left += int((parameter != 0).sum())
        assert tiny.relative_difference(parameter, expected) < 2e-3, name  # ten steps of AdamW from sums in another order
    assert left == 2 * len(weights.sites())


def test_a_layer_that_gave_up_all_its_ranks_is_read_by_peft_and_by_us(tiny_base: TinyBase, tmp_path: Path) -> None:
    base = load_base(tiny_base("phi3"), "fp32")
    weights = stirred(base, KINDS["adalora"])
    adapter: Any = weights.adapter
    kept = {name: [False] * 4 if "layers.0" in name else [True, False, True, False] for name in weights.sites()}
    with torch.no_grad():
        for name, site in weights.sites().items():
            site.layer.lora_E["default"][~torch.tensor(kept[name])] = 0  # type: ignore[union-attr]
    adapter.model.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": its for name, its in kept.items()}
    theirs = twin(tiny_base("phi3"), weights, tmp_path)
    again = load_peft(base, tmp_path)
    with base.using(again.sites):
        reloaded = tiny.packed_logits(base, ROWS)
    for ids, ours, same in zip(ROWS, adapted(base, weights), reloaded, strict=True):
        assert torch.equal(ours, same)
        assert tiny.relative_difference(ours, tiny.reference_logits(theirs, ids)) < 3e-6


def test_adalora_needs_a_step_to_give_up_ranks_in(tiny_base: TinyBase) -> None:
    base = load_base(tiny_base("phi3"), "fp32")
    spec = AdaloraSpec(alpha=1.0, initial_share=0.5, final_share=0.4)
    with pytest.raises(SpecError, match="it has 0 steps"):
        new_weights(spec, base, tiny.random_rows((3,)), 0, seed=0)


def test_what_is_drawn_is_drawn_by_the_seed_alone(tiny_base: TinyBase) -> None:
    base = load_base(tiny_base("phi3"), "fp32")
    for kind, spec in KINDS.items():
        torch.manual_seed(1)
        one = new_weights(spec, base, [], STEPS, seed=3).parameters()
        torch.manual_seed(2)
        same = new_weights(spec, base, [], STEPS, seed=3).parameters()
        other = new_weights(spec, base, [], STEPS, seed=4).parameters()
        assert all(torch.equal(one[name], same[name]) for name in one), kind
        if kind not in ("ia3", "ln_tuning", "vera"):  # which start the same whatever the seed
            assert any(not torch.equal(one[name], other[name]) for name in one), kind


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ln_tuning"])  # norms of one name and width fit any base
def test_a_folder_of_another_base_is_refused_in_words(kind: str, tiny_base: TinyBase, tmp_path: Path) -> None:
    weights = stirred(load_base(tiny_base("phi3"), "fp32"), KINDS[kind])
    weights.export(tmp_path, "base")
    other = load_base(tiny_base("llama"), "fp32")
    if kind == "prompt":
        tensors = {"prompt_embeddings": torch.zeros(5, 47)}
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(IntegrityError, match=r"should hold prompt_embeddings|fit no layer|does not fit"):
        load_peft(other, tmp_path)


@contextmanager
def _changed(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def test_a_base_without_norms_of_its_own_is_told(tiny_base: TinyBase) -> None:
    import kivnun.model.norms as norms

    with _changed(norms, "_is_norm", lambda module: False), pytest.raises(BaseModelError, match="has no norms"):
        new_weights(LnTuningSpec(), load_base(tiny_base("phi3"), "fp32"), [], 1, seed=0)
