"""Scores and measurements -> what the policy sees: one state token per group, comparable across models."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.allocators.sensitivity import cheapest_logits
from hipp_ext.calibration import Calibration, CalibrationLike, image_token_id
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import Group, find_groups, total_parameters
from hipp_ext.progress import counting
from hipp_ext.scorers import MRS, Scorer, SynFlow, VisualSensitivity, WandaSP
from hipp_ext.sensitivity.measured import PRUNE_LEVELS, measure_sensitivity

FEATURE_LEVELS = (1, 3)  # of PRUNE_LEVELS: those that a state token and the curvature are read from
QUANTILES = (0.1, 0.25, 0.5, 0.75)  # of the units, where the importance curve is read
FEATURES = 2 + 3 + len(QUANTILES) + len(FEATURE_LEVELS) + 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Signals:
    """What was measured of a model, once; any number of plans can be made from it.

    Attributes:
        groups: the groups, in order (G of them).
        scores: group name -> score per unit, which ranks the units.
        scorer: name of the scorer of `scores`.
        sensitivity: (TASKS, G, PRUNE_LEVELS) KL divergence [nats] of the answers when one group loses its lowest units,
            on the calibration of each task.
        visual: (G,) visual flow (attention) or drift (FFN), see `VisualSensitivity`; zero for language models.
        flow_shares: group name -> share of synaptic flow per unit, see `SynFlow`.
        digest: of the groups and the weights they were measured on.
        calibration: digest of the batches.
        mrs: (G,) module robustness sensitivity [nats], see `MRS`; None: not measured, and no part of the state.
    """

    groups: tuple[Group, ...]
    scores: Mapping[str, Tensor]
    scorer: str
    sensitivity: Float[Tensor, "tasks groups levels"]
    visual: Float[Tensor, " groups"]
    flow_shares: Mapping[str, Tensor]
    digest: str
    calibration: str
    mrs: Float[Tensor, " groups"] | None = None

    @functools.cached_property
    def ranking(self) -> str:
        """Digest of the model and of how its units are ranked: with it, equal keep counts mean the same units."""
        scores = safetensors.torch.save(
            {name: score.contiguous() for name, score in self.scores.items()}
        )
        return hashlib.sha256(self.digest.encode() + scores).hexdigest()

    @functools.cached_property
    def state(self) -> Float[Tensor, "groups features"]:
        """One token per group: kind, position, size, importance curve, sensitivity, visual signal, stability; MRS if any."""
        groups = self.groups
        depth = max(max(g.layer for g in groups), 1)
        total = total_parameters(groups)
        columns = [torch.tensor([float(g.kind == k) for g in groups]) for k in ("attention", "ffn")]
        columns.append(torch.tensor([g.layer / depth for g in groups]))
        columns.append(_standard(torch.tensor([g.parameters / total for g in groups]).log()))
        columns.append(_standard(torch.tensor([float(g.width) for g in groups]).log()))
        columns += [
            torch.tensor([_curve(self.scores[g.name], q) for g in groups]) for q in QUANTILES
        ]
        columns += [
            _standard((self.sensitivity.mean(0)[:, i] + 1e-6).log()) for i in FEATURE_LEVELS
        ]
        columns += [
            self.visual_rank,
            _standard(torch.stack([self.flow_shares[g.name].sum() for g in groups]).float()),
        ]
        if self.mrs is not None:
            columns.append(_standard((self.mrs + 1e-6).log()))
        return torch.stack([c.float() for c in columns], 1)

    @functools.cached_property
    def visual_rank(self) -> Float[Tensor, " groups"]:
        """Log of the visual signal, standardised within each kind (flow and drift are different quantities)."""
        result = torch.zeros(len(self.groups))
        for kind in ("attention", "ffn"):
            rows = torch.tensor(
                [i for i, g in enumerate(self.groups) if g.kind == kind], dtype=torch.long
            )
            if len(rows) and float(self.visual[rows].max()) > 0:
                result[rows] = _standard((self.visual[rows] + 1e-9).log())
        return result

    def prior(
        self, ratios: Float[Tensor, " batch"], robustness_weights: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch groups"]:
        """Allocation logits of the allocator `Sensitivity`, at each pruning_ratio and weight."""
        pairs = zip(ratios.tolist(), robustness_weights.tolist(), strict=True)
        return torch.stack([cheapest_logits(self.groups, self.sensitivity, *p) for p in pairs])

    @functools.cached_property
    def soft_prior(self) -> Float[Tensor, " groups"]:
        """The same for all budgets and leans, and not followed to the end: log of KL per removed share squared, per parameter.

        With KL growing as the square of the removed share, the loss at a given number of parameters is least where the
        removed share is proportional to parameters / curvature.
        """
        cost = torch.tensor([float(g.parameters) for g in self.groups])
        logits = (self.curvature / cost).log()
        return (logits - logits.mean()).float()

    @functools.cached_property
    def curvature(self) -> Float[Tensor, " groups"]:
        """KL divergence [nats] per squared share removed, mean over tasks and the FEATURE_LEVELS; above zero."""
        removed = torch.tensor(PRUNE_LEVELS)
        return (self.sensitivity.mean(0) / removed.square())[:, FEATURE_LEVELS].mean(1) + 1e-6


def keep_shares(
    groups: Sequence[Group], plans: Sequence[Sequence[int]] | np.ndarray
) -> Float[Tensor, "plans groups"]:
    """Keep counts of plans as shares of the groups' widths, float64."""
    return torch.from_numpy(
        np.asarray(plans, dtype=np.float64) / np.array([g.width for g in groups])
    )


