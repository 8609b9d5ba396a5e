"""LoRA and DoRA against PEFT with equal tensors: logits, gradients, merged weights, and folders that go both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from kivnun.data.packing import pack
from kivnun.errors import IntegrityError
from kivnun.model.adapter_folder import load_peft
from kivnun.model.load import Base, load_base

TinyBase = Callable[[str], Path]
KINDS: list[dict[str, Any]] = [
    {"kind": "lora", "init": "kaiming"},
    {"kind": "lora", "init": "gaussian"},
    {"kind": "lora", "rslora": True},
    {"kind": "lora", "rank": 1, "alpha": 0.5},
    {"kind": "dora"},
    {"kind": "dora", "rslora": True, "rank": 5},
]
ROWS = [tiny.random_ids(length) for length in (3, 17, 30)]


def _near(options: dict[str, Any]) -> float:
    """Return how near to PEFT's float32 logits ours must be. With "gaussian", whose A is largest, PEFT itself is 1e-6 from what it
    computes in float64, and two libraries that round differently are up to twice that from each other."""
    return 2e-6 if options.get("init") == "gaussian" else 1e-6


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("name", ["phi3", "qwen2"])
def test_logits_are_as_near_to_float64_as_pefts_own(name: str, options: dict[str, Any], tiny_base: TinyBase):
    folder = tiny_base(name)
    base = load_base(folder, "fp32")
    weights = tiny.new_weights(base, **options)
    twin = tiny.peft_twin(folder, weights.adapter)
    theirs = [tiny.reference_logits(twin, ids) for ids in ROWS]
    twin.double()
    exact = [tiny.reference_logits(twin, ids) for ids in ROWS]
    ours = _adapted_logits(base, weights)
    distance = max(map(tiny.relative_difference, ours, exact))
    assert distance < 1.5 * max(map(tiny.relative_difference, theirs, exact))


def _adapted_logits(base: Base, weights: tiny.AdapterWeights) -> list[torch.Tensor]:
    with base.using(weights.sites()):
        return tiny.packed_logits(base, ROWS)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("name", ["phi3", "qwen2"])
def test_logits_equal_pefts_with_equal_tensors(name: str, options: dict[str, Any], tiny_base: TinyBase):
    folder = tiny_base(name)
    base = load_base(folder, "fp32")
    weights = tiny.new_weights(base, **options)
    twin = tiny.peft_twin(folder, weights.adapter)
    plain = tiny.packed_logits(base, ROWS)
    for ids, logits, before in zip(ROWS, _adapted_logits(base, weights), plain, strict=True):
        expected = tiny.reference_logits(twin, ids)
        assert tiny.relative_difference(logits, expected) < _near(options)
        assert tiny.relative_difference(before, expected) > 1e-2  # the adapter is felt


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_gradients_equal_pefts(options: dict[str, Any], tiny_base: TinyBase):
    folder = tiny_base("phi3")
    base = load_base(folder, "fp32")
    weights = tiny.new_weights(base, **options)
    trainee = tiny.new_trainee(base, weights)
    rows = tiny.random_rows((1, 7, 30))
    total = sum(row.total_weight for row in rows)
    loss = trainee.forward_backward(pack(rows), total)
    twin = tiny.peft_twin(folder, weights.adapter)
    expected = tiny.reference_loss(twin, rows)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    theirs = dict(twin.named_parameters())
    ours = tiny.gradients(trainee)
    assert len(ours) == len(weights.parameters())
    for name, gradient in ours.items():
        assert tiny.relative_difference(gradient, theirs[tiny.peft_name(name)].grad) < 1e-5, name


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_merged_weights_equal_pefts(options: dict[str, Any], tiny_base: TinyBase):
    folder = tiny_base("phi3")
    base = load_base(folder, "fp32")
    weights = tiny.new_weights(base, **options)
    merged = tiny.peft_twin(folder, weights.adapter).merge_and_unload()
    for name, site in weights.sites().items():
        ours = site.merged(base.linears[name].weight)
        assert tiny.relative_difference(ours, merged.get_submodule(name).weight) < 1e-6, name


@pytest.mark.parametrize(("init", "bound"), [("kaiming", 1 / 48**0.5), ("gaussian", None)])
def test_a_starts_as_pefts_does_and_b_at_zero(init: str, bound: float | None, tiny_base: TinyBase):
    folder = tiny_base("phi3")
    weights = tiny.new_weights(load_base(folder, "fp32"), rank=16, init=init, stirred=False)  # type: ignore[arg-type]
    config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights="gaussian" if init == "gaussian" else True)
    torch.manual_seed(0)  # theirs are drawn from torch's own generator, and might be 10 % off by chance
    theirs = dict(peft.get_peft_model(tiny.reference(folder), config).named_parameters())
    for name, parameter in weights.parameters().items():
        expected = theirs[tiny.peft_name(name)]
        assert parameter.shape == expected.shape
        if name.endswith("lora_B"):
            assert not parameter.any()
            continue
        assert float(parameter.detach().std()) == pytest.approx(float(expected.detach().std()), rel=0.1)
        if bound is not None and parameter.shape[1] == 48:
            assert float(parameter.detach().abs().max()) == pytest.approx(bound, rel=0.02)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_our_folder_opens_in_peft_with_the_same_logits(options: dict[str, Any], tiny_base: TinyBase, tmp_path: Path):
    folder = tiny_base("phi3")
    base = load_base(folder, "fp32")
    weights = tiny.new_weights(base, **options)
    weights.adapter.save(tmp_path, str(folder))
    theirs = peft.PeftModel.from_pretrained(tiny.reference(folder), tmp_path).eval()
    for ids, logits in zip(ROWS, _adapted_logits(base, weights), strict=True):
        assert tiny.relative_difference(logits, tiny.reference_logits(theirs, ids)) < _near(options)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_pefts_folder_opens_here_with_the_same_logits(options: dict[str, Any], tiny_base: TinyBase, tmp_path: Path):
    folder = tiny_base("phi3")
    base = load_base(folder, "fp32")
    twin = tiny.peft_twin(folder, tiny.new_weights(base, **options).adapter)
    twin.save_pretrained(tmp_path)
    adapter = load_peft(base, tmp_path)
    with base.using(adapter.sites):
        found = tiny.packed_logits(base, ROWS)
    for ids, logits in zip(ROWS, found, strict=True):
        assert tiny.relative_difference(logits, tiny.reference_logits(twin, ids)) < _near(options)


def test_an_adapter_on_an_untied_head_trains_as_in_peft(tiny_base: TinyBase):
    folder = tiny_base("phi3")
    base = load_base(folder, "fp32")
    weights = tiny.new_weights(base, targets=["lm_head", "down_proj"])
    trainee = tiny.new_trainee(base, weights)
    rows = tiny.random_rows((5, 40))
    trainee.forward_backward(pack(rows), 45.0)
    twin = tiny.peft_twin(folder, weights.adapter)
    tiny.reference_loss(twin, rows).backward()
    theirs = dict(twin.named_parameters())
    for name, gradient in tiny.gradients(trainee).items():
        assert gradient.any()
        assert tiny.relative_difference(gradient, theirs[tiny.peft_name(name)].grad) < 1e-5, name


def _damage(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")


FIRST = "base_model.model.model.layers.0.self_attn.qkv_proj"
DAMAGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], object], str]] = {
    "no B": (lambda config, tensors: tensors.pop(f"{FIRST}.lora_B.weight"), "lora_B"),
    "no magnitude": (lambda config, tensors: tensors.pop(f"{FIRST}.lora_magnitude_vector"), "lora_magnitude_vector"),
    "a magnitude of another length": (
        lambda config, tensors: tensors.update({f"{FIRST}.lora_magnitude_vector": torch.ones(7)}),
        "magnitude",
    ),
    "another rank": (lambda config, tensors: config.update(r=5), r"lora_A is \(3, 48\), the base needs \(5, 48\)"),
    "a foreign tensor": (lambda config, tensors: tensors.update({"other.lora_A.weight": torch.ones(2, 2)}), "fit no layer"),
    "saved modules": (lambda config, tensors: config.update(modules_to_save=["lm_head"]), "modules_to_save"),
    "ranks per layer": (lambda config, tensors: config.update(rank_pattern={"qkv_proj": 2}), "rank_pattern"),
    "a start that changes the base": (lambda config, tensors: config.update(init_lora_weights="pissa"), "init_lora_weights"),
    "trained token rows": (lambda config, tensors: config.update(trainable_token_indices=[1]), "trainable_token_indices"),
    "an activated adapter": (lambda config, tensors: config.update(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "another method": (lambda config, tensors: config.update(peft_type="OFT"), "OFT"),
    "a rank that is no number": (lambda config, tensors: config.update(r="many"), "many"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_an_adapter_folder_that_cannot_be_used_is_refused_in_words(what: str, tiny_base: TinyBase, tmp_path: Path):
    base = load_base(tiny_base("phi3"), "fp32")
    tiny.new_weights(base, "dora").adapter.save(tmp_path, "base")
    change, words = DAMAGES[what]
    _damage(tmp_path, change)
    with pytest.raises(IntegrityError, match=words):
        load_peft(base, tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"torn"])
def test_a_missing_or_torn_tensor_file_is_refused_in_words(content: bytes | None, tiny_base: TinyBase, tmp_path: Path):
    base = load_base(tiny_base("phi3"), "fp32")
    tiny.new_weights(base).adapter.save(tmp_path, "base")
    (tmp_path / "adapter_model.safetensors").unlink()
    if content is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        load_peft(base, tmp_path)


def test_a_head_that_is_a_plain_linear_layer_elsewhere_stays_plain_here(tiny_base: TinyBase):
    """Lending sites is undone whatever happens inside."""
    base = load_base(tiny_base("phi3"), "fp32")
    weights = tiny.new_weights(base)
    with pytest.raises(RuntimeError), base.using(weights.sites()):
        raise RuntimeError
    assert all(linear.site is None for linear in base.linears.values())
    assert not any(isinstance(module, nn.Linear) for module in base.model.modules())
