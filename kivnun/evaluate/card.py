"""The model card: what a result is, how it was made, what it scored and how to use it, in the folder that is handed on.

A `README.md` with the metadata header that model hubs read. It is made from the run folder alone, holds counts and hashes of the
data and none of its content, names files without their folders, and is the same for equal runs whatever their folders are called.
Next: `report.py` (where the figures come from).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from kivnun import __version__
from kivnun.artifacts import atomic_write
from kivnun.errors import BaseModelError
from kivnun.evaluate.report import Figure, read_report
from kivnun.lineage import CARD
from kivnun.model.families import BUILT_IN, FAMILIES, find_base, read_config
from kivnun.run_folder import RunFolder
from kivnun.spec import FullSpec, TuneSpec, is_hub_id
from kivnun.spec.base import QUANTISED
from kivnun.spec.yaml_text import write_yaml

Form = Literal["adapter", "model", "merged"]

# Licences as model hubs name them, by how the family's is told.
LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0", "Gemma terms of use": "gemma"}
OBJECTIVES = {"supervised": "sft", "pretraining": "continued-pretraining", "dpo": "dpo"}
NAMES = {
    "full": "full tuning", "lora": "LoRA", "dora": "DoRA", "adalora": "AdaLoRA", "loha": "LoHa", "lokr": "LoKr", "vera": "VeRA",
    "ia3": "IA3", "ln_tuning": "norm", "prompt": "prompt", "prefix": "prefix",
}  # fmt: skip
# What decides bytes no more than how a run is stopped and computed: the run's resolved.yaml holds it.
_NOT_TOLD = ("checkpoints", "compute")
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&])")


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the card is made from."""

    spec: TuneSpec
    base_hash: str
    data_hash: str
    form: Form
    headline: str
    detail: str
    figures: Sequence[Figure]
    data: Mapping[str, str]
    model: Mapping[str, str]
    lineage: Mapping[str, Any] | None
    family: str | None
    licence: str | None


def write_card(run_dir: Path, place: Path, form: Form, lineage: Mapping[str, Any] | None = None) -> Path:
    """Write the card of a run's result into `place` and return its path. The run must have been scored and exported; `lineage` is
    what its manifest says of its parent.

    Raises RunFolderError where there is no run, IntegrityError where its record is damaged, StorageError.
    """
    atomic_write(place / CARD, card_text(run_dir, form, lineage))
    return place / CARD


def card_text(run_dir: Path, form: Form, lineage: Mapping[str, Any] | None = None) -> str:
    """Return the card of a run's result: its adapter, its own model, or the model that an export merged."""
    facts = _facts(run_dir, form, lineage)
    parts = [_title(facts), _results(facts), _use(facts), _made(facts), _limits(facts)]
    head = yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line: a name must not become a link, a heading or a cell."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _facts(run_dir: Path, form: Form, lineage: Mapping[str, Any] | None) -> _Facts:
    folder, report = RunFolder(run_dir), read_report(run_dir)
    spec = folder.read_spec()
    began = cast("dict[str, Any]", json.loads(folder.start.read_text(encoding="utf-8")))
    family, licence = None, None
    try:
        config = read_config(find_base(spec.base.model, spec.base.revision))
        known = FAMILIES.get(str(config.get("model_type")))
        family = None if known is None else known.name
        licence = "Apache-2.0" if spec.base.model in BUILT_IN else known.licence if known and is_hub_id(spec.base.model) else None
    except BaseModelError:  # moved since: the card says less
        pass
    return _Facts(
        spec,
        str(began["base_hash"]),
        str(began["data_hash"]),
        form,
        report.headline,
        report.detail,
        report.figures,
        report.facts.get("Data", {}),
        report.facts.get("Model", {}),
        lineage,
        family,
        licence,
    )


# --- the metadata header -----------------------------------------------------------------------------------------------------


def _metadata(facts: _Facts) -> dict[str, Any]:
    spec, known = facts.spec, LICENCES.get(facts.licence or "")
    objective = OBJECTIVES[spec.objective.kind] if spec.objective else "sft"
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "held-out", "name": "held-out rows of the run's own data"},
        "metrics": [
            {"type": figure.name, "name": f"{figure.name}{_in_words(figure)}", "value": round(figure.tuned, 6)}
            for figure in facts.figures
            if figure.tuned is not None
        ],
    }
    return {
        "library_name": "peft" if facts.form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": spec.base.model} if _has_id(spec) else {}),
        **({} if facts.licence is None else {"license": known or "other"}),
        "tags": ["kivnun", spec.adapter.kind, objective, *(["merged"] if facts.form == "merged" else [])],
        **({"model-index": [{"name": _name(facts), "results": [result]}]} if result["metrics"] else {}),
        "kivnun": {"version": __version__, "base_hash": facts.base_hash, "data_hash": facts.data_hash},
    }


def _in_words(figure: Figure) -> str:
    if figure.tuned_interval is None:
        return ""
    low, high = figure.tuned_interval
    return f" (95 % interval {low:.4g} to {high:.4g})"


def _has_id(spec: TuneSpec) -> bool:
    return spec.base.model in BUILT_IN or is_hub_id(spec.base.model)


def _base_name(spec: TuneSpec) -> str:
    return spec.base.model if _has_id(spec) else Path(spec.base.model).name


def _name(facts: _Facts) -> str:
    base, kind = _base_name(facts.spec), NAMES[facts.spec.adapter.kind]
    if facts.form == "adapter":
        return f"{kind} adapter for {base}"
    return f"{base} after full tuning" if facts.form == "model" else f"{base} with a {kind} adapter merged in"


