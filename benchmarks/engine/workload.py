"""The work that every side of the benchmark is given: the same models, the same start adapter, the same rows, in the same order.

Models are Phi-3-shaped with random weights (a step costs the same as on trained ones) and are written once into a work folder;
rows are drawn anew in each process from the same seed. Importing this file loads no torch; `python -m benchmarks.engine.workload
DIR MODEL ...` writes the folders. Next: `flops.py` (what a step of this work costs), `cases.py` (who does it, and how).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RANK, ALPHA = 16, 16
VARIANTS = ("lora", "dora", "rslora", "dropout", "head")
VOCAB = 32064
SEED = 0


@dataclass(frozen=True, slots=True)
class Model:
    """The shape of a Phi-3 model with untied head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int = VOCAB

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of one layer's projections, by their names in the layer."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "self_attn.o_proj": (self.hidden, self.hidden),
            "self_attn.qkv_proj": (self.hidden, qkv),
            "mlp.gate_up_proj": (self.hidden, 2 * self.mlp),
            "mlp.down_proj": (self.mlp, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Return the weights of all linear layers, head excluded."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())


MODELS = {
    "71m": Model(hidden=512, layers=12, heads=8, kv_heads=4, mlp=1536),
    # The head is a fifth of the weights that a token meets here, three tenths in the 71 M model, and 3 % in Phi-3-mini.
    "wide": Model(hidden=2048, layers=4, heads=32, kv_heads=8, mlp=8192),
    "small": Model(hidden=256, layers=4, heads=4, kv_heads=2, mlp=768),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one chat, and which of them are supervised (the replies)."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


def draw_rows(count: int, seed: int = SEED) -> list[Row]:
    """Return chats of realistic length: log-normal, median about 122 tokens, mean about 156, at most 1024.

    Turns alternate between a user (8 to 59 tokens) and an assistant (8 to 69, supervised), so that about half of all tokens are
    supervised. Ids follow Zipf's law, as words do. The first rows do not depend on how many are drawn.
    """
    return [_draw_row(np.random.default_rng([seed, number])) for number in range(count)]


def _draw_row(draws: np.random.Generator) -> Row:
    length = int(np.clip(np.exp(np.log(122) + 0.7 * draws.standard_normal()), 16, 1024))
    ids = 3 + draws.zipf(1.3, size=length) % (VOCAB - 3)
    supervised = np.zeros(length, dtype=bool)
    at = 0
    while at < length:
        user, reply = int(draws.integers(8, 60)), int(draws.integers(8, 70))
        supervised[at + user : at + user + reply] = True
        at += user + reply
    if not supervised.any():  # a short row that ended in its first question
        supervised[length // 2 :] = True
    return Row(tuple(ids.tolist()), tuple(supervised.tolist()))


def model_folder(work: Path, model: str) -> Path:
    return work / model


def adapter_folder(work: Path, model: str, variant: str) -> Path:
    return work / f"{model}-{variant}"


def write_workload(work: Path, model: str) -> None:
    """Write the model in bfloat16, a tokenizer of its vocabulary, and one start adapter per variant, unless they are there."""
    folder = model_folder(work, model)
    done = folder / "complete.json"
    stamp = json.dumps({"model": repr(MODELS[model]), "rank": RANK, "alpha": ALPHA, "seed": SEED, "layout": 1})
    if done.exists() and done.read_text(encoding="utf-8") == stamp:
        return
    _write_model(MODELS[model], folder)
    for variant in VARIANTS:
        _write_adapter(MODELS[model], adapter_folder(work, model, variant), folder, variant)
    done.write_text(stamp, encoding="utf-8")


def _write_model(model: Model, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    config = Phi3Config(
        hidden_size=model.hidden,
        intermediate_size=model.mlp,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        vocab_size=model.vocab,
        max_position_embeddings=2048,
        original_max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
    )
    # Stored as published models are, so that float32 and bfloat16 runs start from the same numbers.
    Phi3ForCausalLM(config).bfloat16().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(model.vocab)}, unk_token="<3>"))
    tokens = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>", "unk_token": "<3>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)


def _write_adapter(model: Model, folder: Path, base: Path, variant: str) -> None:
    """Write a PEFT folder. B is random too: with B zero, as PEFT starts, A would have no gradient at the first step and a
    mistake in it would stay unseen there. B A is a tenth of a weight's size."""
    import torch
    from safetensors.torch import load_file, save_file

    sites = {f"model.layers.{i}.{name}": size for i in range(model.layers) for name, size in model.linears.items()}
    if variant == "head":
        sites["lm_head"] = (model.hidden, model.vocab)
    draws = np.random.default_rng([SEED, 1])
    tensors = {}
    for name, (inputs, outputs) in sites.items():
        a = (draws.random((RANK, inputs), dtype=np.float32) * 2 - 1) / np.float32(np.sqrt(inputs))
        b = draws.standard_normal((outputs, RANK), dtype=np.float32) * np.float32(0.02)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.from_numpy(a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.from_numpy(b)
    if variant == "dora":
        weights = load_file(base / "model.safetensors")
        for name in sites:
            lengths = torch.linalg.vector_norm(weights[f"{name}.weight"].float(), dim=1)
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = lengths
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1 if variant == "dropout" else 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in sites}),
        "use_dora": variant == "dora",
        "use_rslora": variant == "rslora",
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    for named in sys.argv[2:]:
        write_workload(Path(sys.argv[1]), named)
