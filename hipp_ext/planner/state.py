"""Scores and measurements -> the policy's state: one token per group, comparable across models."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.allocators.cheapest import cheapest_logits, task_losses
from hipp_ext.budget import Bounds
from hipp_ext.calibration import Calibration, CalibrationLike
from hipp_ext.fingerprint import model_digest
from hipp_ext.groups import (
    Group,
    LeftWhole,
    find_groups,
    left_whole,
    total_parameters,
    tower_layers,
)
from hipp_ext.planner.columns import (
    OPTIONAL,
    TRANSFORMS,
    by_place,
    column_passes,
    measure_columns,
    standardise,
)
from hipp_ext.scorers import MRS, Scorer, WandaSP
from hipp_ext.sensitivity.curves import LEVELS
from hipp_ext.sensitivity.efforts import Announce, Effort, forward_passes, measure_sensitivity
from hipp_ext.steps import NOTHING_KEPT, Steps

# of LEVELS: those that a state token and the curvature are read from
FEATURE_LEVELS = (LEVELS.index(0.25), LEVELS.index(0.5))
PLACES = ("attention", "ffn")  # of the blocks in a layer, by which a state token tells them apart
QUANTILES = (0.1, 0.25, 0.5, 0.75)  # of the units, where the importance curve is read
# of a state token, without the optional columns
FEATURES = len(PLACES) + 3 + len(QUANTILES) + len(FEATURE_LEVELS) + len(TRANSFORMS) - len(OPTIONAL)


@dataclass(frozen=True, kw_only=True, eq=False)
class Signals:
    """What was measured of a model, once; any number of plans can be made from it.

    Attributes:
        groups: the groups, in order.
        scores: group name -> score per unit, which ranks the units.
        scorer: name of the scorer of `scores`.
        sensitivity: (tasks, groups, levels) KL divergence [nats] of the outputs from dense when one
            group loses its lowest units, at LEVELS, see `measure_sensitivity`.
        effort: how the sensitivity was found.
        columns: name -> (groups,) further signals, see `measure_columns`.
        digest: digest of the groups and the weights that they were measured on.
        calibration: digest of the calibration.
        left_whole: parts of layers that no group has units of.
        bounds: which keep counts the prior chooses among.
    """

    groups: tuple[Group, ...]
    scores: Mapping[str, Tensor]
    scorer: str
    sensitivity: Float[Tensor, "tasks groups levels"]
    effort: Effort
    columns: Mapping[str, Float[Tensor, " groups"]]
    digest: str
    calibration: str
    left_whole: tuple[LeftWhole, ...] = ()
    bounds: Bounds = Bounds()

    @property
    def visual(self) -> Float[Tensor, " groups"]:
        """Visual flow (attention) or drift (FFN), see `VisualSensitivity`; 0 without pictures."""
        return self.columns["visual"]

    @functools.cached_property
    def visual_rank(self) -> Float[Tensor, " groups"]:
        """The visual signal as the policy sees it."""
        return by_place(self.visual, self.groups)

    @functools.cached_property
    def ranking(self) -> str:
        """Digest of the model and of its scores.

        With the same ranking, equal keep counts mean the same units.
        """
        scores = safetensors.torch.save(
            {name: score.contiguous() for name, score in self.scores.items()}
        )
        return hashlib.sha256(self.digest.encode() + scores).hexdigest()

    @functools.cached_property
    def state(self) -> Float[Tensor, "groups features"]:
        """One token per group: place in its layer, depth, size, importance curve, sensitivity,
        columns.
        """
        groups = self.groups
        total = total_parameters(groups)
        losses = self.sensitivity.mean(0)
        features = [
            *(torch.tensor([float(g.place == p) for g in groups]) for p in PLACES),
            depths(groups),
            standardise(torch.tensor([g.parameters / total for g in groups]).log()),
            standardise(torch.tensor([float(g.width) for g in groups]).log()),
            *(torch.tensor([_curve(self.scores[g.name], q) for g in groups]) for q in QUANTILES),
            *(standardise((losses[:, level] + 1e-6).log()) for level in FEATURE_LEVELS),
            *(TRANSFORMS[name](values, groups) for name, values in self.columns.items()),
        ]
        return torch.stack([f.float() for f in features], 1)

    def within(self, bounds: Bounds) -> "Signals":
        """The signals of a planner that keeps to `bounds`."""
        return dataclasses.replace(self, bounds=bounds)

    def prior(
        self, ratios: Float[Tensor, " batch"], robustness_weights: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch groups"]:
        """Allocation logits of the allocator `Sensitivity`, at each pruning_ratio and weight."""
        pairs = zip(ratios.tolist(), robustness_weights.tolist(), strict=True)
        return torch.stack(
            [
                cheapest_logits(
                    self.groups, task_losses(self.sensitivity, weight), ratio, self.bounds
                )
                for ratio, weight in pairs
            ]
        )

    @functools.cached_property
    def soft_prior(self) -> Float[Tensor, " groups"]:
        """Allocation logits for all budgets and preferences: log of curvature per parameter.

        With KL growing as the square of the removed fraction, the loss at a given number of
        parameters is least where the removed fraction is proportional to parameters / curvature.
        """
        cost = torch.tensor([float(g.parameters) for g in self.groups])
        logits = (self.curvature / cost).log()
        return (logits - logits.mean()).float()

    @functools.cached_property
    def curvature(self) -> Float[Tensor, " groups"]:
        """KL [nats] per squared fraction removed, mean over tasks and FEATURE_LEVELS; above 0."""
        removed = torch.tensor([LEVELS[i] for i in FEATURE_LEVELS])
        return (self.sensitivity.mean(0)[:, FEATURE_LEVELS] / removed.square()).mean(1) + 1e-6


def depths(groups: Sequence[Group]) -> Float[Tensor, " groups"]:
    """Where on the way from picture to answer each group lies.

    From 0 to 1 in the language tower, 0 in the projector, from -1 to below 0 in the vision tower.
    """
    last = {t: max(g.layer for g in groups if g.tower == t) for t in {g.tower for g in groups}}

    def depth(group: Group) -> float:
        if group.tower == "vision":
            return group.layer / (last["vision"] + 1) - 1
        return group.layer / max(last["language"], 1) if group.tower == "language" else 0.0

    return torch.tensor([depth(g) for g in groups])


def keep_fractions(
    groups: Sequence[Group], plans: Sequence[Sequence[int]] | np.ndarray
) -> Float[Tensor, "plans groups"]:
    """Keep counts of plans as fractions of the groups' widths, float64."""
    widths = np.array([g.width for g in groups])
    return torch.from_numpy(np.asarray(plans, dtype=np.float64) / widths)


