"""The kernels in C: compiled by the machine's own compiler on first use, kept in the user's cache, called through ctypes.

Linking leaves OpenMP's symbols open, so that they are found in the runtime torch has loaded: two runtimes in one process would
each bring their own threads. Where they cannot be built, `build` says why and the kernels of `reference.py` serve.
Next: `reference.py` (what each kernel computes, in torch), `pointwise.inc`, `attention.inc` and `cells.h` (the same in C).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kivnun.model.dropout import Mask, scale_and_limit
from kivnun.model.kernels.reference import Angles, leaves_over

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-std=gnu11")
WIDE = ("-mprefer-vector-width=512",)  # compilers for x86 take half of AVX-512's width when left alone
ENDING = {torch.float32: "f32", torch.bfloat16: "bf16"}
COMPILE_TIMEOUT_S = 120
LEFT, LOW = 1, 2  # what drops in a product
STRAIGHT, TRANSPOSED = 1, 2  # how a right factor is given, where it is not packed
ALIASED_BYTES = 4096  # as in products.c
LANES = 16  # float32 numbers of a vector
GROUP = {torch.float32: 1, torch.bfloat16: 2}  # numbers that products.c multiplies in one instruction


class CannotBuild(Exception):
    """The kernels cannot be built or loaded here; the text says why."""


class _Pass(ctypes.Structure):
    """`struct attention` of attention.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "lse", "cos", "sin")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("q", "k", "v", "out", "dq", "dk", "dv")),
        *((f"{name}_head", ctypes.c_int64) for name in ("q", "k", "v", "dq", "dk", "dv")),
        *((name, ctypes.c_int64) for name in ("tokens", "angle_stride", "window")),
        *((name, ctypes.c_int) for name in ("groups", "per_group", "head_dim", "width", "rot")),
        ("scale", ctypes.c_float),
    )


class _Dropout(ctypes.Structure):
    """`struct dropout` of products.c, field by field."""

    _fields_ = (
        ("keys", ctypes.c_void_p), ("site", ctypes.c_int64), ("limit", ctypes.c_int64), ("factor", ctypes.c_float),
        ("what", ctypes.c_int),
    )  # fmt: skip


