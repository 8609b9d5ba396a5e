"""Which layers of a base an adapter touches, how its tensors start, and PEFT's folder as its form on disk.

Targets are resolved from the model itself: a name that matches nothing is an error, never a silently smaller adapter.
Next: `linear.py` (what a site computes), `train/engine.py` (who trains its tensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kivnun.data.packing import PackedBatch
from kivnun.errors import BaseModelError, IntegrityError
from kivnun.model.dropout import site_key, token_keys
from kivnun.model.families import FUSED_PARTS
from kivnun.model.linear import DoraSite, DropoutDraw, LoraSite, LowRankSite, Start, whole_factors
from kivnun.model.load import Base
from kivnun.model.sites import Site
from kivnun.model.starts import eva, gaussian, kaiming, olora, pissa, refuse_higher_rank

ALL_LINEAR = "all-linear"
Init: TypeAlias = Literal["kaiming", "gaussian", "pissa", "olora", "eva"]


class Adapter(Protocol):
    """A trained delta in memory: what it lends to a base for a pass, and what of it is trained."""

    @property
    def no_merge(self) -> str | None:
        """Return why it cannot be folded into the base's weights; None: it can."""
        ...

    @property
    def sites(self) -> Mapping[str, Site]: ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors by name, float32."""
        ...

    def draw_dropout(self, step: int, rows_T: Tensor, positions_T: Tensor) -> None: ...

    def stop_dropout(self) -> None: ...

    def before_update(self) -> None:
        """Add, once per step, the gradient of what is made small beside the loss."""
        ...

    def after_update(self, step: int) -> None:
        """Change, once per step (counted from 1), what the optimizer does not: gradients are still there."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what an exact resume needs beside the trained tensors and their moments."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        ...

    def save(self, folder: Path, base_name: str) -> None:
        """Write PEFT's folder."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What makes an adapter what it is, apart from its tensors."""

    kind: Literal["lora", "dora"]
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    sites: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """Return the factor of B A: alpha / rank (Hu et al. 2021), or alpha / sqrt(rank) (Kalajdzievski 2023, rsLoRA)."""
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank


@dataclass(slots=True)
class LowRankAdapter:
    """A LoRA or DoRA adapter in memory: its shape, one site per adapted layer, and the seed of its dropout."""

    shape: AdapterShape
    sites: dict[str, LowRankSite]
    seed: int
    no_merge: None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors by name: `SITE.lora_A`, `SITE.lora_B`, `SITE.lora_magnitude_vector`."""
        named: dict[str, nn.Parameter] = {}
        for name, site in self.sites.items():
            named[f"{name}.lora_A"] = site.a_RI
            named[f"{name}.lora_B"] = site.b_OR
            if isinstance(site, DoraSite):
                named[f"{name}.lora_magnitude_vector"] = site.magnitude_O
        return named

    def draw_dropout(self, step: int, rows_T: Tensor, positions_T: Tensor) -> None:
        """Make the next passes drop inputs as drawn for this step and these tokens. No effect at rate 0."""
        if self.shape.dropout == 0.0:
            return
        keys_T = token_keys(self.seed, step, rows_T, positions_T)
        for site in self.sites.values():
            site.dropout.keys_T = keys_T

    def stop_dropout(self) -> None:
        for site in self.sites.values():
            site.dropout.keys_T = None

    def before_update(self) -> None:
        """Nothing but the loss gives A, B and the magnitudes a gradient."""

    def after_update(self, step: int) -> None:
        """The optimizer's update is all."""

    def state(self) -> dict[str, Tensor]:
        """Return what an exact resume needs beside the trained tensors: what sites started from, where they take it off again."""
        named: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            if site.start is not None:
                named |= {f"{name}.start_A": site.start.a_RI, f"{name}.start_B": site.start.b_OR}
        return named

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        for name, site in self.sites.items():
            if site.start is not None:
                site.start.a_RI.copy_(state[f"{name}.start_A"])
                site.start.b_OR.copy_(state[f"{name}.start_B"])

    def save(self, folder: Path, base_name: str) -> None:
        """Write PEFT's folder. An adapter that takes its start off again becomes plain LoRA or DoRA of twice the rank and the same
        scaling: it loads on the base as it is, where PEFT's own PiSSA and OLoRA would change the base first."""
        tensors = {_peft_name(name): tensor for name, tensor in _whole_tensors(self).items()}
        write_peft(folder, _config_of(_whole_shape(self)), base_name, tensors)