def measure_signals(
    model: nn.Module,
    calibration: CalibrationLike | None = None,
    *,
    scorer: Scorer | None = None,
    mrs: MRS | None = None,
    groups: Sequence[Group] | None = None,
    effort: Effort = "anchored",
    log: Callable[[str], None] | None = None,
    progress: bool = False,
    announce: Announce | None = None,
    steps: Steps = NOTHING_KEPT,
) -> Signals:
    """Measure everything the policy's state needs; the model is left as it was.

    Args:
        model: model to be planned for.
        calibration: a Calibration, batches, or batches by task; None: the testbed's.
        scorer: scorer that ranks the units of a group; None: WandaSP.
        mrs: also measures module robustness sensitivity; needs labels in the batches.
        groups: groups to be pruned; None: those of the language tower.
        effort: how the sensitivity is found, see `measure_sensitivity`.
        log: called with a line before each measurement.
        progress: show on stderr what is measured, and how long it will take.
        announce: called before anything is measured, see `Announce`.
        steps: where what is finished is kept, and found if an interrupted run left it.
    """
    groups = tuple(groups) if groups is not None else find_groups(model)
    given = Calibration.of(model, calibration)
    scorer, log = scorer or WandaSP(), log or (lambda _: None)
    if announce is not None:
        layers = len(tower_layers(model, "language"))
        passes = scorer.passes(groups) + column_passes(model, groups, mrs)
        announce(given, passes + forward_passes(groups, layers, effort))
    log(f"scoring units ({scorer.name})")
    widths = {g.name: (g.width,) for g in groups}
    scores = steps.step("scores", widths, lambda: scorer(model, given, groups=groups))
    names = [name for name in TRANSFORMS if name not in OPTIONAL or mrs is not None]
    columns = steps.step(
        "columns",
        dict.fromkeys(names, (len(groups),)),
        lambda: measure_columns(model, given, groups, mrs, log),
    )
    log(f"sensitivity of every group ({effort})")
    sensitivity = measure_sensitivity(
        model, given, groups, scores, effort=effort, progress=progress, steps=steps
    )
    return Signals(
        groups=groups,
        scores=scores,
        scorer=scorer.name,
        columns=columns,
        sensitivity=sensitivity,
        effort=effort,
        digest=model_digest(model, groups),
        calibration=given.digest,
        left_whole=left_whole(model),
    )


def _curve(scores: Tensor, fraction: float) -> float:
    """Fraction of the total score in the top units, less what equal scores would give."""
    positive = scores.double() - min(float(scores.min()), 0.0)
    top = positive.sort(descending=True).values[: max(1, round(fraction * len(scores)))]
    return float(top.sum() / positive.sum().clamp_min(1e-30)) - fraction
