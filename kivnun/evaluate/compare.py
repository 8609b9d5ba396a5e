"""Several finished runs side by side: what each got, and what can be said of their differences.

A difference between two runs is paired: the rows that both were scored on are matched by what they hold, and drawn together. Runs
whose held-out rows differ are shown side by side, without a difference: it would measure the rows. The first run named is the one
that the others are held against. Next: `compare_page.py`, `evaluation.py` (which names the rows).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kivnun.artifacts import read_manifest
from kivnun.errors import RunFolderError
from kivnun.evaluate.evaluation import Evaluation, load_evaluation
from kivnun.evaluate.facts import all_of, last_of
from kivnun.evaluate.forgetting import forgetting_fields
from kivnun.evaluate.intervals import Verdict, difference_interval, verdict_of
from kivnun.evaluate.metrics import Measure, higher_is_better
from kivnun.evaluate.report import Curve, curve_of, held_out_of, status_of
from kivnun.evaluate.wording import Ends, in_words
from kivnun.events import AdapterOpened, BaseLoaded, Event, RunFinished, StepDone, read_events
from kivnun.run_folder import RunFolder
from kivnun.spec import TuneSpec

# These are of the rows as they were scored; every other measure is of the rows that a reply or a label was asked of.
OF_ALL_ROWS = ("nll", "perplexity", "preference_accuracy")
UNRELATED = "unrelated_nll"
"""What the loss on unrelated text is called among the differences."""


@dataclass(frozen=True, slots=True)
class Score:
    """One measure of one run: the base's value where it was scored, the tuned model's, and the interval of that."""

    base: float | None
    tuned: float
    interval: Ends


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One run as it is shown. `forgetting` is as in the final object, with the base's loss as `base_nll`."""

    name: str
    path: str
    base_model: str
    adapter: str
    trained_parameters: int
    steps: int
    trained_tokens: int
    seconds: float
    peak_bytes: int
    held_out_rows: int
    scores: dict[str, Score]
    forgetting: dict[str, Any]
    curve: Curve | None
    held_out: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Difference:
    """A run's measure less the reference's on the same rows; where they cannot be paired, `unpaired` says why and the rest is
    None."""

    measure: str
    run: str
    reference: str
    value: float | None
    interval: Ends
    verdict: Verdict | None
    words: str
    unpaired: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that is shown. `spec` and `record` map an option, or an entry of the manifest, to each run's value where they differ."""

    version: int
    reference: str
    runs: list[ComparedRun]
    measures: list[str]
    differences: list[Difference]
    spec: dict[str, list[str]]
    record: dict[str, list[str]]


@dataclass(frozen=True)
class _Opened:
    """What is read of a run's folder."""

    name: str
    path: Path
    spec: TuneSpec
    manifest: dict[str, Any]
    events: list[Event]
    base: Evaluation | None
    tuned: Evaluation | None


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Return what the runs got and how they differ from the first. `folders` are two or more, each once.

    Raises RunFolderError for a folder without a finished run, IntegrityError where what it keeps is damaged.
    """
    opened = [_open(path, name) for path, name in zip(folders, _names(folders), strict=True)]
    first, runs = opened[0], [_shown(run) for run in opened]
    measures = list(dict.fromkeys(name for run in runs for name in run.scores))
    return Comparison(
        version=1,
        reference=first.name,
        runs=runs,
        measures=measures,
        differences=[difference for run in opened[1:] for difference in _differences(first, run, measures)],
        spec=_differing([flat(run.spec.to_tree()) for run in opened]),
        record=_differing([_of_manifest(run.manifest) for run in opened]),
    )


def in_a_sentence(comparison: Comparison, run: str) -> str:
    """Return what the differences of one run say together: they count measures of the task, never unrelated text."""
    own = [d for d in comparison.differences if d.run == run and d.measure != UNRELATED]
    told = [d.verdict for d in own if d.verdict not in (None, "too few rows")]
    better, worse, reference = told.count("better"), told.count("worse"), comparison.reference
    if not told:
        few = any(d.verdict == "too few rows" for d in own)
        return f"{run} cannot be told from {reference}: too few rows" if few else f"{run} cannot be paired with {reference}"
    if not better and not worse:
        return f"{run} shows no detectable difference from {reference}"
    if better and worse:
        return f"{run} is better than {reference} on {better} of {len(told)} measures and worse on {worse}"
    which, count = ("better", better) if better else ("worse", worse)
    return f"{run} is {which} than {reference}" + ("" if count == len(told) else f" on {count} of {len(told)} measures")


# --- reading -----------------------------------------------------------------------------------------------------------------


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as much of their paths before them as tells them apart."""
    whole = [path.resolve() for path in folders]
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole) and depth < max(len(path.parts) for path in whole):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in whole]