class _Product(ctypes.Structure):
    """`struct product` of products.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "right", "low", "low_right", "out")),
        *((name, ctypes.c_int64) for name in ("left_row", "right_row", "low_row", "out_row", "M", "N", "K", "R")),
        ("given", ctypes.c_int),
        ("wide", ctypes.c_int),
        ("factor", ctypes.c_float),
        ("drop", _Dropout),
    )


@dataclass(frozen=True, slots=True)
class Panels:
    """A right factor [K, N] as products.c reads it."""

    data: Tensor
    depth: int
    columns: int


class NativeKernels:
    """Kernels on the CPU for contiguous float32 and bfloat16 tensors; what each computes stands in `TorchKernels`."""

    def __init__(self, library: ctypes.CDLL, version: str) -> None:
        self._library = library
        self._multiplied = frozenset(dtype for bit, dtype in enumerate(ENDING) if library.products_serve() >> bit & 1)
        self.name = f"native {version}"  # of sources, compiler and processor: another one may round otherwise

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y_TD, scale_T = torch.empty_like(x_TD), torch.empty(len(x_TD), dtype=torch.float32)
        self._call("rms_norm", x_TD, x_TD, weight_D, y_TD, scale_T, *x_TD.shape, ctypes.c_float(eps))
        return y_TD, scale_T

    def add_rms_norm(
        self, h_TD: Tensor, rest_TD: Tensor | None, delta_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        sum_TD, y_TD, scale_T = torch.empty_like(h_TD), torch.empty_like(h_TD), torch.empty(len(h_TD), dtype=torch.float32)
        over_TD = torch.empty_like(h_TD) if leaves_over(h_TD) else None
        sizes = *h_TD.shape, ctypes.c_float(eps)
        self._call("add_rms_norm", h_TD, h_TD, rest_TD, _Rows(delta_TD), weight_D, sum_TD, over_TD, y_TD, scale_T, *sizes)
        return sum_TD, over_TD, y_TD, scale_T

    def rms_norm_backward(
        self, dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, scale_T: Tensor, add_TD: Tensor | None = None
    ) -> Tensor:
        dx_TD, added = torch.empty_like(x_TD), (0, 0) if add_TD is None else (_Rows(add_TD),)
        self._call("rms_norm_backward", x_TD, _Rows(dy_TD), x_TD, weight_D, scale_T, *added, dx_TD, *x_TD.shape)
        return dx_TD

    def gate(self, gu_T2F: Tensor) -> Tensor:
        tokens, width = gu_T2F.shape
        h_TF = gu_T2F.new_empty(tokens, width // 2)
        self._call("gate", gu_T2F, _Rows(gu_T2F), h_TF, *h_TF.shape)
        return h_TF

    def gate_backward_(self, dh_TF: Tensor, gu_T2F: Tensor) -> None:
        self._call("gate_backward", gu_T2F, dh_TF.contiguous(), _Rows(gu_T2F), *dh_TF.shape)

    def nll_(self, logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        count, width = len(targets_C), logits_CV.shape[1]
        logits_CV, nll_C = logits_CV.float(), torch.empty(count, dtype=torch.float32)
        assert logits_CV.stride(1) == 1  # it is written in place
        gradient_CV = logits_CV.view(dtype)[:, :width]  # each row at the beginning of its logits' place
        self._call("nll", gradient_CV, _Rows(logits_CV), targets_C, weights_C, nll_C, count, width)
        gradient_CV[count:].zero_()
        return nll_C, gradient_CV

    def log_prob(self, logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        out_C = torch.empty(len(targets_C), dtype=torch.float32)
        self._call("log_prob", logits_CV, _Rows(logits_CV), targets_C, out_C, len(targets_C), logits_CV.shape[1])
        return out_C

    def dropped(self, x_TD: Tensor, mask: Mask, onto_TD: Tensor | None = None) -> Tensor:
        x_TD, (scale, limit) = x_TD.contiguous(), scale_and_limit(mask.rate)
        out_TD = torch.empty_like(x_TD) if onto_TD is None else onto_TD
        assert out_TD.stride(1) == 1  # it is written in place
        rest = _Rows(out_TD), onto_TD is not None, *x_TD.shape
        self._call("dropped", x_TD, x_TD, mask.keys_T, mask.site, limit, ctypes.c_float(scale), *rest)
        return out_TD

    def scale_columns(self, x_TO: Tensor, factor_O: Tensor) -> Tensor:
        out_TO = torch.empty_like(x_TO, memory_format=torch.contiguous_format)
        self._call("scale_columns", x_TO, _Rows(x_TO), factor_O.detach(), out_TO, *x_TO.shape)
        return out_TO

    def column_dots(self, x_TO: Tensor, y_TO: Tensor) -> Tensor:
        out_O = torch.empty(x_TO.shape[1], dtype=torch.float32)
        self._call("column_dots", x_TO, _Rows(x_TO), _Rows(y_TO), out_O, *x_TO.shape)
        return out_O

    def attention(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        lengths: Sequence[int],
        scale: float,
        window: int | None,
        angles: Angles | None,
        parents: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        tokens, heads, head_dim = q_THK.shape
        out_THK = q_THK.new_empty(tokens, heads, head_dim)
        lse_HT = torch.empty(heads, tokens, dtype=torch.float32)
        given = _pass(q_THK, k_TGK, v_TGK, out_THK, lse_HT, scale, window, angles)
        self._over_rows("attention", given, q_THK, lengths, parents)
        return out_THK, lse_HT

    def attention_backward(
        self,
        dout_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        out_THK: Tensor,
        lse_HT: Tensor,
        lengths: Sequence[int],
        scale: float,
        window: int | None,
        angles: Angles | None,
        into: tuple[Tensor, Tensor, Tensor],
        parents: Sequence[int] | None = None,
    ) -> None:
        dout_THK = dout_THK.contiguous()
        given = _pass(q_THK, k_TGK, v_TGK, out_THK, lse_HT, scale, window, angles)
        given.dout = dout_THK.data_ptr()
        for name, tensor in zip(("dq", "dk", "dv"), into, strict=True):
            _place(given, name, tensor)
        self._over_rows("attention_backward", given, q_THK, lengths, parents)

    def multiplies(self, dtype: torch.dtype, depth: int) -> bool:
        """Return whether this processor has products of its own for this type and this many summed numbers."""
        return dtype in self._multiplied and depth % GROUP[dtype] == 0

    def packs(self) -> frozenset[str]:
        """Return the precisions, by their names in a spec, whose matrices are read packed here."""
        names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        return frozenset(names[dtype] for dtype in self._multiplied)

    def panels_transposed(self, w_NK: Tensor) -> Panels:
        """Return w^T packed, the right factor of x w^T."""
        columns, depth = w_NK.shape
        return self._panels("pack_transposed", w_NK, depth, columns)

    def panels(self, w_KN: Tensor) -> Panels:
        """Return w packed, the right factor of x w."""
        return self._panels("pack", w_KN, *w_KN.shape)

    def _panels(self, pack: str, w: Tensor, depth: int, columns: int) -> Panels:
        w = w.detach() if w.stride(1) == 1 else w.detach().contiguous()
        width = LANES if columns <= LANES else 2 * LANES
        data = torch.empty(-(-columns // width) * width * depth, dtype=w.dtype)
        rows_and_columns = [ctypes.c_int64(size) for size in (*w.shape, w.stride(0))]
        kernel = getattr(self._library, f"{pack}_{ENDING[w.dtype]}")
        kernel(ctypes.c_void_p(w.data_ptr()), *rows_and_columns, ctypes.c_void_p(data.data_ptr()), torch.get_num_threads())
        return Panels(data, depth, columns)

    def unpacked(self, right: Panels) -> Tensor:
        """Return the matrix [K, N] that `panels` has packed."""
        width, group = (LANES if right.columns <= LANES else 2 * LANES), GROUP[right.data.dtype]
        panels = right.data.view(-1, right.depth // group, width, group)
        return panels.permute(1, 3, 0, 2).reshape(right.depth, -1)[:, : right.columns].contiguous()

    def product(
        self,
        left_MK: Tensor,
        right: Panels | Tensor,
        low_MR: Tensor | None = None,
        low_right: Panels | None = None,
        *,
        transposed: bool = False,
        drop_left: Mask | None = None,
        drop_low: Mask | None = None,
        factor: float = 1.0,
        wide: bool = False,
    ) -> Tensor:
        """Return factor * (left right + low low_right) [M, N], computed in float32 and rounded once, or with `wide` never.

        `right` is packed, or a matrix [K, N] (`transposed`: [N, K]), which is packed on the way, a block at a time. Either the
        left factor or the second product may be dropped on the way.
        """
        left_MK = left_MK if left_MK.stride(1) == 1 else left_MK.contiguous()
        given = _Product(left=left_MK.data_ptr(), left_row=left_MK.stride(0), M=len(left_MK), factor=factor, wide=wide)
        if isinstance(right, Panels):
            given.right, given.K, given.N = right.data.data_ptr(), right.depth, right.columns
        else:
            right = right.detach() if right.stride(1) == 1 else right.detach().contiguous()
            given.given = TRANSPOSED if transposed else STRAIGHT
            given.N, given.K = right.shape if transposed else right.shape[::-1]
            given.right, given.right_row = right.data_ptr(), right.stride(0)
        assert left_MK.shape[1] == given.K
        out_MN = rows_apart(left_MK, given.M, given.N, torch.float32 if wide else left_MK.dtype)
        given.out, given.out_row = out_MN.data_ptr(), out_MN.stride(0)
        if low_MR is not None and low_right is not None:
            assert low_MR.stride(1) == 1
            given.low, given.low_right = low_MR.data_ptr(), low_right.data.data_ptr()
            given.low_row, given.R = low_MR.stride(0), low_right.depth
        for mask, what in ((drop_left, LEFT), (drop_low, LOW)):
            if mask is not None:
                given.drop = _dropout(mask, given.M, what)
        if getattr(self._library, f"product_{ENDING[left_MK.dtype]}")(ctypes.byref(given), torch.get_num_threads()):
            raise MemoryError(f"no memory to pack a block of a matrix of {given.K} rows")
        return out_MN

    def outer(self, a_TR: Tensor, b_TN: Tensor, drop: Mask | None = None) -> Tensor:
        """Return a^T b, float32 [R, N], for a narrow `a`; with `drop`, of b dropped."""
        tokens, rank = a_TR.shape
        group = GROUP[a_TR.dtype]
        b_TN = b_TN if b_TN.stride(1) == 1 else b_TN.contiguous()
        grouped = torch.nn.functional.pad(a_TR, (0, 0, 0, -tokens % group)).view(-1, group, rank).transpose(1, 2).contiguous()
        out_RN = torch.empty(rank, b_TN.shape[1], dtype=torch.float32)
        sizes = [ctypes.c_int64(size) for size in (tokens, rank, b_TN.shape[1], b_TN.stride(0))]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (grouped, b_TN, out_RN)]
        dropout = None if drop is None else ctypes.byref(_dropout(drop, tokens, LEFT))
        getattr(self._library, f"outer_{ENDING[a_TR.dtype]}")(*pointers, *sizes, dropout, torch.get_num_threads())
        return out_RN

    def nf4_encode(self, values_N: Tensor, block: int, codes: Tensor, scales: Tensor) -> None:
        values_N = values_N if values_N.dtype in ENDING else values_N.float()
        self._call("nf4_encode", values_N, values_N, codes, scales, len(values_N), block)

    def nf4_decode(self, codes: Tensor, scales: Tensor, block: int, out: Tensor) -> None:
        self._call("nf4_decode", out, codes, scales, out, out.numel(), block)

    def nf4_decode_nested(
        self, codes: Tensor, scale_codes: Tensor, map_256: Tensor, group_scales: Tensor, offset: Tensor, block: int, out: Tensor
    ) -> None:
        self._call("nf4_decode_nested", out, codes, scale_codes, map_256, group_scales, offset, out, out.numel(), block)

    def int8_decode(self, codes_OI: Tensor, absmax_O: Tensor, out: Tensor) -> None:
        self._call("int8_decode", out, codes_OI, absmax_O, out, *out.shape)

    def _over_rows(self, name: str, given: _Pass, like: Tensor, lengths: Sequence[int], parents: Sequence[int] | None) -> None:
        count = len(lengths)
        numbers = ctypes.c_int64 * count
        kernel = getattr(self._library, f"{name}_{ENDING[like.dtype]}")
        before = None if parents is None else numbers(*parents)
        if kernel(ctypes.byref(given), numbers(*lengths), before, ctypes.c_int64(count), torch.get_num_threads()):
            raise MemoryError(f"no memory for the scratch of attention over rows of {sum(lengths):,} tokens")

    def _call(self, name: str, like: Tensor, *arguments: Tensor | _Rows | int | ctypes.c_float | None) -> None:
        passed: list[Any] = []
        for item in arguments:
            if isinstance(item, _Rows):
                passed += [ctypes.c_void_p(item.x.data_ptr()), ctypes.c_int64(item.x.stride(0))]
            else:
                passed.append(_pointer(item) if item is None or isinstance(item, Tensor) else _number(item))
        getattr(self._library, f"{name}_{ENDING[like.dtype]}")(*passed, torch.get_num_threads())


class _Rows:
    """A matrix whose rows may lie apart: a pointer and the way from one row to the next."""

    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x if x.stride(1) == 1 else x.contiguous()


def rows_apart(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return an empty matrix whose rows do not fall into the same lines of the first-level cache, as they do 4 KiB apart.

    The rows of a product's tile are read together, and what is written here is most often what the next product reads.
    """
    if columns * dtype.itemsize % ALIASED_BYTES != 0:
        return like.new_empty(rows, columns, dtype=dtype)
    # No view of a wider matrix: what a function of autograd's returns could not be added to in place then, as PEFT's layers do.
    return like.new_empty_strided((rows, columns), (columns + LANES, 1), dtype=dtype)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())