def measure_signals(
    model: nn.Module,
    calibration: CalibrationLike | None = None,
    *,
    scorer: Scorer | None = None,
    mrs: MRS | None = None,
    groups: Sequence[Group] | None = None,
    progress: Callable[[str], None] | None = None,
    bar: bool = False,
) -> Signals:
    """Measure everything the policy's state needs; the model is left as it was.

    Args:
        model: to be planned for.
        calibration: a Calibration, batches, or batches by task; None: the testbed's.
        scorer: ranks the units of a group; None: WandaSP.
        mrs: measures module robustness sensitivity too; needs labels in the batches.
        groups: None: those of the language tower.
        progress: called with a line at the start of every measurement.
        bar: show how many groups are done; sensitivity takes minutes on a large model.
    """
    groups = tuple(groups) if groups is not None else find_groups(model)
    if any(g.tower != "language" for g in groups):
        raise UnsupportedModelError(
            "Signals are measured for the language tower; prune the vision tower by a plan of your own."
        )
    given = Calibration.of(model, calibration)
    scorer, say = scorer or WandaSP(), progress or (lambda _: None)
    say(f"scoring units ({scorer.name})")
    scores = scorer(model, given, groups=groups)
    say("measuring visual sensitivity")
    visual = torch.zeros(len(groups))
    if image_token_id(model) is not None:
        by_unit = VisualSensitivity()(model, given, groups=groups)
        visual = torch.stack([by_unit[g.name].sum() for g in groups])
    say("measuring synaptic flow")
    flow_shares = SynFlow()(model, groups=groups)
    if mrs is not None:
        say("measuring the sensitivity of every group under attack")
        under_attack = mrs.sensitivity(model, given, groups=groups)
    say("measuring the sensitivity of every group")
    with counting(bar, "measuring sensitivity") as tick:
        sensitivity = measure_sensitivity(model, given, groups, scores, tick)
    return Signals(
        groups=groups,
        scores=scores,
        scorer=scorer.name,
        visual=visual,
        flow_shares=flow_shares,
        sensitivity=sensitivity,
        digest=model_digest(model, groups),
        calibration=given.digest,
        mrs=None if mrs is None else torch.tensor([under_attack[g.name] for g in groups]),
    )


def model_digest(model: nn.Module, groups: Sequence[Group]) -> str:
    """Hex digest of the groups and of a sample of all weights, so that signals meet their own model only."""
    digest = hashlib.sha256(repr(groups).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if not parameter.is_meta:  # offloaded
            weight = parameter.detach().flatten()
            # An odd stride walks over rows and columns.
            digest.update(
                weight[:: max(1, weight.numel() // 64) | 1].float().cpu().numpy().tobytes()
            )
    return digest.hexdigest()


def _standard(x: Tensor) -> Tensor:
    x = x.float()
    return (
        (x - x.mean()) / x.std(unbiased=False).clamp_min(1e-6)
        if float(x.std(unbiased=False)) > 1e-6
        else x * 0
    )


def _curve(scores: Tensor, share: float) -> float:
    """Share of the group's total score in its top `share` of units, above what equal scores would give."""
    positive = scores.double() - min(float(scores.min()), 0.0)
    top = positive.sort(descending=True).values[: max(1, round(share * len(scores)))]
    return float(top.sum() / positive.sum().clamp_min(1e-30)) - share
