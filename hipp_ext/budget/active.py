"""How much of a model computes for one token, before and after a plan.

Of a mixture of experts a token meets as many experts as the router sends it to. Fewer experts make
the model smaller and not faster; narrower experts make it both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hipp_ext.groups import Group, block_of, decoder
from hipp_ext.kinds.mixture import Mixture
from hipp_ext.plan import PruningPlan


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of a model.

    Attributes:
        parameters: all parameters.
        active: parameters of which one token of text makes use: those of experts that it is not
            sent to are left out, and so are those of other towers.
        flops: floating-point operations per token of text: two per multiply-accumulate of the
            language tower's weights and of the output embeddings, without attention over the
            context.
    """

    parameters: int
    active: int
    flops: int


def has_mixtures(model: nn.Module) -> bool:
    """Whether the language tower has mixtures of experts, so that its active size is another."""
    return any(Mixture.of(module) for module in decoder(model).modules())


def size_of(model: nn.Module) -> Size:
    """The size of a model as it is."""
    tower, head = decoder(model), model.get_output_embeddings()  # type: ignore[operator]
    used = {id(p): p for m in (tower, head) if m is not None for p in m.parameters()}
    idle = sum(map(_idle, filter(None, map(Mixture.of, tower.modules()))))
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    read = head is None or head.weight is not embeddings  # a token looks one row up
    multiplied = sum(p.numel() for p in used.values() if p.ndim > 1)
    active = sum(p.numel() for p in used.values()) - idle
    return Size(
        parameters=sum(p.numel() for p in model.parameters()),
        active=active,
        flops=2 * (multiplied - idle - read * embeddings.numel()),
    )


def size_after(model: nn.Module, groups: Sequence[Group], plan: PruningPlan) -> Size:
    """The size of a model once it is pruned by a plan.

    Args:
        model: the dense model.
        groups: its groups, in the order of the plan's entries.
        plan: the plan.
    """
    size = size_of(model)
    parameters, active, flops = size.parameters, size.active, size.flops
    for group, entry in zip(groups, plan.groups, strict=True):
        removed = entry.width - entry.keep
        if entry.keep or group.tower == "projector":
            parameters -= removed * group.unit_parameters
            if group.tower == "language":
                active -= removed * group.unit_active
                flops -= removed * group.unit_flops
            continue
        whole = list(block_of(model, group).parameters())
        mixture = Mixture.of(block_of(model, group))
        idle = _idle(mixture) if mixture else 0
        parameters -= sum(p.numel() for p in whole)
        if group.tower == "language":
            active -= sum(p.numel() for p in whole) - idle
            flops -= 2 * (sum(p.numel() for p in whole if p.ndim > 1) - idle)
    return Size(parameters=parameters, active=active, flops=flops)


def _idle(mixture: Mixture) -> int:
    """Parameters of the experts that a token is not sent to."""
    own = sum(p.numel() for p in mixture.experts.parameters())
    return own // mixture.count * max(0, mixture.count - mixture.top_k)
