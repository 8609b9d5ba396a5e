"""A base of two layers, a data set of forty conversations and their spec: a whole run in a second."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml
from transformers import Phi3Config, Phi3ForCausalLM, set_seed

from template_corpus import FAMILIES, TOKENIZERS, write_base

PHI_3 = next(family for family in FAMILIES if family.name == "phi_3")
PROGRAM = (sys.executable, "-c", "from kivnun.cli.main import main; main()")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
HEBREW = ("אחת", "שתיים", "שלוש", "ארבע", "חמש", "שש", "שבע", "שמונה")


def make_base(folder: Path) -> Path:
    """Write a Phi-3 of two layers with its tokenizer and template, the same every time; return its folder."""
    tokenizer = TOKENIZERS["bytes"]()
    write_base(folder, tokenizer, PHI_3)
    set_seed(3)
    config = Phi3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=None,
        bos_token_id=tokenizer.token_to_id(PHI_3.bos),
        eos_token_id=tokenizer.token_to_id(PHI_3.eos),
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_spec(folder: Path, base: Path) -> Path:
    """Write train.jsonl (line n says word n modulo eight, with a number) and words.yaml; return the spec's path."""
    rows = [
        {"messages": [{"role": "user", "content": f"{word} {number}"}, {"role": "assistant", "content": f"{hebrew} {number}"}]}
        for number in range(5)
        for word, hebrew in zip(WORDS, HEBREW, strict=True)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "version": 1,
        "base": str(base),
        "data": {"train": "train.jsonl", "validation": 0.2},
        "adapter": {"kind": "lora", "rank": 4},
        "schedule": {"epochs": 2, "batch_rows": 4, "learning_rate": 0.01},
        "evaluation": {"metrics": ["exact_match", "chrf"], "max_new_tokens": 8, "samples": 2, "bootstrap": 100},
        "compute": {"kind": "local", "device": "cpu", "threads": 1},
        "seed": 7,
    }
    (folder / "words.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "words.yaml"