def _number(value: int | ctypes.c_float) -> ctypes.c_int64 | ctypes.c_float:
    return value if isinstance(value, ctypes.c_float) else ctypes.c_int64(value)


def _pass(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None, angles: Angles | None
) -> _Pass:
    tokens, heads, head_dim = q.shape
    given = _Pass(
        out=out.data_ptr(), out_stride=heads * head_dim, lse=lse.data_ptr(), tokens=tokens, window=window or 0,
        groups=k.shape[1], per_group=heads // k.shape[1], head_dim=head_dim, width=-(-head_dim // 16) * 16, scale=scale,
    )  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _place(given, name, tensor)
    if angles is not None:
        given.cos, given.sin = angles.cos_TR.data_ptr(), angles.sin_TR.data_ptr()
        given.angle_stride, given.rot = angles.cos_TR.shape[1], 2 * angles.cos_TR.shape[1]
    return given


def _dropout(mask: Mask, rows: int, what: int) -> _Dropout:
    assert mask.keys_T.shape == (rows,)
    assert mask.keys_T.is_contiguous()
    factor, limit = scale_and_limit(mask.rate)
    return _Dropout(mask.keys_T.data_ptr(), mask.site, limit, factor, what)


def _place(given: _Pass, name: str, tensor: Tensor) -> None:
    assert tensor.stride(2) == 1
    setattr(given, name, tensor.data_ptr())
    setattr(given, f"{name}_stride", tensor.stride(0))
    setattr(given, f"{name}_head", tensor.stride(1))


