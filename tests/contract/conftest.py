"""One tiny base for all runs of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_task import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phi-3 of two layers with a tokenizer and a chat template."""
    return make_base(tmp_path_factory.mktemp("base"))
