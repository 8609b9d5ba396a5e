"""Makes `kivnun/tiny-phi` from nothing: tokenizer, corpus, random start, training, bf16 weights in the package, evaluation.

Each stage is a function of the ones before and of the seed; a stage whose result is there is not done again, and the training
goes on from its checkpoint. 75 to 90 minutes on two cores. `python -m recipes.tiny_phi` runs all of it in the repository's root.
Next: `spec.yaml` (the training), `corpus.py` (the text), `evaluate.py` (what came of it).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from kivnun.randomness import generator
from recipes.tiny_phi import corpus, docs
from recipes.tiny_phi.tokenizer import letter_pieces, save_tokenizer, train_tokenizer
from recipes.tiny_phi.words import load_words

HERE = Path(__file__).parent
BUILD = Path("build/tiny_phi")
START, CORPUS, RUN = BUILD / "start", BUILD / "corpus", BUILD / "run"
SHIPPED = Path("kivnun/bases/tiny_phi")
LOG = HERE / "log"
SEED = 7
STANDARD_DEVIATION = 0.02
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
]
RESIDUAL_ENDS = ("o_proj.weight", "down_proj.weight")


def build() -> None:
    """Run every stage that is not done yet, in the repository's root."""
    if not (CORPUS / "corpus.json").is_file():
        make_corpus()
    if not (START / "model.safetensors").is_file():
        write_start(START)
    train()
    ship(RUN / "model", SHIPPED)
    keep_log(RUN, LOG)
    evaluate_shipped()


def make_corpus() -> None:
    """Write tokenizer and corpus. The tokenizer is trained before there are pieces of it to make words from."""
    documented = docs.entries()
    texts = [text for _, text in documented]
    tokenizer = train_tokenizer(corpus.sample_texts(load_words(texts), documented))
    save_tokenizer(tokenizer, START)
    corpus.write_corpus(CORPUS, tokenizer, load_words(texts, letter_pieces(tokenizer)), documented)


def write_start(folder: Path) -> None:
    """Write the untrained model: normal weights, those that write into the residual stream smaller by the root of their number."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    settings = json.loads((HERE / "model_config.json").read_text(encoding="utf-8"))
    model = Phi3ForCausalLM(Phi3Config(**settings))
    residual_scale = 1.0 / (2 * settings["num_hidden_layers"]) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                scale = STANDARD_DEVIATION * (residual_scale if name.endswith(RESIDUAL_ENDS) else 1.0)
                draws = generator(SEED, "start", name).standard_normal(tuple(parameter.shape), dtype=np.float32)
                parameter.copy_(torch.from_numpy(draws * np.float32(scale)))
    generation = (folder / "generation_config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(generation)  # the tokenizer's, which names the end of a turn


def train() -> None:
    """Run the spec as anyone would; an unfinished run goes on, a finished one says so."""
    from kivnun.cli.main import run

    status = run(["tune", str(HERE / "spec.yaml"), "--output", str(RUN), "--resume"])
    if status != 0:
        sys.exit(status)


def ship(trained: Path, folder: Path) -> None:
    """Write the trained model in bfloat16, with its tokenizer, as package data."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(trained / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone; package data are for everyone
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(START / name, folder / name)


def keep_log(run: Path, folder: Path) -> None:
    """Keep the run's record beside the recipe: what was asked, what was done, what the corpus came to.

    Paths are made relative to the repository's root: where it lay on the machine that ran the recipe means nothing elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = f"{Path.cwd()}/"
    for path in (run / "events.jsonl", run / "resolved.yaml", run / "manifest.json", CORPUS / "corpus.json"):
        (folder / path.name).write_text(path.read_text(encoding="utf-8").replace(root, ""), encoding="utf-8")


def evaluate_shipped() -> None:
    from recipes.tiny_phi.evaluate import main

    main([str(SHIPPED), str(HERE / "evaluation.json")])
