"""Attention: a unit is a KV group, one key and value head with all query heads that share it."""

from typing import Any

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.kinds.base import BlockKind, Skip, SkipAttention


class Attention(BlockKind):
    """Attention blocks with linear q, k, v and output projections."""

    name = "attention"

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

    def skip(self, block: Any) -> Skip:
        """A module that returns nothing and keeps the cache counting."""
        return SkipAttention(block)
