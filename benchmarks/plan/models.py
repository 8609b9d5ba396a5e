"""Writes a model of a case with random weights: `python -m benchmarks.plan.models FOLDER NAME`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.plan.cases import MODELS
from kivnun.matrix.shapes import Shape, write_shape


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    write_shape(folder, Shape(**asdict(MODELS[sys.argv[2]])))


if __name__ == "__main__":
    main()
