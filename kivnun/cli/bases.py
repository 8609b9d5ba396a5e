"""`kivnun bases`: the bases one can name, and what Kivnun will do with one. Next: `kivnun/model/coverage.py` (who finds out)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kivnun.cli.screen import print_json, table, working

if TYPE_CHECKING:
    from kivnun.model.coverage import Coverage, Target
    from kivnun.model.phi import PhiModel

PRECISIONS = ("bf16", "int8", "nf4")


@click.command()
@click.argument("name", required=False)
@click.option(
    "--json", "as_json", is_flag=True,
    help="Print a JSON list of {id, family, parameters, folder, licence, refused}; with NAME one object of all its facts.",
)  # fmt: skip
def bases(name: str | None, as_json: bool) -> None:
    """List the bases known by name, or tell what Kivnun will do with the base NAME: an id, or a folder.

    Any causal language model of transformers can be asked for. Of a hub's id the configuration alone is downloaded, of a Phi model
    nothing. One that is refused ends with the reason and status 4.
    """
    if name is not None:
        _tell(name, as_json)
        return
    rows = _known()
    if as_json:
        print_json(rows)
        return
    table(("id", "family", "parameters", "context", "licence", "note"), [_cells(row) for row in rows])


# --- the list ----------------------------------------------------------------------------------------------------------------


def _known() -> list[dict[str, Any]]:
    from kivnun.model.families import builtin_bases, longest_row
    from kivnun.model.phi import PHI

    rows = [
        {
            "id": b.id, "family": b.family, "parameters": b.parameters, "context": longest_row(Path(b.folder)),
            "licence": b.licence, "folder": str(b.folder), "refused": None,
        }
        for b in builtin_bases()
    ]  # fmt: skip
    return rows + [_phi_row(model) for model in PHI.values()]


def _phi_row(model: PhiModel) -> dict[str, Any]:
    context = model.config.get("max_position_embeddings")
    return {
        "id": model.id, "family": model.family, "parameters": model.parameters, "context": context, "licence": model.licence,
        "folder": None, "refused": model.refused,
    }  # fmt: skip


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    figures = [f"{row[key]:,}" if row[key] else "-" for key in ("parameters", "context")]
    note = f"refused: {row['refused']}" if row["refused"] else "comes with Kivnun" if row["folder"] else "from the hub"
    return (row["id"], row["family"], *figures, row["licence"], note)


# --- one base ----------------------------------------------------------------------------------------------------------------


def _tell(name: str, as_json: bool) -> None:
    from kivnun.plan.bases import base_files

    files = base_files(name)
    with working(f"asking {files.name}"):
        from kivnun.model.coverage import cover

        coverage = cover(files.name, files.config)
        facts = _facts(coverage, files.folder)
    if as_json:
        print_json(facts)
        return
    table(("", ""), _lines(coverage, facts))


def _facts(coverage: Coverage, folder: Path | None) -> dict[str, Any]:
    """Return all that is known, as programs read it."""
    from dataclasses import asdict

    from kivnun.model.families import BUILT_IN, base_hash, builtin_bases
    from kivnun.plan.memory import weight_bytes

    outer = coverage.parameters - coverage.linear_numbers
    facts = asdict(coverage)
    facts["weight_bytes"] = {kind: round(weight_bytes(coverage.linear_numbers, outer, kind)) for kind in PRECISIONS}
    facts["template"] = _template(coverage.name, folder)
    facts["folder"] = None if folder is None else str(folder)
    if coverage.name in BUILT_IN:
        facts["licence"] = next(base.licence for base in builtin_bases() if base.id == coverage.name)
    has_weights = folder is not None and any(folder.glob("*.safetensors"))
    facts["content_hash"] = base_hash(folder) if folder is not None and has_weights else None
    return facts


def _template(name: str, folder: Path | None) -> str | None:
    """Return how a turn is written by the base's own chat template; None where it has none."""
    from kivnun.model.families import chat_template_of
    from kivnun.model.phi import phi_by_id

    phi = phi_by_id(name)
    if phi is not None:
        return phi.turn
    return "unknown before its tokenizer is fetched" if folder is None else chat_template_of(folder)


def _lines(coverage: Coverage, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the report, one fact a line."""
    from kivnun.plan.advise import words_of_bytes

    layers = ", ".join(f"{count} {kind}" for kind, count in coverage.layers.items())
    path = (
        "on Kivnun's own decoder, the fast path" if coverage.fast
        else "by transformers' own forward, the generic path: products and attention are fast, the rest is not"
    )  # fmt: skip
    numbers = ", ".join(f"{words_of_bytes(facts['weight_bytes'][kind])} in {kind}" for kind in PRECISIONS)
    template = facts["template"] or "none: rows of messages need data.template, other rows need none"
    safe = f"safe: logits within {_share(coverage.distance)} of transformers', asked of a twin of {coverage.twin_layers} layers"
    lines = [
        ("base", coverage.name),
        ("family", f"{coverage.family} ({coverage.model_type}, {coverage.model_class})"),
        ("licence", facts["licence"]),
        ("parameters", f"{coverage.parameters:,}"),
        ("context", "no limit named" if coverage.context is None else f"{coverage.context:,} tokens"),
        ("layers", f"{layers}, {path}"),
        (
            "targets",
            ", ".join(_target(it) for it in coverage.targets) or "none: no adapter can cover a layer; adapter.kind full can",
        ),
        ("not covered", ", ".join(f"{name} ({count:,})" for name, count in coverage.uncovered.items()) or "nothing"),
        ("head", "tied to the embedding" if coverage.tied else "its own"),
        ("rotation", str(coverage.rope)),
        ("window", coverage.window),
        ("soft caps", ", ".join(f"{name} {value:g}" for name, value in coverage.softcaps.items()) or "none"),
        ("packed rows", safe),
        ("weights take", numbers),
        ("template", template.replace("\n", "\\n")),
    ]
    return lines + ([("content hash", facts["content_hash"])] if facts["content_hash"] else [])


def _share(distance: float) -> str:
    """Return the power of ten that a distance stays below: its digits depend on the machine."""
    from math import ceil, log10

    return f"1e{ceil(log10(distance))}" if distance > 0 else "0"


def _target(target: Target) -> str:
    parts = f" ({', '.join(target.parts)})" if target.parts else ""
    return f"{target.name}{parts} x{target.count}"
