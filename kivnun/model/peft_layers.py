"""Adapters whose mathematics is PEFT's: IA3, LoHa, LoKr, VeRA, AdaLoRA. Each of their layers is lent to a base as any site is.

PEFT is given a skeleton: modules of the base's names that have a weight's shape but no memory. It puts its layers around them, and
a layer, lent to the base, finds the base's own product behind its stand-in: packed, quantised, on whatever device. So nothing of
the base is changed, rows pack, and an adapter's folder is written and read by PEFT itself. What PEFT draws at random is drawn again
from the seed. Next: `adapters.py` (the protocol), `linear.py` (who calls a site).
Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kivnun.errors import IntegrityError
from kivnun.model.adapters import MODULE_PREFIX, read_peft_tensors
from kivnun.model.linear import Again, TunableLinear
from kivnun.model.load import Base
from kivnun.randomness import generator

NAME = "default"  # PEFT's own name for an adapter that is alone


def peft() -> Any:
    """Return the library. It imports what it finds installed (bitsandbytes, DeepSpeed), and these speak where nobody asked."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import peft
    finally:
        logger.setLevel(level)
    return peft


@contextmanager
def peft_is_right() -> Iterator[None]:
    """Keep from people what PEFT 0.21 warns of without cause: norms that are none of torch's (LN tuning), and AdaLoRA's ranks,
    whose names it reads as LoRA's and of which a layer may have given up all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", ".*LoRA tensor.*have invalid shape")
        yield


class StandIn(nn.Linear):
    """Where PEFT expects the linear layer that it changes: its shape, and the product of the layer that the site is lent to."""

    def __init__(self, linear: TunableLinear, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # One number, seen as a whole matrix: PEFT asks a weight for its shape, type and device alone.
        shaped = torch.zeros(1, device=device).expand(linear.out_features, linear.in_features)
        self.weight = nn.Parameter(shaped, requires_grad=False)
        self.register_parameter("bias", None)
        self.layer: list[TunableLinear] = []  # in a list, so that it is no part of the skeleton

    def forward(self, input: Tensor) -> Tensor:
        return self.layer[0].plain(input)


@dataclass(slots=True)
class PeftSite:
    """One of PEFT's layers around its stand-in."""

    layer: Any
    stand_in: StandIn

    def __call__(self, x_TI: Tensor, linear: TunableLinear, again: Again = None, select_S: Tensor | None = None) -> Tensor:
        self.stand_in.layer[:] = [linear]
        return self.layer(x_TI)

    @torch.no_grad()
    def merged(self, weight_OI: Tensor) -> Tensor:
        """Return the weight, float32, with this layer's delta, or times its scales (IA3)."""
        if self._scales is not None:
            return weight_OI.float() * self._scales
        return weight_OI.float() + self.layer.get_delta_weight(NAME).float()

    @torch.no_grad()
    def merged_bias(self, bias_O: Tensor) -> Tensor:
        """Return the bias of a plain layer that computes the same: outputs that are scaled have theirs scaled too."""
        scales = self._scales
        return bias_O if scales is None or self.layer.is_feedforward else bias_O * scales.flatten()

    @property
    def _scales(self) -> Tensor | None:
        """Return IA3's factors, [O, 1] of outputs or [1, I] of inputs; None for layers that add."""
        found = getattr(self.layer, "ia3_l", None)
        return None if found is None else found[NAME].detach().float()


