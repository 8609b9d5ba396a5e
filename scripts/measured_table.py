"""Make the table that `kivnun advise` reads out of a committed matrix.json: `python -m scripts.measured_table MATRIX_JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kivnun.plan.measured import SHIPPED, slim


def main() -> int:
    held = slim(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    SHIPPED.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{SHIPPED}: {len(held['tasks'])} tasks, {held['scale']}, {held['date']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
