import pytest

from lqf_lightning.linear.representation import choose_representation

GIB = 2**30


def test_small_problems_take_the_exact_kernel() -> None:
    choice = choose_representation(500, 10, 11_000_000)
    assert choice.name == "kernel"
    assert choice.memory == 28 * 5000**2
    assert choice.reason == (
        "exact kernel: 500 samples x 10 outputs = 5,000 rows (limit 20,000) take 0.65 GiB of 12 GiB"
    )


@pytest.mark.parametrize(("samples", "name"), [(2000, "kernel"), (2001, "streamed")])
def test_the_limit_is_on_samples_times_outputs(samples: int, name: str) -> None:
    assert choose_representation(samples, 10, 10**6, 100 * GIB).name == name


def test_what_exceeds_the_budget_is_streamed_and_the_reason_says_so() -> None:
    choice = choose_representation(1500, 10, 11_000_000, 4 * GIB)
    assert choice.name == "streamed"
    assert choice.reason.endswith("15,000 rows takes 5.9 GiB, the budget is 4 GiB")
    assert choice.memory == 20 * 11_000_000
    assert choose_representation(1500, 10, 11_000_000, 4 * GIB, groups=1, limit=14_000).reason.endswith("14,000")


def test_kernels_by_layer_group_count_for_the_budget() -> None:
    assert choose_representation(1500, 10, 10**6, 6 * GIB).name == "kernel"
    assert choose_representation(1500, 10, 10**6, 6 * GIB, groups=8).name == "streamed"


def test_features_are_taken_where_they_are_cheaper_than_the_kernel() -> None:
    assert choose_representation(50_000, 100, 128_100, features=1281).name == "features"
    assert choose_representation(500, 10, 12_810, features=1281).name == "features"
    # 50 samples in 1281 dimensions: the kernel is smaller.
    assert choose_representation(50, 2, 2_562, features=1281).name == "kernel"
    # The whole Jacobian of a network with 9,610 parameters.
    assert choose_representation(500, 10, 9_610, features=9_610, shared=False).name == "kernel"
    assert choose_representation(5000, 10, 9_610, features=9_610, shared=False).name == "features"
    assert choose_representation(5000, 10, 9_610, 2 * GIB, features=9_610, shared=False).name == "streamed"


def test_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive, got samples=0, features=-1"):
        choose_representation(0, 10, 5, features=-1)
