"""`python -m benchmarks.engine.distances`: how far bfloat16 is from float32, for ours and for transformers with PEFT.

Losses, gradient norms and whole gradients of steps of one row each, all from the same start adapter (no update is made), against
transformers with PEFT in float32. Many steps of one row say more about rounding than the few of a trajectory do, and the gradient
itself says more than its norm. Next: `summary.py` (distances along a trajectory of training).
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.engine import ours
from benchmarks.engine.cases import Case
from benchmarks.engine.workload import MODELS, adapter_folder, draw_rows, model_folder, write_workload
from kivnun.data.packing import pack

Step = tuple[float, Tensor]  # a step's loss, and all its gradients in one vector
SIDES = (("ours", "fp32"), ("peft", "bf16"), ("ours", "bf16"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.distances", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kivnun-bench-engine")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    write_workload(options.work, options.model)
    runs: dict[str, Callable[..., Iterator[Step]]] = {"ours": _ours, "peft": _peft}
    reference = list(_shown("peft in fp32", options.steps, _peft(options.work, options.model, "fp32", options.steps)))
    table = Table(title=f"{options.steps} steps of one row, {options.model}: relative distance to PEFT in fp32, rms (largest)")
    for column in ("", "loss", "gradient's norm", "gradient"):
        table.add_column(column)
    for who, precision in SIDES:
        steps = _shown(f"{who} in {precision}", options.steps, runs[who](options.work, options.model, precision, options.steps))
        found = np.array([_distances(*pair) for pair in zip(steps, reference, strict=True)])
        rms, largest = np.sqrt((found**2).mean(0)), found.max(0)
        table.add_row(f"{who} {precision}", *(f"{a:.2e} ({b:.2e})" for a, b in zip(rms, largest, strict=True)))
    Console(width=120).print(table)


def _shown(what: str, total: int, steps: Iterator[Step]) -> Iterator[Step]:
    return iter(track(steps, what, total, console=Console(stderr=True)))


def _distances(found: Step, exact: Step) -> tuple[float, float, float]:
    (loss, gradient), (exact_loss, exact_gradient) = found, exact
    length = exact_gradient.norm()
    return (
        abs(loss - exact_loss) / exact_loss,
        abs(float(gradient.norm() / length) - 1.0),
        float((gradient - exact_gradient).norm() / length),
    )


def _ours(work: Path, model: str, precision: str, steps: int) -> Iterator[Step]:
    side = ours.opened(Case("", "", "ours", model, precision, steps, 1, 1), work, {})
    assert isinstance(side, ours.Opened), side
    trainee, parameters = side.trainee, side.trainee.weights.parameters()
    for (row,) in side.steps:
        loss = trainee.forward_backward(pack([row]), trainee.objective.weight_of(row))
        yield loss, _taken(parameters)


def _peft(work: Path, model: str, precision: str, steps: int) -> Iterator[Step]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    base = AutoModelForCausalLM.from_pretrained(model_folder(work, model), dtype=dtype)
    tuned = PeftModel.from_pretrained(base, adapter_folder(work, model, "lora"), is_trainable=True).train()
    parameters = {name.replace(".default", ""): p for name, p in tuned.named_parameters() if p.requires_grad}
    for row in draw_rows(steps):
        ids, supervised = torch.tensor([row.ids]), torch.tensor([row.supervised])
        loss = tuned(input_ids=ids, labels=torch.where(supervised, ids, -100)).loss
        loss.backward()
        yield float(loss.detach()), _taken(parameters)


def _taken(parameters: dict[str, torch.nn.Parameter]) -> Tensor:
    """Return all gradients in one vector, in the order of names, which both sides share, and clear them."""
    taken = []
    for name in sorted(parameters):
        gradient = parameters[name].grad
        assert gradient is not None
        taken.append(gradient.flatten().clone())
        parameters[name].grad = None
    return torch.cat(taken)


if __name__ == "__main__":
    main()
