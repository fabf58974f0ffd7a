"""A trained classifier -> sensitivity per group of channels, and a ranking of the channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hipp_ext.attacks import Ball, check_precision
from hipp_ext.errors import AttackError, UnsupportedModelError
from hipp_ext.modes import restored
from hipp_ext.quantities import take_numbers
from hipp_ext.robust.data import Images
from hipp_ext.robust.losses import attacked
from hipp_ext.scorers.channels import ChannelGroup, require_removable
from hipp_ext.scorers.gates import unit_taylor
from hipp_ext.scorers.group_loss import first_order, removal, worst_case
from hipp_ext.scorers.mrs import FORMS, Form, check_numbers

Ranking = Literal["auto", "bn", "taylor", "l1"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How groups and channels are scored.

    Attributes:
        form: form of MRS, see `hipp_ext.scorers.MRS`.
        ranking: how the channels of a group are ranked: "bn" (scale of the batch norm behind the
            channel), "taylor" (derivative of the loss with respect to a gate), "l1" (weight norms),
            or "auto": "bn" where every channel has a batch norm, else "taylor". It matters more
            than the allocation: see evals/studies/LOG.md.
        epsilon: L-inf radius of the attack on the scored images.
        attack_steps: gradient steps of PGD; 0 scores clean images, which is the counterpart that a
            claim about robustness has to beat.
        rows: number of training images that are scored, the first ones.
        rho: radius of the form "worst", as a fraction of a weight's norm.
        steps: gradient steps of the form "worst".
        ratio: fraction of channels that the form "removal" removes.
        batch_size: images per batch; Taylor averages squares over batches.
        seed: random seed of PGD's starting point.
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
                f"MRS has the forms {FORMS} and the rankings {RANKINGS}; got {self.form!r} and "
                f"{self.ranking!r}."
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
class GroupScores:
    """The scores of a classifier.

    Attributes:
        sensitivity: one number per group [nats]; "removal" and "worst" are rises of the loss on the
            scored images.
        ranking: per group one score per channel, higher = keep, comparable within a group only.
    """

    sensitivity: tuple[float, ...]
    ranking: tuple[Tensor, ...]


def score(
    model: nn.Module, images: Images, groups: Sequence[ChannelGroup], settings: ScoreSettings
) -> GroupScores:
    """Sensitivity per group and ranking per channel.

    Args:
        model: left as it was, and so is the global random state.
        images: images to score on. Training images leave the test images unseen.
        groups: from `find_channel_groups`.
        settings: see `ScoreSettings`.

    Raises:
        UnsupportedModelError: the model is in half precision, or a group cannot be removed.
        AttackError: epsilon is not above zero.
    """
    check_precision(model)
    require_removable(groups)
    with restored(model, random_state=True):
        model.eval()
        batches = attacked_batches(model, images, settings)
        ranking = rank_channels(model, groups, batches, settings.ranking)
        values = sensitivity(model, groups, batches, ranking, settings)
        return GroupScores(sensitivity=tuple(values), ranking=tuple(ranking))


def attacked_batches(
    model: nn.Module, images: Images, settings: ScoreSettings
) -> list[tuple[Tensor, Tensor]]:
    """(attacked images, labels), made once on the model as it is."""
    device = next(model.parameters()).device
    batches = []
    for x, y in images.first(settings.rows).batches(settings.batch_size):
        x, y = x.to(device), y.to(device)
        if settings.attack_steps:
            x = attacked(model, x, y, settings.epsilon, settings.attack_steps, settings.seed)
        batches.append((x, y))
    return batches


def rank_channels(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[tuple[Tensor, Tensor]],
    ranking: Ranking,
) -> list[Tensor]:
    """Per group one score per channel, higher = keep; for the rankings see `ScoreSettings`.

    Raises:
        UnsupportedModelError: "bn", and no batch norm follows the channels of a group.
    """
    if ranking == "l1":
        return [unit_norms(model, group) for group in groups]
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


def unit_norms(model: nn.Module, group: ChannelGroup) -> Tensor:
    """(width,) L1 norms of the units' weights; those of every producer are scaled to sum to 1."""
    total = torch.zeros(group.width, dtype=torch.float64)
    for name, units in zip(group.producers, group.producer_units, strict=True):
        layer = model.get_submodule(name)
        weight = _by_output(layer, model.get_parameter(f"{name}.weight"))
        norms = weight.abs().sum(1, dtype=torch.float64).cpu()
        scaled = norms / norms.sum().clamp_min(1e-30)
        total.index_add_(0, units[units >= 0], scaled[units >= 0])
    return total


def _by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """(output channels, all other entries); a transposed convolution has its inputs first."""
    weight = weight.detach()
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed:
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _norm_scales(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """(width,) sums of absolute scales of the batch norms behind each channel, or None."""
    names = [n for n, size in group.norms if n.endswith(".weight") and size == 1]
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
    """Sensitivity per group, in the form that the settings name."""
    if settings.form == "worst":
        # Stochastic: for all groups together it then costs about one epoch of adversarial training
        # on the same images.
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
