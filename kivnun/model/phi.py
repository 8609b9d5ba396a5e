"""The Phi models by their ids on the hub: one table of what Kivnun knows of each, and what follows from it.

The configurations are those of the hub's config.json files, without what Kivnun reads from the files alone (LongRoPE's factors).
Whatever else is told of a model follows from its configuration, so that no second table can disagree. Imports nothing heavy.
Next: `families.py` (other families), `coverage.py` (what Kivnun will do with a base).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

# By `model_type`: families that are refused whatever their weights are, and why.
REFUSED = {
    "phi3small": "Phi-3-small computes block-sparse attention in code of its own that transformers does not hold",
    "phi3_v": "Phi-3-vision reads images by code of its own that transformers does not hold",
    "phi4mm": "Phi-4-multimodal reads images and speech by code of its own that transformers does not hold",
    "phi4flash": "Phi-4-mini-flash has state-space layers, in code of its own that transformers does not hold",
}
REFUSED_FAMILY = "15-phi-3-small"  # of docs/mistakes
USE_INSTEAD = "use Phi-3-mini, Phi-3-medium, Phi-3.5-mini or Phi-4 instead"
MOE_ROTATES = "Phi-3.5-MoE scales its rotations by factors of its own, which differ from LongRoPE's"


@dataclass(frozen=True, slots=True)
class PhiModel:
    """One model. `turn` is how its own template writes a question and the start of the answer, None where it has no template;
    `refused` says why it cannot be tuned."""

    id: str
    family: str
    config: Mapping[str, Any]
    parameters: int | None = None
    turn: str | None = None
    licence: str = "MIT"
    refused: str | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Return the special tokens of the template, in the order of a turn."""
        rest, found = self.turn or "", []
        while "<|" in rest:
            mark, _, rest = rest[rest.index("<|") :].partition("|>")
            found.append(f"{mark}|>")
        return tuple(found)

    @property
    def rope(self) -> Rope:
        return rope_of(self.config)


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions are turned: `kind` is "plain", or the scaling's name; `share` is the rotated part of a head; `original` is the
    length up to which LongRoPE's short factors hold."""

    kind: str
    theta: float | None
    share: float
    original: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.kind}, up to {self.original:,} tokens by the short factors" if self.original else self.kind]
        parts += [f"theta {self.theta:,.0f}"] if self.theta else []
        return ", ".join([*parts, f"{self.share:.0%} of each head"] if self.share != 1 else parts)


def rope_of(config: Mapping[str, Any]) -> Rope:
    """Return the rotation that a config.json asks for, in the spelling of any version of transformers."""
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    kind = {"default": "plain", "su": "LongRoPE", "longrope": "LongRoPE"}.get(kind, kind)
    share = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or config.get("rotary_pct") or 1.0
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    theta = scaling.get("rope_theta") or config.get("rope_theta")
    return Rope(kind, theta, float(share), int(original) if kind == "LongRoPE" and original else None)


