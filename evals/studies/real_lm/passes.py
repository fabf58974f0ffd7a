"""How many forward passes over the calibration a measurement is worth."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hipp_ext.groups import Group, total_parameters


@dataclass
class Passes:
    """Tokens times parameters that went through the blocks of a model.

    Attributes:
        forward: of forward passes.
        backward: of backward passes without weight gradients, which cost as much as forward ones.
    """

    forward: int = 0
    backward: int = 0

    def over(self, groups: Sequence[Group], tokens: int) -> float:
        """The work in forward passes of all blocks of `groups` over `tokens` tokens."""
        return (self.forward + self.backward) / (total_parameters(groups) * tokens)


@contextlib.contextmanager
def counted_passes(model: nn.Module, groups: Sequence[Group]) -> Iterator[Passes]:
    """Count what runs through the blocks of `groups` inside the `with` block.

    A block counts when its consumer (o_proj, down_proj) is called, as much as its dense parameters:
    layers that are replaced while something is measured cost nothing. Embeddings and the output
    head are not counted.
    """
    passes = Passes()

    def add_backward(amount: int, _: Tensor) -> None:
        passes.backward += amount

    def count(parameters: int, _: nn.Module, args: tuple) -> None:
        amount = parameters * args[0].shape[:-1].numel()
        passes.forward += amount
        if args[0].requires_grad:
            args[0].register_hook(functools.partial(add_backward, amount))

    with contextlib.ExitStack() as stack:
        for group in groups:
            consumer = model.get_submodule(group.consumer)
            hook = consumer.register_forward_pre_hook(functools.partial(count, group.parameters))
            stack.callback(hook.remove)
        yield passes
