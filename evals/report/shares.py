"""Costs in percent of the first model, for figures."""

import statistics
from collections.abc import Mapping
from typing import Any

Shares = dict[str, dict[str, tuple[float, float, float]]]


def shares(models: Mapping[str, Mapping[str, Any]]) -> Shares:
    """(value, lower quartile, upper quartile) in percent of the first model's value, by quantity
    and model, of a result of `hipp latency`.
    """
    found: Shares = {}
    for label, key, parts in (
        ("parameters", "parameters", ()),
        ("FLOPs of the prompt", "prefill_gflops", ()),
        ("peak memory", "peak_mib", ()),
        ("first token", "prefill_ms", ("median", "low", "high")),
        ("further token", "decode_ms", ("median", "low", "high")),
    ):
        values = {
            name: [row[key][part] for part in parts] or [row[key]] * 3
            for name, row in models.items()
        }
        found[label] = _percent(values)
    return found


def served_shares(models: Mapping[str, Mapping[str, Any]]) -> Shares:
    """(median, least, most) in percent of the first model's median, by quantity and model, of a
    result of `hipp latency --runtime`.
    """
    found: Shares = {}
    for label, key in (
        ("memory", "memory_mib"),
        ("prompt", "prefill_ms"),
        ("further token", "decode_ms"),
    ):
        rounds = {name: [v for v in row[key] if v is not None] for name, row in models.items()}
        if all(rounds.values()):
            found[label] = _percent(
                {n: [statistics.median(v), min(v), max(v)] for n, v in rounds.items()}
            )
    return found


def _percent(values: Mapping[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    base = next(iter(values.values()))[0]
    return {
        name: (100 * value / base, 100 * low / base, 100 * high / base)
        for name, (value, low, high) in values.items()
    }
