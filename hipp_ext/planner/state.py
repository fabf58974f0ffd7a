"""Scores and measurements -> what the policy sees: one state token per group, comparable across models."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.allocators.cheapest_path import CheapestPath
from hipp_ext.answers import AnswerLogits
from hipp_ext.calibration import (
    ROWS,
    TASKS,
    Batch,
    Calibration,
    Task,
    all_batches,
    calibration_by_task,
    calibration_digest,
    image_token_id,
)
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import Group, find_groups, total_parameters
from hipp_ext.plan import PruningPlan
from hipp_ext.progress import Tick, counting
from hipp_ext.scorers import MRS, Scorer, SynFlow, VisualSensitivity, WandaSP
from hipp_ext.surgery.masks import masked
from hipp_ext.units import check_scores, plan_from_counts

REMOVED = (
    0.125,
    0.25,
    0.375,
    0.5,
    0.625,
    0.75,
    0.875,
)  # shares of a group's units that go when its sensitivity is measured
SHOWN = (1, 3)  # of these, what a state token tells, and what the curvature is read from
LEANS = 17  # divisions of the wish between the tasks that have a cheapest path of their own; between them, straight lines
RATIOS = 201  # pruning ratios from 0 to 1 that paths are read at
NEARLY_ALL = (
    0.95  # share that stands for a whole group where shares become logits, which have no end
)
QUANTILES = (0.1, 0.25, 0.5, 0.75)  # of the units, where the importance curve is read
FEATURES = 2 + 3 + len(QUANTILES) + len(SHOWN) + 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Signals:
    """What was measured of a model, once; any number of plans can be made from it.

    Attributes:
        groups: the groups, in order (G of them).
        scores: group name -> score per unit, which ranks the units.
        scorer: name of the scorer of `scores`.
        sensitivity: (TASKS, G, REMOVED) KL divergence [nats] of the answer distribution when one group loses its lowest units,
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
        columns += [_standard((self.sensitivity.mean(0)[:, i] + 1e-6).log()) for i in SHOWN]
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
        self, ratios: Float[Tensor, " batch"], leans: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch groups"]:
        """Allocation logits that measured sensitivity alone suggests, see `CheapestPath`.

        Args:
            ratios: pruning_ratio of each.
            leans: how the wish is divided between the tasks, 0 is all utility and 1 all robustness; so are measured losses.
        """
        places = torch.stack([ratios, leans], 1) * 2 - 1  # as grid_sample counts
        table = self._paths.permute(2, 0, 1)[None]
        return nn.functional.grid_sample(
            table, places[None, None], padding_mode="border", align_corners=True
        )[0, :, 0].T

    @functools.cached_property
    def _paths(self) -> Float[Tensor, "leans ratios groups"]:
        ratios, parameters = torch.linspace(0, 1, RATIOS), [g.parameters for g in self.groups]
        utility, robustness = self.sensitivity
        leaning = (
            torch.lerp(utility, robustness, lean) for lean in torch.linspace(0, 1, LEANS).tolist()
        )
        shares = torch.stack(
            [CheapestPath(parameters, REMOVED, losses).keep_shares(ratios) for losses in leaning]
        )
        return torch.logit(shares.clamp(1 - NEARLY_ALL, NEARLY_ALL))

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
        """KL divergence [nats] per squared share removed, mean over tasks and the levels SHOWN; above zero."""
        removed = torch.tensor(REMOVED)
        return (self.sensitivity.mean(0) / removed.square())[:, SHOWN].mean(1) + 1e-6


def keep_shares(
    groups: Sequence[Group], plans: Sequence[Sequence[int]] | np.ndarray
) -> Float[Tensor, "plans groups"]:
    """Keep counts of plans as shares of the groups' widths, float64."""
    return torch.from_numpy(
        np.asarray(plans, dtype=np.float64) / np.array([g.width for g in groups])
    )


