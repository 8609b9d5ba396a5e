"""The pointwise and attention kernels of the hot path: one set of operations, in torch and, for the CPU, in C.

`choose` picks a set when a base is loaded, by what is there and right, never by how fast it turns out to be; it stays the same for
the whole run and is part of the run's numeric environment. Next: `reference.py` (what each operation computes).
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import torch

from kivnun.errors import BaseModelError
from kivnun.model.kernels.native import ENDING, CannotBuild, NativeKernels, build
from kivnun.model.kernels.reference import Angles, TorchKernels
from kivnun.model.products import onednn_serves

__all__ = ["Angles", "Kernels", "NativeKernels", "TorchKernels", "choose", "names_of", "native_or_reason"]

Kernels: TypeAlias = TorchKernels | NativeKernels


@functools.cache
def native_or_reason() -> NativeKernels | str:
    """Return the compiled kernels after one question to each, or why they do not serve on this machine."""
    try:
        kernels = build()
    except CannotBuild as error:
        return str(error)
    wrong = [name for name in ENDING if not _agrees(kernels, name)]
    return f"the compiled kernels compute {' and '.join(map(str, wrong))} wrongly" if wrong else kernels


def choose(wanted: str, device: str) -> Kernels:
    """Return the kernels named "native" or "torch"; "auto" is native on a CPU where they serve.

    Raises BaseModelError when "native" is asked for and cannot be had, with the reason.
    """
    if wanted == "torch" or (wanted == "auto" and device != "cpu"):
        return TorchKernels()
    found = native_or_reason() if device == "cpu" else "native kernels are for the CPU"
    if not isinstance(found, str):
        return found
    if wanted == "auto":
        return TorchKernels()
    raise BaseModelError(
        f"compute.kernels is native, and they cannot be used: {found}", hint="install a C compiler, or leave compute.kernels out"
    )


def names_of(kernels: Kernels) -> dict[str, str]:
    """Return what computes, as far as it decides last bits: entries for a run's numeric environment."""
    return {"pointwise": kernels.name, "float32 products": "oneDNN" if onednn_serves() else "torch"}


def _agrees(kernels: NativeKernels, dtype: torch.dtype) -> bool:
    """Compare the kernels with the reference on a small problem; a miscompiled one must not train anything."""
    reference, near = TorchKernels(), 2e-2 if dtype == torch.bfloat16 else 2e-5
    values = torch.sin(torch.arange(2 * 21 * 4 * 32, dtype=torch.float32)).to(dtype).view(2, 21, 4, 32)
    (x_THK, y_THK), lengths = values, [16, 5]
    angles = Angles(torch.cos(y_THK[:, 0].float()), torch.sin(y_THK[:, 0].float()))
    angles = Angles(angles.cos_TR[:, :8].contiguous(), angles.sin_TR[:, :8].contiguous())
    flat_TD, weight_D = x_THK.reshape(21, -1), y_THK.reshape(21, -1)[0]
    targets, weights = torch.arange(18), torch.linspace(0.1, 1.0, 18)

    def answers(of: Kernels) -> list[torch.Tensor]:
        normed, scale = of.rms_norm(flat_TD, weight_D, 1e-5)
        logits = flat_TD.clone()
        nll = of.nll_(logits, targets, weights)
        out, lse = of.attention(x_THK, y_THK[:, :2], y_THK[:, 2:], lengths, 0.2, None, angles)
        into = (torch.empty_like(x_THK), torch.empty_like(y_THK[:, :2]), torch.empty_like(y_THK[:, 2:]))
        of.attention_backward(x_THK, x_THK, y_THK[:, :2], y_THK[:, 2:], out, lse, lengths, 0.2, None, angles, into)
        keys = torch.arange(21)
        return [
            normed, of.rms_norm_backward(flat_TD, flat_TD, weight_D, scale), of.gate(flat_TD), nll, logits, out, lse, *into,
            of.gate_backward(flat_TD[:, :64].contiguous(), flat_TD), of.log_prob(flat_TD, targets),
            of.dropped(flat_TD, keys, 7, 0.3), of.scale_columns(flat_TD, weight_D.float()), of.column_dots(flat_TD, flat_TD),
        ]  # fmt: skip

    return all(torch.allclose(a.float(), b.float(), near, near) for a, b in zip(answers(kernels), answers(reference), strict=True))
