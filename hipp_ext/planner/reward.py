"""Plan -> reward: the evaluator's scores, what the plan removes, and what both are worth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.errors import DataError
from hipp_ext.groups import Tower
from hipp_ext.planner.policy import MAX_RATIO
from hipp_ext.quantities import finite

Evaluator = Callable[[nn.Module], Mapping[str, float]]
SMOOTHING = 0.03  # of the Tchebycheff scalarisation, in units of the objectives
AUGMENTATION = 0.02  # weight of the plain sum beside it
DEFAULT_ENDS = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, MAX_RATIO]])  # (nadir, ideal) point
MAX_REWARD = 1e6  # of any component: the hypervolume multiplies three of them
SCORE_TOLERANCE = 0.005  # scores of one model on one set of questions, on any hardware


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What one plan achieves; utility, robustness and compression are maximised.

    Attributes:
        utility: score from the evaluator; ours is 1 for certain and right, 0 for guessing.
        robustness: the same on POPE.
        compression: fraction of the cost that the plan saves; of parameters it is the
            plan's pruning_ratio.
        utility_se: standard error of utility over the evaluator's questions; 0 if it gives none.
        robustness_se: standard error of robustness.
    """

    utility: float
    robustness: float
    compression: float
    utility_se: float = 0.0
    robustness_se: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Component name -> value."""
        return asdict(self)

    def objectives(self) -> list[float]:
        """[utility, robustness, compression], the axes of the Pareto front."""
        return [self.utility, self.robustness, self.compression]

    def __str__(self) -> str:
        def shown(value: float, error: float) -> str:
            return f"{value:.3f}" + (f" ± {error:.3f}" if error else "")

        return (
            f"utility {shown(self.utility, self.utility_se)}, "
            f"robustness {shown(self.robustness, self.robustness_se)}, "
            f"compression {self.compression:.1%}"
        )

    @property
    def bounded(self) -> bool:
        """Whether every component is a number of at most MAX_REWARD."""
        return all(abs(value) <= MAX_REWARD for value in self.as_dict().values())  # NaN is not

    def dominates(self, other: "Reward") -> bool:
        """Whether it is at least as good in every objective and better in one.

        Standard errors are not considered.
        """
        pairs = list(zip(self.objectives(), other.objectives(), strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def check_evaluator(evaluator: Evaluator, towers: Sequence[Tower]) -> None:
    """Raise DataError if the evaluator says that it cannot evaluate plans of these towers.

    One that computes what pictures look like only once would not see what their tower loses.
    """
    known = getattr(evaluator, "towers", None)
    if known is not None and not set(towers) <= set(known):
        raise DataError(
            f"The evaluator evaluates plans of the towers {', '.join(known)}, and these are plans "
            f"of {', '.join(towers)}: make it with towers={tuple(towers)}."
        )


def read_reward(measured: object, compression: float) -> Reward:
    """The reward of a plan from what the evaluator returned.

    Raises:
        DataError: "utility" or "robustness" is missing, or a value is not a finite number or is
            larger than any score.
    """
    values = {}
    for name in ("utility", "robustness", "utility_se", "robustness_se"):
        default = 0.0 if name.endswith("_se") else None
        given = measured.get(name, default) if isinstance(measured, Mapping) else None
        value = finite(given)
        if value is None or abs(value) > MAX_REWARD:
            raise DataError(
                f"The evaluator must return a finite number as {name!r}, {MAX_REWARD:g} at most; "
                f"got {measured!r}."
            )
        values[name] = value
    return Reward(**values, compression=compression)


def scores_agree(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two sets of scores may be those of one model on one set of questions."""
    return one.keys() == other.keys() and all(
        abs(value - other[name]) <= SCORE_TOLERANCE for name, value in one.items()
    )


def scalarise(
    objectives: Float[Tensor, "*batch 3"],
    preference: Float[Tensor, "*batch 3"],
    ends: Float[Tensor, "2 3"] = DEFAULT_ENDS,
) -> Float[Tensor, " *batch"]:
    """One number per plan, higher = better for the preference.

    It is the smooth Tchebycheff distance to the ideal point, which also reaches non-convex parts of
    the front and has its optimum inside the simplex for every preference. A small multiple of the
    plain sum is added, so that an objective without weight is still not given away for nothing.

    Args:
        objectives: utility, robustness and compression of plans.
        preference: weights of the objectives, which sum to one.
        ends: (nadir, ideal) point, by which objectives are normalised.

    Source: smooth Tchebycheff, arXiv 2402.19078; augmentation, Steuer and Choo, Mathematical
    Programming 26 (1983).
    """
    nadir, ideal = ends
    scaled = (objectives - nadir) / (ideal - nadir)
    distance = SMOOTHING * torch.logsumexp(preference * (1 - scaled) / SMOOTHING, -1)
    return AUGMENTATION * scaled.sum(-1) - distance


def best_for(
    rewards: Sequence[Reward], preference: tuple[float, float, float], ends: Float[Tensor, "2 3"]
) -> int:
    """Index of the reward that is best for a preference."""
    objectives = torch.tensor([r.objectives() for r in rewards])
    weights = torch.tensor(preference).expand_as(objectives)
    return int(scalarise(objectives, weights, ends).argmax())
