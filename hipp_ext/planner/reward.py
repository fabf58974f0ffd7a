"""Plan -> reward: what the evaluator measures, what the plan removes, how stable it leaves the network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.errors import DataError, PreferenceError
from hipp_ext.planner.policy import MAX_RATIO
from hipp_ext.quantities import finite

Evaluator = Callable[[nn.Module], Mapping[str, float]]
Scalarisation = Literal["linear", "tchebycheff"]
SMOOTHING = 0.03  # of the Tchebycheff scalarisation, in units of the objectives
AUGMENTATION = 0.02  # weight of the plain sum beside it
WHOLE = torch.tensor(
    [[0.0, 0.0, 0.0], [1.0, 1.0, MAX_RATIO]]
)  # nadir and ideal point, while nothing is known of them
LARGEST = 1e6  # of any component: ours lie within 1, and the hypervolume multiplies three of them
SAME = 0.005  # scores of one model on one set of questions differ by less, whatever the hardware


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What one plan achieves; every component is maximised.

    Attributes:
        utility: from the evaluator; ours is 1 for certain and right, 0 for guessing.
        robustness: the same on POPE.
        compression: share of the cost that the plan saves, see `Cost`; of parameters: its pruning_ratio.
        stability: log of the retained synaptic flow, 0 for the dense model.
        utility_se, robustness_se: standard errors over the evaluator's questions; 0 where it gives none.
    """

    utility: float
    robustness: float
    compression: float
    stability: float
    utility_se: float = 0.0
    robustness_se: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Component name -> value."""
        return asdict(self)

    def objectives(self) -> list[float]:
        """[utility, robustness, compression], the axes of the front."""
        return [self.utility, self.robustness, self.compression]

    @property
    def bounded(self) -> bool:
        """Whether every component is a number of at most LARGEST."""
        return all(abs(value) <= LARGEST for value in self.as_dict().values())  # NaN is not

    def dominates(self, other: "Reward") -> bool:
        """At least as good in every objective, and better in one; standard errors are not considered."""
        pairs = list(zip(self.objectives(), other.objectives(), strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def read_reward(measured: object, compression: float, stability: float) -> Reward:
    """The reward of a plan from what the evaluator returned.

    Raises:
        DataError: the evaluator's answer lacks "utility" or "robustness", or one of these or their errors is not a finite
            number, or a larger one than any score.
    """
    values = {}
    for name in ("utility", "robustness", "utility_se", "robustness_se"):
        given = (
            measured.get(name, 0.0 if name.endswith("_se") else None)
            if isinstance(measured, Mapping)
            else None
        )
        value = finite(given)
        if value is None or abs(value) > LARGEST:
            raise DataError(
                f"The evaluator must return a finite number as {name!r}, {LARGEST:g} at most; got {measured!r}."
            )
        values[name] = value
    return Reward(**values, compression=compression, stability=stability)


def scores_agree(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two sets of scores may be one model's on one set of questions, on different hardware say."""
    return one.keys() == other.keys() and all(
        abs(value - other[name]) <= SAME for name, value in one.items()
    )


def scalarise(
    objectives: Float[Tensor, "*batch 3"],
    preference: Float[Tensor, "*batch 3"],
    kind: Scalarisation,
    ends: Float[Tensor, "2 3"] = WHOLE,
) -> Float[Tensor, " *batch"]:
    """One number per plan, higher = better for the preference.

    Every objective counts as its share of the way from nadir to ideal point, `ends`. "linear" is the weighted sum;
    "tchebycheff" the smooth Tchebycheff distance to the ideal point, which also reaches non-convex parts of the front and has
    its optimum inside the simplex for every preference; a little of the plain sum beside it, so that an objective that does
    not count is still not given away for nothing.

    Raises:
        PreferenceError: an unknown kind.

    Source: smooth Tchebycheff, arXiv 2402.19078; augmentation, Steuer and Choo, Mathematical Programming 26 (1983).
    """
    check_scalarisation(kind)
    nadir, ideal = ends
    scaled = (objectives - nadir) / (ideal - nadir)
    if kind == "linear":
        return (preference * scaled).sum(-1)
    return AUGMENTATION * scaled.sum(-1) - SMOOTHING * torch.logsumexp(
        preference * (1 - scaled) / SMOOTHING, -1
    )


def check_scalarisation(kind: str) -> None:
    """Raise PreferenceError unless `kind` is one of Scalarisation."""
    if kind not in get_args(Scalarisation):
        raise PreferenceError(
            f"scalarisation={kind!r}: one of {', '.join(get_args(Scalarisation))} is needed."
        )


def best_for(
    rewards: Sequence[Reward], preference: tuple[float, float, float], ends: Float[Tensor, "2 3"]
) -> int:
    """Index of the reward that serves a preference best."""
    objectives = torch.tensor([r.objectives() for r in rewards])
    return int(
        scalarise(
            objectives, torch.tensor(preference).expand_as(objectives), "tchebycheff", ends
        ).argmax()
    )
