"""What stands in the place of dropped blocks."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.families import CACHE_LAYER, CACHES, borrows_keys


class Skip(nn.Module):
    """A dropped block: adds nothing to the residual stream, computes nothing, has no parameters.

    Args:
        kind: name of the kind of the block.
        block: the block that is dropped. Its plain attributes (layer_idx, is_sliding, ...) are
            kept, because some decoder layers read them.
    """

    def __init__(self, kind: str, block: nn.Module):
        super().__init__()
        self.kind = kind
        plain = (bool, int, float, str, type(None))
        self.__dict__.update(
            {k: v for k, v in vars(block).items() if isinstance(v, plain) and k[0] != "_"}
        )
        self.training = block.training
        # MPT's and Bloom's blocks are called with the residual stream and add to it themselves.
        self.adds = "residual" in list(inspect.signature(block.forward).parameters)[:2]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block would return if it added nothing: zeros, or the residual stream."""
        if self.adds:
            return kwargs["residual"] if "residual" in kwargs else args[0]
        return torch.zeros_like(hidden_states)  # with memory: Falcon adds in place


class SkipAttention(Skip):
    """A dropped attention block.

    A cache counts its tokens layer by layer, so this one is told how many there are: it gets one
    zero per token, because an empty entry would count as no token at all.
    """

    def forward(self, hidden_states: Tensor, *_: Any, **given: Any) -> tuple[Tensor, None]:
        """(zeros of the shape of `hidden_states`, no attention weights)."""
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if cache is not None and not borrows_keys(self):
            batch, tokens = hidden_states.shape[:2]
            zeros = hidden_states.new_zeros(batch, 1, tokens, 1)
            layer = next(getattr(self, name) for name in CACHE_LAYER if hasattr(self, name))
            cache.update(zeros, zeros, layer)
        return super().forward(hidden_states), None


class SkipMixture(Skip):
    """A dropped mixture whose decoder layer expects the router's scores beside its outputs."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """(zeros of the shape of `hidden_states`, no scores)."""
        return super().forward(hidden_states), None
