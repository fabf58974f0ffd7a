"""Attention: a unit is a KV group, one key and value head with all query heads that share it."""

from typing import Any

from torch import Tensor

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import BLOCKS
from hipp_ext.kinds.base import BlockKind, Skip


class Attention(BlockKind):
    """Attention blocks with linear q, k, v and output projections."""

    name = "attention"
    place = "attention"
    names = BLOCKS["attention"]
    unit = "KV groups"
    fields = ("num_key_value_heads", "num_attention_heads")

    def width(self, block: Any, name: str) -> int:
        """Number of KV groups."""
        head_dim = getattr(block, "head_dim", None)
        if not isinstance(head_dim, int) or block.k_proj.out_features % head_dim:
            raise UnsupportedModelError(
                f"{name} ({type(block).__name__}) has no head_dim that divides its k_proj."
            )
        return block.k_proj.out_features // head_dim

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

    def context_flops(self, columns: int, context: int) -> int:
        """Scores and weighted sum over `context` keys."""
        return 4 * columns * context

    def attributes(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Numbers of query heads and KV heads."""
        return {"num_heads": width * columns // block.head_dim, "num_key_value_heads": width}

    def config(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Numbers of query heads and KV heads."""
        heads = width * columns // block.head_dim
        return {"num_attention_heads": heads, "num_key_value_heads": width}

    def configured_width(self, config: Any, block: Any, columns: int) -> int:
        """KV groups that have the configured number of query heads."""
        return config.num_attention_heads * block.head_dim // columns

    def common_width(self, config: Any, tower: str) -> int | None:
        """KV heads, or heads where the configuration names no others; vision towers name heads."""
        return super().common_width(config, tower) if tower == "language" else _heads(config)

    def stock_counts(
        self, config: Any, tower: str, common: int, block: Any, columns: int
    ) -> tuple[int, ...]:
        """Others than `common` only where the query heads divide the hidden size, and where this
        kind of configuration has a field for the head dimension."""
        named = hasattr(type(config), "head_dim") and config.head_dim is not None
        if tower == "vision" or not named:
            return (common,)  # the head dimension is derived from the number of heads
        repeat = columns // block.head_dim  # query heads of a KV group
        fewer = (n for n in range(1, common) if config.hidden_size % (n * repeat) == 0)
        return (*fewer, common)

    def set_common_width(self, config: Any, tower: str, width: int) -> None:
        """As many query heads per KV group as before. A vision tower's heads stay."""
        if tower == "language":
            kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            repeat = config.num_attention_heads // kv_heads
            config.num_key_value_heads = width
            config.num_attention_heads = width * repeat

    def skip(self, block: Any) -> Skip:
        """A module that returns nothing and keeps the cache counting."""
        return SkipAttention(self.name, block)


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


def _heads(config: Any) -> int | None:
    heads = getattr(config, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None
