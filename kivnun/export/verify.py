"""Is a run what it says, and would it come out the same again? Every check reads the run folder and computes anew.

In the numeric environment and with the code of the run, figures must be equal to the bit; elsewhere within 1e-4, and the checks
say which of the two was asked. `docs/guides/resume-and-verify.md` tells it to users.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from kivnun.artifacts import check_manifest, code_hash, environment_difference, numeric_environment, read_manifest
from kivnun.data.rows import PreferencePair, TokenRow
from kivnun.errors import IntegrityError, KivnunError
from kivnun.evaluate.evaluation import Evaluation, load_evaluation
from kivnun.evaluate.heldout import held_out_nll
from kivnun.events import Event, StepDone, read_events
from kivnun.model.families import base_hash
from kivnun.model.kernels import choose, names_of
from kivnun.model.load import DTYPES, read_decoded
from kivnun.model.read_model import hide_bars
from kivnun.opened import OpenedRun, open_run
from kivnun.pipeline import tune
from kivnun.spec.base import QUANTISED

# Two figures of one computation whose sums were taken in another order, in float32: nats per token, or relative for a step's
# loss and gradient norm.
TOLERANCE = 1e-4
# Another program's kernels round bfloat16 activations in other places.
OTHER_PROGRAM = {"fp32": 1e-4, "bf16": 1e-2, "nf4": 1e-2, "int8": 1e-2}
FIRST_STEPS = 5
# Rows that transformers scores, one at a time: enough to tell, and bounded for large sets.
PLAIN_ROWS = 500


@dataclass(frozen=True, slots=True)
class Check:
    """One question put to the run: its name, whether the answer is yes, and the figures behind it."""

    name: str
    ok: bool
    detail: str


class _Enough(Exception):
    """Ends the retraining after its first steps."""


def verify_run(run_dir: Path, on_check: Callable[[Check], None] = lambda check: None) -> list[Check]:
    """Put every check to a finished run and return them in order; `on_check` hears each as it is answered.

    Raises RunFolderError when there is no finished run; whatever else is wrong is a failed check.
    """
    run = open_run(run_dir)
    run.folder.read_result()
    try:
        differences = _differences(run)
    except IntegrityError as error:  # without a manifest there is nothing to hold the run to
        check = Check("files", False, error.message)
        on_check(check)
        return [check]
    exact = not differences
    questions: list[tuple[str, Callable[[], str]]] = [
        ("files", lambda: _files(run)),
        ("environment", lambda: _environment(differences)),
        ("base", lambda: _base(run)),
        ("data", lambda: _data(run)),
        ("held-out score", lambda: _score(run, exact)),
        ("transformers" if run.is_full else "PEFT", lambda: _plain_score(run)),
        ("first steps", lambda: _first_steps(run, exact)),
    ]
    checks: list[Check] = []
    for name, question in questions:
        checks.append(_answer(name, question))
        on_check(checks[-1])
        if name == "files" and not checks[-1].ok:  # nothing can be asked of files that are not the run's
            break
    return checks


def _answer(name: str, question: Callable[[], str]) -> Check:
    try:
        return Check(name, True, question())
    except KivnunError as error:
        return Check(name, False, error.message)


def _differences(run: OpenedRun) -> list[str]:
    """Return what could change the last bit since the run: the numeric environment, and the code itself."""
    manifest = read_manifest(run.folder.path)
    kernels = names_of(choose(run.kernels, run.spec.compute.device))
    now = numeric_environment(cast(int, run.spec.compute.threads), run.spec.compute.device, kernels)
    differences = environment_difference(manifest["environment"], now)
    if manifest["code_hash"] != code_hash():
        differences.append("Kivnun's own code is another")
    return differences


def _files(run: OpenedRun) -> str:
    manifest = check_manifest(run.folder.path)
    return f"{len(manifest['files'])} files are what the manifest says"


def _environment(differences: Sequence[str]) -> str:
    if not differences:
        return "the run's own: figures must be equal to the bit"
    return f"another one, so figures are compared within {TOLERANCE:g}: {'; '.join(differences)}"


def _base(run: OpenedRun) -> str:
    said, found = read_manifest(run.folder.path)["base"]["content_hash"], base_hash(run.base_folder)
    if said != found:
        raise IntegrityError(
            f"{run.base_folder} is not the base that was trained on: its hash was {said}, is {found}",
            hint="put the base back as it was; an adapter on another base is another model",
        )
    return f"{run.spec.base.model} is the one that was trained on"


def _data(run: OpenedRun) -> str:
    said, found = read_manifest(run.folder.path)["data_hash"], run.dataset.content_hash
    if said != found:
        raise IntegrityError(
            f"the rows are others than those trained on: their hash was {said}, is {found}",
            hint="put the files back that the spec names; resolved.yaml says which",
        )
    return f"{len(run.dataset.train.rows):,} training and {len(run.dataset.validation):,} held-out rows are those of the run"


# --- the result, scored again ------------------------------------------------------------------------------------------------


def _score(run: OpenedRun, exact: bool) -> str:
    """Load the result as chat and export do, and score the held-out rows with it."""
    if not run.dataset.validation:
        return "not asked: the run has no held-out rows"
    said = _recorded(run).nll
    found = held_out_nll(run.tuned, run.dataset.validation, cast(int, run.spec.compute.micro_batch_tokens)).nll
    _refuse_another("held-out loss", found, said, 0.0 if exact else TOLERANCE)
    return f"loaded again, {found:.6f} nats per token, {_how_near(found, said)}"


def _plain_score(run: OpenedRun) -> str:
    """Score with transformers (and PEFT) as anybody would, row by row, with nothing of ours in between."""
    if not run.dataset.validation:
        return "not asked: the run has no held-out rows"
    if run.spec.base.rope_factors != "per_row":
        return f"not asked: rope_factors {run.spec.base.rope_factors} is a choice that transformers does not offer"
    items = run.dataset.validation[:PLAIN_ROWS]
    rows = [item.chosen if isinstance(item, PreferencePair) else item for item in items]
    model = _plain_model(run)
    found = sum(_plain_nll(model, row) for row in rows) / sum(row.total_weight for row in rows)
    sums, weights = _recorded(run).measures["nll"].rows_ND[: len(rows)].sum(axis=0)
    said = float(sums / weights)
    tolerance = OTHER_PROGRAM[run.spec.base.precision]
    _refuse_another("held-out loss", found, said, tolerance)
    return f"{found:.6f} nats per token over {len(rows):,} rows, {_how_near(found, said)} (at most {tolerance:g} is allowed)"


def _recorded(run: OpenedRun) -> Evaluation:
    return load_evaluation(run.folder.tuned_evaluation)


def _plain_model(run: OpenedRun) -> nn.Module:
    from transformers import AutoModelForCausalLM

    hide_bars()
    folder, precision = run.folder.model if run.is_full else run.base_folder, run.spec.base.precision
    model: Any
    if precision in QUANTISED:  # the decoded weights, which the parity tests hold to bitsandbytes
        model = read_decoded(folder, precision)
        model.set_attn_implementation("eager")
    else:
        dtype = DTYPES[precision]
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    if not run.is_full:
        from kivnun.model.peft_layers import peft, peft_is_right

        # An adapter stays in float32, as the run computes with it.
        with peft_is_right():
            model = peft().PeftModel.from_pretrained(model, str(run.folder.adapter), autocast_adapter_dtype=True)
    return model.eval()


@torch.no_grad()
def _plain_nll(model: nn.Module, row: TokenRow) -> float:
    """Return the row's summed weighted loss, from logits of the row alone."""
    ids_T = torch.from_numpy(row.ids).long()
    # Of a prompt of virtual tokens PEFT gives the logits too, first.
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, -len(ids_T) : -1].float()
    log_probs_T = torch.log_softmax(logits_TV, dim=1).gather(1, ids_T[1:, None])[:, 0]
    return -float(np.dot(row.weights[1:].astype(np.float64), log_probs_T.double().numpy()))