def _open(path: Path, name: str) -> _Opened:
    folder = RunFolder(path)
    if not path.is_dir():
        raise RunFolderError(f"{path} is no folder", hint="give the folders of finished runs")
    spec = folder.read_spec()
    events = read_events(folder.events)
    if not folder.is_finished:
        state = {"not finished": "has not come to its end", "interrupted": "was interrupted", "failed": "failed"}
        raise RunFolderError(
            f"{path} cannot be compared: the run {state.get(status_of(events), 'has not come to its end')}",
            hint="finish it with `kivnun tune SPEC --output RUN --resume`, or leave it out",
        )
    manifest = read_manifest(path)
    base, tuned = (load_evaluation(file) if file.is_file() else None for file in (folder.base_evaluation, folder.tuned_evaluation))
    return _Opened(name, path, spec, manifest, events, base, tuned)


def _shown(run: _Opened) -> ComparedRun:
    steps, finished = all_of(run.events, StepDone), last_of(run.events, RunFinished)
    adapter, base_loaded = last_of(run.events, AdapterOpened), last_of(run.events, BaseLoaded)
    assert finished is not None, "a finished run has this line"
    return ComparedRun(
        name=run.name,
        path=str(run.path),
        base_model=base_loaded.model if base_loaded is not None else run.spec.base.model,
        adapter=run.spec.adapter.kind,
        trained_parameters=adapter.trainable_parameters if adapter is not None else 0,
        steps=len(steps),
        trained_tokens=finished.trained_tokens,
        seconds=finished.seconds,
        peak_bytes=finished.peak_bytes,
        held_out_rows=run.tuned.rows if run.tuned is not None else 0,
        scores=_scores(run),
        forgetting=_forgetting(run),
        curve=curve_of(run.events),
        held_out=held_out_of(run.events),
    )


def _scores(run: _Opened) -> dict[str, Score]:
    if run.tuned is None:
        return {}
    before = run.base.measures if run.base is not None else {}
    return {
        name: Score(before[name].figure if name in before else None, measure.figure, run.tuned.intervals.get(name))
        for name, measure in run.tuned.measures.items()
    }


def _forgetting(run: _Opened) -> dict[str, Any]:
    if run.tuned is None or run.tuned.forgetting is None:
        return {}
    before = run.base.forgetting if run.base is not None else None
    return {**forgetting_fields(run.tuned.forgetting), "base_nll": before.nll if before is not None else None}


# --- differences -------------------------------------------------------------------------------------------------------------


def _differences(first: _Opened, run: _Opened, measures: Sequence[str]) -> list[Difference]:
    found = [_difference(name, first, run, _paired(name, first, run)) for name in measures]
    if all(one.tuned is not None and one.tuned.forgetting is not None for one in (first, run)):
        found.append(_difference(UNRELATED, first, run, _paired_unrelated(first, run)))
    return found