@dataclass
class LayerAdapter:
    """PEFT's model around a skeleton of the base, and its layers as sites."""

    model: Any
    sites: dict[str, PeftSite]
    no_merge: None = None
    _named: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.sites.values():
            ranks: nn.Module | None = getattr(site.layer, "ranknum", None)
            if ranks is not None:  # AdaLoRA's count of ranks: PEFT 0.21 makes it one of the trained when it moves it to a GPU
                ranks.requires_grad_(False)
        self._named = {
            f"{name}.{own.removesuffix('.' + NAME)}": p
            for name, site in self.sites.items()
            for own, p in site.layer.named_parameters()
            if p.requires_grad
        }

    @property
    def kind(self) -> str:
        return str(self.model.peft_config[NAME].peft_type.value).lower()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors as `SITE.TENSOR`, TENSOR as PEFT has it: hada_w1_a, vera_lambda_d, lora_E."""
        return self._named

    def draw_dropout(self, step: int, rows_T: Tensor, positions_T: Tensor) -> None:
        """PEFT's own dropout draws from torch's generator: it is not offered."""

    def stop_dropout(self) -> None:
        """There is none."""

    def before_update(self) -> None:
        """Add the gradient of AdaLoRA's penalty, orth_reg_weight times the mean of |P^T P - I| (Zhang et al. 2023,
        arXiv:2303.10512, equation 4), once per step: packs are many."""
        if self.kind != "adalora":
            return
        factors = [(name, p) for name, p in self._named.items() if name.endswith(("lora_A", "lora_B"))]
        weight = self.model.peft_config[NAME].orth_reg_weight
        with torch.enable_grad():
            distances = []
            for name, p in factors:
                squares_RR = p @ p.T if name.endswith("lora_A") else p.T @ p
                distances.append(torch.linalg.matrix_norm(squares_RR - torch.eye(len(squares_RR), device=p.device)))
            (weight * torch.stack(distances).mean()).backward()

    def after_update(self, step: int) -> None:
        """Let AdaLoRA weigh its ranks and give up those above the budget."""
        if self.kind == "adalora":
            self.model.base_model.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        """Return how important AdaLoRA has found each number to be, and which ranks are left."""
        if self.kind != "adalora":
            return {}
        allocator, pattern = self.model.base_model.rankallocator, self.model.peft_config[NAME].rank_pattern or {}
        kept = {f"{what}/{name}": t for what in _IMPORTANCE for name, t in getattr(allocator, what).items()}
        return kept | {f"rank_pattern/{name}": torch.tensor(ranks) for name, ranks in pattern.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        if self.kind != "adalora":
            return
        allocator = self.model.base_model.rankallocator
        parts = [(*name.split("/", 1), tensor) for name, tensor in state.items()]
        for what in _IMPORTANCE:
            setattr(allocator, what, {name: t.to(self._device, copy=True) for kind, name, t in parts if kind == what})
        pattern = {name: tensor.tolist() for kind, name, tensor in parts if kind == "rank_pattern"}
        self.model.peft_config[NAME].rank_pattern = pattern or None

    @property
    def _device(self) -> torch.device:
        return next(iter(self._named.values())).device

    def save(self, folder: Path, base_name: str) -> None:
        """Write PEFT's folder by PEFT. Its state may share memory between layers (VeRA): each tensor is written by itself."""
        config = self.model.peft_config[NAME]
        config.base_model_name_or_path, config.task_type, config.inference_mode = base_name, "CAUSAL_LM", True
        with peft_is_right():
            tensors = peft().get_peft_model_state_dict(self.model, save_embedding_layers=False)
        kept = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        config.inference_mode = False


_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def new_layers(base: Base, config: Any, sites: Sequence[str], seed: int) -> LayerAdapter:
    """Return an adapter of PEFT's configuration on these layers. Where PEFT would draw from torch's generator, the seed does."""
    adapter = _around(base, config, sites)
    scale = _SPREAD.get(adapter.kind, _kaiming)
    with torch.no_grad():
        for name, parameter in adapter.parameters().items():
            if float(parameter.min()) != float(parameter.max()):  # what starts at one value starts there in PEFT too
                parameter.copy_(scale(generator(seed, "init", name), parameter))
    return adapter


