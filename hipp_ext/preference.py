"""The user's preference: a point on the simplex."""

from dataclasses import dataclass

from hipp_ext.errors import PreferenceError
from hipp_ext.quantities import finite


@dataclass(frozen=True, init=False)
class Preference:
    """Weights of utility, hallucination robustness and compression, which sum to one.

    Args:
        utility: weight of task accuracy (ScienceQA on the testbed).
        robustness: weight of not hallucinating objects (POPE).
        compression: weight of removing parameters.

    Only proportions count: (4, 4, 2) is (0.4, 0.4, 0.2). For a fitted planner, objectives are
    normalised to [nadir, ideal], so that a weight of 0.5 reaches about half of an objective's
    range, whether that is 50 points of accuracy or 5.

    Raises:
        PreferenceError: a component is negative, not finite or not a number, or all are zero.

    Source: arXiv 2603.06270, abstract: a user preference vector over the same objectives.
    """

    utility: float
    robustness: float
    compression: float

    def __init__(self, utility: float = 0.0, robustness: float = 0.0, compression: float = 0.0):
        given = {"utility": utility, "robustness": robustness, "compression": compression}
        weights = {}
        for name, value in given.items():
            number = finite(value)
            if number is None or number < 0:
                raise PreferenceError(
                    f"Preference({name}={value!r}): a finite number of 0 or more is needed."
                )
            weights[name] = number
        largest = max(weights.values())
        if largest == 0:
            raise PreferenceError(
                "Preference(0, 0, 0) wants nothing: at least one component must be above 0."
            )
        # Scaled by the largest first, because the sum of huge or denormal weights is not exact.
        total = sum(v / largest for v in weights.values())
        for name, number in weights.items():
            object.__setattr__(self, name, number / largest / total)

    def as_tuple(self) -> tuple[float, float, float]:
        """(utility, robustness, compression), summing to one."""
        return self.utility, self.robustness, self.compression

    def __str__(self) -> str:
        weights = zip(("utility", "robustness", "compression"), self.as_tuple(), strict=True)
        return ", ".join(f"{name} {weight:.2f}" for name, weight in weights)
