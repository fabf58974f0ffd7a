"""Error bars, tests and sample sizes: against closed forms, hand computation, and simulation."""

import math

import numpy as np
import pytest

from hipp_ext.evals.statistics import (
    bootstrap_estimate,
    clustered_mean_se,
    clustered_se,
    mcnemar_p,
    mean_of_means_se,
    paired_difference,
    questions_needed,
)


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def clustered_pairs(
    rng, clusters: int, size: int, gain: float = 0.0
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Two models whose right answers share each picture's difficulty, and who each misread whole
    pictures at times.
    """
    shape = (clusters, size)
    difficulty = rng.normal(0, 1, (clusters, 1))
    sides = []
    for shift in (0.0, gain):
        misread = rng.normal(0, 1.2, (clusters, 1))
        sides.append((difficulty + misread + rng.normal(0, 1, shape) + 1.5 + shift > 0).ravel())
    return *sides, [str(n // size) for n in range(clusters * size)]


def test_bootstrap_error_equals_the_closed_form_and_metrics():
    rng = np.random.default_rng(1)
    sizes = rng.integers(2, 9, 250)
    clusters = [str(c) for c, size in enumerate(sizes) for _ in range(size)]
    values = (np.repeat(rng.normal(0, 1, 250), sizes) + rng.normal(0, 1, sizes.sum()) > 0.3).astype(
        float
    )
    counts = np.stack([values, np.ones(len(values))], axis=1)
    estimate = bootstrap_estimate(counts, clusters, mean, seed=2, resamples=4000)
    closed = clustered_mean_se(values, clusters)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.se == pytest.approx(closed, rel=0.05)
    assert (
        estimate.se
        == clustered_se(counts, clusters, lambda s: mean(s)[..., None], seed=2, resamples=4000)[0]
    )
    assert closed > 1.3 * math.sqrt(values.var() / len(values))  # rows of a picture go together
    assert estimate.low == pytest.approx(values.mean() - 1.96 * closed, abs=0.15 * closed)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * closed, abs=0.15 * closed)


def test_closed_form_by_hand():
    # Means 1 and 1/3 in clusters of 1 and 3: overall 1/2; residuals 1 - 1/2 and 1 - 3/2; sqrt(2 *
    # (1/4 + 1/4)) / 4.
    assert clustered_mean_se(np.array([1, 1, 0, 0]), ["a", "b", "b", "b"]) == pytest.approx(0.25)
    assert math.isnan(clustered_mean_se(np.array([1, 0]), ["a", "a"]))


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_the_error_of_a_mean_of_means_counts_what_moves_them_together(shared):
    rng = np.random.default_rng(3)
    pictures = rng.normal(0, 1, 300)
    samples, names = [], [str(n) for n in range(300)]
    for size, first in ((400, 0), (700, round(150 * (1 - shared)))):
        seen = first + rng.integers(0, 150, size)  # of the second sample `shared` with the first
        seen[:2] = first, first + 1
        samples.append((pictures[seen] + rng.normal(0, 0.3, size), [names[n] for n in seen]))
    (one, left), (other, right) = samples
    counts = np.zeros((1100, 4))
    counts[:400, 0], counts[:400, 1], counts[400:, 2], counts[400:, 3] = one, 1, other, 1

    def both(sums):
        return (mean(sums[..., :2]) + mean(sums[..., 2:]))[..., None] / 2

    drawn = clustered_se(counts, [*left, *right], both, seed=2, resamples=4000)[0]
    together = mean_of_means_se(samples)
    assert together == pytest.approx(drawn, rel=0.05)
    apart = math.hypot(*(clustered_mean_se(*own) for own in samples)) / 2
    assert together == pytest.approx(apart) if not shared else together > 1.1 * apart
    assert mean_of_means_se([samples[0]] * 2) == pytest.approx(clustered_mean_se(one, left))
    assert math.isnan(mean_of_means_se([samples[0], (np.ones(2), ["a", "a"])]))


def test_intervals_cover_and_p_keeps_its_level_where_mcnemar_does_not():
    covered, rejected, naive, runs = 0, 0, 0, 400
    many_a, many_b, _ = clustered_pairs(np.random.default_rng(9), 40000, 6, gain=0.4)
    truth = 100 * (many_b.mean() - many_a.mean())
    rng = np.random.default_rng(4)
    for run in range(runs):
        a, b, clusters = clustered_pairs(rng, 90, 6, gain=0.4)
        estimate = paired_difference(a, b, clusters, seed=run, resamples=400).difference
        covered += estimate.low <= truth <= estimate.high
        a, b, clusters = clustered_pairs(rng, 90, 6)
        null = paired_difference(a, b, clusters, seed=run, resamples=400)
        rejected += null.difference.p_value < 0.05
        naive += null.mcnemar_p < 0.05
    margin = 3.3 * math.sqrt(0.05 * 0.95 / runs)  # of the simulation
    assert abs(covered / runs - 0.95) < margin + 0.01
    assert rejected / runs < 0.05 + margin + 0.01
    assert naive / runs > 0.15  # the caveat that the table states: three times its level, and more


def test_p_value_and_interval_say_the_same():
    rng = np.random.default_rng(6)
    seen = set()
    for run in range(60):
        a, b, clusters = clustered_pairs(rng, 40, 3, gain=rng.uniform(0, 1))
        own = paired_difference(a, b, clusters, seed=run, resamples=999).difference
        if abs(own.p_value - 0.05) > 0.01:  # next to the level, ties decide
            assert (own.p_value < 0.05) == (own.low > 0 or own.high < 0)
            seen.add(own.p_value < 0.05)
    assert seen == {True, False}


def test_mcnemar_by_hand():
    # 9 discordant, 1 against 8: 2 * (1 + 9) / 2**9.
    assert mcnemar_p(1, 8) == pytest.approx(20 / 512)
    assert mcnemar_p(8, 1) == pytest.approx(20 / 512)
    assert (
        mcnemar_p(0, 5) == pytest.approx(2 / 32) and mcnemar_p(4, 4) == 1 and mcnemar_p(0, 0) == 1
    )
    with pytest.raises(ValueError, match="cannot be negative: -1 and 2"):
        mcnemar_p(-1, 2)


def test_paired_difference_by_hand():
    a, b = [1, 1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 0, 1, 0, 0]
    own = paired_difference(a, b, list("ppqqrrss"), resamples=200)
    assert (own.n, own.clusters, own.only_a, own.only_b) == (8, 4, 3, 1)
    assert (own.a, own.b, own.difference.value) == (62.5, 37.5, -25)
    assert own.discordance == 50 and own.mcnemar_p == pytest.approx(2 * (1 + 4) / 16)
    # Gains by picture -1, 0, 0, -1, less -1/4 for each of 2 rows: residuals -1/2, 1/2, 1/2, -1/2;
    # variance 4/3 / 64.
    assert own.design_effect == pytest.approx((4 / 3 / 64) / ((4 / 8 - 1 / 16) / 8))


def test_pairing_is_what_makes_it_sharp():
    rng = np.random.default_rng(8)
    a = rng.random(3000) < 0.8
    b = a ^ (rng.random(3000) < 0.02)
    paired = paired_difference(a, b, resamples=1000).difference.se
    apart = 100 * math.sqrt(a.var() / 3000 + b.var() / 3000)
    assert paired < 0.4 * apart


def test_bootstrap_is_seeded_and_undefined_for_one_picture():
    a, b, clusters = clustered_pairs(np.random.default_rng(2), 30, 4)
    assert paired_difference(a, b, clusters, seed=3) == paired_difference(a, b, clusters, seed=3)
    assert paired_difference(a, b, clusters, seed=3) != paired_difference(a, b, clusters, seed=4)
    alone = paired_difference(a, b, ["one"] * len(a))
    assert (
        math.isnan(alone.difference.se)
        and math.isnan(alone.difference.p_value)
        and math.isnan(alone.design_effect)
    )
    same = paired_difference(a, a, clusters)
    assert (
        same.difference.value == same.difference.se == 0
        and same.difference.p_value == same.mcnemar_p == 1
    )
    assert math.isnan(same.design_effect)


@pytest.mark.parametrize(("difference", "discordance"), [(2.0, 8.0), (5.0, 20.0)])
def test_the_number_of_questions_has_the_power_it_promises(difference, discordance):
    n = questions_needed(difference, discordance, power=0.8)
    rng = np.random.default_rng(0)
    up, down = (discordance + difference) / 200, (discordance - difference) / 200
    only_b, only_a, _ = rng.multinomial(n, [up, down, 1 - up - down], size=20000).T
    power = np.mean(np.abs(only_b - only_a) / np.sqrt(np.maximum(only_a + only_b, 1)) > 1.96)
    assert power == pytest.approx(0.8, abs=0.015)
    exact = np.mean(
        [mcnemar_p(int(a), int(b)) < 0.05 for a, b in zip(only_a[:600], only_b[:600], strict=True)]
    )
    assert 0.72 < exact < 0.82  # a little less, as the docstring says


def test_the_number_of_questions_by_hand_and_its_directions():
    # psi = .1, delta = .05, 80%: (1.959964 * sqrt(.1) + .841621 * sqrt(.1 - .0025))**2 / .0025 =
    # 311.8
    assert questions_needed(5, 10) == questions_needed(-5, 10) == 312
    assert questions_needed(1, 10) > 24 * 312 / 1.1 and questions_needed(5, 20) > 600
    assert questions_needed(5, 10, power=0.9) > 400 and questions_needed(5, 10, alpha=0.01) > 400
    assert questions_needed(5, 10, design_effect=2) == pytest.approx(2 * 312, abs=2)


def test_the_number_of_questions_holds_for_clusters_too():
    rng = np.random.default_rng(12)
    a, b, clusters = clustered_pairs(rng, 30000, 6, gain=0.35)
    large = paired_difference(a, b, clusters, resamples=50)
    assert large.design_effect > 1.5
    n = questions_needed(
        large.difference.value, large.discordance, design_effect=large.design_effect
    )
    hits = []
    for run in range(200):
        a, b, clusters = clustered_pairs(rng, round(n / 6), 6, gain=0.35)
        hits.append(
            paired_difference(a, b, clusters, seed=run, resamples=400).difference.p_value < 0.05
        )
    assert np.mean(hits) == pytest.approx(0.8, abs=0.1)


def test_refusals():
    for difference, discordance in ((0, 10), (11, 10), (5, 101), (math.nan, 10)):
        with pytest.raises(ValueError, match="0 < difference <= discordance <= 100 is needed"):
            questions_needed(difference, discordance)
    for wrong in ({"power": 1}, {"alpha": 0}, {"design_effect": 0}):
        with pytest.raises(ValueError, match="power and alpha must be in"):
            questions_needed(1, 10, **wrong)
    with pytest.raises(ValueError, match="clusters must have one length, above 0; got 2, 1 and 2"):
        paired_difference([1, 0], [1])
    with pytest.raises(ValueError, match="one length, above 0; got 0, 0 and 0"):
        paired_difference([], [])
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), not 1"):
        paired_difference([1, 0], [0, 1], level=1)


def test_counts_beyond_reason_are_refused():
    with pytest.raises(
        ValueError,
        match="discordant counts can add up to 1,000,000,000,000,000, and these are more",
    ):
        mcnemar_p(10**400, 1)
    assert 0 <= mcnemar_p(10**14, 10**14 + 1) <= 1
    with pytest.raises(
        ValueError, match="more than 1,000,000,000,000,000 questions would be needed"
    ):
        questions_needed(1e-300, 50)
    with pytest.raises(
        ValueError, match="more than 1,000,000,000,000,000 questions would be needed"
    ):
        questions_needed(1, 50, design_effect=1e308)


@pytest.mark.parametrize("count", [1e308, math.inf, math.nan])
def test_counts_that_no_sum_can_hold_end_in_a_number_or_nan(count):
    with np.errstate(all="ignore"):
        estimate = bootstrap_estimate(
            np.array([[count, 1], [count, 1]]), ["a", "b"], mean, resamples=20
        )
    assert isinstance(estimate.low, float)
