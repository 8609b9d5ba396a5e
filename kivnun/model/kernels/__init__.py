"""The pointwise and attention kernels of the hot path: one set of operations, in torch, for the CPU in C, and for CUDA in
Triton.

`choose` picks a set when a base is loaded, by what is there and right, never by how fast it turns out to be; it stays the same for
the whole run and is part of the run's numeric environment. Next: `reference.py` (what each operation computes).
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import torch

from kivnun.errors import BaseModelError
from kivnun.model.dropout import Mask
from kivnun.model.kernels.native import ENDING, CannotBuild, NativeKernels, build
from kivnun.model.kernels.reference import Angles, TorchKernels
from kivnun.model.kernels.triton import TritonKernels
from kivnun.model.products import onednn_serves

__all__ = [
    "Angles", "Kernels", "NativeKernels", "TorchKernels", "TritonKernels", "choose", "names_of", "native_or_reason",
    "triton_or_reason",
]  # fmt: skip

Kernels: TypeAlias = TorchKernels | NativeKernels | TritonKernels


@functools.cache
def native_or_reason() -> NativeKernels | str:
    """Return the compiled kernels after one question to each, or why they do not serve on this machine."""
    try:
        kernels = build()
    except CannotBuild as error:
        return str(error)
    wrong = [name for name in ENDING if not _agrees(kernels, name)]
    return f"the compiled kernels compute {' and '.join(map(str, wrong))} wrongly" if wrong else kernels


@functools.cache
def triton_or_reason() -> TritonKernels | str:
    """Return the kernels in Triton after one question to each, or why they do not serve on this machine."""
    try:
        kernels = TritonKernels()
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    wrong = []
    for dtype in ENDING:
        try:
            right = _agrees(kernels, dtype, "cuda") and _turns_and_decodes(kernels, dtype, "cuda")
        except Exception as error:  # a compiler on a stranger's machine raises what it likes
            return f"the kernels in Triton do not run: {type(error).__name__}: {error}"
        wrong += [] if right else [dtype]
    return f"the kernels in Triton compute {' and '.join(map(str, wrong))} wrongly" if wrong else kernels


def choose(wanted: str, device: str) -> Kernels:
    """Return the kernels named "native", "triton" or "torch"; "auto" is the device's own where they serve, else torch.

    Raises BaseModelError when kernels are asked for by name and cannot be had, with the reason.
    """
    if wanted == "torch":
        return TorchKernels()
    best, found = ("native", native_or_reason()) if device == "cpu" else ("triton", triton_or_reason())
    if wanted in ("auto", best) and not isinstance(found, str):
        return found
    if wanted == "auto":
        return TorchKernels()
    reason = found if wanted == best else f"they do not compute on {device}"
    raise BaseModelError(f"compute.kernels is {wanted}, and they cannot be used: {reason}", hint="leave compute.kernels out")


def names_of(kernels: Kernels) -> dict[str, str]:
    """Return what computes, as far as it decides last bits: entries for a run's numeric environment."""
    return {"pointwise": kernels.name, "float32 products": "oneDNN" if onednn_serves() else "torch"}


def _agrees(kernels: Kernels, dtype: torch.dtype, device: str = "cpu") -> bool:
    """Compare the kernels with the reference on a small problem; a miscompiled one must not train anything."""
    reference, near = TorchKernels(), 2e-2 if dtype == torch.bfloat16 else 2e-5
    values = torch.sin(torch.arange(2 * 21 * 4 * 32, dtype=torch.float32)).to(device, dtype).view(2, 21, 4, 32)
    (x_THK, y_THK), lengths = values, [16, 5]
    angles = Angles(torch.cos(y_THK[:, 0].float()), torch.sin(y_THK[:, 0].float()))
    angles = Angles(angles.cos_TR[:, :8].contiguous(), angles.sin_TR[:, :8].contiguous())
    flat_TD, weight_D = x_THK.reshape(21, -1), y_THK.reshape(21, -1)[0]
    targets, weights = torch.arange(18, device=device), torch.linspace(0.1, 1.0, 18, device=device)

    def answers(of: Kernels) -> list[torch.Tensor | None]:
        normed, scale = of.rms_norm(flat_TD, weight_D, 1e-5)
        logits = flat_TD.clone()
        nll, dlogits = of.nll_(logits, targets, weights, dtype)
        out, lse = of.attention(x_THK, y_THK[:, :2], y_THK[:, 2:], lengths, 0.2, None, angles)
        into = (torch.empty_like(x_THK), torch.empty_like(y_THK[:, :2]), torch.empty_like(y_THK[:, 2:]))
        of.attention_backward(x_THK, x_THK, y_THK[:, :2], y_THK[:, 2:], out, lse, lengths, 0.2, None, angles, into)
        mask, gu = Mask(torch.arange(21, device=device), 7, 0.3), flat_TD.clone()
        of.gate_backward_(flat_TD[:, :64].contiguous(), gu)
        return [
            normed, of.rms_norm_backward(flat_TD, flat_TD, weight_D, scale), *of.add_rms_norm(flat_TD, gu, flat_TD, weight_D, 1e-5),
            of.rms_norm_backward(flat_TD, flat_TD, weight_D, scale, gu), of.gate(flat_TD), nll, dlogits, out, lse, *into,
            gu, of.log_prob(flat_TD, targets),
            of.dropped(flat_TD, mask), of.dropped(flat_TD, mask, gu.clone()),
            of.scale_columns(flat_TD, weight_D.float()), of.column_dots(flat_TD, flat_TD),
        ]  # fmt: skip

    pairs = [(a, b) for a, b in zip(answers(kernels), answers(reference), strict=True) if b is not None]
    return all(a is not None and torch.allclose(a.float(), b.float(), near, near) for a, b in pairs)


def _turns_and_decodes(kernels: TritonKernels, dtype: torch.dtype, device: str) -> bool:
    """Compare what only kernels in Triton do by themselves, or what only bases in 4 and 8 bits use."""
    reference, near = TorchKernels(), 2e-2 if dtype == torch.bfloat16 else 2e-5
    turns = torch.arange(21 * 6, device=device).float().view(21, 6)
    angles, x_THK = Angles(turns.cos(), turns.sin()), torch.sin(torch.arange(21 * 3 * 16, device=device)).to(dtype).view(21, 3, 16)
    codes = torch.arange(256, device=device).to(torch.uint8)
    scales, offset = torch.linspace(0.5, 2.0, 256, device=device), torch.tensor(0.25, device=device)

    def answers(of: TorchKernels) -> list[torch.Tensor]:
        plain, nested, eight = (torch.empty(8, 64, dtype=dtype, device=device) for _ in range(3))
        of.nf4_decode(codes, scales, 64, plain)
        of.nf4_decode_nested(codes, codes[:8], scales, scales[:1], offset, 64, nested)
        of.int8_decode(codes.repeat(2).view(torch.int8).view(8, 64), scales[:8], eight)
        return [plain, nested, eight]

    pairs = [(kernels.turned(x_THK, angles, way), angles.turned(x_THK, way)) for way in (1, -1)]
    pairs += zip(answers(kernels), answers(reference), strict=True)
    return all(torch.allclose(a.float(), b.float(), near, near) for a, b in pairs)
