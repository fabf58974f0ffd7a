"""Attention, in one of two units.

Kind "attention": a unit is a KV group, one key and value head with all query heads that share it.
Kind "query_heads": a unit is a query head; keys and values stay.
"""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import (
    BLOCKS,
    HEAD_BIASES,
    HEAD_DIMS,
    HEADS,
    QUERY_WIDTHS,
    SCATTERED,
    VALUE_DIM,
    borrowed_kv_heads,
    borrows_keys,
    common_value,
    field_name,
    fused_layout,
    lends_keys,
)
from hipp_ext.kinds.base import BlockKind, Skip
from hipp_ext.kinds.sized_config import SizedConfig
from hipp_ext.kinds.slices import Slice
from hipp_ext.projections import inputs_of, matrix_of, outputs_of


class _Heads(BlockKind):
    """What both units of attention have in common."""

    place = "attention"
    names = BLOCKS["attention"]

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
        return (Skip if alone else SkipAttention)(Attention.name, block)


class Attention(_Heads):
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


class SkipAttention(Skip):
    """A dropped attention block.

    A cache counts its tokens layer by layer, so this one is told how many there are: it gets one
    zero per token, because an empty entry would count as no token at all.
    """

    def forward(
        self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any
    ) -> tuple[Tensor, None]:
        """(zeros of the shape of `hidden_states`, no attention weights)."""
        if past_key_values is not None and not borrows_keys(self):
            batch, tokens = hidden_states.shape[:2]
            zeros = hidden_states.new_zeros(batch, 1, tokens, 1)
            past_key_values.update(zeros, zeros, self.layer_idx)
        return super().forward(hidden_states), None


def shares_keys(block: Any) -> bool:
    """Whether several query heads of an attention block share a key head."""
    kind = Attention()
    return kind.query_heads(block) > kind.kv_heads(block)


def shares_with_layers(block: Any) -> bool:
    """Whether an attention block shares keys and values with other layers."""
    return lends_keys(block) or borrows_keys(block)


def _has_entry_per_head(part: str, parameter: Tensor) -> bool:
    """Whether a parameter of an attention block has an entry, or a row, for every head."""
    return part == "sinks" or (part.startswith(("q_norm.", "k_norm.")) and parameter.ndim == 2)


def head_dim(block: Any) -> int:
    """Numbers per head of an attention block; 0 where it does not say."""
    sizes = [getattr(block, name, None) for name in HEAD_DIMS]
    return next((size for size in sizes if isinstance(size, int)), 0)


def value_dim(block: Any) -> int:
    """Numbers per value of an attention block, which may be fewer than of a key (MiMo)."""
    size = getattr(block, VALUE_DIM, None)
    return size if isinstance(size, int) else head_dim(block)


def _heads(config: Any) -> int | None:
    """Number of heads of a tower, if its configuration names it."""
    sizes = [common_value(config, name) for name in HEADS]
    return next((heads for heads in sizes if isinstance(heads, int)), None)
