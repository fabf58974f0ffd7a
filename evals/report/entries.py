"""The contents of a report: models with their scores, plans and costs; fits with their fronts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hipp_ext.plan import PruningPlan
from hipp_ext.planner.history import FitHistory
from hipp_ext.planner.reward import Reward
from hipp_ext.planner.state import Signals
from hipp_ext.units import plan_from_counts


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One evaluated model.

    Attributes:
        name: name of the model in tables and figures.
        preference: preference of its plan, as text; None if unknown, and for the dense model.
        plan: its plan; None for the dense model, and if its folder was not given.
        reward: reward of the plan by the planner's evaluator; None if it was not computed.
        parameters: number of parameters of the whole model; None if its folder was not given.
        records: results by data set, as `vlmeval` writes them to results.json.
        chair: results of `hipp chair`, as in its scores.json.
    """

    name: str
    preference: str | None = None
    plan: PruningPlan | None = None
    reward: Reward | None = None
    parameters: int | None = None
    records: dict[str, dict[str, Any]]
    chair: tuple[dict[str, Any], ...] = ()

    @property
    def folder(self) -> str:
        """The name of its folder, which is `name` unless several models have it."""
        known = [record["model"] for record in (*self.records.values(), *self.chair)]
        return str(known[0]) if known else self.name


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted planner.

    Attributes:
        name: name of its folder.
        history: the evaluated plans.
        signals: what was measured of the model before.
        visual: visual sensitivity per layer of each kind; None where there is none.
    """

    name: str
    history: FitHistory
    signals: Signals | None = None
    visual: dict[str, list[float]] | None = None

    def reward(self, plan: PruningPlan) -> Reward | None:
        """The reward of a plan that the fit evaluated; None: it did not evaluate this one."""
        if self.signals is None:
            return None
        groups = self.signals.groups
        counts = tuple(plan.keep_counts.get(g.name, 0) for g in groups)
        reward = self.history.reward(counts)
        if reward is None:
            return None
        evaluated = plan_from_counts(groups, counts, self.signals.scores)
        return reward if evaluated.groups == plan.groups else None


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The contents of a report.

    Attributes:
        entries: evaluated models; the others are compared with the first.
        dense_is_known: whether a folder or a measurement tells that the first is the dense one.
        fits: fitted planners.
        latency: results of `hipp latency`.
        served: results of `hipp latency --runtime`.
        commands: commands that made them, in order.
        seeds: random seeds, as text.
    """

    entries: tuple[Entry, ...] = ()
    dense_is_known: bool = True
    fits: tuple[Fit, ...] = ()
    latency: tuple[dict[str, Any], ...] = ()
    served: tuple[dict[str, Any], ...] = ()
    commands: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the models, the dense one first."""
        return [e.name for e in self.entries]


def main_yes_no(entries: Sequence[Entry]) -> str | None:
    """The yes/no data set that a report shows by split: POPE, else the first one."""
    found = [
        data
        for e in entries
        for data, record in e.records.items()
        if "official" in record["metrics"]
    ]
    return "POPE" if "POPE" in found else next(iter(found), None)
