"""`kivnun verify`: is the run what it says, and would it come out the same again?"""

from __future__ import annotations

from pathlib import Path

import click

from kivnun.cli.completion import run_folders


@click.command(short_help="Check hashes, the score, and that training repeats.")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False), shell_complete=run_folders)
@click.option("--json", "as_json", is_flag=True, help="Print {run, ok, checks} as one JSON object.")
def verify(run: Path, as_json: bool) -> None:
    """Check RUN: file hashes, the adapter loaded again, the held-out score computed again, the first steps trained again."""
    from kivnun.cli.process import keep_freed_memory
    from kivnun.cli.screen import print_json, stdout, table, working
    from kivnun.errors import IntegrityError

    keep_freed_memory()
    with working("checking the run"):
        from kivnun.export.verify import verify_run

        checks = verify_run(run)
    failed = [check.name for check in checks if not check.ok]
    if as_json:
        rows = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in checks]
        print_json({"run": str(run), "ok": not failed, "checks": rows})
    else:
        table(("check", "", ""), [(check.name, "ok" if check.ok else "FAILED", check.detail) for check in checks], stdout())
    if failed:
        raise IntegrityError(f"{run} does not reproduce: {', '.join(failed)}", hint="the table above says what differs")