# --- the page ----------------------------------------------------------------------------------------------------------------


def _title(facts: _Facts) -> str:

    family = f", of the family {markdown(facts.family)}" if facts.family else ""
    trained = facts.model.get("trainable parameters")
    lines = [
        f"# {markdown(_name(facts))}",
        f"Tuned with Kivnun {markdown(__version__)} on {markdown(_base_name(facts.spec))}{family}."
        + (f" Trained parameters: {markdown(trained)}." if trained else ""),
    ]
    if facts.lineage is not None:
        whose = f" of the run {markdown(facts.lineage['run'])}" if facts.lineage.get("run") else ""
        how = {
            "adapter": "Training went on with the adapter",
            "model": "The base is the model",
            "merged": "The base holds the adapter",
        }
        lines.append(f"{how[facts.lineage['how']]}{whose}, content hash `{facts.lineage['content_hash']}`.")
    if facts.licence is not None:
        lines.append(f"Licence of the base's family: {markdown(facts.licence)}. What the base's own page says decides.")
    else:
        lines.append("The licence is the base's; see there.")
    return "\n\n".join(lines)


def _results(facts: _Facts) -> str:
    lines = ["## Results", f"**{markdown(facts.headline)}.** {markdown(facts.detail)}"]
    if facts.figures:
        rows = ["| measure | base | tuned | tuned minus base | verdict |", "|---|---|---|---|---|"]
        for figure in facts.figures:
            cells = [
                _value(figure.base, figure.base_interval), _value(figure.tuned, figure.tuned_interval),
                _span(figure.difference_interval), figure.verdict or "",
            ]  # fmt: skip
            rows.append(f"| {markdown(figure.name)} | {' | '.join(cells)} |")
        lines += ["\n".join(rows), "In brackets and in the fourth column: 95 % intervals over the held-out rows, resampled."]
    return "\n\n".join(lines)


def _value(value: float | None, interval: tuple[float, float] | None) -> str:
    return "" if value is None else f"{value:.4g}{f' {_span(interval)}' if interval else ''}"


def _span(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.4g}, {interval[1]:.4g}]"


def _use(facts: _Facts) -> str:
    spec, base = facts.spec, _base_name(facts.spec)
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if facts.form == "adapter":
        found = f"find_base({json.dumps(base)})" if base in BUILT_IN else json.dumps(base, ensure_ascii=False)
        lines = [
            *(["from kivnun.model.families import find_base"] if base in BUILT_IN else []),
            "from peft import PeftModel",
            *lines,
            "",
            f"base = {found}{'' if _has_id(spec) else '  # the folder of the base'}",
            'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "FOLDER")',
        ]
    else:
        lines += ["", 'model = AutoModelForCausalLM.from_pretrained("FOLDER")']
    lines.append('tokenizer = AutoTokenizer.from_pretrained("FOLDER")')
    asked = {"prompt_completion": "prompts as plain text", "text": "plain text"}.get(spec.data.format, "chat messages")
    held = f" It was trained on a base held in {spec.base.precision}." if spec.base.precision in QUANTISED else ""
    on = (
        f"To train on: `adapter: {{kind: {spec.adapter.kind}, start_from: FOLDER}}`."
        if facts.form == "adapter" and spec.adapter.kind in ("lora", "dora")
        else "To train on, name this folder as `base`."
        if facts.form != "adapter"
        else ""
    )
    text = f"FOLDER is the folder of this file. The model takes {asked}; tokenizer and template lie beside it.{held}"
    kivnun = f"With Kivnun, from the run's folder: `kivnun chat RUN`, `kivnun predict RUN`, `kivnun serve-run RUN`. {on}".strip()
    return "\n\n".join(["## Use", text, _fenced("python", "\n".join(lines)), kivnun])


def _made(facts: _Facts) -> str:
    counts = [f"| {markdown(name)} | {markdown(value)} |" for name, value in facts.data.items()]
    hashes = [f"| hash of the rows | `{facts.data_hash}` |", f"| hash of the base | `{facts.base_hash}` |"]
    table = "\n".join(["| data | |", "|---|---|", *counts, *hashes])
    return "\n\n".join(
        [
            "## How it was made",
            table,
            "The spec, with files named without their folders and without what only says how it was computed:",
            _fenced("yaml", _spec_text(facts.spec)),
        ]
    )


def _limits(facts: _Facts) -> str:
    lines = [
        "- Scores hold for rows like the held-out ones; nothing else was measured.",
        "- Intervals tell how much a score owes to the choice of held-out rows, not how another training would come out.",
        "- A tuned model may repeat rows it was trained on, and keeps the faults of its base.",
    ]
    if facts.form == "adapter":
        lines.append("- The adapter is of use on the base of the hash above alone.")
    if isinstance(facts.spec.adapter, FullSpec):
        lines.append("- Every weight was trained: what the base knew beside the task may have faded.")
    return "\n".join(["## Limits", "", *lines])


def _fenced(language: str, text: str) -> str:
    """Return a code block that no line of the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _spec_text(spec: TuneSpec) -> str:
    """Return the spec as YAML without the folders of somebody's machine."""
    tree = cast("dict[str, Any]", spec.to_tree())
    if not _has_id(spec):
        tree["base"]["model"] = Path(spec.base.model).name
    for source in tree["data"]["train"]:
        source["path"] = Path(source["path"]).name
    for section, name in (("data", "validation"), ("data", "template"), ("adapter", "start_from")):
        if isinstance(tree[section].get(name), str):
            tree[section][name] = Path(tree[section][name]).name
    return write_yaml({name: value for name, value in tree.items() if name not in _NOT_TOLD})
