"""What `auto` stands for: the published rules, with their bounds, for every number of examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.service.hyperparameters import auto_batch_size, auto_epochs, resolve
from kivnun.spec import rate_table

EXAMPLES = st.integers(1, 3_000_000)


@given(EXAMPLES)
def test_auto_epochs_show_at_least_a_hundred_examples_and_at_most_25000_where_that_can_be(examples: int) -> None:
    epochs = auto_epochs(examples)
    assert 1 <= epochs <= 25
    assert epochs == 25 or epochs * (examples + 1) >= 75, "a hundred, as near as whole epochs come"
    assert epochs == 1 or epochs * examples <= 25_000


@pytest.mark.parametrize(
    ("examples", "epochs"), [(1, 25), (4, 25), (5, 20), (10, 10), (33, 3), (34, 3), (8333, 3), (8334, 2), (12_501, 1), (30_000, 1)]
)
def test_auto_epochs_follow_the_published_rule(examples: int, epochs: int) -> None:
    assert auto_epochs(examples) == epochs


@given(EXAMPLES)
def test_an_auto_batch_is_a_500th_of_the_examples_within_1_and_256(examples: int) -> None:
    size = auto_batch_size(examples)
    assert 1 <= size <= 256
    assert size in (1, 256) or abs(size - examples / 500) <= 0.5


@given(
    st.sampled_from(["supervised", "dpo"]),
    EXAMPLES,
    st.one_of(st.none(), st.just("auto"), st.integers(1, 50)),
    st.one_of(st.none(), st.just("auto"), st.integers(1, 256)),
    st.one_of(st.none(), st.just("auto"), st.floats(1e-6, 1e4)),
    st.sampled_from([None, 1_000_000, 4_000_000_000]),
)
def test_what_is_asked_for_is_kept_and_the_rate_is_the_multiplier_times_the_bases_own(
    method: str, examples: int, epochs: object, size: object, multiplier: object, parameters: int | None
) -> None:
    asked = {"n_epochs": epochs, "batch_size": size, "learning_rate_multiplier": multiplier}
    found = resolve(method, asked, examples, parameters)  # type: ignore[arg-type]
    assert found.n_epochs == (epochs if isinstance(epochs, int) else auto_epochs(examples))
    assert found.batch_size == (size if isinstance(size, int) else auto_batch_size(examples))
    assert found.learning_rate_multiplier == (multiplier if isinstance(multiplier, float) else 1.0)
    rates = {(objective, kinds): (large, small) for objective, kinds, large, small in rate_table()}
    own = rates[method, "lora, dora"][parameters == 1_000_000]
    assert found.learning_rate == pytest.approx(own * found.learning_rate_multiplier, rel=1e-8)
    assert found.beta == (0.1 if method == "dpo" else None)
    assert ("beta" in found.shown()) == (method == "dpo")
