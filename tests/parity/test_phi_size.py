"""Phi's real size: a base shaped like Phi-3-mini (3.8 B parameters) with random weights loads, trains and keeps to its memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

GIB = 1 << 30
# Phi-3-mini-4k-instruct, https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/config.json
SHAPE = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096, "sliding_window": 2047, "pad_token_id": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip

LOAD_AND_TRAIN = """
    import json, sys, threading, time
    from pathlib import Path

    import numpy as np
    import psutil
    import torch

    import tiny
    from kivnun.data.packing import pack
    from kivnun.model.load import load_base

    def planned(config, adapter, tokens, itemsize, precision):
        # Bytes beside the weights: the adapter with gradient and moments, what layers keep, what one layer and the loss hold.
        width, inner = config.hidden_size, 2 * config.intermediate_size
        # Kept of a layer: two residual streams, queries, keys, values, attention's output, gate and up.
        kept = config.num_hidden_layers * (6 * width + inner)
        passing = 2 * inner + 4 * width
        decoded = config.hidden_size * inner * itemsize if precision == "nf4" else 0
        logits = min(tokens, 256) * config.vocab_size * 4
        return 16 * adapter + tokens * (kept + passing) * itemsize + logits + decoded

    small, large, precision = sys.argv[1:]
    torch.set_num_threads(2)
    load_base(Path(small), precision)
    process, highest, done = psutil.Process(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            highest[0] = max(highest[0], process.memory_info().rss)

    before = process.memory_info().rss
    threading.Thread(target=watch, daemon=True).start()
    began = time.monotonic()
    base = load_base(Path(large), precision)
    said = {"load_s": time.monotonic() - began, "load_peak": highest[0] - before}
    said["held"] = sum(p.numel() * p.element_size() for p in {*base.model.parameters(), *base.model.buffers()})
    said["parameters"] = base.num_parameters
    trainee = tiny.new_trainee(base, tiny.new_weights(base, rank=16))
    batch = pack([tiny.token_row(np.random.default_rng(row).integers(3, 32000, 192), row) for row in range(4)])
    said["step_s"], said["norms"] = [], []
    for _ in range(3):
        began = time.monotonic()
        trainee.forward_backward(batch, batch.total_weight)
        said["norms"].append(trainee.optim_step(1e-4).grad_norm)
        said["step_s"].append(time.monotonic() - began)
    said["peak"], said["tokens"] = highest[0] - before, batch.num_tokens
    adapter = sum(p.numel() for p in trainee.weights.parameters().values())
    said["planned"] = said["held"] + planned(base.config, adapter, batch.num_tokens, base.dtype.itemsize, precision)
    print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder as save_pretrained writes it, in two files, and take it away afterwards: it holds 7.6 GB."""
    folder = tmp_path_factory.mktemp("phi")
    config = transformers.Phi3Config(**SHAPE)
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {name: tuple(p.shape) for name, p in transformers.AutoModelForCausalLM.from_config(config).named_parameters()}
    weights = (
        (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    )
    halves = [dict(list(names.items())[start::2]) for start in (0, 1)]
    index = {}
    for number, half in enumerate(halves):
        file = folder / f"model-0000{number + 1}-of-00002.safetensors"
        write_tensors(file, half, weights)
        index |= dict.fromkeys(half, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    yield folder
    for file in folder.glob("*.safetensors"):
        file.unlink()


def write_tensors(file: Path, shapes: dict[str, tuple[int, ...]], weights: bytes) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, at, len(weights)):
            stream.write(weights[: at - start])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("precision", "share"), [("bf16", 1.001), ("nf4", 0.30)])
def test_a_base_of_phis_size_loads_and_trains_within_its_memory(precision: str, share: float, phi: Path, tmp_path: Path) -> None:
    few = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    small = tmp_path / "small"
    transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(**{**SHAPE, **few})).save_pretrained(small)
    command = [sys.executable, "-c", textwrap.dedent(LOAD_AND_TRAIN), str(small), str(phi), precision]
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100, env=paths)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    rate = said["tokens"] / sorted(said["step_s"])[1]
    print({"precision": precision, **said, "load_ratio": round(said["load_peak"] / said["held"], 3)})
    print(f"plan {said['planned'] / GIB:.2f} GiB, peak {said['peak'] / GIB:.2f}, error {said['peak'] / said['planned'] - 1:+.1%}")
    print(f"{rate:.0f} tokens a second: {1000 * 200 / rate / 3600:.1f} hours for 1,000 rows of 200 tokens, once")
    assert all(0 < norm < float("inf") for norm in said["norms"])
    assert said["parameters"] > 3.8e9
    assert said["held"] <= share * 2 * said["parameters"]
    assert said["load_peak"] <= 1.1 * said["held"]
    assert said["peak"] < 24 * GIB
