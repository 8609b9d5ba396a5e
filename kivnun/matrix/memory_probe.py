"""The process that measures points of the memory surface: it imports the libraries once and forks for each point.

`python -m kivnun.matrix.memory_probe WORK` reads a point a line and answers with what was measured. A fork makes a step of a
thimble-sized model first, so that code pages and caches are no part of what is counted, gives freed memory back, and takes what is
resident then as its rest. The peak is the kernel's count. A watch around the layers knows at any moment which activations,
gradients and moments there are, and keeps the moment at which these are the most together.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kivnun.data.packing import PackedBatch, pack
from kivnun.data.rows import TokenRow, Where
from kivnun.matrix.memory import Measured, Point
from kivnun.matrix.shapes import SHAPES, write_shape
from kivnun.model.kernels import choose
from kivnun.model.load import Base, load_base
from kivnun.model.peft_layers import LayerAdapter, peft
from kivnun.model.products import PackedMatrix
from kivnun.plan.techniques import TECHNIQUES, adapter_of
from kivnun.randomness import generator
from kivnun.train.engine import TorchEngine, Trainee
from kivnun.train.new_weights import new_weights
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings
from kivnun.train.weights import AdapterWeights

STEPS = 3  # moments are there from the second on; the last is not watched, and timed
RUN_STEPS = 100  # that AdaLoRA is told its run has: no rank is given up in the first few


def main() -> None:
    work = Path(sys.argv[1])
    peft()
    choose("auto", "cpu")
    adapter_of("lora")
    for line in sys.stdin:
        point = Point(**json.loads(line))
        for shape in ("thimble", point.model):
            if not (work / shape).exists():
                _in_a_fork(lambda shape=shape: _write(work / shape, shape))
        answer = _in_a_fork(lambda point=point: json.dumps(asdict(measured(point, work))))
        print(answer, flush=True)


def _write(folder: Path, shape: str) -> str:
    folder.mkdir()
    write_shape(folder, SHAPES[shape])
    return "written"


def _in_a_fork(task: Callable[[], str]) -> str:
    """Return what `task` returns in a process of its own. Exits where that one failed: it has told why."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(receiver)
            text = task()
            with os.fdopen(sender, "w") as pipe:
                pipe.write(text)
            status = 0
        except BaseException as error:
            first, *_ = str(error).splitlines() or [""]
            print(f"{type(error).__name__}: {first}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        text = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        sys.exit(1)
    return text


def measured(point: Point, work: Path) -> Measured:
    """Return what the steps of a point take, in a process that is only there for this."""
    _step(_opened(point, work / "thimble"), _batch(2, 16, SHAPES["thimble"].vocab))
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    _forget_peak()
    rest = _resident_bytes()
    trainee = _opened(point, work / point.model)
    batch = _batch(point.rows, point.tokens, SHAPES[point.model].vocab)
    watch = Watch(trainee)
    for _ in range(STEPS - 1):
        watch.step(batch)
    watch.stop()
    began = time.perf_counter(), time.process_time()
    loss = _step(trainee, batch)
    wall_s, cpu_s = time.perf_counter() - began[0], time.process_time() - began[1]
    peak = _peak_bytes() - rest
    standing = watch.fullest
    held = {"weights": weight_bytes(trainee.base), "adapter": adapter_bytes(trainee)}
    parts = {**held, "gradients": standing.gradients, "moments": standing.moments, "activations": standing.activations}
    parts["workspace"] = peak - sum(parts.values())
    whole = {"gradients": watch.gradients, "moments": moment_bytes(trainee), "activations": watch.activations}
    return Measured(peak, parts, whole, trainee.base.num_parameters, trainee.trainable_parameters, wall_s, cpu_s, loss)


def _opened(point: Point, folder: Path) -> Trainee:
    technique = TECHNIQUES[point.technique]
    held = "nf4" if technique.coded else point.precision
    base = load_base(folder, held, kernels=point.kernels, packed=point.packed, recompute=point.recompute)
    weights = new_weights(adapter_of(point.technique), base, [], RUN_STEPS, 0)
    return TorchEngine(base).open(weights, LikelihoodObjective(), AdamWSettings(0.9, 0.999, 1e-8, 0.0), 1.0)


def _batch(rows: int, tokens: int, vocab: int) -> PackedBatch:
    """Return rows of random tokens, the second half of each trained."""
    weights = np.zeros(tokens, dtype=np.float32)
    weights[tokens // 2 :] = 1.0
    draws = generator(0, "memory", rows, tokens)
    drawn = [draws.integers(3, vocab, tokens).astype(np.int32) for _ in range(rows)]
    return pack([TokenRow(ids, weights, row, Where("made", row + 1), 1) for row, ids in enumerate(drawn)])


def _step(trainee: Trainee, batch: PackedBatch) -> float:
    loss = trainee.forward_backward(batch, batch.total_weight)
    trainee.optim_step(1e-4)
    return loss


@dataclass(frozen=True, slots=True)
class Standing:
    """The bytes of what is there at a moment."""

    gradients: int = 0
    moments: int = 0
    activations: int = 0

    @property
    def together(self) -> int:
        return self.gradients + self.moments + self.activations


@dataclass
class Watch:
    """Looks whenever autograd keeps a tensor of the layers or lets one go, and around an update.

    An activation is what the layers' graph keeps, each storage once, without the weights. `fullest` is the moment at which most
    was there; `gradients` and `activations` are the most there ever was of each alone.
    """

    trainee: Trainee
    fullest: Standing = field(default_factory=Standing)
    gradients: int = 0
    activations: int = 0
    _kept: dict[int, tuple[int, int]] = field(default_factory=dict)  # storage -> its bytes, how many keep it
    _live: int = 0
    _moments: int = 0

    def __post_init__(self) -> None:
        base, parameters = self.trainee.base, self.trainee.weights.parameters().values()
        self._with_gradients = [*base.model.parameters(), *parameters]
        fixed = [*self._with_gradients, *base.model.buffers(), *_adapter_tensors(self.trainee)]
        self._fixed = {_storage(tensor) for tensor in fixed}
        self._trunk = base.trunk
        base.trunk = self._watched

    def stop(self) -> None:
        self.trainee.base.trunk = self._trunk

    def step(self, batch: PackedBatch) -> None:
        """Make a step, watched."""
        self.trainee.forward_backward(batch, batch.total_weight)
        self._look()
        gradients = self._gradient_bytes()
        self.trainee.optim_step(1e-4)
        self._moments = moment_bytes(self.trainee)
        self._look(gradients)  # while it updates, moments are there beside all gradients

    def _watched(self, *given: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor):
            return self._trunk(*given)

    def _keep(self, tensor: Tensor) -> _Kept:
        storage, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if storage in self._fixed:
            return _Kept(self, tensor, None)
        _, count = self._kept.get(storage, (size, 0))
        self._kept[storage] = (size, count + 1)
        self._live += 0 if count else size
        self._look()
        return _Kept(self, tensor, storage)

    def let_go(self, storage: int) -> None:
        self._look()
        size, count = self._kept.pop(storage)
        if count > 1:
            self._kept[storage] = (size, count - 1)
        else:
            self._live -= size

    def _look(self, gradients: int | None = None) -> None:
        gradients = self._gradient_bytes() if gradients is None else gradients
        now = Standing(gradients, self._moments, self._live)
        self.gradients, self.activations = max(self.gradients, gradients), max(self.activations, self._live)
        self.fullest = max(self.fullest, now, key=lambda standing: standing.together)

    def _gradient_bytes(self) -> int:
        return _bytes_of(p.grad for p in self._with_gradients if p.grad is not None)


class _Kept:
    """What autograd holds in a tensor's place: it says when it is let go."""

    __slots__ = ("storage", "tensor", "watch")

    def __init__(self, watch: Watch, tensor: Tensor, storage: int | None) -> None:
        self.watch, self.tensor, self.storage = watch, tensor, storage

    def __del__(self) -> None:
        if self.storage is not None:
            self.watch.let_go(self.storage)


def weight_bytes(base: Base) -> int:
    """Return the bytes of a base as it is held: weights, codes and their scales, packed matrices."""
    packed = [linear.matrix for linear in base.linears.values() if isinstance(linear.matrix, PackedMatrix)]
    panels = [it.data for matrix in packed for it in (matrix.panels_transposed(), matrix.panels())]
    return _bytes_of([*base.model.parameters(), *base.model.buffers(), *panels])


def adapter_bytes(trainee: Trainee) -> int:
    """Return the bytes of what training adds to the base: an adapter's tensors, or the float32 copies of a bfloat16 base."""
    held = {_storage(p) for p in trainee.base.model.parameters()}
    return _bytes_of(t for t in _adapter_tensors(trainee) if _storage(t) not in held)


def moment_bytes(trainee: Trainee) -> int:
    """Return the bytes of the optimizer's moments, its step counters left out."""
    return _bytes_of(tensor for name, tensor in trainee.moments.items() if not name.startswith("step/"))


def _adapter_tensors(trainee: Trainee) -> list[Tensor]:
    """Return what is trained and what stays fixed beside it (VeRA's random matrices)."""
    weights = trainee.weights
    fixed: list[Tensor] = []
    if isinstance(weights, AdapterWeights) and isinstance(weights.adapter, LayerAdapter):
        fixed = [t for t in (*weights.adapter.model.parameters(), *weights.adapter.model.buffers()) if not t.requires_grad]
    return [*weights.parameters().values(), *fixed]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of these tensors' storages, each once."""
    return sum({_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def _forget_peak() -> None:
    """Make the kernel count the peak anew, where it lets a process ask for that; what it has counted so far is no more than the
    libraries."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
        clear.write("5")


if __name__ == "__main__":
    main()
