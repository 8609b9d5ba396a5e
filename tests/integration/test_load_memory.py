"""Sharded bases are loaded layer by layer: the most memory that loading takes is little above what is loaded.

Measured in a process of its own: the kernel's mark of the most that was resident (VmHWM) while a base is loaded, above what is
resident before. Nothing is added for the size of anything but the one tensor that quantising holds.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny

SHARDS = 4
MEASURE = """
    import ctypes, gc, json, re, sys
    from pathlib import Path

    import torch

    from kivnun.model.load import load_base

    def resident(mark):
        return 1024 * int(re.search(rf"^{mark}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])

    def settle():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the mark begins again from what is resident now

    torch.set_num_threads(1)
    small, large, *precisions = sys.argv[1:]
    for precision in precisions:
        load_base(Path(small), precision)  # everything is imported and every code path has run
        settle()
        before = resident("VmRSS")
        base = load_base(Path(large), precision)
        peak = resident("VmHWM") - before
        held = sum(p.numel() * p.element_size() for p in {*base.model.parameters(), *base.model.buffers()})
        print(json.dumps({"precision": precision, "peak": peak, "held": held}))
        del base
"""


def write_shards(folder: Path, config: Any) -> int:
    """Write a model of this configuration with random float32 weights in several files; return the bytes of its largest tensor."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    draws = (torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)) * 0.02).numpy().tobytes()
    index = {}
    for number in range(SHARDS):
        part = dict(list(shapes.items())[number::SHARDS])
        file = folder / f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        _write(file, part, draws)
        index |= dict.fromkeys(part, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    return 4 * max(torch.Size(shape).numel() for name, shape in shapes.items() if "embed" not in name and "head" not in name)


def _write(file: Path, shapes: dict[str, tuple[int, ...]], draws: bytes) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, at, len(draws)):
            stream.write(draws[: at - start])


def widths(layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "num_attention_heads": 8}
    return {**tiny.SIZES, **sizes, "vocab_size": 2048, "tie_word_embeddings": False}


OWN = (transformers.Phi3Config, tiny.CONFIGS["phi3"])
SIZES: dict[str, Any] = tiny.SIZES
GENERIC = (transformers.Olmo2Config, lambda: transformers.Olmo2Config(**SIZES))


def measured(kind: Any, layers: int, precisions: list[str], folder: Path) -> None:
    """Load a base in each precision and compare the most memory with what is held."""
    make, small = kind
    largest = write_shards(folder / "large", make(**widths(layers)))
    tiny.write_base(folder / "small", small())
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(folder / "small"), str(folder / "large"), *precisions]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [it["precision"] for it in found] == precisions
    for it in found:
        print({**it, "ratio": round(it["peak"] / it["held"], 3)})
        more = largest if it["precision"] in ("nf4", "int8") else 0
        assert it["peak"] <= 1.1 * it["held"] + more, it
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize("kind", [OWN, pytest.param(GENERIC, marks=pytest.mark.slow)], ids=["own", "generic"])
def test_loading_takes_at_most_a_tenth_more_than_is_loaded(kind: Any, tmp_path: Path) -> None:
    measured(kind, 5, ["bf16", "nf4"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OWN, GENERIC], ids=["own", "generic"])
def test_loading_a_base_of_600_megabytes_takes_at_most_a_tenth_more(kind: Any, tmp_path: Path) -> None:
    measured(kind, 25, ["fp32", "bf16", "nf4", "int8"], tmp_path)