def _config_of(shape: AdapterShape) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "r": shape.rank,
        "lora_alpha": int(shape.alpha) if shape.alpha == int(shape.alpha) else shape.alpha,
        "lora_dropout": shape.dropout,
        "target_modules": list(shape.sites),
        "use_rslora": shape.rslora,
        "use_dora": shape.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
    }


def resolve_targets(base: Base, target_modules: Literal["all-linear"] | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the layers that `target_modules` means in this base, in the model's order.

    "all-linear" is every linear layer but the language head. Other names match a layer's full name or its end. Parts of a fused
    projection (q_proj, k_proj, v_proj; gate_proj, up_proj) mean the fused one when all of them are named. Raises BaseModelError
    for a name that matches nothing, for a lone part of a fused projection and for a head that shares the embedding's weight.
    """
    if target_modules == ALL_LINEAR:
        names = tuple(name for name in base.linears if name != base.head_name)
        if not names:
            raise BaseModelError(
                f"{base.name} has no linear layer besides its head that an adapter could cover",
                hint="use a base whose projections are linear layers, or adapter.kind full",
            )
        return names
    wanted = _fused_names(base, list(target_modules))
    chosen = {name for target in wanted for name in _matches(base, target)}
    if base.head_name in chosen and base.tied:
        raise BaseModelError(
            f"{base.head_name} shares its weight with the embedding, so an adapter on it could not be merged or exported",
            hint="leave the language head out of target_modules",
        )
    return tuple(name for name in base.linears if name in chosen)


def _matches(base: Base, target: str) -> list[str]:
    found = [name for name in base.linears if name == target or name.endswith("." + target)]
    if not found:
        raise BaseModelError(
            f"adapter.target_modules names {target!r}, which matches no linear layer of {base.name}",
            hint=f"the base has: {', '.join(_endings(base))}; or use all-linear",
            pages=("11-unknown-target-module",),
        )
    return found


def _endings(base: Base) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in base.linears})


def _fused_names(base: Base, targets: list[str]) -> list[str]:
    """Return the targets with complete sets of fused parts replaced by the fused name."""
    for fused, parts in FUSED_PARTS.items():
        named = parts.intersection(targets)
        if not named or fused not in _endings(base) or named.intersection(_endings(base)):
            continue
        if named != parts:
            whole = ", ".join(sorted(parts))
            raise BaseModelError(
                f"adapter.target_modules names {', '.join(sorted(named))}, but this base stores {whole} as one {fused}",
                hint=f"name {fused}, or all of {whole}: a part of it cannot be adapted alone",
                pages=("10-fused-projection",),
            )
        targets = [target for target in targets if target not in parts]
        targets += [fused] if fused not in targets else []
    return targets


def new_adapter(base: Base, shape: AdapterShape, init: Init, seed: int, looked_at: Iterable[PackedBatch] = ()) -> LowRankAdapter:
    """Return an adapter that changes nothing yet. Magnitudes start as the rows' own lengths; `looked_at` is what EVA looks at.

    Raises BaseModelError for a rank above a weight's own (PiSSA, OLoRA), DataError where EVA finds too few directions.
    """
    refuse_dropout_on_head(base, shape)
    directions = eva(base, shape.sites, looked_at, shape.rank) if init == "eva" else {}
    return LowRankAdapter(
        shape, {name: _new_site(base, name, shape, init, seed, directions.get(name)) for name in shape.sites}, seed
    )


def refuse_dropout_on_head(base: Base, shape: AdapterShape) -> None:
    """Raise BaseModelError for dropout at the head: it is drawn for every token, and the head sees a few."""
    if base.head_name in shape.sites and shape.dropout > 0.0:
        raise BaseModelError(
            f"adapter.dropout is {shape.dropout} and the adapter covers {base.head_name}, which sees chosen positions only",
            hint="set adapter.dropout to 0, or leave the language head out of target_modules",
        )


def _new_site(base: Base, name: str, shape: AdapterShape, init: Init, seed: int, directions_RI: Tensor | None) -> LowRankSite:
    linear = base.linears[name]
    if init in ("pissa", "olora"):
        weight_OI = linear.dense()
        refuse_higher_rank(name, weight_OI, shape.rank, init)
        a_RI, b_OR = pissa(weight_OI, shape.rank, shape.scaling) if init == "pissa" else olora(weight_OI, shape.rank)
        site = _site(base, name, shape, seed, a_RI, b_OR, None)
        site.start = Start(site.a_RI.detach().clone(), site.b_OR.detach().clone())
        return site
    if directions_RI is None:
        draw = gaussian if init == "gaussian" else kaiming
        directions_RI = draw(seed, name, shape.rank, linear.in_features)
    return _site(base, name, shape, seed, directions_RI, torch.zeros(linear.out_features, shape.rank), None)


def _site(
    base: Base, name: str, shape: AdapterShape, seed: int, a_RI: Tensor, b_OR: Tensor, magnitude_O: Tensor | None
) -> LowRankSite:
    a, b = _parameter(a_RI, base.device), _parameter(b_OR, base.device)
    dropout = DropoutDraw(shape.dropout, site_key(seed, name))
    if shape.kind == "lora":
        return LoraSite(a, b, shape.scaling, dropout)
    start_O = torch.linalg.vector_norm(base.linears[name].dense().float(), dim=1) if magnitude_O is None else magnitude_O
    return DoraSite(a, b, _parameter(start_O, base.device), shape.scaling, dropout)


def _parameter(tensor: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device=device, dtype=torch.float32, copy=True).contiguous())


MODULE_PREFIX = "base_model.model."  # of the names of modules in PEFT's files


def write_peft(folder: Path, config: Mapping[str, object], base_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter as PEFT reads it: adapter_config.json and adapter_model.safetensors, in the tensors' own types."""
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "revision": None, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps({**common, **config}, indent=2) + "\n", encoding="utf-8")
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _whole_shape(adapter: LowRankAdapter) -> AdapterShape:
    shape = adapter.shape
    if all(site.start is None for site in adapter.sites.values()):
        return shape
    rank = 2 * shape.rank
    return replace(shape, rank=rank, alpha=shape.scaling * (math.sqrt(rank) if shape.rslora else rank))


