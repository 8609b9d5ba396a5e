"""Memory of a process falls as a + b / N when N processes divide a run's state: slope b is what is divided."""

from __future__ import annotations

from pathlib import Path

import pytest

from kivnun.matrix.law import fit, launch, peak_mib, weights_mib
from kivnun.matrix.law_cases import Case

pytest.importorskip("deepspeed")

# In units of the weights: at stage 3 shard, master, two moments, gradient; at stage 2 master, moments, gradient and its flat copy.
DIVIDED = 5.0


def test_a_law_is_fitted_exactly() -> None:
    law = fit({1: 300.0, 2: 200.0, 4: 150.0})
    assert (law.fixed, law.divided, law.residual) == (pytest.approx(100), pytest.approx(200), pytest.approx(0, abs=1e-9))
    assert law.at(8) == pytest.approx(125)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_memory_falls_with_the_slope_of_what_is_divided(tmp_path: Path, stage: int) -> None:
    """Measured slopes: 4.7 and 4.8 of the weights; buckets and what is gathered make up the rest."""
    peaks = {
        count: peak_mib(launch(Case("28m", "full", "fp32", stage, count), tmp_path, tmp_path / "measured.json"))
        for count in (1, 2, 4)
    }
    law, weights = fit(peaks), weights_mib("28m")
    assert 0.85 * DIVIDED < law.divided / weights < 1.1 * DIVIDED, (peaks, law)
    assert law.residual < 0.25 * weights, (peaks, law)
    whole = {3: 0.0, 2: 1.0}[stage] * weights
    assert law.fixed < whole + 240, (peaks, law)
