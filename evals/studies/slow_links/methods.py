"""The methods, what each of them sends, and how many steps of it fit into a time or into bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RANK, BITS = 4, 8


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train on two workers.

    Attributes:
        sends: "plain" for an all-reduce of float32 values, or "lqsgd".
        local_steps: steps between two exchanges; None: gradients are exchanged at every step.
    """

    sends: str
    local_steps: int | None = None

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.sends} {self.local_steps or 'every step'}"

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings of `RecoverSettings`."""
        compression = "lqsgd" if self.sends == "lqsgd" else "none"
        return {"compression": compression, "rank": RANK, "bits": BITS} | (
            {} if self.local_steps is None else {"local_steps": self.local_steps}
        )

    def exchanges(self, steps: int) -> int:
        """Exchanges in a run of `steps` steps."""
        return -(-steps // (self.local_steps or 1))

    def cost(self, steps: int, step: float, exchange: float) -> float:
        """What a run costs, by the cost of a step and that of an exchange."""
        return steps * step + self.exchanges(steps) * exchange

    def steps_within(self, limit: float, most: int, step: float, exchange: float) -> int:
        """The most steps, at most `most`, that cost no more than `limit`; see `cost`."""
        fitting = (n for n in range(most, 0, -1) if self.cost(n, step, exchange) <= limit)
        return next(fitting, 0)


METHODS: Mapping[str, Method] = {
    "fp32 all-reduce": Method(sends="plain"),
    "LQ-SGD": Method(sends="lqsgd"),
    "local steps, 8": Method(sends="plain", local_steps=8),
    "local steps, 32": Method(sends="plain", local_steps=32),
    "local steps, 8, LQ-SGD": Method(sends="lqsgd", local_steps=8),
}