def _whole_tensors(adapter: LowRankAdapter) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(adapter.parameters())
    for name, site in adapter.sites.items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = whole_factors(site)
    return tensors


def _peft_name(name: str) -> str:
    suffix = "" if name.endswith("lora_magnitude_vector") else ".weight"
    return f"{MODULE_PREFIX}{name}{suffix}"


def read_low_rank_shape(folder: Path, sites: tuple[str, ...] = ()) -> AdapterShape:
    """Return what makes the adapter in a PEFT folder what it is, on these sites. Raises IntegrityError as `load_low_rank`."""
    config = _read_low_rank_config(folder)
    return AdapterShape(
        kind="dora" if config.get("use_dora") else "lora",
        rank=int(_number(folder, config, "r")),
        alpha=_number(folder, config, "lora_alpha"),
        dropout=_number(folder, config, "lora_dropout"),
        rslora=bool(config.get("use_rslora")),
        sites=sites,
    )


def load_low_rank(base: Base, folder: Path, seed: int = 0, dropout: float | None = None) -> LowRankAdapter:
    """Return the adapter in a PEFT folder, on this base; `dropout` takes the place of the rate in its configuration.

    Raises IntegrityError when the folder is not a LoRA or DoRA adapter, needs what Kivnun does not offer, or its tensors do not
    fit the base: every tensor must be used, every site complete.
    """
    tensors = read_peft_tensors(folder)
    ending = ".lora_A.weight"
    found = {name.removeprefix(MODULE_PREFIX).removesuffix(ending) for name in tensors if name.endswith(ending)}
    shape = read_low_rank_shape(folder, tuple(name for name in base.linears if name in found))
    shape = shape if dropout is None else replace(shape, dropout=dropout)
    sites: dict[str, LowRankSite] = {}
    for name in shape.sites:
        linear = base.linears[name]
        a = _taken(folder, tensors, f"{name}.lora_A", (shape.rank, linear.in_features))
        b = _taken(folder, tensors, f"{name}.lora_B", (linear.out_features, shape.rank))
        dora = shape.kind == "dora"
        magnitude = _taken(folder, tensors, f"{name}.lora_magnitude_vector", (linear.out_features,)) if dora else None
        sites[name] = _site(base, name, shape, seed, a, b, magnitude)
    if tensors or not sites:
        raise IntegrityError(
            f"{folder}: {len(tensors)} tensors fit no layer of the base, for example {next(iter(tensors), 'none')}",
            hint="load the adapter on the base it was trained on",
        )
    return LowRankAdapter(shape, sites, seed)


