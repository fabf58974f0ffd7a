"""The statistics that the benchmarks share: standard errors, in the unit of the number they belong to.

A benchmark asks several questions about one image, and a model that misreads the image misses them together. So
rows are not independent, and an error bar that counts rows is too small. `clustered_se` counts images.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_BLOCK = 64  # resamples drawn at a time: bounds memory at 64 x clusters, whatever the size of the benchmark


def f1_percent(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    """F1 [%] from the numbers of true positives and of wrong answers, of both kinds together; 0 where there are neither."""
    whole = 2 * hits + misses
    return 100 * np.divide(2 * hits, whole, out=np.zeros_like(whole), where=whole > 0)


def clustered_se(
    counts: np.ndarray,
    clusters: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> np.ndarray:
    """Standard errors of statistics of column sums, by a bootstrap that draws whole clusters with replacement.

    Returns:
        Shape (m,), in the unit of `statistic`; NaN with fewer than two clusters, where no spread can be seen.

    Arguments, errors and source as `cluster_resamples`.
    """
    return cluster_resamples(counts, clusters, statistic, seed=seed, resamples=resamples).std(
        axis=0, ddof=1
    )


def cluster_resamples(
    counts: np.ndarray,
    clusters: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> np.ndarray:
    """The statistics of each resample of a bootstrap that draws whole clusters with replacement.

    Args:
        counts: shape (rows, k), what each row adds to each of k sums.
        clusters: the cluster (image) of each row.
        statistic: column sums, shape (..., k), to statistics, shape (..., m).
        seed: of the draws; the same seed gives the same numbers.
        resamples: bootstrap draws, at least 2.

    Returns:
        Shape (resamples, m), in the unit of `statistic`; NaN with fewer than two clusters.

    Raises:
        ValueError: rows and clusters differ in number, or fewer than 2 resamples.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 6; clusters as in Field and
    Welsh, "Bootstrapping clustered data" (2007), section 3.
    """
    counts = np.asarray(counts, dtype=float)
    if len(counts) != len(clusters):
        raise ValueError(f"{len(counts)} rows of counts, but {len(clusters)} clusters")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, not {resamples}")
    sums = cluster_sums(counts, clusters)
    if len(sums) < 2:
        return np.full((resamples, *np.asarray(statistic(counts.sum(axis=0))).shape), math.nan)
    rng, drawn = np.random.default_rng(seed), []
    for start in range(0, resamples, _BLOCK):
        block = min(_BLOCK, resamples - start)
        drawn.append(
            statistic(
                rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=block) @ sums
            )
        )
    return np.concatenate(drawn)


def cluster_sums(counts: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Column sums of each cluster, shape (clusters, k), clusters in the order of their first rows."""
    counts = np.asarray(counts, dtype=float)
    ids = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(ids), counts.shape[1]))
    np.add.at(sums, [ids[cluster] for cluster in clusters], counts)
    return sums


def binomial_se(percent: float, n: int) -> float:
    """Standard error [percentage points] of a share of `percent` [0, 100] among n independent rows; NaN if n is 0.

    It is 0 at 0 and at 100: a share without a miss carries no measured spread, which is not certainty.
    """
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / n) if n else math.nan


def without_nan(value: Any) -> Any:
    """Numbers in nested dicts, with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(own) for name, own in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
