"""The engine of many processes: DeepSpeed's ZeRO stages 1 to 3 behind the verbs of `engine.py`.

Optimizer state (stage 1), gradients (2) and weights (3) are divided among the processes; the loop, the packs, the loss and the
mathematics of layers are those of one process. Each process gets its part of a step's rows, all run the same number of passes, and
shares of the loss add up to the step's mean over all of them.

This is the one module that imports deepspeed, and it reaches into it in a few places, which its tests hold to the pinned version:
where a parameter's part lies (`_fragment`), what is refreshed after loading, the hooks of modules without parameters, its module
named `dist`. Shapes: S supervised positions, D model width.
Next: `processes.py`, `tensor_file.py` (how state is written), `deepspeed_settings.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from kivnun.data.packing import PackedBatch
from kivnun.data.rows import Trainable, Where
from kivnun.model.generate import OnToken, SamplingParams, generate
from kivnun.model.linear import LowRankSite
from kivnun.model.load import Base
from kivnun.model.quantised import FrozenMatrix
from kivnun.train.data_parallel import dealt_packs, weight_of_pass
from kivnun.train.deepspeed_settings import ShardSettings, deepspeed_config
from kivnun.train.engine import StepResult, broken_rows, check_fit, hidden, log_probs_and_choice, loss_of, non_finite, token_places
from kivnun.train.objectives import Objective
from kivnun.train.optim import AdamWSettings, MuonSettings
from kivnun.train.passes import telling_shortage
from kivnun.train.processes import Processes, lost_processes
from kivnun.train.tensor_file import TensorFile
from kivnun.train.weights import Weights

MOMENTS = ("exp_avg", "exp_avg_sq")
SMALL = 256  # elements of a quantised matrix's tables
PIECE = 1 << 21  # elements of a tensor that are gathered at once for a checkpoint


class DeepSpeedTrainee:
    """One adapter (or the whole model), its state divided among processes. Every verb is called by all of them, with the same
    arguments but for `forward_backward`, which gets each process's own pack."""

    def __init__(
        self,
        base: Base,
        weights: Weights,
        objective: Objective,
        optimizer: AdamWSettings,
        max_grad_norm: float | None,
        settings: ShardSettings,
        processes: Processes,
    ) -> None:
        self._base, self.weights, self.objective = base, weights, objective
        self._max_grad_norm, self._processes = max_grad_norm, processes
        self._parameters = weights.parameters()
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self.trainable_parameters = sum(p.numel() for p in self._parameters.values())
        self._stage = settings.zero_stage
        self._model = _Pass(base, weights, objective, processes.count)
        self._engine = _engine(self._model, self._parameters, optimizer, max_grad_norm, settings, base.device)
        self._rows_of_step: list[Where] = []
        self.steps = 0

    def packs_of(self, items: Sequence[Trainable], micro_batch_tokens: int, share_prefixes: bool) -> tuple[list[PackedBatch], int]:
        """Return this process's packs of a step, and the tokens of all processes' packs."""
        return dealt_packs(items, micro_batch_tokens, share_prefixes, self._processes)

    def forward(self, batch: PackedBatch) -> np.ndarray:
        """Return the log-probability (nats, float32 [S]) of each target token of the pack; no gradient, no dropout."""
        return self.forward_and_choice(batch)[0]

    def forward_and_choice(self, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
        """Return what `forward` does, and for each target whether no token is likelier there (bool [S])."""
        with self._base.using(self.weights.sites()), torch.no_grad(), lost_processes():
            log_probs_S, likeliest_S = self._model(batch, None)
            return log_probs_S.cpu().numpy(), likeliest_S.cpu().numpy()

    def forward_backward(self, batch: PackedBatch, total_weight: float) -> float:
        """Add the packs' shares of the step's gradient; return their share of the step's loss, summed over processes.

        Raises NonFiniteLossError in every process, naming the rows of all, before anything is updated; WontFitError in a process
        whose memory runs out: the others are inside exchanges of the same pass, and cannot be told to begin the step again.
        """
        self._rows_of_step.extend(batch.where)
        with self._base.using(self.weights.sites()), telling_shortage(f"step {self.steps + 1}"), lost_processes():
            self.weights.draw_dropout(self.steps + 1, *token_places(self._base, batch))
            try:
                surrogate, loss, nll_S = self._engine(batch, weight_of_pass(batch, total_weight))
                share = self._processes.total(float(loss))
                self._refuse_non_finite(batch, share, nll_S)
                self._engine.backward(surrogate, scale_wrt_gas=False)
            finally:
                self.weights.stop_dropout()
        return share

    def optim_step(self, learning_rate: float) -> StepResult:
        """Clip the gathered gradient, update, clear. Raises NonFiniteLossError before the update if the gradient is not finite."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        with telling_shortage(f"the update of step {self.steps + 1}"), lost_processes():
            self._engine.step()
        if self._engine.optimizer.overflow:
            rows = [where for its in self._processes.all_of(self._rows_of_step) for where in its]
            raise non_finite(f"the gradient of step {self.steps + 1} is not finite", rows)
        norm = float(self._engine.get_global_grad_norm())
        limit = self._max_grad_norm
        self._changed()
        self._rows_of_step.clear()
        self.steps += 1
        return StepResult(norm, limit / (norm + 1e-6) if limit is not None and norm > limit else 1.0)

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams, on_token: OnToken | None = None) -> list[list[int]]:
        """Return the new token ids of each prompt, written with this trainee's weights."""
        with self._base.using(self.weights.sites()), lost_processes():
            return generate(self._base, prompts, params, on_token)

    def save(self, folder: Path) -> None:
        """Write the complete state, in the files of `Trainee.save`: the first process writes whole tensors, a piece at a time."""
        with lost_processes():
            self._write(folder / "state.safetensors", self._shapes)
            moments = {f"{moment}/{name}": shape for moment in MOMENTS for name, shape in self._shapes.items()}
            self._write(folder / "optimizer.safetensors", moments | {f"step/{name}": () for name in self._shapes})
        if self._processes.rank == 0:
            (folder / "trainee.json").write_text(json.dumps({"steps": self.steps}) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take the state of `save`, of this or any other number of processes. Raises IntegrityError when its tensors are not this
        trainee's."""
        steps = int(json.loads((folder / "trainee.json").read_text(encoding="utf-8"))["steps"])
        with safe_open(folder / "state.safetensors", "pt") as state, safe_open(folder / "optimizer.safetensors", "pt") as moments:
            check_fit(folder, {name: tuple(state.get_slice(name).get_shape()) for name in state.keys()}, self._shapes)  # noqa: SIM118
            with lost_processes(), self._whole_again():
                for name, parameter in self._parameters.items():
                    self._take(parameter, state.get_tensor(name), {m: moments.get_tensor(f"{m}/{name}") for m in MOMENTS})
        for flat, its in self._engine.optimizer.optimizer.state.items():
            its["step"] = _count_of(flat, steps)  # one for each: a shared one would count as often as there are sub-groups
        self._changed()
        self._rows_of_step.clear()
        self.steps = steps

    def export(self, folder: Path, base_name: str) -> None:
        """Write what others load, out of the live weights: the first process writes, and has them whole meanwhile."""
        with lost_processes(), self._whole_in_the_first():
            if self._processes.rank == 0:
                self.weights.export(folder, base_name)
        self._processes.any(False)  # what was lent is given back before anybody computes on

    def _changed(self) -> None:
        """Forget what was derived from trained tensors: gathered again, they may lie where other values lay."""
        for site in self.weights.sites().values():
            assert isinstance(site, LowRankSite)  # the spec refuses other adapters
            site.factors.made_of = ()

    def _refuse_non_finite(self, batch: PackedBatch, share: float, nll_S: Tensor) -> None:
        if math.isfinite(share):
            return
        own = broken_rows(batch, nll_S) if not bool(torch.isfinite(nll_S).all()) else []
        rows = [where for its in self._processes.all_of(own) for where in its]
        raise non_finite(f"the loss of step {self.steps + 1} is {share}", rows or list(batch.where))

    def _write(self, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        file = TensorFile(path, shapes)
        pieces = (piece for name in file.names for piece in self._pieces(name))
        if self._processes.rank == 0:
            file.write(pieces)
        else:
            for _ in pieces:  # takes part in the gathering
                pass

    def _pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor of the checkpoint, flattened, in pieces that are whole in the first process alone."""
        moment, _, rest = name.partition("/")
        if moment == "step":
            yield torch.tensor([float(self.steps)])
            return
        parameter = self._parameters[rest if rest else name]
        size = math.prod(self._shapes[rest if rest else name])
        own = _fragment(self._engine.optimizer, parameter, self._stage)
        values = None if own is None else own.master if not rest else own.moments[moment]
        for at in range(0, size, PIECE):
            yield _gathered_bits(own, values, at, min(at + PIECE, size), self._base.device)

    def _take(self, parameter: nn.Parameter, whole: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Copy this process's part of a parameter and its moments, and all that it holds of the live weight."""
        own = _fragment(self._engine.optimizer, parameter, self._stage)
        if own is not None:
            here = slice(own.start, own.start + len(own.master))
            own.master.copy_(whole.flatten()[here])
            for moment, values in moments.items():
                own.moments[moment].copy_(values.flatten()[here])
        if self._stage < 3:
            parameter.data.copy_(whole)
        elif own is not None:
            parameter.ds_tensor.data[: len(own.master)].copy_(own.master)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _whole_again(self) -> Iterator[None]:
        """Let parts be changed: what stays whole in every process is divided meanwhile and gathered anew afterwards."""
        if self._stage < 3:
            yield
            return
        optimizer = self._engine.optimizer
        optimizer._partition_all_parameters()
        yield
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @contextlib.contextmanager
    def _whole_in_the_first(self) -> Iterator[None]:
        """Give the trained parameters of the first process all their values; the others keep their parts."""
        if self._stage < 3:
            yield
            return
        lent: list[tuple[nn.Parameter, Tensor]] = []
        for name, parameter in self._parameters.items():
            pieces = [piece if self._processes.rank == 0 else None for piece in self._pieces(name)]
            if self._processes.rank == 0:
                whole = torch.cat([piece for piece in pieces if piece is not None]).view(self._shapes[name])
                lent.append((parameter, parameter.data))
                parameter.data = whole.to(parameter.device, parameter.dtype)
        try:
            yield
        finally:
            for parameter, part in lent:
                parameter.data = part


class DeepSpeedEngine:
    """A base and the processes that work on it; `open` gives trainees whose state is divided among them."""

    def __init__(self, base: Base, settings: ShardSettings, processes: Processes) -> None:
        self.base, self._settings, self._processes = base, settings, processes

    def open(
        self, weights: Weights, objective: Objective, optimizer: AdamWSettings | MuonSettings, max_grad_norm: float | None = None
    ) -> DeepSpeedTrainee:
        """Return a trainee of these weights, at step 0. The base is its own from here on: nothing else may compute with it."""
        assert isinstance(optimizer, AdamWSettings)  # the spec refuses others
        return DeepSpeedTrainee(self.base, weights, objective, optimizer, max_grad_norm, self._settings, self._processes)


class _Pass(nn.Module):
    """A forward pass as DeepSpeed sees it: a pack in, its loss or log-probabilities out. Each tensor belongs to the module that
    uses it, which is what gathers it at stage 3."""

    def __init__(self, base: Base, weights: Weights, objective: Objective, count: int) -> None:
        super().__init__()
        self._base_of_pass = base
        if weights.sites():
            _keep_vectors_whole(base)
        for name, parameter in weights.parameters().items():
            site, _, kind = name.rpartition(".")
            if site in weights.sites():
                base.linears[site].register_parameter(f"site_{kind}", parameter)
        for linear in base.linears.values():
            if isinstance(linear.matrix, FrozenMatrix):
                for kind, codes in linear.matrix.named_parameters():
                    linear.register_parameter(f"matrix_{kind}", codes)
        self.model = base.model
        self.head = _Head(base, weights, objective, count)

    def forward(self, batch: PackedBatch, total_weight: float | None) -> Any:
        return self.head(hidden(self._base_of_pass, batch), batch, total_weight)


def _keep_vectors_whole(base: Base) -> None:
    """Make norms, biases and small tables of a frozen base plain tensors, which nothing divides.

    An adapter's layer makes its normed input again in its own backward pass, when the norm's module would not have gathered its
    weight yet."""
    for module in base.model.modules():
        most = SMALL if isinstance(module, FrozenMatrix) else math.inf  # codes are vectors too
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim <= 1 and parameter.numel() <= most and not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)


class _Head(nn.Module):
    """The language head and the loss, as one module: the head's tensors are there from the first chunk to the last."""

    def __init__(self, base: Base, weights: Weights, objective: Objective, count: int) -> None:
        super().__init__()
        self._of = (base, weights, objective, count)
        for name, parameter in base.linears[base.head_name].named_parameters():
            self.register_parameter(name.replace(".", "_"), parameter)

    def forward(self, h_SD: Tensor, batch: PackedBatch, total_weight: float | None) -> Any:
        """Return (what to take the gradient of, share of the loss, NLL [S]); with no total weight, what `forward_and_choice` does.

        DeepSpeed takes the mean of gradients over processes: here they are shares of a sum."""
        base, weights, objective, count = self._of
        if total_weight is None:
            return log_probs_and_choice(base.language_head(()), h_SD, torch.from_numpy(batch.targets_S).to(base.device))
        head = base.language_head(weights.head_parameters())
        surrogate, loss, nll_S = loss_of(head, h_SD, batch, objective, total_weight)
        return surrogate * count, loss, nll_S


@dataclass(frozen=True, slots=True)
class _Fragment:
    """This process's part of a parameter: the elements from `start`, as views of what the optimizer updates."""

    start: int
    master: Tensor
    moments: dict[str, Tensor]


def _fragment(optimizer: Any, parameter: Any, stage: int) -> _Fragment | None:
    """Return the part of a parameter that this process updates; None: others have it all."""
    if stage == 3:
        group, at, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat, length = optimizer.fp32_partitioned_groups_flat[group], parameter.partition_numel()
        start = length * dist.get_rank()
        length = min(length, parameter.ds_numel - start)
    else:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        at, start, length = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    if length <= 0:
        return None
    state = optimizer.optimizer.state[flat]
    if not state:  # before the first update
        state["step"] = _count_of(flat, 0)
        state.update({moment: torch.zeros_like(flat) for moment in MOMENTS})
    return _Fragment(start, flat.data[at : at + length], {moment: state[moment][at : at + length] for moment in MOMENTS})


def _count_of(flat: Tensor, steps: int) -> Tensor:
    """Return a count of steps where torch's fused AdamW reads it: beside what it updates."""
    return torch.tensor(float(steps), device=flat.device)


def _gathered_bits(own: _Fragment | None, values: Tensor | None, first: int, end: int, device: torch.device) -> Tensor:
    """Return elements first to end of a tensor whose parts the processes have; whole in the first process.

    Bits are summed as whole numbers, of which all but one process give zero: a sum of floats would lose the sign of a zero.
    """
    bits = torch.zeros(end - first, dtype=torch.int32, device=device)
    if own is not None and values is not None:
        low, high = max(first, own.start), min(end, own.start + len(values))
        if low < high:
            bits[low - first : high - first] = values[low - own.start : high - own.start].view(torch.int32)
    dist.reduce(bits, dst=0)
    return bits.view(torch.float32).cpu()


def _engine(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: AdamWSettings,
    max_grad_norm: float | None,
    settings: ShardSettings,
    device: torch.device,
) -> Any:
    deepspeed = _deepspeed(device)
    trained = list(parameters.values())
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    rule = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=True,
    )
    widest = max((p.numel() for p in model.parameters() if p.ndim <= 1), default=0)
    masters = all(p.dtype == torch.bfloat16 for p in trained)
    config = deepspeed_config(settings, max_grad_norm, widest_vector=widest, masters=masters)
    engine, *_ = deepspeed.initialize(model=model, optimizer=rule, config=config, dist_init_required=False)
    for module in model.modules():
        if not any(True for _ in module.parameters()):  # nothing to gather, and what it takes and gives is not always tensors
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    return engine


def _deepspeed(device: torch.device) -> Any:
    """Return the library, quiet, told what computes, and with bounded gathers."""
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed
    import deepspeed.runtime.utils as runtime_utils
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.utils.logging import logger

    logger.setLevel(logging.ERROR)
    present: Any = get_accelerator()
    if present.device_name() != device.type:  # another library loaded it before, and it took what the machine has
        set_accelerator(_accelerator(device.type))
    # Its exchange through shared memory would be compiled at the start, for minutes, and is not used for what ZeRO exchanges.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu":
        runtime_utils.dist = _BoundedGathers(deepspeed.comm)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed


def _accelerator(kind: str) -> Any:
    if kind == "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        return CPU_Accelerator()
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    return CUDA_Accelerator()


class _BoundedGathers:
    """DeepSpeed's `dist` without its gather of a whole group, so that stages 1 and 2 gather bucket by bucket.

    gloo holds a copy of all that one call gathers, as large as the model whatever the number of processes."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def has_all_gather_into_tensor(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)