# Fields of PEFT's configuration that change what an adapter computes, in ways that Kivnun does not follow.
_UNUSUAL = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "lora_bias", "trainable_token_indices",
    "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config", "fan_in_fan_out",
)  # fmt: skip
# Other starts (PiSSA, OLoRA, CorDA, LoftQ) change the base as well, and PEFT changes it again on loading.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def read_peft_config(folder: Path) -> Mapping[str, object]:
    """Return the configuration in PEFT's folder. Raises IntegrityError when it cannot be read."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{folder} holds no readable adapter_config.json: {error}", hint="give a PEFT adapter folder"
        ) from error
    if not isinstance(config, dict):
        raise IntegrityError(f"{folder}: adapter_config.json holds no object", hint="give a PEFT adapter folder")
    return config


def _read_low_rank_config(folder: Path) -> Mapping[str, object]:
    config = read_peft_config(folder)
    unusual = [f"{key} {config[key]!r}" for key in _UNUSUAL if config.get(key)]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        unusual.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if config.get("peft_type") != "LORA" or unusual or config.get("bias", "none") != "none":
        raise IntegrityError(
            f"{folder}: peft_type {config.get('peft_type')!r}, bias {config.get('bias', 'none')!r} with "
            f"{', '.join(unusual) or 'no unusual fields'} cannot be used",
            hint="LoRA and DoRA adapters of one rank, without trained biases or saved modules, are supported",
        )
    return config


def read_peft_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of PEFT's folder by their names there. Raises IntegrityError when they cannot be read."""
    path = folder / "adapter_model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}", hint="give a PEFT adapter folder as PEFT saves it") from error


def _number(folder: Path, config: Mapping[str, object], key: str) -> float:
    value = config.get(key) or 0.0
    if not isinstance(value, int | float):
        raise IntegrityError(f"{folder}: {key} must be a number, got {value!r}", hint="give a PEFT adapter folder as PEFT saves it")
    return float(value)


def _taken(folder: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor and take it out of `tensors`. Raises IntegrityError when it is missing or of another shape."""
    tensor = tensors.pop(_peft_name(name), None)
    if tensor is None or tuple(tensor.shape) != shape:
        found = "is missing" if tensor is None else f"is {tuple(tensor.shape)}"
        raise IntegrityError(
            f"{folder}: {name} {found}, the base needs {shape}", hint="load the adapter on the base it was trained on"
        )
    return tensor
