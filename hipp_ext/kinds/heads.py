"""What attention has in common in whichever units it is divided: its heads, and whose they are."""

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import (
    BLOCKS,
    HEAD_BIASES,
    HEAD_DIMS,
    SCATTERED,
    VALUE_DIM,
    borrowed_kv_heads,
    borrows_keys,
    common_value,
    fused_layout,
    lends_keys,
)
from hipp_ext.kinds.base import BlockKind
from hipp_ext.kinds.sized_config import SizedConfig
from hipp_ext.kinds.skips import Skip, SkipAttention
from hipp_ext.kinds.slices import Slice
from hipp_ext.projections import inputs_of, matrix_of, outputs_of


class Heads(BlockKind):
    """What both units of attention have in common."""

    place = "attention"
    names = BLOCKS["attention"]
    found_as: ClassVar[str] = "attention"  # the kind that finds the blocks

    def query_heads(self, block: Any) -> int:
        """Number of query heads: the consumer reads as many numbers of each as a value has."""
        return inputs_of(getattr(block, self.matched(block)[1])) // value_dim(block)

    def kv_heads(self, block: Any) -> int:
        """Number of key heads, and of value heads."""
        producers, _ = self.matched(block)
        if len(producers) > 1:
            return outputs_of(block.k_proj) // head_dim(block)
        if borrows_keys(block):
            return borrowed_kv_heads(block)
        heads = outputs_of(getattr(block, producers[0])) // head_dim(block)
        return (heads - self.query_heads(block)) // 2

    def extras(self, block: Any, name: str, width: int) -> tuple[Slice, ...]:
        """A sink per query head, and the rows of norms that have their own gain for every head."""
        return tuple(
            Slice(parameter=f"{name}.{part}", dim=0, size=len(parameter) // width, linear=False)
            for part, parameter in block.named_parameters()
            if _has_entry_per_head(part, parameter)
        )

    def check_rest(self, block: Any, name: str, width: int) -> None:
        """Only what heads own, and the parameters of a norm that all heads share, head_dim long,
        may stand beside the projections: not those in a list of norms, for one."""
        if type(block).__name__ in SCATTERED:
            raise UnsupportedModelError(
                f"{name} ({type(block).__name__}): the rows of its heads are scattered over parts "
                "of one projection."
            )
        taken = inspect.signature(type(block).forward).parameters
        biased = getattr(getattr(block, "config", None), "alibi", True)  # Falcon's may be without
        if biased and any(name in taken for name in HEAD_BIASES):
            raise UnsupportedModelError(
                f"{name} ({type(block).__name__}) is given a bias for every head "
                f"({' or '.join(HEAD_BIASES)}), which the model makes of the number of heads that "
                "its configuration names."
            )
        producers, consumer = self.matched(block)
        for part, parameter in block.named_parameters():
            owner, *rest = part.split(".")
            projection = owner in (*producers, *self.names.gates, consumer)
            if projection or _has_entry_per_head(part, parameter):
                continue
            if len(rest) != 1 or parameter.shape != (head_dim(block),):
                raise UnsupportedModelError(
                    f"{name}.{part} has shape {tuple(parameter.shape)}: only the parameters of a "
                    f"norm that all heads share, of shape ({head_dim(block)},), can stay when "
                    "heads go."
                )

    def passed_on(self, block: Any) -> tuple[Tensor, int]:
        """The value projection; that of the keys where they are the values; the identity where the
        values come from an earlier layer.
        """
        producers, _ = self.matched(block)
        weight, size = matrix_of(getattr(block, producers[-1])), value_dim(block)
        if borrows_keys(block):
            return torch.eye(self.kv_heads(block) * size, weight.shape[1]).to(weight), size
        if len(producers) == 1:
            heads = self.kv_heads(block)
            if fused_layout(block, producers[0]) == "units":
                weight = weight.unflatten(0, (heads, -1))[:, -size:].flatten(0, 1)
            weight = weight[-heads * size :]
        return weight, size

    def droppable(self, block: Any) -> bool:
        """Not where later layers need the keys and values."""
        return not lends_keys(block)

    def context_flops(self, owns: tuple[Slice, ...], context: int) -> int:
        """Scores and weighted sum over `context` keys."""
        return 4 * owns[-1].size * context

    def stock_counts(
        self, config: Any, tower: str, common: int, block: Any, columns: int
    ) -> tuple[int, ...]:
        """Others than `common` only where the query heads divide the hidden size, and where this
        kind of configuration has a field for the head dimension."""
        named = hasattr(type(config), "head_dim") and common_value(config, "head_dim") is not None
        if tower == "vision" or not named:
            return (common,)  # the head dimension is derived from the number of heads
        heads = columns // value_dim(block)  # query heads of a unit
        fewer = (n for n in range(1, common) if config.hidden_size % (n * heads) == 0)
        return (*fewer, common)

    def resize(self, block: Any, columns: int, width: int) -> None:
        """Blocks with fused projections (Phi-3) read their number of heads from the
        configuration that all layers share: such a block gets a view of its own.
        """
        super().resize(block, columns, width)
        producers, _ = self.matched(block)
        if fused_layout(block, producers[0]) == "parts" and hasattr(block, "config"):
            shared = getattr(block.config, "_shared", block.config)
            heads = width * columns // value_dim(block)
            block.config = shared
            if getattr(shared, "num_attention_heads", heads) != heads:
                block.config = SizedConfig(shared, num_attention_heads=heads)

    def skip(self, block: Any) -> Skip:
        """A module that returns nothing and keeps the cache counting.

        Some vision towers (Qwen-VL, GLM-4V) expect a tensor of their attention, and no pair.
        """
        returned = inspect.signature(type(block).forward).return_annotation
        alone = returned in (Tensor, "torch.Tensor", "Tensor")
        return (Skip if alone else SkipAttention)(self.found_as, block)


def shares_with_layers(block: Any) -> bool:
    """Whether an attention block shares keys and values with other layers."""
    return lends_keys(block) or borrows_keys(block)


def head_dim(block: Any) -> int:
    """Numbers per head of an attention block; 0 where it does not say."""
    sizes = [getattr(block, name, None) for name in HEAD_DIMS]
    return next((size for size in sizes if isinstance(size, int)), 0)


def value_dim(block: Any) -> int:
    """Numbers per value of an attention block, which may be fewer than of a key (MiMo)."""
    size = getattr(block, VALUE_DIM, None)
    return size if isinstance(size, int) else head_dim(block)


def _has_entry_per_head(part: str, parameter: Tensor) -> bool:
    """Whether a parameter of an attention block has an entry, or a row, for every head."""
    return part == "sinks" or (part.startswith(("q_norm.", "k_norm.")) and parameter.ndim == 2)