def measure_signals(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    processor: Any = None,
    rows: int = ROWS,
    scorer: Scorer | None = None,
    mrs: MRS | None = None,
    groups: Sequence[Group] | None = None,
    progress: Callable[[str], None] | None = None,
    bar: bool = False,
) -> Signals:
    """Measure everything the policy's state needs; the model is left as it was.

    Args:
        model: to be planned for.
        calibration: batches, by task where it is known which questions are asked for what; None: the testbed's through
            `processor`.
        processor: of a vision-language model; None: the one beside its weights.
        rows: of the testbed's calibration.
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
    tasks = calibration_by_task(model, calibration, processor, rows)
    batches = all_batches(tasks)
    scorer, say = scorer or WandaSP(), progress or (lambda _: None)
    say(f"scoring units ({scorer.name})")
    scores = scorer(model, batches, groups=groups)
    say("measuring visual sensitivity")
    visual = torch.zeros(len(groups))
    if image_token_id(model) is not None:
        by_unit = VisualSensitivity()(model, batches, groups=groups)
        visual = torch.stack([by_unit[g.name].sum() for g in groups])
    say("measuring synaptic flow")
    flow_shares = SynFlow()(model, groups=groups)
    if mrs is not None:
        say("measuring the sensitivity of every group under attack")
        under_attack = mrs.sensitivity(model, batches, groups=groups)
    say("measuring the sensitivity of every group")
    with counting(bar, "measuring sensitivity") as tick:
        sensitivity = measure_sensitivity(model, tasks, groups, scores, tick)
    return Signals(
        groups=groups,
        scores=scores,
        scorer=scorer.name,
        visual=visual,
        flow_shares=flow_shares,
        sensitivity=sensitivity,
        digest=model_digest(model, groups),
        calibration=calibration_digest(tasks),
        mrs=None if mrs is None else torch.tensor([under_attack[g.name] for g in groups]),
    )


def measure_sensitivity(
    model: nn.Module,
    tasks: Mapping[Task, Sequence[Batch]],
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    tick: Tick = lambda done, total: None,
) -> Float[Tensor, "tasks groups levels"]:
    """Mean KL [nats] of each task's answers from dense, when one group loses its lowest units, at the levels REMOVED.

    A group of one unit can lose nothing; it gets the median of the others, which says nothing. `tick` is called after each.
    """
    check_scores(groups, scores)
    batches = all_batches(tasks)
    answers = AnswerLogits(model, batches)
    dense = answers(model).log_softmax(-1)
    rows = _rows_of_tasks(tasks, batches)
    result = torch.zeros(len(TASKS), len(groups), len(REMOVED))
    several = [i for i, g in enumerate(groups) if g.width > 1]
    for number, i in enumerate(several, 1):
        width, counts, known = groups[i].width, [g.width for g in groups], {}
        for j, nominal in enumerate(REMOVED):
            counts[i] = max(1, min(width - 1, round(width * (1 - nominal))))
            if counts[i] not in known:
                each = divergence(model, plan_from_counts(groups, counts, scores), answers, dense)
                known[counts[i]] = torch.stack(
                    [each[of_task].mean() for of_task in rows]
                ).clamp_min(0)
            removed = 1 - counts[i] / width
            # Few units cannot lose exactly a quarter: scale the measured KL to the nominal share.
            result[:, i, j] = known[counts[i]] * (nominal / removed) ** 2
        tick(number, len(several))
    if several:
        single = [i for i, g in enumerate(groups) if g.width == 1]
        result[:, single] = result[:, several].median(1, keepdim=True).values
    return result


def _rows_of_tasks(tasks: Mapping[Task, Sequence[Batch]], batches: Sequence[Batch]) -> list[Tensor]:
    """For each task, which rows of `batches` are its own."""
    owners = [{id(batch) for batch in tasks[task]} for task in TASKS]
    return [
        torch.tensor([id(b) in owner for b in batches for _ in b["input_ids"]]) for owner in owners
    ]


def divergence(
    model: nn.Module,
    plan: PruningPlan,
    answers: AnswerLogits,
    dense: Float[Tensor, "rows vocabulary"],
) -> Float[Tensor, " rows"]:
    """KL [nats] of every row's answer under `plan` from the dense model's, whose log probabilities are `dense`."""
    with masked(model, plan):
        pruned = answers(model).log_softmax(-1)
    return (dense.exp() * (dense - pruned)).sum(-1)


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
