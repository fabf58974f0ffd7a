"""LQ-SGD between nodes under FSDP2, which shards inside a node.

Native HSDP (a 2-D mesh) offers no way to replace its all-reduce (torch 2.14); its all-reduce hook
runs afterwards. With FSDP over the inner mesh only, the same hook runs instead, on the result of
reduce-scatter. This is a flat vector of shards without names or shapes, so it cannot be factored:
it is sent whole, quantised, with error feedback, in 4 (8 bits) or 8 (4 bits) times fewer bytes
than fp32.
"""

from typing import Any

from torch import nn

from hipp_ext.comm.state import LQSGDState
from hipp_ext.errors import CompressionError


def register_lqsgd_fsdp(model: nn.Module, between: Any, **options: Any) -> dict[str, LQSGDState]:
    """Average the gradients of an FSDP2 model over the group `between`. Every rank calls this.

    Args:
        model: model after `fully_shard(..., mesh=inside)` on it and, as usual, on its blocks.
        between: group of the ranks that hold the same shard on different nodes, such as
            `mesh["nodes"].get_group()`.
        options: keyword arguments of `LQSGDState`.

    Returns:
        Name of each sharded module with parameters of its own -> its state, for `stats()` and
        `state_dict()`; the layout is known after the first step.

    Raises:
        CompressionError: no module of `model` is sharded; see also `LQSGDState`.
    """
    from torch.distributed.fsdp import FSDPModule

    sharded = {n: m for n, m in model.named_modules() if isinstance(m, FSDPModule)}
    if not sharded:
        raise CompressionError(
            f"{type(model).__name__} has no module that fully_shard was applied to."
        )
    states = {}
    taken: set[int] = set()
    for name, module in reversed(sharded.items()):  # inner modules first: they own what they hold
        own = {id(p) for p in module.parameters()} - taken
        taken |= own
        if own:
            states[name] = state = LQSGDState(between, **options)
            _ = state.group  # made here, where all ranks are
            module.set_all_reduce_hook(lambda flat, state=state: state.mean_({"0": flat}))
    return dict(reversed(states.items()))