@functools.cache
def build() -> NativeKernels:
    """Return the compiled kernels, from the cache or new. Raises CannotBuild with the reason."""
    compiler = _compiler()
    flags = FLAGS + (WIDE if platform.machine() in ("x86_64", "AMD64") else ())
    sources = sorted(SOURCES.glob("*.c"))
    parts = sorted([*sources, *SOURCES.glob("*.inc"), *SOURCES.glob("*.h")])
    seen = [
        " ".join([*compiler, *flags]),
        _run([*compiler, "--version"]),
        _run([*compiler, "-march=native", "-Q", "--help=target"]),
    ]
    digest = hashlib.sha256("\0".join([*seen, *(part.read_text(encoding="utf-8") for part in parts)]).encode()).hexdigest()
    library = _cache() / f"kernels-{digest[:20]}.so"
    if not library.is_file():
        _compile(compiler, flags, sources, library)
    try:
        return NativeKernels(ctypes.CDLL(str(library)), digest[:12])
    except OSError as error:
        raise CannotBuild(f"{library} cannot be loaded: {error}") from error


def _compile(compiler: list[str], flags: Sequence[str], sources: Sequence[Path], library: Path) -> None:
    """Compile into a folder of this process and rename: processes that start together do not disturb each other."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-")
    except OSError as error:
        raise CannotBuild(f"the cache {library.parent} cannot be written: {error.strerror}") from error
    with place as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        commands = [[*compiler, *flags, "-c", str(source), "-o", target] for source, target in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor() as pool:  # someone waits for it, and each is a process of its own
            list(pool.map(_run, commands))
        made = Path(folder) / library.name
        # No -fopenmp here: see the module's docstring.
        _run([*compiler, "-shared", "-o", str(made), *objects, "-lm"])
        os.replace(made, library)


def compiler_version() -> str:
    """Return what the C compiler calls itself: its first line. Raises CannotBuild."""
    command = _compiler()
    said = _run([*command, "--version"]).splitlines()
    return f"{shlex.join(command)}: {said[0] if said else 'of no name'}"


def _compiler() -> list[str]:
    named = os.environ.get("CC")
    if named:
        return shlex.split(named)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise CannotBuild("there is no C compiler (cc, gcc or clang)")


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CannotBuild(f"{command[0]} failed: {lines[0]}")
    return done.stdout


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kivnun" / "kernels"
    except RuntimeError as error:  # a user without a home, as containers have
        raise CannotBuild(f"there is no folder for the cache: {error}; XDG_CACHE_HOME may name one") from error