def _difference(name: str, first: _Opened, run: _Opened, paired: tuple[Measure, Measure] | str) -> Difference:
    if isinstance(paired, str):
        return Difference(name, run.name, first.name, None, None, None, "", paired)
    before, after = paired
    settings = first.spec.evaluation
    ends = difference_interval(before, after, settings.bootstrap, first.spec.seed)
    return Difference(
        measure=name,
        run=run.name,
        reference=first.name,
        value=after.figure - before.figure,
        interval=ends,
        verdict=verdict_of(ends, higher_is_better(before.name)),
        words=in_words(before.name, before.figure, after.figure, ends, first.name),
        unpaired="",
    )


def _paired(name: str, first: _Opened, run: _Opened) -> tuple[Measure, Measure] | str:
    """Return a measure of both runs with the same rows in the same order, or why there is none."""
    for one in (first, run):
        if one.tuned is None:
            return f"{one.name} has no held-out rows"
        if name not in one.tuned.measures:
            return f"{one.name} did not measure it"
    of = "rows" if name in OF_ALL_ROWS else "replies"
    before, after = cast(Evaluation, first.tuned), cast(Evaluation, run.tuned)
    ours, theirs = before.keys.get(of), after.keys.get(of)
    if ours and theirs:
        order = _order(ours, theirs)
        if isinstance(order, str):
            return order
        return before.measures[name], Measure(name, after.measures[name].rows_ND[order])
    if first.manifest["data_hash"] == run.manifest["data_hash"] and (of == "rows" or _asked_alike(first.spec, run.spec)):
        return before.measures[name], after.measures[name]
    return "a run from before rows were named, on other data or with other rows asked"


def _order(ours: Sequence[str], theirs: Sequence[str]) -> list[int] | str:
    """Return where each of our rows stands among theirs, or why they are not the same rows."""
    if Counter(ours) != Counter(theirs):
        both = (Counter(ours) & Counter(theirs)).total()
        return f"the rows differ: {both:,} of {len(ours):,} and {len(theirs):,} are the same"
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place in reversed(range(len(theirs))):
        places[theirs[place]].append(place)
    return [places[key].pop() for key in ours]


def _asked_alike(first: TuneSpec, run: TuneSpec) -> bool:
    """Return whether the seed, which alone chooses the rows that replies are asked of, chose the same."""
    return (first.seed, first.evaluation.generate_rows) == (run.seed, run.evaluation.generate_rows)


def _paired_unrelated(first: _Opened, run: _Opened) -> tuple[Measure, Measure] | str:
    before, after = (cast(Evaluation, one.tuned).forgetting for one in (first, run))
    assert before is not None
    assert after is not None
    if before.content_hash != after.content_hash:
        return "the text differs, or its tokens do"
    return before.loss, after.loss


# --- what differs ------------------------------------------------------------------------------------------------------------


def flat(tree: object, path: str = "") -> dict[str, str]:
    """Return every leaf of nested mappings and lists by its path, as JSON."""
    if isinstance(tree, Mapping) and tree:
        items = [(str(key), value) for key, value in cast(Mapping[object, object], tree).items()]
    elif isinstance(tree, list | tuple) and any(isinstance(item, Mapping) for item in tree):
        items = [(str(number), value) for number, value in enumerate(tree)]
    else:
        return {path: tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False)}
    return {name: text for key, value in items for name, text in flat(value, f"{path}.{key}" if path else key).items()}


def short_hash(value: str) -> str:
    """Return the beginning of a SHA-256, enough to see that two differ; everything else as it is."""
    return f"{value[:12]}…" if re.fullmatch("[0-9a-f]{64}", value) else value


def _of_manifest(manifest: Mapping[str, Any]) -> dict[str, str]:
    return flat({name: value for name, value in manifest.items() if name not in ("files", "spec_hash", "kind", "created")})


def _differing(trees: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return what is not the same in all, by its path; "-" where one has no such entry."""
    names = dict.fromkeys(name for tree in trees for name in tree)
    values = {name: [tree.get(name, "-") for tree in trees] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}
