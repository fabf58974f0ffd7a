"""The methods, what each of them sends, and how many steps of it fit into a time or into bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RANK, BITS = 4, 8
# Learning rate and momentum of the outer loop.
MEAN = (1.0, 0.0)
MOMENTUM = (1.0, 0.5)
PAPER = (0.7, 0.9)  # DiLoCo, with 500 steps between exchanges


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train on two workers.

    Attributes:
        sends: "plain" for an all-reduce of float32 values, or "lqsgd".
        local_steps: steps between two exchanges; None: gradients are exchanged at every step.
        outer: learning rate and momentum of the outer loop.
    """

    sends: str
    local_steps: int | None = None
    outer: tuple[float, float] = MEAN

    @property
    def name(self) -> str:
        """Name of its files."""
        if self.local_steps is None:
            return f"{self.sends} every step"
        return f"{self.sends} {self.local_steps} {self.outer[0]} {self.outer[1]}"

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings of `RecoverSettings`."""
        compression = "lqsgd" if self.sends == "lqsgd" else "none"
        common: dict[str, Any] = {"compression": compression, "rank": RANK, "bits": BITS}
        if self.local_steps is None:
            return common
        lr, momentum = self.outer
        local = {"local_steps": self.local_steps, "outer_lr": lr, "outer_momentum": momentum}
        return common | local

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
    "8 local steps": Method(sends="plain", local_steps=8),
    "32 local steps": Method(sends="plain", local_steps=32),
    "8 local steps, momentum 0.5": Method(sends="plain", local_steps=8, outer=MOMENTUM),
    "8 local steps, DiLoCo's SGD": Method(sends="plain", local_steps=8, outer=PAPER),
    "8 local steps, LQ-SGD": Method(sends="lqsgd", local_steps=8),
}
