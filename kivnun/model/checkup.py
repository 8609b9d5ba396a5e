"""What torch, the libraries and the kernels say of this machine: `python -m kivnun.model.checkup STAGE ...`, for `kivnun doctor`.

A process of its own, since the doctor must outlive what is broken: a library that cannot be imported, a kernel that crashes. Each
stage prints one line of JSON as soon as it is known, so that a crash hides nothing but what comes after it.
Next: `plan/checkup.py`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def torch_view() -> dict[str, Any]:
    """Return what torch is and which GPUs it can use."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(number) for number in range(count)]
    return {
        "version": torch.__version__,
        "built_for_cuda": torch.version.cuda,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": [gpu.major, gpu.minor]} for gpu in gpus],
        "bf16": torch.cuda.is_bf16_supported() if count else None,
    }


def libraries() -> dict[str, Any]:
    """Import what every run imports; the first that fails ends the stage with its own words."""
    for name in ("tokenizers", "safetensors.torch", "transformers", "peft"):
        importlib.import_module(name)
    return {}


def kernels() -> dict[str, Any]:
    """Build the kernels in C, ask each one question, and return why they do not serve, or their name and what they pack."""
    from kivnun.model.kernels import native_or_reason
    from kivnun.model.kernels.native import CannotBuild, compiler_version

    found = native_or_reason()
    said = {"reason": found} if isinstance(found, str) else {"reason": None, "packs": sorted(found.packs())}
    try:
        return {**said, "compiler": compiler_version()}
    except CannotBuild:
        return {**said, "compiler": None}  # the reason says why


def triton() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"reason": "there is no CUDA device"}
    from kivnun.model.kernels import triton_or_reason

    found = triton_or_reason()
    return {"reason": found if isinstance(found, str) else None}


def speed() -> dict[str, Any]:
    """Return how many operations a second products do, by precision."""
    from kivnun.model.speed import products_per_second

    return {precision: products_per_second(precision) for precision in ("fp32", "bf16")}


STAGES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_view, "libraries": libraries, "kernels": kernels, "triton": triton, "speed": speed,
}  # fmt: skip


def main(names: Sequence[str]) -> int:
    for name in names:
        try:
            found = STAGES[name]()
        except Exception as error:  # whatever it is, it is a finding
            said = str(error).strip().splitlines()
            found = {"error": f"{type(error).__name__}: {said[0] if said else ''}"}
        print(json.dumps({"stage": name, **found}), flush=True)
        if name == "torch" and "error" in found:
            break  # nothing else works without it
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
