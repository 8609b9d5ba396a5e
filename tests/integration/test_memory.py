"""Memory of a run does not grow with the number of its steps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MIB = 1 << 20
MANY_SIZES = """
import json, sys
import numpy as np, psutil, torch
torch.set_num_threads(1)
from kivnun.data.packing import pack
from kivnun.data.rows import TokenRow, Where
from kivnun.model.adapters import AdapterShape, new_adapter, resolve_targets
from kivnun.model.families import find_base
from kivnun.model.load import load_base
from kivnun.train.engine import TorchEngine
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings
from kivnun.train.weights import AdapterWeights

base = load_base(find_base("kivnun/tiny-phi"), "fp32", kernels=sys.argv[1])
shape = AdapterShape("lora", 8, 16.0, 0.0, False, resolve_targets(base, "all-linear"))
weights = AdapterWeights(base, new_adapter(base, shape, "kaiming", 0))
trainee = TorchEngine(base).open(weights, LikelihoodObjective(), AdamWSettings(0.9, 0.999, 1e-8, 0.0))


def step(length):
    weights = np.ones(length, dtype=np.float32)
    weights[0] = 0.0
    trainee.forward_backward(pack([TokenRow(np.full(length, 7, dtype=np.int32), weights, 0, Where("made", 1), 1)]), length - 1.0)
    trainee.optim_step(1e-4)


step(512)
before = psutil.Process().memory_info().rss
for length in range(449, 513):
    step(length)
print(json.dumps(psutil.Process().memory_info().rss - before))
"""


@pytest.mark.parametrize("kernels", ["auto", pytest.param("torch", marks=pytest.mark.slow)])
def test_packs_of_many_sizes_leave_no_kernels_behind(kernels: str) -> None:
    """oneDNN, which multiplies where no kernels of ours do, keeps what it makes for each number of rows: 64 sizes, each by itself,
    came to some 800 MiB."""
    done = subprocess.run([sys.executable, "-c", MANY_SIZES, kernels], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 100 * MIB
