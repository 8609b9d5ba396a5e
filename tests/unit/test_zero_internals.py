"""What the engine of many processes reaches into is there in the pinned DeepSpeed, and pure parts of it do what they say."""

from __future__ import annotations

import importlib.metadata
import inspect
import tomllib
from pathlib import Path

import pytest

from kivnun.train.data_parallel import dealt_packs, weight_of_pass
from kivnun.train.deepspeed_settings import ShardSettings, deepspeed_config
from kivnun.train.processes import OneProcess, tokens_apart
from tiny import random_rows

ROOT = Path(__file__).parents[2]


class Second(OneProcess):
    """A process beside another, as far as dealing out rows asks."""

    rank, count = 1, 2


def test_the_version_is_the_one_that_was_looked_into() -> None:
    pytest.importorskip("deepspeed")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["deepspeed"] == [f"deepspeed=={importlib.metadata.version('deepspeed')}"]


def test_names_that_are_reached_into_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.runtime.utils as runtime_utils
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Stage12

    assert callable(runtime_utils.dist.has_all_gather_into_tensor)
    gathering = inspect.getsource(runtime_utils.all_gather_dp_groups)
    assert "dist.has_all_gather_into_tensor()" in gathering, "the way that gathers bucket by bucket is chosen by this question"
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    stage_3, stage_12 = inspect.getsource(Stage3), inspect.getsource(Stage12)
    for name in (
        "grad_position",
        "get_param_id",
        "fp32_partitioned_groups_flat",
        "_partition_all_parameters",
        "persistent_parameters",
    ):
        assert name in stage_3
    assert "single_partition_of_fp32_groups" in stage_12
    assert "def finalize_gradient_accumulation_boundary" in stage_3
    assert "def finalize_gradient_accumulation_boundary" in stage_12


def test_rows_are_dealt_evenly_and_all_of_them() -> None:
    lengths = [9, 1, 7, 7, 30, 2, 2, 5]
    hands = tokens_apart(lengths, 3)
    assert sorted(place for hand in hands for place in hand) == list(range(len(lengths)))
    assert all(hand == sorted(hand) for hand in hands)
    assert max(sum(lengths[place] for place in hand) for hand in hands) == 30
    assert tokens_apart([4], 3) == [[0], [], []]


def test_a_process_without_rows_goes_through_the_shortest_with_weights_of_zero() -> None:
    rows = random_rows([11])
    packs, tokens = dealt_packs(rows, 100, False, Second())
    assert (len(packs), tokens) == (1, 2 * rows[0].length)
    assert not packs[0].weights_S.any()
    assert weight_of_pass(packs[0], 11.0) == float("inf")
    (own,), _ = dealt_packs(rows, 100, False, OneProcess())
    assert weight_of_pass(own, 11.0) == 11.0


def test_every_process_has_as_many_packs() -> None:
    rows = random_rows([9, 3, 14, 5, 2, 7])
    first, tokens = dealt_packs(rows, 20, False, OneProcess())
    assert tokens == sum(row.length for row in rows)
    assert sum(pack.num_tokens for pack in first) == tokens

    class First(Second):
        rank = 0

    ones, twos = dealt_packs(rows, 20, False, First())[0], dealt_packs(rows, 20, False, Second())[0]
    assert len(ones) == len(twos)
    dealt = [row for pack in (*ones, *twos) if pack.weights_S.any() for row in pack.rows]
    assert sorted(dealt) == [row.row for row in rows]


def test_buckets_are_even_where_deepspeed_insists() -> None:
    zero = deepspeed_config(ShardSettings(2, "none", 567_001), None, widest_vector=8, masters=False)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (567_001, 567_002)
    assert "sub_group_size" not in zero


def test_vectors_stay_whole_and_state_is_left_where_it_is_said() -> None:
    config = deepspeed_config(ShardSettings(3, "parameters"), 0.5, widest_vector=20_000, masters=True)
    zero = config["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 20_000
    assert (zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == ("cpu", "cpu")
    assert (config["gradient_clipping"], config["bf16"]["enabled"], config["data_types"]) == (
        0.5,
        True,
        {"grad_accum_dtype": "fp32"},
    )
