"""From a spec to a tuned model: every stage, in its order. Start reading here.

    spec -> data -> plan -> base -> score the base -> adapter -> train -> export -> score the tuned -> report

In a run of several processes each goes through all stages, in step; the first one alone writes and is heard. Stages hand each other
values and folders, never a live model of their own. Next: `train/loop.py` (what training is), `opened.py` (a finished run, opened
for use).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from kivnun.artifacts import (
    atomic_folder,
    atomic_write,
    code_hash,
    discard,
    make_folder,
    numeric_environment,
    sweep,
    write_manifest,
)
from kivnun.data.loader import Dataset, load_dataset
from kivnun.data.template import ChatTokenizer, load_tokenizer
from kivnun.errors import IntegrityError, KivnunError, StorageError
from kivnun.evaluate.card import write_card
from kivnun.evaluate.evaluation import (
    Evaluation,
    StageProgress,
    evaluate_scorer,
    evaluation_fields,
    load_evaluation,
    result_fields,
    save_evaluation,
)
from kivnun.evaluate.forgetting import Probe, check_same_text, open_probe
from kivnun.evaluate.heldout import Scorer
from kivnun.evaluate.report import write_report
from kivnun.events import (
    AdapterOpened,
    BaseLoaded,
    CheckpointSaved,
    DataLoaded,
    Evaluated,
    Event,
    EventLog,
    Planned,
    Resumed,
    RunFailed,
    RunFinished,
    RunStarted,
    StepDone,
    Warned,
    read_events,
    utc_now,
)
from kivnun.lineage import lineage_of, start_of
from kivnun.model.families import base_record, copy_tokenizer, find_base, longest_row
from kivnun.model.kernels import names_of
from kivnun.model.load import Base, load_base
from kivnun.parts import (
    open_engine,
    open_objective,
    open_weights,
    optimizer_settings,
    peak_memory,
    plan_run,
    resolve_facts,
    row_order,
    schedule_of,
    spared_tokens,
)
from kivnun.plan.verdict import Plan
from kivnun.run_folder import (
    RunFolder,
    check_finished,
    check_same,
    check_start,
    claim,
    seconds_worked,
    write_specs,
)
from kivnun.spec import FullSpec, MultiProcessSpec, TuneSpec, resolve
from kivnun.train.checkpoint import Cadence, Checkpoint, CheckpointStore
from kivnun.train.engine import TorchEngine, Trainee
from kivnun.train.loop import fit
from kivnun.train.new_weights import check_targets
from kivnun.train.passes import PassBudget, telling_shortage
from kivnun.train.processes import OneProcess, Processes, joined, stop_on_signals

Emit = Callable[[Event], None]
WORTH_TELLING = 0.2  # of a step's tokens, which an option that is off would spare


def tune(
    spec: TuneSpec,
    spec_text: str,
    run_dir: Path,
    *,
    resume: bool = False,
    listener: Callable[[Event], None] = lambda event: None,
    on_progress: StageProgress | None = None,
    processes: Processes | None = None,
    known_base: Path | None = None,
    exposed: int = 0,
) -> dict[str, Any]:
    """Run a spec in a folder and return the final object: run, status, steps, trained_tokens, base, tuned, plan, actual.

    `listener` hears every event as it is recorded. With `resume`, a finished run gives its result, one with checkpoints goes on
    from the newest, one without starts over. `processes` are those that work on it, all of which call this (None: this one alone).
    `known_base` is what `score_base` wrote for the same base, rows and metrics: it is taken as it is. `exposed` is how many
    adapters of epochs' ends stay beside the checkpoints, for others to load while the run goes on (`RunFolder.exposed`).
    Raises KivnunError subclasses; what was saved before stays whole.
    """
    folder, processes = RunFolder(run_dir), processes or OneProcess()
    finished = processes.from_first(lambda: _claimed(folder, spec, resume))
    if finished is not None:
        return finished
    if processes.rank > 0:
        return _Run(spec, spec_text, folder, processes, lambda: None, lambda event: None, None, known_base, exposed).execute()
    with EventLog(folder.events, utc_now) as log:
        for place in (folder.path, folder.base_evaluation.parent, folder.exposed, folder.stopped):
            sweep(place)

        def emit(event: Event) -> None:
            listener(log.append(event))

        try:
            return _Run(spec, spec_text, folder, processes, log.sync, emit, on_progress, known_base, exposed).execute()
        except KivnunError as error:
            with contextlib.suppress(StorageError):  # the first error is the one to tell
                emit(RunFailed(code=error.code, message=error.message))
            with contextlib.suppress(KivnunError):
                if folder.has_begun:  # else the command may be given again, and finds an empty folder
                    write_report(folder.path)
            raise


def score_base(spec: TuneSpec, path: Path, on_progress: StageProgress | None = None) -> Evaluation:
    """Score the base on the held-out rows of a spec, as its run would, and keep it in `path` for `tune(known_base=...)`."""
    base_folder = find_base(spec.base.model, spec.base.revision)
    tokenizer = load_tokenizer(base_folder, spec.data.template)
    dataset = load_dataset(spec.data, tokenizer, spec.seed, spec.data.max_seq_len or longest_row(base_folder))
    spec, _ = resolve(spec, resolve_facts(dataset, base_folder, spec.compute, adapter=spec.adapter))
    torch.set_num_threads(cast(int, spec.compute.threads))
    base = load_base(
        base_folder,
        spec.base.precision,
        spec.compute.device,
        spec.base.rope_factors,
        kernels=spec.compute.kernels,
        content_hash=spec.base.content_hash,
    )
    tokens = cast(int, spec.compute.micro_batch_tokens)
    model, rows = TorchEngine(base).base_model(), dataset.validation
    probe = _probe(spec, dataset, tokenizer)
    scored = evaluate_scorer(
        model, rows, tokenizer, spec.evaluation, spec.seed, on_progress, micro_batch_tokens=tokens, probe=probe
    )
    make_folder(path.parent)
    save_evaluation(scored, path)
    return scored


def _probe(spec: TuneSpec, dataset: Dataset, tokenizer: ChatTokenizer) -> Probe | None:
    """Return the unrelated text of a resolved spec, None where nothing is scored."""
    return open_probe(spec.evaluation.forgetting, tokenizer, cast(int, spec.data.max_seq_len)) if dataset.validation else None


def _fitting(scored: Evaluation, spec: TuneSpec, dataset: Dataset, path: Path, probe: Probe | None) -> Evaluation:
    """Return a base's scores that were made before. Raises IntegrityError where they are of other rows, metrics or text."""
    lacks = probe is not None and scored.forgetting is None
    if scored.rows != len(dataset.validation) or not set(spec.evaluation.metrics) <= scored.measures.keys() or lacks:
        raise IntegrityError(f"{path} holds scores of other rows or metrics than this run's", hint="score the base again")
    return scored


