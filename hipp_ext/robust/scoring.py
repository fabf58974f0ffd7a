"""A trained classifier -> what each of its modules is worth under attack, and which of its channels go first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hipp_ext.attacks import Ball, check_precision
from hipp_ext.errors import AttackError, UnsupportedModelError
from hipp_ext.quantities import take_numbers
from hipp_ext.robust.data import Images
from hipp_ext.robust.losses import attacked
from hipp_ext.robust.training import restored
from hipp_ext.scorers.group_loss import (
    ChannelGroup,
    first_order,
    removal,
    require_removable,
    unit_norms,
    unit_taylor,
    worst_case,
)
from hipp_ext.scorers.mrs import FORMS, Form, check_numbers

Ranking = Literal["auto", "bn", "taylor", "l1"]
RANKINGS = ("auto", "bn", "taylor", "l1")


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How modules and channels are scored.

    Attributes:
        form: of MRS, see `hipp_ext.scorers.MRS`.
        ranking: of the channels within a module: "bn" (scale of the batch norm behind the channel), "taylor" (derivative of the
            loss with respect to a gate), "l1" (weight norms), or "auto": "bn" where every channel has a batch norm, else
            "taylor". It matters more than the allocation: see evals/LOG.md.
        epsilon: of the attack on the scored images.
        attack_steps: of PGD; 0 scores clean images, which is the counterpart that a claim about robustness has to beat.
        rows: of the training images, the first ones.
        rho, steps: of the form "worst".
        ratio: share of channels removed in the form "removal".
        batch_size: images at a time; Taylor averages squares over batches.
        seed: of PGD.
    """

    form: Form = "removal"
    ranking: Ranking = "auto"
    epsilon: float = 8 / 255
    attack_steps: int = 10
    rows: int = 512
    rho: float = 0.1
    steps: int = 10
    ratio: float = 0.5
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS or self.ranking not in RANKINGS:
            raise AttackError(
                f"MRS has the forms {FORMS} and the rankings {RANKINGS}; got {self.form!r} and {self.ranking!r}."
            )
        Ball(epsilon=self.epsilon)
        take_numbers(
            self,
            AttackError,
            wholes=("attack_steps", "rows", "steps", "batch_size", "seed"),
            finites=("rho", "ratio"),
        )
        check_numbers(self.rho, self.ratio, self.steps, self.attack_steps)
        if min(self.rows, self.batch_size) < 1:
            raise AttackError(f"Scoring needs rows and batch_size >= 1, got {self}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleScores:
    """What was measured.

    Attributes:
        sensitivity: per module [nats]; "removal" and "worst" are rises of the loss on the scored images.
        ranking: per module one score per channel, higher = keep; compared within a module only.
    """

    sensitivity: tuple[float, ...]
    ranking: tuple[Tensor, ...]


def score(
    model: nn.Module, images: Images, groups: Sequence[ChannelGroup], settings: ScoreSettings
) -> ModuleScores:
    """Sensitivity per module and ranking per channel. The model is left as it was, and so is the random state.

    Args:
        images: to score on; training images, so that the test images stay unseen.
        groups: from `find_channel_groups`.

    Raises:
        UnsupportedModelError: the model is in half precision, or a group cannot be removed.
        AttackError: epsilon is not above zero.
    """
    check_precision(model)
    require_removable(groups)
    with restored(model):
        model.eval()
        batches = attacked_batches(model, images, settings)
        ranking = rank_channels(model, groups, batches, settings.ranking)
        return ModuleScores(
            sensitivity=tuple(sensitivity(model, groups, batches, ranking, settings)),
            ranking=tuple(ranking),
        )


def attacked_batches(
    model: nn.Module, images: Images, settings: ScoreSettings
) -> list[tuple[Tensor, Tensor]]:
    """(attacked images, labels), made once on the model as it is."""
    device = next(model.parameters()).device
    result = []
    for x, y in images.first(settings.rows).batches(settings.batch_size):
        x, y = x.to(device), y.to(device)
        moved = (
            attacked(model, x, y, settings.epsilon, settings.attack_steps, settings.seed)
            if settings.attack_steps
            else x
        )
        result.append((moved, y))
    return result


def rank_channels(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[tuple[Tensor, Tensor]],
    ranking: Ranking,
) -> list[Tensor]:
    """Per module one score per channel, higher = keep; for the rankings see `ScoreSettings`.

    Raises:
        UnsupportedModelError: "bn", and a module's channels are followed by no batch norm.
    """
    if ranking == "l1":
        return unit_norms(model, groups, [g.owners for g in groups])
    if ranking != "taylor":
        scales = [scale for g in groups if (scale := _norm_scales(model, g)) is not None]
        if len(scales) == len(groups):
            return scales
        if ranking == "bn":
            missing = next(g.name for g in groups if _norm_scales(model, g) is None)
            raise UnsupportedModelError(
                f"No batch norm follows the channels of {missing}; rank them by l1 or taylor."
            )
    return unit_taylor(model, groups, mean_loss, batches)


def _norm_scales(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """(width,) sum of the absolute scales of the batch norms behind each channel; None where there is none."""
    names = [n for n, size in group.followers if n.endswith(".weight") and size == 1]
    weights = [model.get_parameter(n).detach().abs().double().cpu() for n in names]
    weights = [w for w in weights if len(w) == group.width]
    return torch.stack(weights).sum(0) if weights else None


def sensitivity(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[tuple[Tensor, Tensor]],
    ranking: Sequence[Tensor],
    settings: ScoreSettings,
) -> list[float]:
    """Per module, in the form that the settings ask for."""
    if settings.form == "worst":
        # Stochastic: for all modules together it then costs about one epoch of adversarial training on the same images.
        return worst_case(
            model,
            groups,
            mean_loss,
            batches,
            rho=settings.rho,
            steps=settings.steps,
            stochastic=True,
        )
    if settings.form == "grad":
        return first_order(model, groups, mean_loss, batches, rho=settings.rho)
    return removal(model, groups, mean_loss, batches, ranking, ratio=settings.ratio)


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of (images, labels)."""
    return F.cross_entropy(model(batch[0]), batch[1])