def window_of(config: Mapping[str, Any]) -> int | None:
    """Return how far back attention sees, where that is less than the whole context."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return None
    return None if isinstance(longest, int) and window >= longest else window


_MINI = {"hidden_size": 3072, "num_hidden_layers": 32, "intermediate_size": 8192, "model_type": "phi3", "rope_theta": 10000.0}
_PHI_3 = {**_MINI, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False}
_MEDIUM = {
    "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10, "intermediate_size": 17920,
    "model_type": "phi3", "tie_word_embeddings": False,
}  # fmt: skip
_MEDIUM_3 = {**_MEDIUM, "vocab_size": 32064, "rope_theta": 10000.0}
_4K = {"max_position_embeddings": 4096, "sliding_window": 2047}
_128K = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope"}}
_PHI_4 = {**_MEDIUM, "vocab_size": 100352, "sliding_window": None}
_PHI_4_MINI = {
    **_MINI, **_128K, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "sliding_window": 262144,
    "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
}  # fmt: skip
_PHI_1 = {
    "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "intermediate_size": 8192, "vocab_size": 51200,
    "max_position_embeddings": 2048, "partial_rotary_factor": 0.5, "model_type": "phi", "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}  # fmt: skip
_PHI_2 = {**_PHI_1, "hidden_size": 2560, "num_hidden_layers": 32, "intermediate_size": 10240, "partial_rotary_factor": 0.4}

_TURN_3 = "<|user|>\n…<|end|>\n<|assistant|>\n…<|end|>"
_TURN_4 = "<|im_start|>user<|im_sep|>…<|im_end|><|im_start|>assistant<|im_sep|>…<|im_end|>"
_TURN_4_MINI = "<|user|>…<|end|><|assistant|>…<|end|>"


def _refused(model: str, family: str, kind: str, reason: str | None = None) -> PhiModel:
    return PhiModel(f"microsoft/{model}", family, {"model_type": kind}, refused=reason or REFUSED[kind])


_TABLE = (
    PhiModel("microsoft/Phi-3-mini-4k-instruct", "Phi-3", {**_PHI_3, **_4K}, 3_821_079_552, _TURN_3),
    PhiModel(
        "microsoft/Phi-3-mini-128k-instruct", "Phi-3", {**_PHI_3, **_128K, "sliding_window": 262144}, 3_821_079_552, _TURN_3
    ),
    PhiModel("microsoft/Phi-3-medium-4k-instruct", "Phi-3", {**_MEDIUM_3, **_4K}, 13_960_238_080, _TURN_3),
    PhiModel("microsoft/Phi-3-medium-128k-instruct", "Phi-3", {**_MEDIUM_3, **_128K}, 13_960_238_080, _TURN_3),
    PhiModel("microsoft/Phi-3.5-mini-instruct", "Phi-3.5", {**_PHI_3, **_128K, "sliding_window": 262144}, 3_821_079_552, _TURN_3),
    PhiModel(
        "microsoft/phi-4", "Phi-4", {**_PHI_4, "max_position_embeddings": 16384, "rope_theta": 250000.0}, 14_659_507_200, _TURN_4
    ),
    PhiModel(
        "microsoft/Phi-4-reasoning", "Phi-4", {**_PHI_4, "max_position_embeddings": 32768, "rope_theta": 500000.0},
        14_659_507_200, _TURN_4,
    ),
    PhiModel(
        "microsoft/Phi-4-reasoning-plus", "Phi-4", {**_PHI_4, "max_position_embeddings": 32768, "rope_theta": 500000.0},
        14_659_507_200, _TURN_4,
    ),
    PhiModel("microsoft/Phi-4-mini-instruct", "Phi-4", _PHI_4_MINI, 3_836_021_760, _TURN_4_MINI),
    PhiModel("microsoft/Phi-4-mini-reasoning", "Phi-4", _PHI_4_MINI, 3_836_021_760, _TURN_4_MINI),
    PhiModel("microsoft/phi-1", "Phi-1", _PHI_1, 1_418_270_720),
    PhiModel("microsoft/phi-1_5", "Phi-1.5", _PHI_1, 1_418_270_720),
    PhiModel("microsoft/phi-2", "Phi-2", _PHI_2, 2_779_683_840),
    _refused("Phi-3-small-8k-instruct", "Phi-3", "phi3small"),
    _refused("Phi-3-small-128k-instruct", "Phi-3", "phi3small"),
    _refused("Phi-3.5-MoE-instruct", "Phi-3.5", "phimoe", MOE_ROTATES),
    _refused("Phi-3-vision-128k-instruct", "Phi-3", "phi3_v"),
    _refused("Phi-3.5-vision-instruct", "Phi-3.5", "phi3_v"),
    _refused("Phi-4-multimodal-instruct", "Phi-4", "phi4mm"),
    _refused("Phi-4-mini-flash-reasoning", "Phi-4", "phi4flash"),
)  # fmt: skip
PHI: dict[str, PhiModel] = {model.id: model for model in _TABLE}
_SPELT = {name.lower(): name for name in PHI}


def phi_by_id(name: str) -> PhiModel | None:
    """Return a Phi model by its id, however it is capitalised."""
    spelt = _SPELT.get(name.lower())
    return None if spelt is None else PHI[spelt]


def refusal_of(name: str) -> tuple[str, str] | None:
    """Return why a hub's model is refused by its name alone, and what to do; None where it is not."""
    found = phi_by_id(name)
    return None if found is None or found.refused is None else (found.refused, USE_INSTEAD)


def nearest_id(name: str) -> str | None:
    """Return the known id that looks most like this one, if any does."""
    near = get_close_matches(name.lower(), [spelt for spelt in _SPELT if PHI[_SPELT[spelt]].refused is None], n=1, cutoff=0.75)
    return _SPELT[near[0]] if near else None
