"""The built-in base can be made again: the start of its recipe, done anew, gives what the recipe's log says.

Slow: the corpus is made whole (the order of the rows depends on their number), then a few steps are trained.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import babel
import pytest

from kivnun.events import Event, StepDone, read_events
from kivnun.spec import parse_spec
from recipes.tiny_phi import build, docs

ROOT = Path(__file__).parent.parent.parent
LOG = ROOT / "recipes/tiny_phi/log"
STEPS = 12


class Enough(Exception):
    """Raised by the listener after the prefix: the rest of the run is not wanted."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_prefix_of_the_recipe_gives_the_shipped_tokenizer_corpus_and_losses(
    tmp_path: Path,
) -> None:
    logged = json.loads((LOG / "corpus.json").read_text(encoding="utf-8"))
    here = {"python": docs.python_version(), "babel": babel.__version__}
    if here != {name: logged[name] for name in here}:
        pytest.skip(f"the corpus was made with {logged['python']} and Babel {logged['babel']}, here are {here}")

    make_corpus_and_start(tmp_path)

    assert json.loads((tmp_path / "corpus" / "corpus.json").read_text(encoding="utf-8")) == logged
    for name in build.TOKENIZER_FILES:
        assert sha256(tmp_path / "start" / name) == sha256(build_root(build.SHIPPED) / name), name
    expected = [event.loss for event in read_events(LOG / "events.jsonl") if isinstance(event, StepDone)][:STEPS]
    assert first_losses(tmp_path) == pytest.approx(expected, rel=0.02)  # bf16 sums differ between processors


def make_corpus_and_start(folder: Path) -> None:
    """Run the first stages in an interpreter of their own: pytest replaces a hook of `sys` whose docstring is in the text."""
    code = (
        "import sys; from pathlib import Path; from recipes.tiny_phi import build; folder = Path(sys.argv[1]); "
        "build.START, build.CORPUS = folder / 'start', folder / 'corpus'; build.make_corpus(); build.write_start(build.START)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True)


def first_losses(folder: Path) -> list[float]:
    """Return the losses of the first steps of the recipe's own spec, over the files in `folder`."""
    from kivnun.pipeline import tune

    text = (ROOT / "recipes/tiny_phi/spec.yaml").read_text(encoding="utf-8").replace("../../build/tiny_phi", str(folder))
    losses: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)
            if len(losses) == STEPS:
                raise Enough

    with pytest.raises(Enough):
        tune(parse_spec(text, folder=folder), text, folder / "run", listener=listen)
    return losses


def build_root(path: Path) -> Path:
    return ROOT / path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
