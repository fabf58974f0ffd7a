"""SynFlow: the synaptic flow from input to output through a unit. It needs no data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.families import norm_before
from hipp_ext.groups import Group, block_of, tower_layers
from hipp_ext.kinds import KINDS
from hipp_ext.scorers.base import Groups, Scorer, Scores, consumer_weight, per_unit


@dataclass(frozen=True, kw_only=True)
class SynFlow(Scorer):
    """Fraction of the flow at a block's depth that passes the unit, in [0, 1). Higher = keep.

    The fractions of a group sum to less than one: the rest takes the residual path. Their sum is a
    signal of the planner's policy. Every tower is a network of its own. A projector has no residual
    path, so the fractions of its units sum to one.

    Source: SynFlow (arXiv 2006.05467), eq. 2; HiPP-Prune (arXiv 2603.06270, abstract) uses a
    stability proxy in its spirit.
    Differs from the paper: one pass instead of iterations; for transformers the network is
    linearised (a norm is its |gain|, attention passes values on, a gated FFN is |W_down| |W_up|),
    and the flow is renormalised at every block, which the shares do not notice, so depth and dtype
    cannot make it overflow; no gradient, no weight is touched.
    """

    needs_calibration = False

    @torch.no_grad()
    def score(self, model: nn.Module, groups: Groups, batches: Sequence[Batch]) -> Scores:
        scores: dict[str, Tensor] = {}
        for group in (g for g in groups if g.tower == "projector"):
            scores[group.name] = _without_residual(_Block(model, group), group)
        for tower in dict.fromkeys(g.tower for g in groups if g.tower != "projector"):
            wanted = [g for g in groups if g.tower == tower]
            blocks = [_Block(model, g) for g in wanted]
            arriving = torch.ones_like(blocks[0].gain)
            for block in blocks:
                arriving = arriving.to(block.gain.device)  # layers may lie on several devices
                block.arriving = arriving
                block.carried = block.into(arriving)
                arriving = _unit_norm(arriving + block.out(block.carried))
            leaving = torch.ones_like(blocks[0].gain)
            for group, block in reversed(list(zip(wanted, blocks, strict=True))):
                leaving = leaving.to(block.gain.device)
                through = block.carried * block.back_out(leaving)
                total = through.sum() + block.arriving @ leaving
                scores[group.name] = (per_unit(through, group).sum(1) / total).double()
                leaving = _unit_norm(leaving + block.back_into(block.back_out(leaving)))
        return scores


def _without_residual(block: "_Block", group: Group) -> Tensor:
    """The fractions of a projector's units, through which all of the flow passes."""
    leaving = torch.ones_like(block.consumer[:, 0], dtype=torch.float32)
    through = block.into(torch.ones_like(block.gain)) * block.back_out(leaving)
    return (per_unit(through, group).sum(1) / through.sum()).double()


class _Block:
    """One linearised block; absolute weights are made in float32 when they are used."""

    def __init__(self, model: nn.Module, group: Group):
        block = block_of(model, group)
        # Attention passes values on, an FFN its up projection. Columns of the consumer that lie
        # side by side, and how often they are repeated.
        self.value, self.size = KINDS[group.kind].passed_on(block)
        self.consumer = consumer_weight(model, group)
        self.repeat = self.consumer.shape[1] // self.value.shape[0]
        norm = norm_before(tower_layers(model, group.tower)[group.layer], group.place)
        self.gain = _gain(norm, torch.ones_like(self.value[0]))
        self.arriving = self.carried = self.gain

    def into(self, x: Tensor) -> Tensor:
        values = (self.value.float().abs() @ (self.gain * x)).view(-1, 1, self.size)
        return values.expand(-1, self.repeat, -1).reshape(-1)

    def out(self, carried: Tensor) -> Tensor:
        return self.consumer.float().abs() @ carried

    def back_out(self, y: Tensor) -> Tensor:
        return self.consumer.float().abs().T @ y

    def back_into(self, carried: Tensor) -> Tensor:
        summed = carried.view(-1, self.repeat, self.size).sum(1).reshape(-1)
        return self.gain * (self.value.float().abs().T @ summed)


def _gain(norm: nn.Module | None, ones: Tensor) -> Tensor:
    """(hidden,) the scale of a norm, also where it is stored less one (Gemma); no norm: ones."""
    if norm is None:
        return ones.float()
    probe = ones.clone()
    probe[::2] = -1
    return (norm(probe) - norm(-probe)).float().abs() / 2


def _unit_norm(x: Tensor) -> Tensor:
    return x / x.norm().clamp_min(torch.finfo(torch.float32).tiny)
