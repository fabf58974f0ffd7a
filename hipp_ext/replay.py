"""The language tower, run again from any of its layers on inputs that were computed once."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hipp_ext.calibration import Batch
from hipp_ext.families import SHARED_KEYS
from hipp_ext.groups import decoder
from hipp_ext.modes import replaced_forward
from hipp_ext.scorers.base import forward, forward_hidden


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


def whole_pass(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden states of the language tower (rows, tokens, hidden), with vision tower and
    projector run again.
    """
    seen: list[Any] = []
    handle = decoder(model).register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        forward_hidden(model, batch)
    finally:
        handle.remove()
    return seen[-1].last_hidden_state


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What a layer has left behind for those above it.

    Attributes:
        output: what it returned.
        shared: keys and values that later layers read of it and of those below (Gemma 3n, Gemma 4).
    """

    output: Any
    shared: Mapping[Any, Any]

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], output: Any) -> "Passed":
        """Made by a hook on a layer that was called with `kwargs` and returned `output`."""
        return cls(output=output, shared=dict(kwargs.get(SHARED_KEYS) or {}))


@contextlib.contextmanager
def starting_at(layers: Sequence[nn.Module], start: int, below: Passed | None) -> Iterator[None]:
    """Inside the block the tower starts at layer `start`: those below it compute nothing.

    What a tower does between its layers (features of pictures that are added by layer, for one) is
    done as usual.

    Args:
        layers: the layers of the tower, in order.
        start: index of the first layer that computes.
        below: what layer `start - 1` left behind on the same inputs; ignored where `start` is 0.
    """

    def skip(*_: Any, **kwargs: Any) -> Any:
        assert below is not None
        if below.shared:
            kwargs[SHARED_KEYS].update(below.shared)
        # A copy, because a tower may add to it in place.
        return tree_map_only(Tensor, Tensor.clone, below.output)

    with contextlib.ExitStack() as stack:
        for layer in layers[:start]:
            stack.enter_context(replaced_forward(layer, skip))
        yield
