"""What Kivnun will do with a base: which layers are fast, what can be adapted, and whether packed rows are what they are alone.

A configuration is enough. Sizes are counted on an outline without weights. The question of packed rows is put to a twin: the same
kinds of layers with heads of the same width, few of them, with random weights, so that a base of any size is asked in seconds and
before it is downloaded. Windows and LongRoPE's original length are shorter in the twin than its rows, so that they are felt.
Next: `load.py` (how a base is opened), `phi.py` (what is known of Phi by name), `kivnun/cli/bases.py` (who tells).
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kivnun.errors import BaseModelError
from kivnun.model.attention import Rows
from kivnun.model.decoder import design_of
from kivnun.model.families import FAMILIES, FUSED_PARTS
from kivnun.model.foreign import layers_of
from kivnun.model.load import Base, base_from_model, refuse_unsupported
from kivnun.model.phi import Rope, phi_by_id, rope_of, window_of
from kivnun.model.probe import TOLERANCE
from kivnun.model.read_model import hide_bars, open_config, told_simply

LENGTH = 20  # of each of the twin's two rows
TWIN_LAYERS, TWIN_HEADS, TWIN_WIDTH, TWIN_INNER, TWIN_WORDS = 2, 2, 128, 96, 503
TWIN_WINDOW, TWIN_ORIGINAL = 7, 12
INNER_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")
SPREAD = 1.5  # of a twin's weights, times the square root of their inputs: wide enough that every token is felt by the next


@dataclass(frozen=True, slots=True)
class Target:
    """Linear layers of one name: how many, (inputs, outputs) of the first, and the names of the parts that it holds fused."""

    name: str
    count: int
    inputs: int
    outputs: int
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Coverage:
    """What there is to say of a base. `uncovered` are matrices in its layers that no adapter covers, by name; `distance` is that of
    the logits of packed rows from transformers' own, as a share of their length."""

    name: str
    model_type: str
    model_class: str
    family: str
    licence: str
    parameters: int
    linear_numbers: int
    layers: Mapping[str, int]
    fast: bool
    targets: tuple[Target, ...]
    uncovered: Mapping[str, int]
    tied: bool
    context: int | None
    window: str
    rope: Rope
    softcaps: Mapping[str, float]
    twin_layers: int
    distance: float


def cover(name: str, config: Mapping[str, Any]) -> Coverage:
    """Return what Kivnun will do with the base of this config.json. Raises BaseModelError, which says why, for one it refuses."""
    refuse_unsupported(name, config)
    with _quietly():
        return _covered(name, config)


def _covered(name: str, config: Mapping[str, Any]) -> Coverage:
    opened = _opened(config)
    outline = _model_of(name, opened, "meta")
    head: nn.Module | None = outline.get_output_embeddings()  # type: ignore[operator]
    linears = {at: it for at, it in outline.named_modules() if type(it) is nn.Linear and it is not head}
    if type(head) is not nn.Linear:
        raise BaseModelError(f"{type(outline).__name__} has no linear language head", hint="use a causal language model")
    phi, known = phi_by_id(name), FAMILIES.get(str(config.get("model_type")))
    twin, distance = _asked(name, opened, config)
    return Coverage(
        name=name,
        model_type=str(config.get("model_type")),
        model_class=type(outline).__name__,
        family=phi.family if phi else known.name if known else "not known by name",
        licence=phi.licence if phi else known.licence if known else "see the base's own licence",
        parameters=sum(p.numel() for p in outline.parameters()),
        linear_numbers=sum(it.weight.numel() for it in linears.values()),
        layers=dict(Counter(type(layer).__name__ for layer in layers_of(outline))),
        fast=design_of(opened) is not None,
        targets=_targets(linears),
        uncovered=_uncovered(outline, linears),
        tied=head.weight is outline.get_input_embeddings().weight,  # type: ignore[operator, union-attr]
        context=_number(opened, "max_position_embeddings"),
        window=_window(opened, config),
        rope=rope_of(opened.to_dict()),
        softcaps={key: value for key in SOFTCAPS if (value := getattr(opened, key, None)) is not None},
        twin_layers=twin.num_hidden_layers,
        distance=distance,
    )


SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from speaking of a configuration that nobody will train with."""
    from transformers.utils import logging

    hide_bars()
    said = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(said)


def _opened(config: Mapping[str, Any]) -> Any:
    """Return transformers' configuration of a config.json; of a Phi by name with stand-ins for the factors that only files hold."""
    given = dict(config)
    if (given.get("rope_scaling") or {}).get("type") == "longrope" and "short_factor" not in given["rope_scaling"]:
        turned = given["hidden_size"] // given["num_attention_heads"] * given.get("partial_rotary_factor", 1.0)
        factors = {"short_factor": [1.0] * int(turned / 2), "long_factor": [2.0] * int(turned / 2)}
        given["rope_scaling"] = {**given["rope_scaling"], **factors}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(given), encoding="utf-8")
        return open_config(Path(place))


def _model_of(name: str, config: Any, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with told_simply(name), torch.device(device):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )


