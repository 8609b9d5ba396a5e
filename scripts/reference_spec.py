"""Writes docs/reference/spec.md and schema/tunespec.schema.json from the models, so that they say what the program does.

Run by `make docs`; `tests/unit/test_spec_reference.py` fails when one of them is out of date.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from kivnun.spec import Option, count_options, json_schema, options, rate_table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "spec.md"
SCHEMA = ROOT / "schema" / "tunespec.schema.json"

HEAD = """# The spec

Written by `scripts/reference_spec.py` from `kivnun/spec`; do not edit.

A spec is one YAML or JSON file that says all of what a run is. The shortest one:

```yaml
version: 1
base: kivnun/tiny-phi
data: {{train: train.jsonl, validation: 0.2}}
adapter: {{kind: lora, rank: 8}}
schedule: {{epochs: 2, batch_rows: 8, learning_rate: 1e-3}}
seed: 7
```

There are {count} options. What is left out takes its default; what is `auto`, or null where a choice must be made, is decided when
the run starts, from the data, the base and the machine. The run folder's `resolved.yaml` then holds every value, each one that was
not given with the reason for it.

## How a spec is read

- Scalars are those of YAML 1.2: `1e-3`, `1E5` and `.5` are numbers; only `true` and `false` are booleans; `no`, `on` and dates
  are text.
- Nothing is converted: `"8"` is no number, `2.0` is no whole number, `true` is no 1. A whole number is fine where a number is
  asked for.
- A key given twice, anchors, aliases, tags and a second document are refused; so is an unknown key, with the nearest option
  there is.
- Relative paths start from the spec's folder.
- `base` may be a bare name for `{{model: ...}}`, `data.train` one path for a list of one, and `kind` may be left out where it
  has a default.
- All problems of a spec are told together, each with its line, what was received, what is allowed and what to do.

`--set path=value` lays a value over the file's: `--set schedule.epochs=1`, `--set adapter.kind=dora` (options of one kind that the
other lacks are refused), `--set 'evaluation.metrics=[chrf]'`, `--set data.train.0.share=3`. The value is read as YAML; its relative
paths, too, start from the spec's folder. `--set schedule.epochs=null` unsets.

An editor that knows JSON Schema completes and checks a spec whose first line is
`# yaml-language-server: $schema=tunespec.schema.json`; `kivnun schema` prints that schema.

## The learning rate, when none is given

{rates}

The rate that suits a data set may be several times higher or lower: try a few.
"""

INTRODUCTIONS = {
    "": "The spec itself",
    "base": "base: which model",
    "data": "data: which rows",
    "data.train.0": "data.train: one file of several",
    "adapter": "adapter: what is trained",
    "objective": "objective: what the loss rewards",
    "schedule": "schedule: how long, how fast",
    "schedule.optimizer": "schedule.optimizer: how gradients become updates",
    "evaluation": "evaluation: what is measured",
    "checkpoints": "checkpoints: what is kept on the way",
    "compute": "compute: the shape of the engine",
}


def page() -> str:
    """Return the page's text."""
    found = sorted(options(), key=lambda option: list(INTRODUCTIONS).index(_section_of(option)))
    parts = [HEAD.format(count=count_options(), rates=_rates())]
    for section, members in groupby(found, key=_section_of):
        parts.append(f"## {INTRODUCTIONS[section]}\n\n{_tables(list(members))}")
    return "\n".join(parts)


def schema_text() -> str:
    """Return the JSON Schema's text."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _section_of(option: Option) -> str:
    return option.path.rpartition(".")[0]


def _tables(members: list[Option]) -> str:
    """Return one table; kinds that have the same option share its row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for option in members:
        name = option.path.rpartition(".")[2]
        if name == "kind" and option.kind is not None:
            default = "required" if option.required else "the default kind"
            cells = (f"`kind: {option.kind}`", "", default, option.description)
        else:
            default = "required" if option.required else f"`{option.default}`"
            why = f" *Why this default:* {option.why}." if option.why else ""
            cells = (f"`{name}`", option.allowed, default, option.description + why)
        rows.setdefault(cells, []).append("" if name == "kind" else option.kind or "")
    lines = ["| option | takes | default | what it is |", "|---|---|---|---|"]
    for (name, allowed, default, text), kinds in sorted(rows.items(), key=lambda row: not row[0][0].startswith("`kind:")):
        of = f" ({', '.join(kinds)})" if all(kinds) else ""
        lines.append(f"| {name}{of} | {allowed} | {default} | {text} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def _rates() -> str:
    rows = [f"| {objective} | {adapter} | {large} | {small} |" for objective, adapter, large, small in rate_table()]
    return "\n".join(["| objective | adapter | base | base below 100 M parameters |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.parent.mkdir(exist_ok=True)
    SCHEMA.write_text(schema_text(), encoding="utf-8")
