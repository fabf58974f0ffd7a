"""The language tower, run again from any of its layers on inputs that were computed once."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hipp_ext.calibration import Batch
from hipp_ext.groups import decoder
from hipp_ext.modes import replaced_forward
from hipp_ext.scorers.base import forward


class _Captured(Exception):
    """Ends a forward pass once the inputs of the language tower are known."""


def decoder_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword arguments that the model calls its language tower with on `batch`.

    Embeddings, projector and vision tower run for them; the layers of the language tower do not.
    """
    captured: dict[str, Any] = {}
    tower = decoder(model)

    def capture(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = inspect.signature(tower.forward).parameters  # some wrappers call by position
        captured.update(zip(names, args, strict=False), **kwargs)
        raise _Captured

    handle = tower.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        forward(model, batch)
    except _Captured:
        pass
    finally:
        handle.remove()
    return captured


@contextlib.contextmanager
def starting_at(layers: Sequence[nn.Module], start: int, output: Any) -> Iterator[None]:
    """Inside the block the tower starts at layer `start`: those below it compute nothing.

    What a tower does between its layers (features of pictures that are added by layer, for one) is
    done as usual.

    Args:
        layers: the layers of the tower, in order.
        start: index of the first layer that computes.
        output: what layer `start - 1` returned on the same inputs; ignored where `start` is 0.
    """

    def skip(*_: Any, **__: Any) -> Any:
        # A copy, because a tower may add to it in place.
        return tree_map_only(Tensor, Tensor.clone, output)

    with contextlib.ExitStack() as stack:
        for layer in layers[:start]:
            stack.enter_context(replaced_forward(layer, skip))
        yield
