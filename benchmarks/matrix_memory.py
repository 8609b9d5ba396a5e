"""Measures the memory surface of the matrix (row 7) and writes it as a dated result: its points, the machine, tables and pictures.

`python -m benchmarks.matrix_memory [--quick] [--written] [FOLDER]` goes on where an earlier call stopped; with `--written` nothing
is measured, and what the folder holds is told.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.engine.report import Section, machine
from kivnun.matrix.memory import PARTS, REFERENCE, Surface, measure_memory, plan
from kivnun.matrix.memory_charts import parts_chart, tokens_chart
from kivnun.matrix.memory_summary import Form, Law, crossings, figures_of, main_form, outlooks
from kivnun.plan.techniques import TECHNIQUES

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> None:
    quick, written = "--quick" in arguments, "--written" in arguments
    named = [argument for argument in arguments if not argument.startswith("--")]
    folder = Path(named[0]) if named else RESULTS / f"matrix_memory{'_quick' * quick}_{datetime.now(UTC):%Y-%m-%d}"
    if not written:
        measure_memory(folder, quick, lambda name, done, of: print(f"{done}/{of} {name}", flush=True))
    surface, facts = Surface.load(folder), machine()
    (folder / "machine.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    wanted = plan(quick)
    known = sum(point in surface.points for point in wanted)
    print(f"{known} of {len(wanted)} points")
    (folder / "README.md").write_text(_text(surface, facts, known, len(wanted)), encoding="utf-8")
    form = main_form(surface)
    for name, picture in (("parts", parts_chart(surface, form)), ("tokens", tokens_chart(surface, form))):
        (folder / f"{name}.svg").write_text(picture.replace(">", f"><style>{_colours()}</style>", 1) + "\n", encoding="utf-8")


def _colours() -> str:
    """Return what a page would give the pictures, for a picture that is a file of its own."""
    from kivnun.evaluate.page_template import STYLE
    from kivnun.matrix.memory_charts import STYLE as MORE

    svg = [line for line in STYLE.splitlines() if line.startswith((":root", "@media (prefers", "  --", "svg"))]
    return "\n".join([*svg, MORE])


def _text(surface: Surface, facts: dict[str, str], known: int, wanted: int) -> str:
    head = f"""\
# Peak memory of a training step, by part

{datetime.now(UTC):%Y-%m-%d}, made by `python -m benchmarks.matrix_memory`; {known} of the plan's {wanted} points.

{", ".join(f"{name}: {value}" for name, value in facts.items())}.

Each point is three steps in a process of its own, one thread. The peak is the kernel's count of resident bytes above the same
process at rest. Gradients, moments and activations are as they stood when these were the most together; workspace is the rest of
the peak. Figures are medians of repeats.
"""
    reference = [_reference(surface, form) for form in dict.fromkeys(point.form for point in surface.points)]
    return "\n".join([head, *(section.as_markdown() for section in reference if section), _crossed(surface), _laws(surface)])


def _reference(surface: Surface, form: Form) -> Section | None:
    lines = []
    for name in TECHNIQUES:
        its = figures_of(surface, name, form)
        if its is not None:
            numbers = [f"{its.ratio:.2f}", f"{its.interval[0]:.2f} to {its.interval[1]:.2f}", str(its.repeats)]
            parts = [f"{its.parts[part] / 1e6:,.1f}" for part in PARTS]
            lines.append([TECHNIQUES[name].label, *numbers, f"{its.peak / 1e6:,.0f}", *parts, f"{its.cpu_s:.2f}"])
    columns = ["technique", "of full", "between any two repeats", "repeats", "peak MB", *PARTS, "CPU s of a step"]
    rows, tokens = REFERENCE
    return Section(f"At {rows} x {tokens} tokens: {_words(form)}", columns, lines) if lines else None


def _crossed(surface: Surface) -> str:
    lines = []
    for c in crossings(surface):
        fixed = f"{c.fixed} {'rows' if c.along == 'tokens' else 'tokens a row'}"
        where = [fixed, f"{c.low} to {c.high} {c.along}", f"{c.pass_tokens:,.0f}", "more above" if c.more_above else "less above"]
        lines.append([TECHNIQUES[c.technique].label, _words(c.form), _words(c.full_form), *where])
    columns = ["technique", "form", "full tuning", "at", "crosses in", "tokens of a pass", "which way"]
    return Section("Crossings", columns, lines).as_markdown() if lines else "## Crossings\n\nNone on this grid.\n"


def _laws(surface: Surface) -> str:
    lines = []
    for o in outlooks(surface):
        most = [f"{ratio:.2f} at {at[0]} x {at[1]}" for ratio, at in (o.least, o.most)]
        laws = [_law(law) for law in (o.law, o.full_law)]
        meets = "-" if not (o.law and o.full_law) else "never" if o.meets_at is None else f"{o.meets_at:,.0f}"
        lines.append([TECHNIQUES[o.technique].label, _words(o.form), _words(o.full_form), *most, *laws, meets])
    columns = [
        "technique",
        "form",
        "full tuning",
        "least of full",
        "most of full",
        "MB + kB a token (off by)",
        "full's",
        "meet at tokens",
    ]
    return Section("Laws: peak = fixed + so much a token of the pass", columns, lines).as_markdown()


def _law(law: Law | None) -> str:
    return "-" if law is None else f"{law.fixed / 1e6:,.0f} + {law.per_token / 1e3:,.1f} t ({law.error:.0%})"


def _words(form: Form) -> str:
    more = [form.model, form.precision, *(["torch kernels"] * (form.kernels == "torch")), *(["packed"] * form.packed)]
    return ", ".join([*more, *(["layers computed again"] * form.recompute)])


if __name__ == "__main__":
    main(sys.argv[1:])