def _targets(linears: Mapping[str, nn.Linear]) -> tuple[Target, ...]:
    counts, first = Counter(at.rpartition(".")[2] for at in linears), dict[str, nn.Linear]()
    for at, linear in linears.items():
        first.setdefault(at.rpartition(".")[2], linear)
    return tuple(
        Target(name, count, first[name].in_features, first[name].out_features, tuple(sorted(FUSED_PARTS.get(name, ()))))
        for name, count in counts.items()
    )


def _uncovered(outline: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, int]:
    """Return how many numbers stand in matrices of the layers that are no linear layers: experts side by side, convolutions."""
    covered = {f"{at}.weight" for at in linears}
    inside = {id(p) for layer in layers_of(outline) for p in layer.parameters()}
    numbers: Counter[str] = Counter()
    for at, parameter in outline.named_parameters():
        if id(parameter) in inside and parameter.ndim >= 2 and at not in covered:
            numbers[".".join(part for part in at.split(".")[-3:] if not part.isdigit()).removesuffix(".weight")] += (
                parameter.numel()
            )
    return dict(numbers)


def _window(opened: Any, config: Mapping[str, Any]) -> str:
    """Return how far back attention sees, in words."""
    window = window_of(opened.to_dict() | {key: config[key] for key in ("use_sliding_window",) if key in config})
    kinds: Counter[str] = Counter(getattr(opened, "layer_types", None) or ())
    if window is None or (kinds and not kinds["sliding_attention"]):
        return "none within its context"
    where = f" in {kinds['sliding_attention']} of {kinds.total()} layers" if kinds["full_attention"] else ""
    return f"{window:,} tokens{where}"


def _number(config: Any, key: str) -> int | None:
    value = getattr(config, key, None)
    return value if isinstance(value, int) else None


# --- the twin ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _asked(name: str, opened: Any, config: Mapping[str, Any]) -> tuple[Any, float]:
    """Return the twin's configuration, and how far its packed rows' logits are from transformers' own."""
    twin = twin_config(opened, config)
    model = _model_of(name, twin, "cpu").eval()
    draws = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, SPREAD / parameter.shape[-1] ** 0.5, generator=draws)
    ids_2L = (torch.arange(2 * LENGTH) * 7 + 3).remainder(twin.vocab_size).view(2, LENGTH)
    try:
        theirs_2LV: Tensor = model(input_ids=ids_2L, use_cache=False).logits.float()
    except Exception as error:  # whatever a stranger's forward raises, the user needs one sentence
        raise BaseModelError(f"{name} cannot be run: {type(error).__name__}: {error}", hint="use another base") from error
    ours_2LV = _packed(base_from_model(model, "fp32"), ids_2L)
    distance = float((ours_2LV - theirs_2LV).norm() / theirs_2LV.norm())
    if not distance <= TOLERANCE[torch.float32]:
        raise BaseModelError(
            f"{name} does not compute packed rows as it computes them alone (logits differ by {distance:.2g} of their length)",
            hint="use another base",
        )
    return twin, distance


def twin_config(opened: Any, config: Mapping[str, Any]) -> Any:
    """Return the configuration of a model of the same kinds of layers and widths of heads, and little else."""
    twin, layers = copy.deepcopy(opened), int(opened.num_hidden_layers)
    count = min(layers, max(TWIN_LAYERS, _layers_of_every_kind(opened)))
    for key, value in vars(twin).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(twin, key, value[:count])
    twin.num_hidden_layers = count
    twin.vocab_size = min(int(twin.vocab_size), TWIN_WORDS)
    twin.bos_token_id, twin.eos_token_id, twin.pad_token_id = 1, 2, 0
    for key in INNER_WIDTHS:
        value = getattr(twin, key, None)
        if isinstance(value, int):
            setattr(twin, key, min(value, TWIN_INNER))
    if design_of(opened) is not None:  # families whose widths are known not to hang together otherwise
        twin.head_dim = getattr(opened, "head_dim", None) or opened.hidden_size // opened.num_attention_heads
        sharing = opened.num_attention_heads // opened.num_key_value_heads
        twin.num_key_value_heads = min(opened.num_key_value_heads, TWIN_HEADS)
        twin.num_attention_heads = twin.num_key_value_heads * sharing
        twin.hidden_size = min(opened.hidden_size, TWIN_WIDTH)
    if window_of(opened.to_dict()) is not None and "use_sliding_window" not in config:
        twin.sliding_window = TWIN_WINDOW
    rope = getattr(twin, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        rope["original_max_position_embeddings"] = TWIN_ORIGINAL
        if hasattr(twin, "original_max_position_embeddings"):
            twin.original_max_position_embeddings = TWIN_ORIGINAL
    return twin


def _layers_of_every_kind(config: Any) -> int:
    """Return how many layers from the first on it takes to have met each kind."""
    kinds = list(getattr(config, "layer_types", None) or ())
    return max((kinds.index(kind) + 1 for kind in set(kinds)), default=1)


def _packed(base: Base, ids_2L: Tensor) -> Tensor:
    positions_T = torch.arange(LENGTH).repeat(2)
    return base.head(base.hidden(ids_2L.flatten(), positions_T, Rows([LENGTH, LENGTH]))).view(2, LENGTH, -1).float()
