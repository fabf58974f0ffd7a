"""The layers that read units, as they are in the pruned model, and what their outputs lack."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from hipp_ext.families import norm_before, residual_scale
from hipp_ext.groups import Group, gated
from hipp_ext.layer_parts import own_norms
from hipp_ext.projections import matrix_of
from hipp_ext.surgery.streams import Stream
from hipp_ext.units import unit_entries

DRIFT = 0.5  # part of the residual stream's drift that a block makes up for


@dataclass(eq=False)
class Consumer:
    """A consumer of the dense model, and what takes its place.

    Attributes:
        module: the dense one.
        kept: input columns that stay.
        weight: weight (outputs, kept inputs), as far as it is known: sliced, then fitted.
        fitted: whether it is another than the slice.
        tokens: number of tokens that it was fitted to.
    """

    module: nn.Module
    kept: Tensor
    weight: Tensor
    fitted: bool = False
    tokens: int = 0

    @classmethod
    def sliced(cls, module: nn.Module, units: Tensor, columns: int) -> "Consumer":
        weight = matrix_of(module)
        kept = unit_entries(units, columns).to(weight.device)
        return cls(module, kept, weight.index_select(1, kept))

    def outputs(self, _: nn.Module, args: tuple[Any, ...], __: Tensor) -> Tensor:
        """What the pruned model computes here; without the bias, where the block is dropped."""
        bias: Any = self.module.bias if len(self.kept) else None
        return functional.linear(args[0].index_select(-1, self.kept), self.weight, bias)

    def standing_in(self) -> contextlib.AbstractContextManager[Any]:
        """Inside the `with` block the model computes with the weight that takes its place."""
        return self.module.register_forward_hook(self.outputs)


@dataclass(frozen=True, eq=False)
class MaskedBlock:
    """A block without consumer: a mixture of experts, which is sliced and not fitted.

    Attributes:
        model: the dense model.
        group: the block's group.
        mask: True for the units that stay.
    """

    model: nn.Module
    group: Group
    mask: Tensor

    def standing_in(self) -> contextlib.AbstractContextManager[Any]:
        """Inside the `with` block the block computes with the units that stay."""
        return gated(self.model, {self.group: self.mask})


@contextlib.contextmanager
def standing_in(replaced: Iterable[Consumer | MaskedBlock]) -> Iterator[None]:
    """Inside the block the model computes with what takes the place of `replaced`."""
    with contextlib.ExitStack() as stack:
        for one in replaced:
            stack.enter_context(one.standing_in())
        yield


def lacking_outputs(
    group: Group,
    consumer: Consumer,
    before: Sequence[Consumer | MaskedBlock],
    dense: Stream,
    pruned: Stream,
) -> tuple[Tensor, Tensor] | None:
    """The kept inputs of a sliced consumer, and what its outputs lack; (tokens, ...), float32.

    None where the model leaves the layer out on such a batch.
    """
    norm = _residual_input(dense.layers[group.layer], group.place)
    norms = [] if norm is None else [norm]
    with standing_in(before):
        here = pruned.inputs(group.layer, *norms, consumer.module)
    if here is None:
        return None
    x, weight = here[-1].float(), matrix_of(consumer.module).float()
    lacking = functional.linear(x, weight.index_fill(1, consumer.kept, 0))
    if norm is not None:
        there = dense.inputs(group.layer, norm)
        assert there is not None, "both models run the same layers"
        lacking += DRIFT * (there[0].float() - here[0].float())
    return x.index_select(1, consumer.kept), lacking


def _residual_input(layer: nn.Module, place: str) -> nn.Module | None:
    """The norm that reads the residual stream to which a block's outputs are added as they are.

    None where the outputs are normed or scaled first, or no norm stands before the block alone.
    """
    norm = norm_before(layer, place)
    after = [n for n in own_norms(layer, place) if getattr(layer, n) is not norm]
    return None if after or residual_scale(layer, place) != 1 else norm
