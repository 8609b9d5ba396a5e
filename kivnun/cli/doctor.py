"""`kivnun doctor`: what this machine offers, what a run will do with it, and what to mend. Next: `kivnun/plan/checkup.py`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click


@click.command(short_help="Say what this machine offers, and what is in the way.")
@click.option("--network", is_flag=True, help="Also ask whether the model hub is reached; without it nothing leaves this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print {ok, findings, defaults} as one JSON object.")
def doctor(network: bool, as_json: bool) -> int:
    """Look at this machine: what it offers, what a run will do with it, and what is in the way.

    Each line is ok, a note (a run works, and could do better) or a problem, with what to do about it. Exits with 1 where a
    problem prevents every run, else with 0. The first time the kernels in C are compiled, which takes a while.
    """
    from kivnun.cli.screen import print_json, stdout, table, working
    from kivnun.plan.checkup import ROWS_OF, check_up

    with working("looking at this machine"):
        found = check_up(Path.cwd(), network=network)
    if as_json:
        findings, defaults = [asdict(one) for one in found.findings], [asdict(one) for one in found.defaults]
        print_json({"ok": found.ok, "findings": findings, "defaults": defaults})
        return 0 if found.ok else 1
    console = stdout()
    table(("", "", "found", "what to do"), [(one.state, one.name, one.found, one.do) for one in found.findings], console)
    if found.defaults:
        console.print(f"\nWhat `kivnun tune` takes when the spec says nothing: LoRA, rows of up to {ROWS_OF} tokens", style="bold")
        heads = ("base", "device", "precision", "threads", "tokens a pass", "kernels", "packed", "memory of a step")
        rows = [
            (one.base, one.device, one.precision, str(one.threads), f"{one.micro_batch_tokens:,}", one.kernels,
             "yes" if one.packed_weights else "no", f"{one.step_bytes / 2**30:.2f} GiB" + ("" if one.fits else ", not free now"))
            for one in found.defaults
        ]  # fmt: skip
        table(heads, rows, console)
    problems = sum(one.state == "problem" for one in found.findings)
    many = f"{problems} {'problem' if problems == 1 else 'problems'} to mend before a run is possible"
    console.print(f"\n{many if problems else 'ready to run'}", style="bold")
    return 0 if found.ok else 1
