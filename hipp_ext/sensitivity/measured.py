"""Measured sensitivity: the KL divergence of the outputs when one group alone is pruned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hipp_ext.groups import Group, gated, tower_layers
from hipp_ext.modes import evaluating
from hipp_ext.output_head import OutputHead, logit_bytes
from hipp_ext.progress import Tick
from hipp_ext.replay import Passed, starting_at
from hipp_ext.sensitivity.replay import CalibrationReplay, ReplayBatch, chunks
from hipp_ext.steps import NOTHING_KEPT, Steps, fits
from hipp_ext.units import unit_order

DENSE_BYTES = 1 << 30  # of the dense model's log probabilities that are kept, of one batch


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measurement: a group that loses its lowest units.

    Attributes:
        group: the group.
        removed: number of units that it loses, the same of each of its sections, from 1; all of
            them drop its block.
    """

    group: Group
    removed: int


@torch.no_grad()
def measure_points(
    model: nn.Module,
    replay: CalibrationReplay,
    points: Sequence[Point],
    scores: Mapping[str, Tensor],
    batches: Sequence[ReplayBatch],
    tick: Tick = lambda done, total: None,
    steps: Steps = NOTHING_KEPT,
    name: str = "points",
) -> Float[Tensor, "points tasks"]:
    """Mean KL [nats per counted position] from the dense model, for each point and task.

    A measurement starts at the pruned layer: what the layer below puts out does not change, and is
    computed once per batch. So a point costs half a forward pass over `batches` on average. A
    point before the language tower costs a whole one, with the vision tower.

    Args:
        model: masked while it is measured, otherwise left as it was found.
        replay: the calibration.
        points: what is removed, one group at a time.
        scores: group name -> score per unit, higher = keep.
        batches: batches of `replay` to measure on; each task needs one. They hold whole batches
            where points lie before the language tower.
        tick: called with (measurements done, all).
        steps: where measurements are kept, and found if an interrupted run left them.
        name: of these measurements among the steps.
    """
    layers = list(tower_layers(model, "language"))
    masks = [_kept_mask(point, scores) for point in points]
    found = []
    with evaluating(model):
        for number, batch in enumerate(batches):
            own = f"{name}-{number}"
            kl = _measured_before(steps.known(own), len(points), batch.size)
            outputs, dense = (
                _dense(model, replay.head, batch, layers) if len(kl) < len(points) else ([], None)
            )
            for point, mask in list(zip(points, masks, strict=True))[len(kl) :]:
                assert dense is not None
                whole = point.group.tower != "language"
                first = 0 if whole else point.group.layer
                below = outputs[first - 1] if first else None
                with gated(model, {point.group: mask}), starting_at(layers, first, below):
                    hidden = batch.counted(batch.last_hidden(model, whole))
                kl.append(batch.per_row(dense.divergence(hidden)))
                steps.keep(own, {"kl": torch.stack(kl)})
                tick(number * len(points) + len(kl), len(points) * len(batches))
            found.append(torch.stack(kl))
    return replay.by_task(torch.cat(found, 1).T, tuple(batches)).T.clamp_min(0)


def _measured_before(kept: Mapping[str, Tensor], points: int, rows: int) -> list[Tensor]:
    """The KL of each row for the first points of a batch, as far as an interrupted run came."""
    kl = kept.get("kl", torch.empty(0))
    known = len(kl) if kl.ndim else 0
    return list(kl) if known <= points and fits(kept, {"kl": (known, rows)}) else []


class _Dense:
    """The dense model's distributions at the counted positions of a batch.

    They are kept where they take at most DENSE_BYTES, else computed from the hidden states again.
    """

    def __init__(self, model: nn.Module, head: OutputHead, hidden: Tensor):
        self._model, self._head = model, head
        self._hidden = list(chunks(model, hidden))
        self._kept = None
        if len(hidden) * logit_bytes(model) <= DENSE_BYTES:
            self._kept = [self._distribution(part) for part in self._hidden]

    def divergence(self, hidden: Float[Tensor, "P hidden"]) -> Float[Tensor, " P"]:
        """KL [nats] of each position's distribution from that of other hidden states."""
        parts = []
        for number, other in enumerate(chunks(self._model, hidden)):
            if self._kept is not None:
                probabilities, entropy = self._kept[number]
            else:
                probabilities, entropy = self._distribution(self._hidden[number])
            logits = self._head(self._model, other)
            parts.append(cross_entropy(logits, probabilities, reduction="none") - entropy)
        return torch.cat(parts)

    def _distribution(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities, entropy) at each position."""
        logits = self._head(self._model, hidden)
        probabilities = logits.softmax(-1)
        return probabilities, cross_entropy(logits, probabilities, reduction="none")


def _dense(
    model: nn.Module, head: OutputHead, batch: ReplayBatch, layers: Sequence[nn.Module]
) -> tuple[list, _Dense]:
    """What each layer leaves behind, and the distributions, without any pruning.

    A layer that does not run (one that reads pictures, in a batch without any) passes on what the
    one below puts out.
    """
    found: dict[int, Passed] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, __, kwargs, output, i=i: found.update({i: Passed.of(kwargs, output)}),
            with_kwargs=True,
        )
        for i, layer in enumerate(layers)
    ]
    try:
        hidden = batch.last_hidden(model)
    finally:
        for hook in hooks:
            hook.remove()
    outputs: list = []
    for i in range(len(layers)):
        outputs.append(found.get(i, outputs[-1] if outputs else None))
    return outputs, _Dense(model, head, batch.counted(hidden))


def _kept_mask(point: Point, scores: Mapping[str, Tensor]) -> Bool[Tensor, " width"]:
    """True for the units that stay."""
    group = point.group
    mask = torch.ones(group.width, dtype=torch.bool)
    order = unit_order(scores[group.name], group.sections)
    mask[order[group.width - point.removed :]] = False
    return mask
