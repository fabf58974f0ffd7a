"""What the study measures one after the other, and the names of the files that hold it."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from hipp_ext.evals.studies.real_lm.methods import METHODS

Side = Literal["sliced", "reconstructed"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One pruned model to measure; its `name` is that of its file."""

    method: str
    draw: int
    ratio: float
    side: Side

    @property
    def name(self) -> str:
        return f"{self._slug}-{self.draw}-{100 * self.ratio:g}-{self.side}"

    @property
    def plan_name(self) -> str:
        """Name of the file of the plan, which all jobs with this plan share."""
        return f"{self._slug}-{self.plan_draw}-{100 * self.ratio:g}.plan"

    @property
    def plan_draw(self) -> int:
        """Draw of the calibration that the plan is made from."""
        return self.draw if METHODS[self.method].calibrated else 0

    @property
    def _slug(self) -> str:
        return re.sub(r"\W+", "_", self.method)


def sides_of(method: str, draw: int) -> list[Side]:
    """The sides of a method in a draw: what no draw changes is measured once."""
    found: list[Side] = ["sliced"] if METHODS[method].calibrated or draw == 0 else []
    return [*found, "reconstructed"] if METHODS[method].reconstructs else found
