"""Accuracy, pass@k and their intervals: closed forms, brute force over subsets, and coverage by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlsys.evaluation.statistics import difference, evaluation_of, over_problems, pass_at_k, wilson


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one() -> None:
    for n, k in [(1, 1), (4, 1), (5, 2), (6, 3), (7, 7)]:
        for c in range(n + 1):
            right = np.arange(n) < c
            hits = [right[list(chosen)].any() for chosen in itertools.combinations(range(n), k)]
            assert pass_at_k(np.array([c]), n, k)[0] == pytest.approx(np.mean(hits), abs=1e-15)


def test_pass_at_k_is_the_closed_form_with_binomials() -> None:
    n = 40
    for k in (1, 3, 17, 39, 40):
        wanted = [1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)]
        np.testing.assert_allclose(pass_at_k(np.arange(n + 1), n, k), wanted, atol=1e-14)


def test_pass_at_1_is_the_mean_and_pass_at_n_is_whether_any_is_right() -> None:
    c = np.arange(11)
    np.testing.assert_allclose(pass_at_k(c, 10, 1), c / 10, atol=1e-15)
    np.testing.assert_array_equal(pass_at_k(c, 10, 10), (c > 0).astype(float))


def test_pass_at_k_is_exactly_zero_and_one_at_its_ends_for_counts_whose_binomials_overflow() -> None:
    n, k = 20_000, 10_000
    assert math.comb(n, k) > 1e308, "a float cannot hold it"
    found = pass_at_k(np.array([0, 1, n - k, n - k + 1, n]), n, k)
    assert found[0] == 0.0 and found[1] == pytest.approx(0.5) and found[3] == found[4] == 1.0
    assert np.isfinite(found).all()


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over the binomial distribution of c is 1 - (1 - p)^k, whatever p."""
    n, k = 9, 4
    for p in (0.0, 0.1, 0.5, 0.93, 1.0):
        chances = np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])
        assert chances @ pass_at_k(np.arange(n + 1), n, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_wilson_gives_the_ends_that_a_score_test_just_does_not_reject() -> None:
    """(mean - p)^2 = z^2 p (1 - p) / n at both ends."""
    z = 1.959963984540054
    for right, n in [(0, 10), (3, 10), (10, 10), (81, 263), (199, 200)]:
        found = wilson(right / n, n, 0.95)
        for end in (found.low, found.high):
            assert (right / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
    printed = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, n), ends in printed.items():
        found = wilson(right / n, n, 0.95)
        assert (found.low, found.high) == pytest.approx(ends, abs=5e-5)


def test_wilson_holds_the_true_accuracy_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    for p in (0.5, 0.9, 0.97):
        draws = rng.binomial(200, p, size=4000)
        ends = {right: wilson(right / 200, 200, 0.95) for right in set(draws.tolist())}
        covered = np.mean([ends[right].low <= p <= ends[right].high for right in draws.tolist()])
        assert 0.93 <= covered <= 0.975, (p, covered)


def test_wilson_is_no_narrower_than_need_be_for_grades_between_0_and_1() -> None:
    rng = np.random.default_rng(2)
    grades = rng.beta(0.4, 0.6, size=(2000, 100))
    found = [wilson(float(row.mean()), 100, 0.95) for row in grades]
    assert np.mean([one.low <= 0.4 <= one.high for one in found]) >= 0.95


def test_a_higher_confidence_is_a_wider_interval() -> None:
    narrow, wide = wilson(0.4, 50, 0.8), wilson(0.4, 50, 0.99)
    assert wide.low < narrow.low < 0.4 < narrow.high < wide.high
    values = np.random.default_rng(0).random(50)
    narrow, wide = over_problems(values, 0.8), over_problems(values, 0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


# Problems differ in difficulty: an interval over completions alone would be far too narrow. Resampling problems covers
# the second case in 0.79 of all trials.
@pytest.mark.parametrize(("a", "b", "P"), [(0.5, 1.0, 120), (3.0, 0.1, 200), (0.05, 3.0, 60), (8.0, 8.0, 40)])
def test_the_interval_of_pass_at_k_holds_the_true_one_as_often_as_it_says(a: float, b: float, P: int) -> None:
    rng = np.random.default_rng(3)
    n, k, trials = 8, 4, 1500
    true = 1 - np.mean((1 - rng.beta(a, b, size=2_000_000)) ** k)
    drawn = [pass_at_k(rng.binomial(n, rng.beta(a, b, size=P)), n, k) for _ in range(trials)]
    found = [over_problems(values, 0.95) for values in drawn]
    assert np.mean([one.low <= true <= one.high for one in found]) >= 0.935


def test_the_interval_of_pass_at_k_is_no_wider_than_its_spread_asks_for() -> None:
    rng = np.random.default_rng(4)
    drawn = [pass_at_k(rng.binomial(8, rng.beta(0.5, 1.0, size=300)), 8, 4) for _ in range(2000)]
    widths = [one.high - one.low for one in (over_problems(values, 0.9) for values in drawn[:200])]
    assert np.mean(widths) == pytest.approx(2 * 1.645 * np.std([values.mean() for values in drawn]), rel=0.04)


def test_for_values_0_and_1_it_is_agresti_and_coulls_interval() -> None:
    z = 1.959963984540054
    for right, n in [(3, 10), (81, 263), (190, 200)]:
        centre, total = (right + z * z / 2) / (n + z * z), n + z * z
        half = z * math.sqrt(centre * (1 - centre) / total)
        found = over_problems((np.arange(n) < right).astype(float), 0.95)
        assert (found.low, found.high) == pytest.approx((centre - half, min(1.0, centre + half)), abs=1e-12)


def test_problems_that_all_agree_are_no_certainty() -> None:
    for value in (0.0, 0.5, 1.0):
        found = over_problems(np.full(40, value), 0.95)
        assert found.low < value or value == 0
        assert found.high > value or value == 1
        assert 0.05 < found.high - found.low < 0.15


def test_every_value_lies_in_its_interval_and_the_interval_in_0_to_1() -> None:
    rng = np.random.default_rng(7)
    for P in (1, 2, 5, 30):
        solved, passed = rng.integers(0, 2, P).astype(float), rng.integers(0, 5, P)
        found = evaluation_of(solved, passed, 4, [1, 2, 4], 0.95)
        for one in (found.accuracy, *found.pass_at.values()):
            assert 0 <= one.low <= one.value <= one.high <= 1 and one.low < one.high


def test_more_tries_never_pass_less() -> None:
    passed = np.random.default_rng(8).integers(0, 9, 60)
    found = evaluation_of(np.zeros(60), passed, 8, [1, 2, 4, 8], 0.95)
    values = [one.value for one in found.pass_at.values()]
    assert values == sorted(values)


def test_facts_carry_every_figure_by_name() -> None:
    metrics = evaluation_of(np.array([1.0, 0.0, 1.0, 1.0]), np.array([2, 0, 1, 2]), 2, [1, 2], 0.95).metrics()
    assert metrics["eval/accuracy"] == 0.75 and metrics["eval/pass_at_1"] == 0.625 and metrics["eval/pass_at_2"] == 0.75
    assert set(metrics) == {
        "eval/problems", "eval/samples", "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/pass_at_1",
        "eval/pass_at_1_low", "eval/pass_at_1_high", "eval/pass_at_2", "eval/pass_at_2_low", "eval/pass_at_2_high",
        "eval/solved", "eval/solved_low", "eval/solved_high",
    }  # fmt: skip
    assert (metrics["eval/problems"], metrics["eval/samples"]) == (4.0, 2.0)


@pytest.mark.parametrize("scale", [(-3.0, 0.5), (1e6, 2e5), (0.4, 0.1), (-1e-7, 1e-8)])
def test_grades_of_any_size_have_their_mean_and_a_normal_interval_that_holds_the_true_one(
    scale: tuple[float, float],
) -> None:
    rng, trials = np.random.default_rng(12), 2000
    drawn = rng.normal(*scale, size=(trials, 50))
    found = [evaluation_of(row, None, 0, [1], 0.95).accuracy for row in drawn]
    assert 0.93 <= np.mean([one.low <= scale[0] <= one.high for one in found]) <= 0.965
    row, one = drawn[0], found[0]
    half = 1.959963984540054 * np.std(row, ddof=1) / math.sqrt(50)
    assert (one.value, one.low, one.high) == pytest.approx((row.mean(), row.mean() - half, row.mean() + half))


def test_what_is_solved_is_a_share_whatever_the_grades_are() -> None:
    grades = np.array([-4.0, -0.5, -0.5, 2.0])
    found = evaluation_of(grades, None, 0, [1], 0.95, solved_at=-0.5)
    assert found.solved == wilson(0.75, 4, 0.95) and found.accuracy.value == -0.75
    assert evaluation_of(grades, None, 0, [1], 0.95).solved.value == 0.25, "a grade of 1 or more"
    binary = evaluation_of(np.array([1.0, 0.0, 1.0]), None, 0, [1], 0.95)
    assert binary.solved == binary.accuracy == wilson(2 / 3, 3, 0.95)


def test_one_problem_and_problems_that_are_all_the_same_have_finite_ends() -> None:
    for grades in ([-7.5], [0.25, 0.25], [1e9] * 3):
        one = evaluation_of(np.array(grades), None, 0, [1], 0.95).accuracy
        assert one.low == one.value == one.high == grades[0]


def test_a_difference_of_grades_of_any_size_is_their_mean_difference_with_a_normal_interval() -> None:
    rng = np.random.default_rng(13)
    covered = 0
    for _ in range(1500):
        before = rng.normal(-20, 5, 60)
        found = difference(before, before + rng.normal(3, 2, 60), 0.95)
        covered += int(found.low <= 3 <= found.high)
    assert 0.93 <= covered / 1500 <= 0.965


def test_without_sampled_completions_there_is_no_pass_at_k() -> None:
    metrics = evaluation_of(np.array([1.0, 0.0]), None, 0, [1], 0.95).metrics()
    assert metrics["eval/samples"] == 0 and not any("pass_at" in name for name in metrics)


def test_two_policies_that_differ_on_few_problems_are_told_apart_by_pairs_alone() -> None:
    rng = np.random.default_rng(9)
    before = (rng.random(200) < 0.5).astype(float)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:12]] = 1.0
    paired = difference(before, after, 0.95)
    assert paired.value == pytest.approx(0.06) and paired.low > 0
    first, second = (wilson(float(grades.mean()), 200, 0.95) for grades in (before, after))
    assert first.high > second.low, "side by side the intervals overlap"


