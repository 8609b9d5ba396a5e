"""How long a person waits from the command to the first step: `python -m benchmarks.startup`.

`kivnun tune` on the built-in base with 64 short chats, for one step, as a process of its own, several times after one that warms
caches: seconds from the start of the process to the step's event, without a validation set and with one (then the base is scored
before it is trained), and the CPU seconds and the largest memory of the whole command.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

RUNS = 5
KIVNUN = (sys.executable, "-c", "from kivnun.cli.main import main; main()")
SPEC = "version: 1\nbase: kivnun/tiny-phi\ndata: {{train: train.jsonl, validation: {validation}}}\nschedule: {{steps: 1}}\n"


def main() -> None:
    print("| `kivnun tune` on kivnun/tiny-phi, warm, median of 5 | seconds to the first step | CPU seconds in all | MiB at most |")
    print("|---|---|---|---|")
    for name, validation in (("no validation set", "null"), ("24 rows scored before", "validation.jsonl")):
        seconds, cpu_seconds, mib = measured(validation)
        print(f"| {name} | {seconds:.2f} | {cpu_seconds:.2f} | {mib:.0f} |", flush=True)


def measured(validation: str) -> tuple[float, ...]:
    """Return the medians of seconds to the first step, of the command's CPU seconds and of its largest memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, count in (("train.jsonl", 64), ("validation.jsonl", 24)):
            lines = [json.dumps({"messages": _messages(number, name)}) for number in range(count)]
            (place / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (place / "spec.yaml").write_text(SPEC.format(validation=validation), encoding="utf-8")
        runs = [_one(place, number) for number in range(RUNS + 1)][1:]
    return tuple(map(statistics.median, zip(*runs, strict=True)))


def _messages(number: int, name: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{name} {number}?"}, {"role": "assistant", "content": f"The answer is {number}."}]


def _one(place: Path, number: int) -> tuple[float, float, float]:
    run, began = place / f"run{number}", time.time()
    command = [*KIVNUN, "tune", str(place / "spec.yaml"), "--output", str(run), "--json"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, **silent)
    _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    events = map(json.loads, (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    stepped = next(event["time"] for event in events if event["name"] == "step_done")
    seconds = datetime.fromisoformat(stepped.replace("Z", "+00:00")).timestamp() - began
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


if __name__ == "__main__":
    main()
