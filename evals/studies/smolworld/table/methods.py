"""The ways of making a plan that the table compares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from hipp_ext.allocators import OWL, Allocator, FLAPAdaptive, GlobalThreshold, Uniform
from hipp_ext.calibration import Batch
from hipp_ext.evals.studies.real_lm.shortgpt import ShortGPT
from hipp_ext.scorers import FLAP, Magnitude, Scorer, VisualSensitivity, WandaSP
from hipp_ext.scorers.base import Groups, Scores
from hipp_ext.sensitivity.efforts import Effort

Search = Literal["policy", "best", "TPE", "CMA-ES"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    Attributes:
        make: pruning_ratio=... -> an allocator, for a method that is one.
        effort: of the sensitivity that plans are made from, for the methods that read signals.
        search: how plans are searched; None: they are not. "policy" is the fitted policy's answer,
            and "best" the best plan that the same fit evaluated.
        steered: plans depend on a preference.
        reconstructs: something is left that least squares may fit.
        shuffled: the groups' visual signal is shuffled before the fit.
        in_table: whether the table has it; others answer a question alone.
        host: torch-pruning carries the plan out.
    """

    make: Callable[..., Allocator] | None = None
    effort: Effort | None = None
    search: Search | None = None
    steered: bool = False
    reconstructs: bool = True
    shuffled: bool = False
    in_table: bool = True
    host: bool = False

    @property
    def searches(self) -> bool:
        """Whether it evaluates plans."""
        return self.search is not None

    @property
    def search_name(self) -> str:
        """Name of its search: the two answers of a fit share it."""
        name = "fit" if self.search in ("policy", "best") else str(self.search)
        return f"{name}-shuffled" if self.shuffled else name

    @property
    def repairs(self) -> tuple[Literal["none", "reconstruct", "distil"], ...]:
        """What is done to its models."""
        if self.search == "best":
            return ("none",)
        return ("none", "reconstruct", "distil") if self.reconstructs else ("none", "distil")


@dataclass(frozen=True, kw_only=True)
class Shuffled(Scorer):
    """The scores of another scorer in a random order: what it knows of the units is lost.

    Args:
        scorer: the scorer.
        seed: random seed.
    """

    scorer: Scorer
    seed: int = 0

    def score(self, model: nn.Module, groups: Groups, batches: Sequence[Batch]) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        scores = self.scorer.score(model, groups, batches)
        return {
            name: own[torch.randperm(len(own), generator=generator)] for name, own in scores.items()
        }


def torch_pruning_uniform(pruning_ratio: float) -> Allocator:
    """torch-pruning's own importance, the same fraction everywhere, which is its default.

    Of its importances it is the one that sees data: without, nothing is left of a language model.
    """
    from hipp_ext.integrations.torch_pruning import TorchPruningScorer
    from hipp_ext.integrations.torch_pruning_importance import tp

    scorer: Any = TorchPruningScorer(tp.importance.GroupTaylorImportance())
    return Uniform(pruning_ratio=pruning_ratio, scorer=scorer)


UNIFORM, FLAP_ADAPTIVE, OWL_LEVELS = "uniform", "FLAP adaptive", "OWL"
FISHER, ANCHORED = "sensitivity, fisher", "sensitivity, anchored"
TPE, CMAES = "TPE", "CMA-ES"
UNTRAINED, FITTED, BEST = "hipp, untrained", "hipp, fitted", "hipp, best evaluated"
VISUAL, VISUAL_SHUFFLED = "uniform, visual scores", "uniform, visual scores shuffled"
SIGNAL_SHUFFLED = "hipp, fitted, visual signal shuffled"
METHODS: Mapping[str, Method] = {
    UNIFORM: Method(make=partial(Uniform, scorer=WandaSP())),
    "global threshold": Method(make=partial(GlobalThreshold, scorer=WandaSP())),
    FLAP_ADAPTIVE: Method(make=partial(FLAPAdaptive, scorer=FLAP())),
    OWL_LEVELS: Method(make=partial(OWL, scorer=WandaSP())),
    # Layers go whole, so their scores are not read: take those that cost nothing.
    "ShortGPT": Method(make=partial(ShortGPT, scorer=Magnitude()), reconstructs=False),
    "torch-pruning": Method(make=torch_pruning_uniform, host=True),
    FISHER: Method(effort="fisher"),
    ANCHORED: Method(effort="anchored"),
    UNTRAINED: Method(effort="anchored", steered=True),
    FITTED: Method(effort="anchored", search="policy", steered=True),
    BEST: Method(effort="anchored", search="best", steered=True),
    TPE: Method(effort="anchored", search="TPE", steered=True),
    CMAES: Method(effort="anchored", search="CMA-ES", steered=True),
    VISUAL: Method(make=partial(Uniform, scorer=VisualSensitivity()), in_table=False),
    VISUAL_SHUFFLED: Method(
        make=partial(Uniform, scorer=Shuffled(scorer=VisualSensitivity())), in_table=False
    ),
    SIGNAL_SHUFFLED: Method(
        effort="anchored", search="policy", steered=True, shuffled=True, in_table=False
    ),
}
IN_TABLE = tuple(name for name, method in METHODS.items() if method.in_table)
