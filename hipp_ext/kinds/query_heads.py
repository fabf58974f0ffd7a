"""Attention by query heads: keys and values stay."""

from dataclasses import replace
from typing import Any

from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import QUERY_WIDTHS, fused_layout
from hipp_ext.kinds.attention import Attention
from hipp_ext.kinds.heads import Heads
from hipp_ext.kinds.slices import Slice


class QueryHeads(Heads):
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

    def divides(self, block: Any) -> bool:
        """Not where a KV group's queries, keys and values lie side by side in one layer."""
        producers, _ = self.matched(block)
        return fused_layout(block, producers[0]) != "units"

    def width(self, block: Any, name: str) -> int:
        """Number of query heads."""
        return self.query_heads(block)

    def sections(self, block: Any) -> int:
        """Number of KV groups: query heads of a group lie side by side."""
        return self.kv_heads(block)

    def owns(self, block: Any, name: str, width: int) -> tuple[Slice, ...]:
        """A query head's part of what its KV group owns."""
        producers, _ = self.matched(block)
        if not self.divides(block):
            raise UnsupportedModelError(
                f"{name}.{producers[0]} holds a KV group's queries, keys and values side by side: "
                "its query heads cannot go alone. Use attention_unit='kv'."
            )
        keys = (f"{name}.k_proj.", f"{name}.v_proj.", f"{name}.k_norm.")
        of_groups = Attention().owns(block, name, self.kv_heads(block))
        repeat = width // self.kv_heads(block)
        return tuple(
            replace(part, size=part.size // repeat)
            for part in of_groups
            if not part.parameter.startswith(keys) and not part.start
        )

    def attributes(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Numbers of query heads, and of those that share a key head."""
        repeat = width // self.kv_heads(block)
        names = {"num_key_value_groups": repeat, **dict.fromkeys(QUERY_WIDTHS, width * columns)}
        return {"num_heads": width, "num_attention_heads": width, **names}
