"""Statistics on made-up answers whose intervals, tests and verdicts are known."""

from __future__ import annotations

import numpy as np
import pytest

from fastpeft.comparison.significance import (
    compare_pair,
    holm,
    interval,
    is_significant,
    row_scores,
)


def answers(*counts: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two methods: of each (first right, second right, number)."""
    first = np.repeat([first for first, _, _ in counts], [number for *_, number in counts])
    second = np.repeat([second for _, second, _ in counts], [number for *_, number in counts])
    return first[None], second[None]


def test_interval_of_one_seed_is_wilsons() -> None:
    low, high = interval(np.array([[1] * 8 + [0] * 2]))
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # Newcombe 1998's form, by hand
    assert interval(np.ones((1, 10), dtype=int)) == pytest.approx((0.7224672, 1.0), abs=1e-6)


def test_interval_over_seeds_by_hand() -> None:
    right = np.array(
        [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    )  # means over rows .75, .5, 1; over seeds 1, 1, 2/3, 1/3
    of_seeds = 0.0625 / 3
    of_rows = ((1 - 0.75) ** 2 * 2 + (2 / 3 - 0.75) ** 2 + (1 / 3 - 0.75) ** 2) / 3 / 4
    freedom = (of_seeds + of_rows) ** 2 / (of_seeds**2 / 2 + of_rows**2 / 3)
    from scipy.stats import t

    half = (of_seeds + of_rows) ** 0.5 * t.ppf(0.975, freedom)
    assert interval(right) == pytest.approx((0.75 - half, 1.0))
    assert 0 < 0.75 - half < 0.75 < 0.75 + half


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(9, 1, 22 / 1024), (5, 5, 1.0), (6, 0, 2 / 64), (0, 0, 1.0), (1, 9, 22 / 1024)],
)
def test_one_seed_is_tested_by_mcnemar(better: int, worse: int, p: float) -> None:
    first, second = answers((1, 1, 50), (0, 0, 20), (1, 0, better), (0, 1, worse))
    found = compare_pair(first, second)
    assert found.p == pytest.approx(p)
    assert found.mean == pytest.approx((better - worse) / (70 + better + worse))
    assert found.low <= found.mean <= found.high
    assert found.test == "McNemar's exact test"


def test_seeds_are_paired() -> None:
    """A difference that every seed has is found although the seeds differ by more."""
    generator = np.random.default_rng(0)
    second = (generator.random((3, 400)) < np.array([[0.6], [0.7], [0.8]])).astype(int)
    first = np.where(np.arange(400) % 5 == 0, 1, second)
    found = compare_pair(first, second)
    assert found.mean > 0
    assert found.p < 0.05
    assert found.low > 0
    shuffled = compare_pair(first[[2, 0, 1]], second)
    assert shuffled.p > 0.05, "the same seeds in another order say nothing"


def test_equal_answers_are_undecided() -> None:
    same = np.ones((3, 20))
    found = compare_pair(same, same)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert not is_significant(found.mean, 0.0)


def test_no_difference_is_seldom_found() -> None:
    """Where two methods are alike, about one comparison in twenty or fewer is significant."""
    generator = np.random.default_rng(1)
    p_values = [compare_pair(*(generator.random((2, 3, 200)) < 0.8).astype(int)).p for _ in range(300)]
    assert sum(p < 0.05 for p in p_values) <= 300 * 0.05 * 1.6


def test_one_seed_tells_apart_what_three_do_not() -> None:
    """Methods that are alike, whose seeds differ by 1.6 points: with one seed the test knows of rows alone."""
    generator = np.random.default_rng(2)

    def told_apart(seeds: int) -> float:
        found = []
        for _ in range(100):
            skill = 0.82 + 0.016 * generator.standard_normal((2, seeds, 1))
            hard = generator.random((1, 1, 872))
            own = generator.random((2, seeds, 872))
            right = np.where(generator.random((1, 1, 872)) < 0.6, hard, own) < skill  # of 6 in 10 rows both think alike
            found.append(compare_pair(*right.astype(int)).p < 0.05)
        return float(np.mean(found))

    assert told_apart(1) > 0.2
    assert told_apart(3) < 0.12


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_scores_of_rows_have_the_metric_as_their_mean_and_its_error() -> None:
    """The standard error of their mean is that of F1 over resampled rows (bootstrap), within its own noise."""
    generator = np.random.default_rng(0)
    below = generator.integers(0, 6, 400)
    above = generator.binomial(below, 0.4)
    scores = row_scores(above, below)
    assert scores.mean() == pytest.approx(above.sum() / below.sum())
    again = generator.integers(0, 400, (4000, 400))
    resampled = above[again].sum(1) / below[again].sum(1)
    assert scores.std(ddof=1) / 20 == pytest.approx(resampled.std(), rel=0.05)
    low, high = interval(scores[None])
    assert (low, high) == pytest.approx(tuple(np.quantile(resampled, (0.025, 0.975))), abs=0.005)
    assert np.array_equal(row_scores([1, 0, 1], [1, 1, 1]), [1, 0, 1])
    assert not row_scores([0, 0], [0, 0]).any()


def test_one_seed_of_other_scores_is_tested_by_t() -> None:
    from scipy.stats import ttest_rel

    first, second = np.random.default_rng(1).normal((0.1, 0.0), 1.0, (50, 2)).T
    found = compare_pair(first[None], second[None])
    assert found.p == pytest.approx(ttest_rel(first, second).pvalue)
    assert found.test == "a t test over rows"


def test_rows_without_a_part_in_the_metric_change_nothing() -> None:
    """A test over 8 sentences with an entity among 1,000 is one over 8: it finds nothing in equal models too often."""
    generator = np.random.default_rng(0)
    below = [2] * 8

    def pair(above: np.ndarray, others: int) -> tuple[np.ndarray, np.ndarray]:
        rest = [0] * others
        first, second = (row_scores([*each, *rest], [*below, *rest])[None] for each in above)
        return first, second

    found = []
    for above in 2 * (generator.random((400, 2, 8)) < 0.5):
        alone, among = (compare_pair(*pair(above, others)) for others in (0, 992))
        assert (among.mean, among.low, among.high, among.p) == pytest.approx(
            (alone.mean, alone.low, alone.high, alone.p), abs=1e-9
        )
        found.append(among.p < 0.05)
    assert np.mean(found) < 0.08
    above = np.array([[2, 0, 2, 2, 0, 2, 2, 2]] * 2)
    assert interval(pair(above, 992)[0]) == pytest.approx(interval(pair(above, 0)[0]))


def test_fractions_without_spread_tell_nothing() -> None:
    """One entity in eight rows, found by one model alone, is no evidence; nor is one row."""
    found, missed = row_scores([2] + [0] * 7, [2] + [0] * 7), row_scores([0] * 8, [1] + [0] * 7)
    difference = compare_pair(found[None], missed[None])
    assert (difference.mean, difference.p, difference.test) == (1.0, 1.0, "a t test over rows")
    assert interval(found[None]) is None
    assert interval(missed[None]) is None
    assert compare_pair(row_scores([5], [10])[None], row_scores([6], [10])[None]).p == 1.0


@pytest.mark.parametrize("rows", [4, 5, 6])
def test_fractions_that_differ_alike_in_every_row_have_the_sign_test(rows: int) -> None:
    """However 0.7 and 0.3 are rounded, and with rows beside them that have no part."""
    below = [10] * rows + [0] * 50
    high, low = (row_scores([*[each, each + 1] * rows][:rows] + [0] * 50, below)[None] for each in (7, 3))
    found = compare_pair(high, low)
    assert found.mean == pytest.approx(0.4)
    assert (found.p, found.test) == (pytest.approx(2 / 2**rows), "a sign test over rows")
    assert found.low < found.mean < found.high
    same, low = compare_pair(high, high), rows / (rows + 1.959964**2)  # Wilson's
    assert (same.mean, same.low, same.high, same.p) == pytest.approx((0.0, low - 1, 1 - low, 1.0))


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_more_seeds_that_do_not_vary_tell_no_more_of_the_rows(seeds: int) -> None:
    right = np.ones((seeds, 20), dtype=bool)
    low = 20 / (20 + 1.959964**2)  # Wilson's
    assert interval(right) == pytest.approx((low, 1.0))
    assert interval(~right) == pytest.approx((0.0, 1 - low))
    found = compare_pair(right, ~right)
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, low, 1.0))
    assert (found.p, found.test) == (pytest.approx(2 / 2**20), "McNemar's exact test")
    assert compare_pair(right[:, :2], ~right[:, :2]).p == pytest.approx(0.5)
    same = compare_pair(right, right)
    assert (same.mean, same.low, same.high, same.p) == pytest.approx((0.0, low - 1, 1 - low, 1.0))


def test_seeds_that_agree_are_one_where_rows_differ() -> None:
    right, other = np.ones((1, 12), int), np.array([[1] * 8 + [0] * 4])
    thrice = compare_pair(right.repeat(3, 0), other.repeat(3, 0))
    assert thrice == compare_pair(right, other)
    assert thrice.p == pytest.approx(0.125)
    assert interval(other.repeat(3, 0)) == interval(other)


def test_seeds_and_rows_with_equal_means_are_no_proof() -> None:
    """Each seed finds another row in three that the other method misses."""
    first = np.array([np.arange(12) % 3 == seed for seed in range(3)])
    found = compare_pair(first, np.zeros_like(first))
    assert found.mean == pytest.approx(1 / 3)
    assert found.p == pytest.approx(2 / 2**4)
    assert found.low < 1 / 3 < found.high


def test_the_interval_of_a_difference_ends_at_one() -> None:
    first = np.ones((2, 4), dtype=bool)
    first[0, 0] = False
    found = compare_pair(first, np.zeros_like(first))
    assert found.low < found.high == 1.0
    assert compare_pair(np.zeros_like(first), first) == -found