def test_a_difference_turns_its_sign_with_the_order() -> None:
    rng = np.random.default_rng(10)
    before, after = rng.random(40), rng.random(40)
    one, other = difference(before, after, 0.95), difference(after, before, 0.95)
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low), abs=1e-15)


def test_a_difference_of_right_and_wrong_is_agresti_and_mins_interval() -> None:
    """Half a pair more in each of the four cells, then Wald's interval."""
    z, both, lost, won, neither = 1.959963984540054, 20, 5, 11, 14
    n, cells = both + lost + won + neither + 2, np.array([lost + 0.5, won + 0.5])
    gain = (cells[1] - cells[0]) / n
    half = z * math.sqrt(cells.sum() - (cells[1] - cells[0]) ** 2 / n) / n
    counts = [both, lost, won, neither]
    found = difference(np.repeat([1.0, 1, 0, 0], counts), np.repeat([1.0, 0, 1, 0], counts), 0.95)
    assert found.value == pytest.approx((won - lost) / 50)
    assert (found.low, found.high) == pytest.approx((gain - half, gain + half), abs=1e-12)


def test_the_interval_of_a_difference_holds_the_true_one_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    for cells in ([0.5, 0.49, 0.005, 0.005], [0.6, 0.2, 0.12, 0.08], [0.3, 0.2, 0.45, 0.05]):
        covered = 0
        for counts in rng.multinomial(200, cells, size=1500):
            before, after = np.repeat([1.0, 0, 0, 1], counts), np.repeat([1.0, 0, 1, 0], counts)
            found = difference(before, after, 0.95)
            covered += int(found.low <= cells[2] - cells[3] <= found.high)
        assert covered / 1500 >= 0.935, cells


def test_policies_that_agree_on_every_problem_may_still_differ_on_others() -> None:
    grades = np.array([1.0, 0.0] * 25)
    found = difference(grades, grades, 0.95)
    assert found.value == 0 and found.low == -found.high and 0.02 < found.high < 0.08
