"""The widths of a base, read from its configuration alone: which linear layers it has, how many numbers. No weights, no torch.

Next: `trained.py` (what a technique trains of it), `memory.py`, `time.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kivnun.errors import BaseModelError

# By the `model_type` of their configuration: families whose layers Kivnun computes itself, and those that transformers computes.
OWN = ("phi3", "llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*OWN, "gemma", "gemma2", "phi")
GEMMA_HEAD = 256  # width of a head, and tied matrices, where a Gemma's configuration says nothing else


@dataclass(frozen=True)
class Sizes:
    """A decoder's widths. `mlp` is its inner width, `tied` whether the head is the embedding, `head_norms` whether each head's
    queries and keys are normed."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    vocab: int
    longest: int
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False

    @classmethod
    def of(cls, config: Mapping[str, object], name: str) -> Sizes:
        """Return the sizes that a config.json tells of. Raises BaseModelError for a family without known layers, or a lack."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise BaseModelError(
                f"the layers of {name} (model_type {family!r}) are not known, so that nothing can be predicted of it",
                hint=f"known: {', '.join(FAMILIES)}; the base can be tuned all the same",
            )

        def number(key: str, default: int | None = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BaseModelError(
                    f"the configuration of {name} must give {key} as a number of 1 or more, got {value!r}",
                    hint="download the model again",
                )
            return value

        hidden, heads = number("hidden_size"), number("num_attention_heads")
        gemma = family in ("gemma", "gemma2")
        return cls(
            str(family),
            hidden,
            number("num_hidden_layers"),
            heads,
            number("num_key_value_heads", heads),
            number("head_dim", GEMMA_HEAD if gemma else hidden // heads),
            number("intermediate_size"),
            number("vocab_size"),
            number("max_position_embeddings", 1 << 30),
            bool(config.get("tie_word_embeddings", gemma)),
            family in ("qwen2", "phi") or bool(config.get("attention_bias", False)),
            family == "phi" or bool(config.get("mlp_bias", False)),
            family == "qwen3" or bool(config.get("qk_layernorm", False)),
        )

    @property
    def own(self) -> bool:
        """Return whether Kivnun computes the layers itself; else transformers does, and more is kept for the backward pass."""
        return self.family in OWN

    @property
    def queries(self) -> int:
        """Return the width of all heads' queries."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Return the width of all heads' keys, and of their values."""
        return self.kv_heads * self.head_width

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of every linear layer but the head, by its name in transformers' files."""
        if self.family == "phi3":
            layer = {
                "self_attn.o_proj": (self.queries, self.hidden),
                "self_attn.qkv_proj": (self.hidden, self.queries + 2 * self.keys),
                "mlp.gate_up_proj": (self.hidden, 2 * self.mlp),
                "mlp.down_proj": (self.mlp, self.hidden),
            }
        elif self.family == "phi":
            layer = {
                "self_attn.q_proj": (self.hidden, self.queries),
                "self_attn.k_proj": (self.hidden, self.keys),
                "self_attn.v_proj": (self.hidden, self.keys),
                "self_attn.dense": (self.queries, self.hidden),
                "mlp.fc1": (self.hidden, self.mlp),
                "mlp.fc2": (self.mlp, self.hidden),
            }
        else:
            layer = {
                "self_attn.q_proj": (self.hidden, self.queries),
                "self_attn.k_proj": (self.hidden, self.keys),
                "self_attn.v_proj": (self.hidden, self.keys),
                "self_attn.o_proj": (self.queries, self.hidden),
                "mlp.gate_proj": (self.hidden, self.mlp),
                "mlp.up_proj": (self.hidden, self.mlp),
                "mlp.down_proj": (self.mlp, self.hidden),
            }
        return {f"model.layers.{number}.{name}": size for number in range(self.layers) for name, size in layer.items()}

    @cached_property
    def norms(self) -> dict[str, int]:
        """Return the numbers of every norm, by its module's name."""
        if self.family == "phi":  # with biases; attention and MLP read the same norm
            layer = {"input_layernorm": 2 * self.hidden}
            heads, last = {f"self_attn.{which}_layernorm": 2 * self.head_width for which in "qk"}, "model.final_layernorm"
        else:
            around = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if self.family == "gemma2" else ()
            layer = dict.fromkeys(("input_layernorm", "post_attention_layernorm", *around), self.hidden)
            heads, last = {f"self_attn.{which}_norm": self.head_width for which in "qk"}, "model.norm"
        layer |= heads if self.head_norms else {}
        every = {f"model.layers.{number}.{name}": size for number in range(self.layers) for name, size in layer.items()}
        return {**every, last: layer["input_layernorm"]}

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the names of all modules with weights of their own; a tied head has none."""
        return ("model.embed_tokens", *self.linears, *self.norms, *(() if self.tied else ("lm_head",)))

    @property
    def linear_numbers(self) -> int:
        """Return the numbers of all linear layers but the head, biases left out."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def outer_numbers(self) -> int:
        """Return the numbers that are never held as codes: embedding, head, norms and biases."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return tables + sum(self.norms.values()) + self._bias_numbers

    @property
    def numbers(self) -> int:
        """Return the numbers of the whole base; tied matrices once."""
        return self.linear_numbers + self.outer_numbers

    @property
    def _bias_numbers(self) -> int:
        out = self.hidden if self.family not in ("qwen2", "phi3") else 0
        attention = self.queries + 2 * self.keys + out
        mlp = (self.mlp if self.family == "phi" else 2 * self.mlp) + self.hidden
        head = self.vocab if self.family == "phi" else 0
        return self.layers * (attention * self.attention_bias + mlp * self.mlp_bias) + head
