"""SynFlow: the synaptic flow from input to output through a unit. It needs no data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.groups import Group, linear, tower_layers
from hipp_ext.plan import PruningPlan
from hipp_ext.scorers.base import Scorer, consumer_weight, per_unit

NORMS = {
    "attention": ("input_layernorm", "attention_layernorm", "layer_norm1"),
    "ffn": (
        "pre_feedforward_layernorm",
        "pre_ff_layernorm",
        "feedforward_layernorm",
        "post_attention_layernorm",
        "layer_norm2",
    ),
}


@dataclass(frozen=True, kw_only=True)
class SynFlow(Scorer):
    """Fraction of the flow at a block's depth that passes the unit, in [0, 1). Higher = keep.

    The fractions of a group sum to less than one: the rest takes the residual path.

    Source: SynFlow (arXiv 2006.05467), eq. 2; HiPP-Prune (arXiv 2603.06270, abstract) uses a
    stability proxy in its spirit.
    Differs from the paper: one pass instead of iterations; for transformers the network is
    linearised (a norm is its |gain|, attention passes values on, a gated FFN is |W_down| |W_up|),
    and the flow is renormalised at every block, which the shares do not notice, so depth and dtype
    cannot make it overflow; no gradient, no weight is touched.
    """

    needs_calibration = False

    @torch.no_grad()
    def score(
        self, model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        for tower in dict.fromkeys(g.tower for g in groups):
            wanted = [g for g in groups if g.tower == tower]
            blocks = [_linearise(model, g) for g in wanted]
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


def stability(plan: PruningPlan, flow_shares: Mapping[str, Tensor]) -> float:
    """Sum over groups of the log of the flow that a plan retains; 0 = dense, lower = less stable.

    It is of first order: each group's loss of flow is computed in the otherwise dense model.

    Args:
        plan: whose groups `flow_shares` covers.
        flow_shares: from `SynFlow()(model)`.

    Source: the stability proxy of HiPP-Prune (arXiv 2603.06270, abstract), whose formula is not
    public; ours.
    """
    total = 0.0
    for g in plan.groups:
        share = flow_shares[g.name].double()
        removed = float(share.sum() - share[list(g.kept)].sum())
        total += math.log1p(-min(max(removed, 0.0), 1 - 1e-12))
    return total


@dataclass
class _Block:
    """One linearised block, float32 absolute weights read tile by tile from the model."""

    model: nn.Module
    group: Group
    gain: Tensor
    arriving: Tensor
    carried: Tensor

    def _value(self) -> Tensor:
        # Attention passes values on (v_proj is the last producer); an FFN its up projection.
        return linear(self.model, self.group.producers[-1]).weight.float().abs()

    def _repeat(self) -> int:
        return self.group.columns // self.group.rows[-1]

    def into(self, x: Tensor) -> Tensor:
        values = (self._value() @ (self.gain * x)).view(self.group.width, 1, -1)
        return values.expand(-1, self._repeat(), -1).reshape(-1)

    def out(self, carried: Tensor) -> Tensor:
        return consumer_weight(self.model, self.group).float().abs() @ carried

    def back_out(self, y: Tensor) -> Tensor:
        return consumer_weight(self.model, self.group).float().abs().T @ y

    def back_into(self, carried: Tensor) -> Tensor:
        summed = carried.view(self.group.width, self._repeat(), -1).sum(1).reshape(-1)
        return self.gain * (self._value().T @ summed)


def _linearise(model: nn.Module, group: Group) -> _Block:
    layer, producer = (
        tower_layers(model, group.tower)[group.layer],
        linear(model, group.producers[-1]),
    )
    ones = torch.ones(
        producer.in_features, dtype=producer.weight.dtype, device=producer.weight.device
    )
    gain = _gain(_norm_before(layer, group.kind), ones)
    return _Block(model=model, group=group, gain=gain, arriving=gain, carried=gain)


def _norm_before(layer: nn.Module, kind: str) -> nn.Module | None:
    """The norm before a block; None where blocks norm their output or share another's norm."""
    norms = {
        k: [m for name in names if isinstance(m := getattr(layer, name, None), nn.Module)]
        for k, names in NORMS.items()
    }
    # Without a norm before attention the one behind it belongs to its output (EXAONE 4).
    return norms[kind][0] if norms["attention"] and norms[kind] else None


def _gain(norm: nn.Module | None, ones: Tensor) -> Tensor:
    """(hidden,) the scale of a norm, also where it is stored less one (Gemma); no norm: ones."""
    if norm is None:
        return ones.float()
    probe = ones.clone()
    probe[::2] = -1
    return (norm(probe) - norm(-probe)).float().abs() / 2


def _unit_norm(x: Tensor) -> Tensor:
    return x / x.norm().clamp_min(torch.finfo(torch.float32).tiny)