# --- training, begun again ---------------------------------------------------------------------------------------------------


def _first_steps(run: OpenedRun, exact: bool) -> str:
    """Train the first steps again in a folder of its own and compare loss and gradient norm with the record."""
    said = [event for event in read_events(run.folder.events) if isinstance(event, StepDone)][:FIRST_STEPS]
    found = _retrain(run, len(said))
    for old, new in zip(said, found, strict=True):
        for what in ("loss", "grad_norm"):
            before, now = getattr(old, what), getattr(new, what)
            _refuse_another(f"{what} of step {old.step}", now, before, 0.0 if exact else TOLERANCE * abs(before))
    largest = max(abs(new.loss - old.loss) for old, new in zip(said, found, strict=True))
    losses = ", ".join(f"{step.loss:.4f}" for step in found)
    return f"{len(found)} trained again, losses {losses}: {'equal to the bit' if largest == 0 else f'within {largest:.1e}'}"


def _retrain(run: OpenedRun, num_steps: int) -> list[StepDone]:
    """Run the resolved spec through the pipeline, with the same horizon, until `num_steps` are done."""
    steps: list[StepDone] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event)
            if len(steps) == num_steps:
                raise _Enough

    spec = run.spec
    never = {"every_steps": None, "every_epoch": False, "every_seconds": None}
    light = spec.model_copy(
        update={
            "evaluation": spec.evaluation.model_copy(update={"metrics": (), "samples": 0, "every_steps": 1 << 40}),
            "checkpoints": spec.checkpoints.model_copy(update=never),
        }
    )
    with tempfile.TemporaryDirectory(prefix="kivnun-verify-") as place, contextlib.suppress(_Enough):
        tune(light, light.to_yaml(), Path(place) / "run", listener=listen)
    return steps


def _refuse_another(what: str, found: float, said: float, tolerance: float) -> None:
    # Written so that a NaN is refused too.
    if not abs(found - said) <= tolerance:
        allowed = "they must be equal to the bit" if tolerance == 0 else f"at most {tolerance:.1e} is allowed"
        raise IntegrityError(
            f"{what} was {said!r}, is {found!r}: {abs(found - said):.1e} apart, {allowed}",
            hint="run it again with no other load; if it stays, the machine or a library computes otherwise than it did",
        )


def _how_near(found: float, said: float) -> str:
    return "equal to the bit" if found == said else f"{abs(found - said):.1e} from the run's"
