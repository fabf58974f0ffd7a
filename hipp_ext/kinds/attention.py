"""Attention, in one of two units.

Kind "attention": a unit is a KV group, one key and value head with all query heads that share it.
Kind "query_heads": a unit is a query head; keys and values stay.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import BLOCKS
from hipp_ext.kinds.base import BlockKind, Skip, Slice


class _Heads(BlockKind):
    """What both units of attention have in common."""

    place = "attention"
    names = BLOCKS["attention"]

    def passes_on(self, block: Any) -> bool:
        """One number per query channel."""
        _, consumer = self.match(block) or ([], "")
        return getattr(block, consumer).in_features == block.q_proj.out_features

    def check_rest(self, block: Any, name: str, width: int) -> None:
        """Only the parameters of a norm that all heads share, head_dim long, may stand beside the
        projections: not those in a list of norms, nor those of the block itself (sinks)."""
        for part, parameter in block.named_parameters():
            owner, *rest = part.split(".")
            if owner in (*self.names.producers[0], *self.names.consumers):
                continue
            if len(rest) != 1 or parameter.shape != (block.head_dim,):
                raise UnsupportedModelError(
                    f"{name}.{part} has shape {tuple(parameter.shape)}: only the parameters of a "
                    f"norm that all heads share, of shape ({block.head_dim},), can stay when heads "
                    "go."
                )

    def context_flops(self, owns: tuple[Slice, ...], context: int) -> int:
        """Scores and weighted sum over `context` keys."""
        return 4 * owns[-1].size * context

    def stock_counts(
        self, config: Any, tower: str, common: int, block: Any, columns: int
    ) -> tuple[int, ...]:
        """Others than `common` only where the query heads divide the hidden size, and where this
        kind of configuration has a field for the head dimension."""
        named = hasattr(type(config), "head_dim") and config.head_dim is not None
        if tower == "vision" or not named:
            return (common,)  # the head dimension is derived from the number of heads
        heads = columns // block.head_dim  # query heads of a unit
        fewer = (n for n in range(1, common) if config.hidden_size % (n * heads) == 0)
        return (*fewer, common)

    def skip(self, block: Any) -> Skip:
        """A module that returns nothing and keeps the cache counting."""
        return SkipAttention(Attention.name, block)


class Attention(_Heads):
    """Attention blocks with linear q, k, v and output projections, by KV groups."""

    name = "attention"
    unit = "KV groups"
    fields = ("num_key_value_heads", "num_attention_heads")

    def width(self, block: Any, name: str) -> int:
        """Number of KV groups."""
        head_dim = getattr(block, "head_dim", None)
        if not isinstance(head_dim, int) or block.k_proj.out_features % head_dim:
            raise UnsupportedModelError(
                f"{name} ({type(block).__name__}) has no head_dim that divides its k_proj."
            )
        return _kv_heads(block)

    def attributes(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Numbers of query heads and KV heads."""
        return {"num_heads": width * columns // block.head_dim, "num_key_value_heads": width}

    def config(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Numbers of query heads and KV heads."""
        heads = width * columns // block.head_dim
        return {"num_attention_heads": heads, "num_key_value_heads": width}

    def configured_width(self, config: Any, block: Any, columns: int) -> int:
        """KV heads, or heads where the configuration names no others."""
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    def common_width(self, config: Any, tower: str) -> int | None:
        """KV heads, or heads where the configuration names no others; vision towers name heads."""
        return super().common_width(config, tower) if tower == "language" else _heads(config)

    def set_common_width(self, config: Any, tower: str, width: int) -> None:
        """As many query heads per KV group as before. A vision tower's heads stay."""
        if tower == "language":
            kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            repeat = config.num_attention_heads // kv_heads
            config.num_key_value_heads = width
            config.num_attention_heads = width * repeat


class QueryHeads(_Heads):
    """The same blocks, by query heads: of every KV group the same number goes.

    A unit owns its rows of q_proj and its columns of the output projection. Keys and values belong
    to nobody; they stay, unless the block is dropped.
    """

    name = "query_heads"
    unit = "query heads"
    fields = ("num_attention_heads",)

    def find(self, layer: nn.Module) -> list[nn.Module]:
        """None: `Attention` finds the blocks, and `find_groups` is told which unit to take."""
        return []

    def width(self, block: Any, name: str) -> int:
        """Number of query heads."""
        return block.q_proj.out_features // block.head_dim

    def sections(self, block: Any) -> int:
        """Number of KV groups: query heads of a group lie side by side."""
        return _kv_heads(block)

    def owns(self, block: Any, name: str, width: int) -> tuple[Slice, ...]:
        """A query head's part of what its KV group owns."""
        of_groups = super().owns(block, name, _kv_heads(block))
        repeat = width // _kv_heads(block)
        return tuple(
            replace(part, size=part.size // repeat)
            for part in of_groups
            if part.dim == 1 or part.layer.endswith(".q_proj")
        )

    def attributes(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Numbers of query heads, and of those that share a key head."""
        return {"num_heads": width, "num_key_value_groups": width // _kv_heads(block)}


class SkipAttention(Skip):
    """A dropped attention block.

    A cache counts its tokens layer by layer, so this one is told how many there are: it gets one
    zero per token, because an empty entry would count as no token at all.
    """

    def forward(
        self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any
    ) -> tuple[Tensor, None]:
        """(zeros of the shape of `hidden_states`, no attention weights)."""
        if past_key_values is not None:
            batch, tokens = hidden_states.shape[:2]
            zeros = hidden_states.new_zeros(batch, 1, tokens, 1)
            past_key_values.update(zeros, zeros, self.layer_idx)
        return super().forward(hidden_states), None


def shares_keys(block: Any) -> bool:
    """Whether several query heads of an attention block share a key head."""
    return block.q_proj.out_features > block.k_proj.out_features


def _kv_heads(block: Any) -> int:
    return block.k_proj.out_features // block.head_dim


def _heads(config: Any) -> int | None:
    heads = getattr(config, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None
