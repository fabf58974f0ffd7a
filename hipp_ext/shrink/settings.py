"""What a shrinking is told: how much goes, in how many rounds, and how each of them recovers."""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from hipp_ext.budget import check_ratio
from hipp_ext.errors import HippError
from hipp_ext.quantities import whole_option
from hipp_ext.recover import RecoverSettings

Spacing = Literal["geometric", "linear"]


@dataclass(frozen=True, kw_only=True)
class ShrinkSettings:
    """How a model is pruned in rounds.

    Attributes:
        to: pruning_ratio at the end, of the dense model's prunable parameters, in [0, 1).
        steps: number of rounds.
        spacing: "geometric": every round removes the same fraction of what is left, so that none
            takes more from the model than the others; "linear": every round removes the same
            number of parameters.
        reconstruct: begin each recovery with a least-squares fit; see `prune`.
        recover: how each round recovers.
        last_steps: optimizer steps of the last recovery; None: as many as of the others.
        only_last: remove the model of a round when the next one is complete.

    Raises:
        BudgetError: `to` is outside [0, 1).
        HippError: another setting is out of range.
    """

    to: float
    steps: int = 4
    spacing: Spacing = "geometric"
    reconstruct: bool = True
    recover: RecoverSettings = field(default_factory=RecoverSettings)
    last_steps: int | None = None
    only_last: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.to, "to")
        for name in ("steps", "last_steps"):
            if (value := getattr(self, name)) is not None or name == "steps":
                object.__setattr__(self, name, whole_option(name, value, HippError, 1))
        if self.spacing not in get_args(Spacing):
            known = ", ".join(get_args(Spacing))
            raise HippError(f"spacing={self.spacing!r}: one of {known} is needed.")

    def ratios(self, gone: float = 0.0) -> tuple[float, ...]:
        """The pruning_ratio after each round, of a model that has lost the fraction `gone`."""
        parts = [number / self.steps for number in range(1, self.steps)]
        if self.spacing == "linear":
            inner = [gone + part * (self.to - gone) for part in parts]
        else:
            inner = [1 - (1 - gone) * ((1 - self.to) / (1 - gone)) ** part for part in parts]
        return (*inner, self.to)

    def recovery(self, number: int) -> RecoverSettings:
        """How round `number`, from 1, recovers."""
        if number < self.steps or self.last_steps is None:
            return self.recover
        return replace(self.recover, steps=self.last_steps)
