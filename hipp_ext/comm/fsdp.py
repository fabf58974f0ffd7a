"""LQ-SGD between nodes under FSDP2: shard inside a node, average compressed gradients between nodes.

Found in torch 2.14: native HSDP (a 2-D mesh) all-reduces with `dist.all_reduce` and offers no way to replace it; its all-reduce
hook runs afterwards. With FSDP over the inner mesh only, the same hook runs in its place, on what reduce-scatter left. That is
a flat vector of this rank's shards without names or shapes, so the low-rank half of LQ-SGD does not apply: it goes whole,
quantised, with error feedback, which is 4 (8 bits) or 8 (4 bits) times less than fp32.
"""

from typing import Any

from torch import Tensor, nn

from hipp_ext.comm.ddp_hook import LQSGDState
from hipp_ext.errors import CompressionError


def register_lqsgd_fsdp(model: nn.Module, between: Any, **options: Any) -> dict[str, LQSGDState]:
    """Average the gradients of an FSDP2 model over the process group `between`, compressed; every rank calls this.

    Args:
        model: after `fully_shard(..., mesh=inside)` on it and, as usual, on its blocks.
        between: the group of ranks that hold the same shard on different nodes: `mesh["nodes"].get_group()`.
        options: of `LQSGDState`.

    Returns:
        Module name -> its state; keep them for `stats()` and `state_dict()`.

    Raises:
        CompressionError: no module of `model` is sharded, or see `LQSGDState`.
    """
    from torch.distributed.fsdp import FSDPModule

    sharded = [
        (name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)
    ]
    if not sharded:
        raise CompressionError(
            f"{type(model).__name__} has no module that fully_shard was applied to."
        )
    states = {}
    for name, module in sharded:
        if (flat := _flat_like(module)) is not None:
            states[name] = LQSGDState([flat], process_group=between, **options)
            module.set_all_reduce_hook(lambda flat, state=states[name]: state.mean_({"0": flat}))
    return states


def _flat_like(module: Any) -> Tensor | None:
    """A tensor of the size of what reduce-scatter leaves for this module; None where it has no parameters of its own."""
    group = module._get_fsdp_state()._fsdp_param_group
    if group is None:
        return None
    return (
        group.fsdp_params[0]
        .sharded_param.to_local()
        .new_empty(sum(p._sharded_param_data.numel() for p in group.fsdp_params))
    )