def tune_together(spec: TuneSpec, spec_text: str, run_dir: Path, **given: Any) -> dict[str, Any]:
    """Do what `tune` does as one of the processes that torchrun started; each of them returns the final object."""
    compute = spec.compute
    assert isinstance(compute, MultiProcessSpec)
    device = compute.device if compute.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with joined(device, compute.processes) as processes:
        return tune(spec, spec_text, run_dir, processes=processes, **given)


def _claimed(folder: RunFolder, spec: TuneSpec, resume: bool) -> dict[str, Any] | None:
    """Take the folder for this run; return the result where it is finished."""
    claim(folder, resume=resume)
    if not folder.is_finished:
        return None
    check_finished(folder, spec)
    return folder.read_result()


@dataclass(frozen=True)
class _Run:
    """One execution. `execute` reads as the list of stages."""

    spec: TuneSpec
    spec_text: str
    folder: RunFolder
    processes: Processes
    sync: Callable[[], object]  # makes the record so far durable
    emit: Emit
    on_progress: StageProgress | None
    known_base: Path | None
    exposed: int

    @telling_shortage("a stage outside of training's passes")
    def execute(self) -> dict[str, Any]:
        base_folder = find_base(self.spec.base.model, self.spec.base.revision)
        tokenizer = load_tokenizer(base_folder, self.spec.data.template)
        longest = self.spec.data.max_seq_len or longest_row(base_folder)
        dataset = load_dataset(self.spec.data, tokenizer, self.spec.seed, longest, self.folder.path)
        facts = resolve_facts(dataset, base_folder, self.spec.compute, self.folder, self.spec.adapter)
        plan = plan_run(self.spec, dataset, base_folder, facts, self.processes)
        spec = plan.spec
        changed = self.processes.from_first(lambda: write_specs(self.folder, self.spec_text, spec, plan.reasons))
        self.emit(RunStarted(run=self.folder.path.name, spec_hash=spec.content_hash()))
        self._tell_data(dataset, tokenizer, changed)
        self._hold_to(plan, begun=facts.passes is not None)

        base = self._load_base(spec, base_folder)
        check_targets(spec.adapter, base)  # a wrong name is told before the base is scored, which takes long
        lineage = lineage_of(spec.adapter, base_folder, base.content_hash)  # while the parent is where the spec says
        same = _sameness(spec, dataset, base)
        self.processes.from_first(lambda: check_start(self.folder, self.spec, same))
        probe = _probe(spec, dataset, tokenizer)
        scored_base = self._score_base(spec, TorchEngine(base), dataset, tokenizer, probe)
        trainee = self._open_trainee(spec, base, dataset)
        self._tell_spared(spec, base, dataset)
        self._train(spec, trainee, dataset, tokenizer, same, base_folder)

        self._export(spec, trainee, base_folder)
        scored_tuned = self._score(spec, trainee, dataset, tokenizer, "tuned", trainee.steps, scored_base, probe)
        peak_bytes = max(self.processes.all_of(peak_memory(spec.compute.device)))
        return self.processes.from_first(
            lambda: self._finish(plan, dataset, base, scored_base, scored_tuned, trainee.steps, peak_bytes, lineage)
        )

    def _tell_data(self, dataset: Dataset, tokenizer: ChatTokenizer, changed: Sequence[str]) -> None:
        for what in changed:
            self.emit(Warned(message=f"goes on in another shape: {what}; rows come in the same order, last bits may differ"))
        report = dataset.report
        self.emit(
            DataLoaded(
                format=dataset.format,
                train_rows=report.train_rows,
                validation_rows=report.validation_rows,
                train_tokens=report.train_tokens,
                trained_tokens=report.trained_tokens,
                skipped=report.skipped,
                truncated=report.truncated,
                findings=report.findings(),
            )
        )
        for message in (*report.notes, *report.warnings, *tokenizer.notes):
            self.emit(Warned(message=message))

    def _hold_to(self, plan: Plan, *, begun: bool) -> None:
        """Tell what the run will take; refuse one that cannot fit, unless it was begun already: that one knows better."""
        for message in plan.urgent:
            self.emit(Warned(message=message))
        figures = plan.figures()
        if figures is None:
            self.emit(Warned(message=f"memory and time are not foretold: {plan.unknown}"))
            return
        self.emit(Planned(**figures))
        refusal = plan.refusal()
        if refusal is not None and not begun:
            raise refusal

    def _load_base(self, spec: TuneSpec, base_folder: Path) -> Base:
        began = time.monotonic()
        torch.set_num_threads(cast(int, spec.compute.threads))
        base = load_base(
            base_folder,
            spec.base.precision,
            spec.compute.device,
            spec.base.rope_factors,
            kernels=spec.compute.kernels,
            recompute=bool(spec.compute.activation_checkpointing),
            packed=bool(spec.compute.packed_weights),
            content_hash=spec.base.content_hash,
        )
        for line in base.slow:
            self.emit(Warned(message=line))
        self.emit(
            BaseLoaded(
                model=spec.base.model,
                parameters=base.num_parameters,
                precision=spec.base.precision,
                content_hash=base.content_hash,
                seconds=time.monotonic() - began,
            )
        )
        return base

    def _score_base(
        self, spec: TuneSpec, engine: TorchEngine, dataset: Dataset, tokenizer: ChatTokenizer, probe: Probe | None
    ) -> Evaluation | None:
        """Score the base before anything changes; a resumed run takes the figures it has."""
        if self.processes.from_first(self.folder.base_evaluation.is_file):
            scored = load_evaluation(self.folder.base_evaluation)
            if scored.forgetting is not None and probe is not None:
                check_same_text(scored.forgetting, probe)
            return scored
        if self.known_base is not None and dataset.validation:
            return self._keep(_fitting(load_evaluation(self.known_base), spec, dataset, self.known_base, probe), "base", 0)
        return self._score(spec, engine.base_model(), dataset, tokenizer, "base", 0, None, probe)

    def _score(
        self,
        spec: TuneSpec,
        scorer: Scorer,
        dataset: Dataset,
        tokenizer: ChatTokenizer,
        which: str,
        step: int,
        base: Evaluation | None,
        probe: Probe | None,
    ) -> Evaluation | None:
        if not dataset.validation:
            return None
        scored = evaluate_scorer(
            scorer,
            dataset.validation,
            tokenizer,
            spec.evaluation,
            spec.seed,
            self.on_progress,
            micro_batch_tokens=cast(int, spec.compute.micro_batch_tokens),
            base=base,
            probe=probe,
        )
        return self._keep(scored, which, step)

    def _keep(self, scored: Evaluation, which: str, step: int) -> Evaluation:
        path = self.folder.base_evaluation if which == "base" else self.folder.tuned_evaluation
        # The file is what a resumed run looks for: once it is there, the record tells of it too.
        self.emit(Evaluated(which=which, step=step, **evaluation_fields(scored)))  # type: ignore[arg-type]
        if self.processes.rank == 0:
            make_folder(path.parent)
            save_evaluation(scored, path)
        return scored

    def _open_trainee(self, spec: TuneSpec, base: Base, dataset: Dataset) -> Trainee:
        # The reference of DPO is the state at the start: taken before full tuning takes the base over.
        objective = open_objective(spec, TorchEngine(base), dataset, self.folder.reference, writes=self.processes.rank == 0)
        engine = open_engine(spec, base, self.processes)
        weights = open_weights(spec, base, dataset)
        optimizer = optimizer_settings(spec.schedule.optimizer)
        trainee = engine.open(weights, objective, optimizer, spec.schedule.max_grad_norm)
        sites = list(weights.sites())
        self.emit(
            AdapterOpened(
                kind=spec.adapter.kind,
                trainable_parameters=trainee.trainable_parameters,
                modules=dict(Counter(name.rpartition(".")[2] for name in sites)),
                sites=len(sites),
            )
        )
        return trainee

    def _tell_spared(self, spec: TuneSpec, base: Base, dataset: Dataset) -> None:
        spared = spared_tokens(spec, base, dataset)
        if spared >= WORTH_TELLING:
            what = f"{spared:.0%} of the tokens of a pass are beginnings that its rows have in common"
            self.emit(Warned(message=f"{what}: compute.share_prefixes computes them once"))

    def _train(
        self,
        spec: TuneSpec,
        trainee: Trainee,
        dataset: Dataset,
        tokenizer: ChatTokenizer,
        same: Mapping[str, Any],
        base_folder: Path,
    ) -> None:
        order = row_order(spec, dataset)
        steps = order.steps

        def expose(step: int, epoch_ended: bool) -> None:
            if step < steps:  # the last one is the result
                place = self.folder.exposed if epoch_ended else self.folder.stopped
                self._write_result(spec, trainee, base_folder, place / f"step-{step:06d}")
                self.processes.from_first(lambda: _keep_newest(place, self.exposed))

        saver = _Saver(spec, self.folder, trainee, same, self.processes, self.sync, self.emit, expose if self.exposed else None)
        saver.restore()
        light = spec.evaluation.model_copy(update={"metrics": (), "samples": 0})

        tokens = cast(int, spec.compute.micro_batch_tokens)

        def evaluate(step: int) -> None:
            if dataset.validation:
                scored = evaluate_scorer(trainee, dataset.validation, tokenizer, light, spec.seed, micro_batch_tokens=tokens)
                self.emit(Evaluated(which="tuned", step=step, **evaluation_fields(scored)))

        with stop_on_signals() as stop_requested:
            fit(
                trainee,
                dataset.train.rows,
                order,
                schedule_of(spec, steps),
                self.processes.from_first(lambda: PassBudget.recorded(tokens, read_events(self.folder.events))),
                share_prefixes=spec.compute.share_prefixes,
                emit=self.emit,
                evaluate=evaluate,
                evaluate_every_steps=spec.evaluation.every_steps,
                saver=saver,
                stop_requested=lambda: self.processes.any(stop_requested()),
            )

    def _export(self, spec: TuneSpec, trainee: Trainee, base_folder: Path) -> None:
        self._write_result(spec, trainee, base_folder, self.folder.path / self._result_folder(spec))

    def _write_result(self, spec: TuneSpec, trainee: Trainee, base_folder: Path, target: Path) -> None:
        if self.processes.rank > 0:
            trainee.export(self.folder.path, spec.base.model)  # takes part and writes nothing
            return
        with atomic_folder(target) as place:
            trainee.export(place, spec.base.model)
            copy_tokenizer(base_folder, place, spec.data.template)

    def _finish(
        self,
        plan: Plan,
        dataset: Dataset,
        base: Base,
        scored_base: Evaluation | None,
        scored_tuned: Evaluation | None,
        steps: int,
        peak_bytes: int,
        lineage: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Write the result, the report and, last, the manifest that says the run is whole."""
        spec, events = plan.spec, read_events(self.folder.events)
        trained = sum(event.trained_tokens for event in events if isinstance(event, StepDone))
        actual = {"peak_bytes": peak_bytes, "seconds": round(seconds_worked(events), 3)}
        result = {
            "run": str(self.folder.path),
            "status": "succeeded",
            "steps": steps,
            "trained_tokens": trained,
            "base": result_fields(scored_base) if scored_base else None,
            "tuned": result_fields(scored_tuned) if scored_tuned else None,
            "plan": plan.result(),
            "actual": actual,
        }
        self.emit(RunFinished(status="succeeded", steps=steps, trained_tokens=trained, **actual))  # type: ignore[arg-type]
        fields = {
            "kind": "run",
            "spec_hash": spec.content_hash(),
            "data_hash": dataset.content_hash,
            "base": base_record(spec.base.model, spec.base.revision, base.folder, base.content_hash),
            "code_hash": code_hash(),
            "environment": numeric_environment(cast(int, spec.compute.threads), spec.compute.device, names_of(base.kernels)),
            **({} if lineage is None else {"lineage": lineage}),
        }
        made = self._result_folder(spec)
        write_card(self.folder.path, self.folder.path / made, "model" if made == "model" else "adapter", lineage)
        kept = ["spec.yaml", "resolved.yaml", "start.json", "evaluation", made]
        write_manifest(self.folder.path, fields, kept)
        write_report(self.folder.path)
        atomic_write(self.folder.result, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        write_manifest(self.folder.path, fields, [*kept, "report.html", "report.json", "result.json"])
        return result

    def _result_folder(self, spec: TuneSpec) -> str:
        return (self.folder.model if isinstance(spec.adapter, FullSpec) else self.folder.adapter).name


class _Saver:
    """Checkpoints of one run: saved when due, restored once at the start."""

    def __init__(
        self,
        spec: TuneSpec,
        folder: RunFolder,
        trainee: Trainee,
        fields: Mapping[str, Any],
        processes: Processes,
        sync: Callable[[], object],
        emit: Emit,
        expose: Callable[[int, bool], None] | None = None,
    ) -> None:
        rule = spec.checkpoints
        self._store = CheckpointStore(folder.checkpoints, rule.keep)
        self._cadence = Cadence(rule.every_steps, rule.every_epoch, rule.every_seconds, time.monotonic)
        self._folder, self._trainee, self._fields, self._sync, self._emit = folder, trainee, fields, sync, emit
        self._processes = processes
        self._expose = expose

    def restore(self) -> None:
        """Take the newest checkpoint, if there is one. Raises RunFolderError when it was made from something else."""
        checkpoint = self._processes.from_first(self._recovered)
        if checkpoint is None:
            if self._processes.rank == 0 and any(isinstance(event, StepDone) for event in read_events(self._folder.events)):
                self._emit(Resumed(step=0, path=""))
            return
        for warning in checkpoint.warnings:
            self._emit(Warned(message=warning))
        check_same(self._folder, checkpoint.fields, self._fields)
        self._trainee.load(checkpoint.path)
        self._emit(Resumed(step=checkpoint.step, path=str(checkpoint.path.relative_to(self._folder.path))))

    def _recovered(self) -> Checkpoint | None:
        self._store.recover()
        return self._store.latest()

    def after_step(self, step: int, epoch_ended: bool) -> None:
        # The first process's clock decides: a checkpoint is made by all.
        due = self._processes.any(self._processes.rank == 0 and self._cadence.due(step, epoch_ended))
        if epoch_ended and self._expose is not None:
            self.now(step, epoch_ended)
        elif due:
            self._save(step)

    def now(self, step: int, epoch_ended: bool) -> None:
        if self._expose is not None:
            self._expose(step, epoch_ended)  # first: the event that tells of the checkpoint tells of the adapter too
        self._save(step)

    def _save(self, step: int) -> None:
        if self._processes.rank > 0:
            self._trainee.save(self._folder.path)  # takes part and writes nothing
            return
        began = time.monotonic()
        self._sync()  # after a power cut the record must reach at least as far as the newest checkpoint
        path = self._store.save(step, self._trainee.save, self._fields)
        self._cadence.saved()
        name = str(path.relative_to(self._folder.path))
        self._emit(CheckpointSaved(step=step, path=name, seconds=time.monotonic() - began))


def _keep_newest(place: Path, count: int) -> None:
    for old in sorted(place.glob("step-*"))[:-count]:
        discard(old)


def _sameness(spec: TuneSpec, dataset: Dataset, base: Base) -> dict[str, Any]:
    """Return what must not change between the processes that work on one run, beside its spec."""
    return {
        "data_hash": dataset.content_hash,
        "base_hash": base.content_hash,
        **({} if (start := start_of(spec.adapter)) is None else {"start_hash": start.content_hash}),
        "environment": numeric_environment(cast(int, spec.compute.threads), spec.compute.device, names_of(base.kernels)),
    }
