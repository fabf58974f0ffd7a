"""What a fit leaves beside its policy: the plans that were evaluated, and what they say of those that were not."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hipp_ext.budget import Bounds
from hipp_ext.errors import PlanError
from hipp_ext.groups import Group
from hipp_ext.planner.archive import Archive, Record
from hipp_ext.planner.cost import Cost
from hipp_ext.planner.evaluation import Keeps
from hipp_ext.planner.reward import Reward, scalarise
from hipp_ext.planner.reward_model import RewardModel
from hipp_ext.planner.state import Signals, keep_shares
from hipp_ext.preference import Preference

UNFITTED = "There is no evaluated plan: call fit(model, evaluator), or load a fitted planner."
DOUBT = 1.0  # standard deviations of the reward model by which an evaluated plan may fall short of what it expects
NEAR = 0.005  # compression that an evaluated plan may lack


class Experience:
    """The evaluated plans of one model.

    Attributes:
        archive: all of them, in the order of their evaluation.
        digest: of the model; None: nothing was evaluated.
        cost: what their compression counts; None: not known.
        dense: what the evaluator said of the dense model, "utility" and "robustness"; None: not known.
        hyper: of the reward model, see `RewardModel.hyper`; None: they are fitted when they are needed.
    """

    def __init__(
        self, *, records: Sequence[Record] = (), digest: str | None = None, cost: Cost | None = None,
        dense: dict[str, float] | None = None, hyper: Tensor | None = None,
    ):  # fmt: skip
        self.archive = Archive()
        self.archive.append(records)
        self.digest, self.cost, self.dense, self.hyper = digest, cost, dense, hyper
        self._model: RewardModel | None = None

    # An archive that is complete; a query has milliseconds.

    @cached_property
    def _measured(self) -> dict[Keeps, Record]:
        return {r.keeps: r for r in self.archive.records if r.measured}

    @cached_property
    def _keeps(self) -> np.ndarray:
        return np.array(list(self._measured))

    @cached_property
    def _objectives(self) -> Float[Tensor, "plans 3"]:
        return torch.tensor([r.reward.objectives() for r in self._measured.values()]).reshape(-1, 3)

    @cached_property
    def _ends(self) -> Float[Tensor, "2 3"]:
        return self.archive.nadir_and_ideal()

    def reward(self, keeps: Keeps) -> Reward | None:
        """What was measured of a plan."""
        record = self._measured.get(keeps)
        return record.reward if record else None

    def best(self, preference: Preference, groups: Sequence[Group], bounds: Bounds, pruning_ratio: float | None) -> Record:
        """The evaluated plan that serves a preference best, among those that the bounds allow and that remove
        `pruning_ratio` or more.

        Raises:
            PlanError: there is none.
        """
        if not len(self.archive):
            raise PlanError(UNFITTED)
        if not self._measured:
            raise PlanError(f"The gate (min_stability) kept all {len(self.archive)} plans from being measured.")
        enough = bounds.allow(groups, self._keeps)
        if not enough.any():
            raise PlanError(f"{bounds} allows none of {len(enough)} evaluated plans.")
        if pruning_ratio is not None:
            enough &= np.array([r.pruning_ratio >= pruning_ratio for r in self._measured.values()])
        if not enough.any():
            raise PlanError(f"None of {len(enough)} evaluated plans removes {pruning_ratio:g} or more.")
        return self._best_of(torch.from_numpy(enough), preference)

    def as_good_as(self, keeps: Keeps, preference: Preference, signals: Signals, bounds: Bounds) -> Record | None:
        """The evaluated plan to take in place of one that was not, or None.

        Its compression is the other's, to within NEAR, or more, and in neither task does it fall short of what the reward
        model expects of the other by more than DOUBT standard deviations; of several, the one that serves the preference best.
        """
        if self.cost is None or signals.digest != self.digest or not self._measured or keeps in self._measured:
            return None
        if self._model is None:
            self._model = RewardModel(signals.curvature, self.hyper)
            self._model.learn(self.archive, signals.groups)
            self.hyper = self._model.hyper
        shares = keep_shares(signals.groups, [keeps])
        mean, deviation = self._model.predict(shares)
        least = torch.cat([mean - DOUBT * deviation, self.cost.removed(shares)[:, None].float() - NEAR], 1)
        enough = (self._objectives >= least).all(1) & torch.from_numpy(bounds.allow(signals.groups, self._keeps))
        return self._best_of(enough, preference) if enough.any() else None

    def tensors(self) -> dict[str, Tensor]:
        """Cost and reward model, for a file."""
        tensors = {"cost": self.cost and self.cost.table, "reward_model": self.hyper}
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    def _best_of(self, enough: Bool[Tensor, " plans"], preference: Preference) -> Record:
        wanted = torch.tensor(preference.as_tuple()).expand_as(self._objectives)
        value = scalarise(self._objectives, wanted, "tchebycheff", self._ends).masked_fill(~enough, -torch.inf)
        return list(self._measured.values())[int(value.argmax())]
