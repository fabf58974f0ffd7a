"""A mixture of experts that sends its tokens to some of its experts alone."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from hipp_ext.kinds.mixture import Mixture
from hipp_ext.kinds.slices import tensors_of


@contextlib.contextmanager
def routed_among(mixture: Mixture, kept: Int[Tensor, " kept"]) -> Iterator[None]:
    """Inside the block tokens are sent to the experts `kept` alone, as if there were no others.

    The router decides with its rows of these experts, exactly as after pruning, and where it sends
    a token to is translated into the numbers of all experts.

    Args:
        mixture: the mixture.
        kept: numbers of the experts, ascending.
    """
    block, experts, count = mixture.block, mixture.experts, mixture.count
    router = getattr(block, mixture.router)
    counting = [m for m in (block, router) if isinstance(getattr(m, "num_experts", None), int)]
    whole: dict[tuple[str, str], Tensor] = {}

    def restrict(*_: Any) -> None:
        for part, dim in mixture.routed.items():
            owner, name = part.rpartition(".")[::2]
            store = tensors_of(block.get_submodule(owner), name)
            whole[owner, name] = store[name]
            store[name] = store[name].index_select(dim, kept.to(store[name].device))
        for module in counting:
            module.num_experts = len(kept)

    def restore(*_: Any) -> None:
        for (owner, name), tensor in whole.items():
            tensors_of(block.get_submodule(owner), name)[name] = tensor
        whole.clear()
        for module in counting:
            module.num_experts = count

    def translate(_: nn.Module, args: Any) -> tuple:
        if not mixture.sorted_inputs:
            hidden, index, *weights = args
            return (hidden, kept.to(index.device)[index], *weights)
        x = args[0].view(len(kept), -1, args[0].shape[-1])
        everywhere = x.new_zeros(count, *x.shape[1:])
        return (everywhere.index_copy(0, kept.to(x.device), x).flatten(0, 1),)

    def select(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        of_experts = output.view(count, -1, output.shape[-1])
        return of_experts.index_select(0, kept.to(output.device)).flatten(0, 1)

    with contextlib.ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(restrict).remove)
        stack.callback(block.register_forward_hook(restore, always_call=True).remove)
        stack.callback(experts.register_forward_pre_hook(translate).remove)
        if mixture.sorted_inputs:
            stack.callback(experts.register_forward_hook(select).remove)
        yield