def load_layers(base: Base, folder: Path) -> LayerAdapter:
    """Return the adapter in PEFT's folder. Raises IntegrityError when its tensors are not those its configuration asks for."""
    tensors = read_peft_tensors(folder)
    named = [re.match(r"base_model\.model\.(.*)\.(?:ia3|hada|lokr|vera_lambda|lora)_\w+$", key) for key in tensors]
    wanted = {match[1] for match in named if match}
    sites = [name for name in base.linears if name in wanted]
    read = peft().PeftConfig.from_pretrained(str(folder))
    if not sites or len(sites) != len(wanted):
        odd = sorted(wanted.difference(sites))
        raise IntegrityError(
            f"{folder}: {len(odd)} of its layers fit no layer of the base, for example {odd[0] if odd else 'none is named'}",
            hint="load the adapter on the base it was trained on",
        )
    read.inference_mode = False  # parameters of one for inference are not to be found by name as trained
    pattern = read.rank_pattern if read.peft_type == "ADALORA" else None
    if pattern:
        tensors, read.rank_pattern = _with_ranks_given_up(tensors, pattern), None
    adapter = _around(base, read, sites)
    try:
        result = peft().set_peft_model_state_dict(adapter.model, tensors)
    except (RuntimeError, KeyError, ValueError) as error:
        raise IntegrityError(f"{folder} does not fit: {error}", hint="load the adapter on the base it was trained on") from error
    trained = {f"{MODULE_PREFIX}{name}.{NAME}" for name in adapter.parameters()}
    lacking = [key for key in result.missing_keys if key in trained]
    if lacking or result.unexpected_keys:
        raise IntegrityError(
            f"{folder} does not fit: {(lacking or result.unexpected_keys)[0]} is {'missing' if lacking else 'one too many'}",
            hint="load the adapter on the base it was trained on",
        )
    if pattern:
        read.rank_pattern = pattern
    return adapter


def _with_ranks_given_up(tensors: Mapping[str, Tensor], pattern: Mapping[str, Sequence[bool]]) -> dict[str, Tensor]:
    """Return AdaLoRA's tensors with zeros for the ranks not in the file: the sums, and so the bits, are those of the run."""
    whole = dict(tensors)
    for name, kept in pattern.items():
        at = torch.tensor(kept)
        for tensor in ("lora_A", "lora_B", "lora_E"):
            key = f"{MODULE_PREFIX}{name.rpartition('.')[0]}.{tensor}"
            part = tensors[key] if tensor != "lora_B" else tensors[key].t()
            full = part.new_zeros(len(at), part.shape[1]).index_put((at,), part)
            whole[key] = full if tensor != "lora_B" else full.t().contiguous()
    return whole


def _around(base: Base, config: Any, sites: Sequence[str]) -> LayerAdapter:
    """Let PEFT put its layers around a skeleton of the base."""
    config.target_modules = list(sites)
    skeleton = nn.Module()
    for name in sites:
        _place(skeleton, name, StandIn(base.linears[name], base.device))
    skeleton.config = {"model_type": "custom", "tie_word_embeddings": False}  # type: ignore[assignment]
    with peft_is_right():
        model = peft().PeftModel(skeleton, config, NAME)
    layers: dict[str, Any] = {name: skeleton.get_submodule(name) for name in sites}
    return LayerAdapter(model, {name: PeftSite(layer, layer.base_layer) for name, layer in layers.items()})


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    here = root
    for part in parents:
        if part not in dict(here.named_children()):
            here.add_module(part, nn.Module())
        here = here.get_submodule(part)
    here.add_module(last, module)


Spread = Callable[[np.random.Generator, Tensor], Tensor]


def _kaiming(draws: np.random.Generator, like: Tensor) -> Tensor:
    """Return numbers uniform within 1 / sqrt(inputs): Kaiming's with a = sqrt(5), as PEFT starts LoHa and LoKr."""
    bound = np.float32(1.0 / math.sqrt(like.shape[1]))
    return torch.from_numpy((draws.random(tuple(like.shape), dtype=np.float32) * 2 - 1) * bound)


def _normal(draws: np.random.Generator, like: Tensor) -> Tensor:
    """Return numbers of a standard deviation of 0.02, as PEFT starts AdaLoRA's singular vectors."""
    return torch.from_numpy(draws.standard_normal(tuple(like.shape), dtype=np.float32) * np.float32(0.02))


_SPREAD: dict[str, Spread] = {"adalora": _normal}
