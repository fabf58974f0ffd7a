"""Attention by KV groups: a unit is one key and value head with all query heads that share it."""

from typing import Any

from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import HEADS, QUERY_WIDTHS, common_value, field_name, fused_layout
from hipp_ext.kinds.heads import Heads, head_dim, value_dim
from hipp_ext.projections import inputs_of, outputs_of


class Attention(Heads):
    """Attention blocks with linear q, k, v and output projections, by KV groups."""

    name = "attention"
    unit = "KV groups"
    fields = ("num_key_value_heads", "num_attention_heads")

    def find(self, layer: nn.Module) -> list[nn.Module]:
        """Children of the layer, or of its child `attn` (GPT-Neo)."""
        deeper = getattr(layer, "attn", None)
        return super().find(layer) or (
            super().find(deeper) if isinstance(deeper, nn.Module) else []
        )

    def width(self, block: Any, name: str) -> int:
        """Number of KV groups."""
        producers, consumer = self.matched(block)
        keys = producers[min(1, len(producers) - 1)]  # the second, or all in one
        size, read = head_dim(block), inputs_of(getattr(block, consumer))
        rows = outputs_of(getattr(block, keys))
        rest = size and (rows % size or read % value_dim(block))
        if not size or rest or not self.kv_heads(block):
            raise UnsupportedModelError(
                f"{name} ({type(block).__name__}) has no head_dim that divides its {keys} and "
                f"{consumer}."
            )
        return self.kv_heads(block)

    def parts(self, block: Any, layer: str, width: int) -> list[int]:
        """Rows of a KV group: of queries, keys and values in turn where they are in one layer."""
        if fused_layout(block, layer) == "parts":
            size = head_dim(block)
            return [self.query_heads(block) // width * size, size, size]
        return super().parts(block, layer, width)

    def attributes(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Numbers of query heads and KV heads."""
        heads = width * columns // value_dim(block)
        names = {"num_key_value_heads": width, **dict.fromkeys(QUERY_WIDTHS, width * columns)}
        return {"num_heads": heads, "num_attention_heads": heads, **names}

    def config(self, block: Any, columns: int, width: int, named: Any) -> dict[str, int]:
        """Numbers of query heads and KV heads."""
        heads = width * columns // value_dim(block)
        return {"num_attention_heads": heads, "num_key_value_heads": width}

    def configured_width(self, config: Any, block: Any, columns: int) -> int:
        """KV heads, or heads where the configuration names no others."""
        return common_value(config, "num_key_value_heads") or config.num_attention_heads

    def common_width(self, config: Any, tower: str) -> int | None:
        """KV heads, or heads where the configuration names no others; vision towers name heads."""
        return super().common_width(config, tower) if tower == "language" else _heads(config)

    def set_common_width(self, config: Any, tower: str, width: int) -> None:
        """As many query heads per KV group as before. A vision tower's heads stay."""
        if tower == "language":
            kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            repeat = config.num_attention_heads // kv_heads
            if field_name(config, "num_key_value_heads"):
                config.num_key_value_heads = width
            config.num_attention_heads = width * repeat


def shares_keys(block: Any) -> bool:
    """Whether several query heads of an attention block share a key head."""
    kind = Attention()
    return kind.query_heads(block) > kind.kv_heads(block)


def _heads(config: Any) -> int | None:
    """Number of heads of a tower, if its configuration names it."""
    sizes = [common_value(config, name) for name in HEADS]
    return next((heads for heads in sizes if isinstance(heads, int)), None)
