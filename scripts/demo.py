"""The main job on real data, run by `make demo`: English dates, amounts, units and durations into Hebrew, from CLDR.

Makes the data, tunes the built-in base with LoRA as examples/demo/spec.yaml says, and shows base against tuned. What was done is
not done again: an interrupted demo goes on from its checkpoint, a finished one shows its result.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kivnun.cli.main import run
from kivnun.data.scenarios import cldr

ROOT = Path(__file__).parent.parent
FOLDER = Path("examples/demo")
RUN = Path("runs/demo")

ABOUT = """\
Kivnun tunes its built-in base, kivnun/tiny-phi, to write English dates, amounts, units and durations in Hebrew.
The rows come from Unicode's CLDR. Months, currencies and units are a closed list of words that base and rows share; what is new in
the held-out rows are the combinations: no date, amount or measure in them is in the training rows.
"""


def main() -> int:
    """Run the demo in the repository's root; return the exit status."""
    os.chdir(ROOT)
    print(ABOUT, file=sys.stderr)
    if not all((FOLDER / name).is_file() for name in ("train.jsonl", "validation.jsonl")):
        cldr.write(FOLDER)
    if (RUN / "result.json").is_file():
        print(f"{RUN} is finished: this is its result (delete the folder to tune again)", file=sys.stderr)
    return run(["tune", str(FOLDER / "spec.yaml"), "--output", str(RUN), "--resume"])


if __name__ == "__main__":
    sys.exit(main())
