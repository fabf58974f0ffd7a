"""Hard limits of what a plan may leave: memory of the weights, and measured latency."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from hipp_ext.budget import Bounds
from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group
from hipp_ext.latency_table import LatencyTable, Phase
from hipp_ext.quantities import finite

STEPS = 20  # of the bisection: a millionth of the parameters

KeepCounts = tuple[int, ...]
Excess = Callable[[KeepCounts], str]  # which limit keep counts exceed, and by what; "": none


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the pruned model may take at most; a plan removes as much as that needs.

    Attributes:
        max_memory_mb: memory of all weights [MB, 10^6 bytes], in the dtype of the loaded model.
        max_latency_ms: expected time [ms] by `latency`.
        latency: times measured in the runtime that will serve the model.
        phase: which time is limited: "decode" (one further token) or "prefill" (the prompt).

    Raises:
        BudgetError: a limit is not above 0, or there is a limit for latency and no table.
    """

    max_memory_mb: float | None = None
    max_latency_ms: float | None = None
    latency: LatencyTable | None = None
    phase: Phase = "decode"

    def __post_init__(self) -> None:
        for name in ("max_memory_mb", "max_latency_ms"):
            given = getattr(self, name)
            if given is not None and ((number := finite(given)) is None or number <= 0):
                raise BudgetError(f"{name}={given!r}: a number above 0 is needed.")
        if self.max_latency_ms is not None and self.latency is None:
            raise BudgetError(
                "A limit of latency needs a table of times measured in the runtime: see "
                "`hipp latency --per-block`."
            )

    def check(self, model: nn.Module, groups: Sequence[Group]) -> Excess:
        """A function that tells of keep counts which limit they exceed, and by what; "": none.

        Raises:
            BudgetError: the latency table is of another model.
        """
        if self.max_latency_ms is not None and self.latency is not None:
            self.latency.check(groups)
        total = weight_bytes(model)
        unit = next(model.parameters()).element_size() * np.array(
            [g.unit_parameters for g in groups]
        )
        widths = np.array([g.width for g in groups])

        def excess(keep_counts: KeepCounts) -> str:
            if self.max_memory_mb is not None:
                left = (total - int(unit @ (widths - keep_counts))) / 1e6
                if left > self.max_memory_mb:
                    return f"its weights take {left:.4g} MB of {self.max_memory_mb:g} MB"
            if self.max_latency_ms is not None and self.latency is not None:
                time = self.latency.latency(groups, keep_counts, self.phase)
                if time > self.max_latency_ms:
                    return (
                        f"{self.phase} is expected to take {time:.4g} ms of "
                        f"{self.max_latency_ms:g} ms in {self.latency.runtime}"
                    )
            return ""

        return excess


def no_excess(keep_counts: KeepCounts) -> str:
    """Without limits no plan exceeds any."""
    return ""


def check_reachable(excess: Excess, groups: Sequence[Group], bounds: Bounds | None) -> None:
    """Raise BudgetError if even the smallest plan within the bounds exceeds a limit."""
    smallest = tuple((bounds or Bounds()).smallest(groups).tolist())
    if reason := excess(smallest):
        raise BudgetError(f"Even the smallest plan within the bounds exceeds a limit: {reason}.")


def counts_within(
    excess: Excess, counts_at: Callable[[float], KeepCounts], pruning_ratio: float, largest: float
) -> KeepCounts:
    """The keep counts of the least pruning_ratio, from `pruning_ratio` on, that exceed no limit.

    Args:
        excess: what `Limits.check` returned.
        counts_at: pruning_ratio -> keep counts.
        pruning_ratio: removed at least.
        largest: the largest ratio that the bounds allow.

    Raises:
        BudgetError: even the plan of the largest ratio exceeds a limit.
    """
    counts = counts_at(pruning_ratio)
    if not excess(counts):
        return counts
    low, high, found = pruning_ratio, largest, counts_at(largest)
    if reason := excess(found):
        raise BudgetError(f"A plan that removes {largest:.1%} still exceeds a limit: {reason}.")
    for _ in range(STEPS):
        middle = (low + high) / 2
        counts = counts_at(middle)
        if excess(counts):
            low = middle
        else:
            high, found = middle, counts
    return found


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; tied ones count once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
