"""A transformers model -> its groups.

A decoder layer has two. In the attention group a unit is a whole KV group: one key head, one value
head and every query head that shares them (one of each under multi-head attention); or, as a finer
unit, a query head. In the FFN group a unit is a channel. Groups are found by structure (which
projections a block holds), not by a list of class names.
"""

import contextlib
import re
from collections.abc import Iterable, Sequence
from typing import get_args

from torch import nn

from hipp_ext.errors import BudgetError, UnsupportedModelError
from hipp_ext.families import BLOCKS
from hipp_ext.groups.group import AttentionUnit, ExpertUnit, Group, LeftWhole, Partial
from hipp_ext.groups.mapping import map_towers
from hipp_ext.kinds import KINDS, BlockKind, Kind, Skip, shares_keys, shares_with_layers
from hipp_ext.layer_parts import UNKNOWN
from hipp_ext.towers import Tower, adapters_in, check_towers, tower_layers, tower_root


def find_groups(
    model: nn.Module,
    towers: Sequence[Tower] = ("language",),
    attention_unit: AttentionUnit = "kv",
    expert_unit: ExpertUnit = "expert",
    partial: Partial = "refuse",
) -> tuple[Group, ...]:
    """The groups of `model`, layer by layer, attention before FFN. Dropped blocks have none.

    Args:
        model: a transformers language model or vision-language model (Llama, Mistral, Qwen2/2.5/3,
            LLaVA, LLaVA-NeXT, Qwen2.5-VL, Idefics3/SmolVLM and others built of the same blocks).
        towers: which parts to search, in this order: "language", "vision" and "projector", the MLP
            between the two. By default those that see pictures are left alone. The layers of a
            vision tower that nothing reads (LLaVA's last one) have groups like the others.
        attention_unit: units of attention blocks. "kv": whole KV groups. "query": query heads, of
            which every KV group of a layer keeps the same number. Keys and values then are not
            prunable parameters: they stay, but for those of a dropped block. Where no query heads
            share keys (multi-head attention), both units are the same: KV groups. Where layers
            share keys and values with each other (Gemma 3n, Gemma 4), they are query heads always.
        expert_unit: units of mixtures of experts. "expert": whole routed experts, of which at least
            as many stay as a token is sent to. "channel": a channel of all routed experts of a
            layer at once; all experts stay. Experts that every token passes are no prunable
            parameters: they stay, but for those of a dropped block.
        partial: what to do where parts of layers cannot be divided into units, such as state-space
            mixers and linear attention. "refuse": raise. "report": find the groups of the other
            blocks; `left_whole` says what stays.

    Raises:
        BudgetError: a unit, a tower or `partial` is unknown.
        UnsupportedModelError: no layers were found, or parts of them cannot be divided into units,
            and partial is "refuse". Nothing is ever skipped in silence; the message lists the
            modules in question.
    """
    check_choices(attention_unit, expert_unit, partial)
    towers = check_towers(towers)
    units = attention_unit, expert_unit
    groups, left = map_towers(model, towers, lambda kind, block: _in_unit(kind, block, *units))
    if left:
        adapted = any(adapters_in(tower_root(model, tower)) for tower in towers)
        if partial == "refuse" or adapted or not groups:
            raise UnsupportedModelError(_refusal(model, towers, left, bool(groups)))
    return groups


def left_whole(model: nn.Module, towers: Sequence[Tower] = ("language",)) -> tuple[LeftWhole, ...]:
    """The parts of layers that no group has units of; see `find_groups`.

    Norms, gates and other vectors are not listed, nor is what lies outside the layers.
    """
    return map_towers(model, towers, lambda kind, _: kind)[1]


def left_whole_lines(left: Iterable[LeftWhole]) -> list[str]:
    """A line for all parts of a class that stay whole for one reason: the first, and how many."""
    alike: dict[tuple[str, str], list[LeftWhole]] = {}
    for part in left:
        alike.setdefault((part.type, re.sub(r"\.\d+\b", "", part.reason)), []).append(part)
    return [
        f"{parts[0].module} ({parts[0].type}{f', and {len(parts) - 1} more' * (len(parts) > 1)}): "
        f"{parts[0].reason}"
        for parts in alike.values()
    ]


def query_groups(model: nn.Module, towers: Sequence[Tower]) -> tuple[Group, ...]:
    """The query heads of all attention blocks that have them apart from keys and values, also of
    those where no heads share keys.
    """
    return _in_other_units(model, towers, "attention", "query_heads")


def channel_groups(model: nn.Module, towers: Sequence[Tower]) -> tuple[Group, ...]:
    """The channels of all mixtures of experts."""
    return _in_other_units(model, towers, "experts", "expert_channels")


def find_skips(model: nn.Module, tower: Tower = "language") -> list[tuple[int, Kind]]:
    """(layer, kind) of every block of a tower that was dropped."""
    if tower == "projector":
        return []
    return [
        (index, kind.name)
        for index, layer in enumerate(tower_layers(model, tower))
        for kind in KINDS.values()
        for block in kind.find(layer)
        if isinstance(block, Skip)
    ]


def known_towers(model: nn.Module) -> tuple[Tower, ...]:
    """The towers whose widths can be found, whatever was pruned."""
    found: list[Tower] = ["language"]
    others: tuple[Tower, ...] = ("vision", "projector")
    for tower in others:
        with contextlib.suppress(UnsupportedModelError):
            find_groups(model, (tower,), partial="report")
            found.append(tower)
    return tuple(found)


def check_choices(attention_unit: object, expert_unit: object, partial: object) -> None:
    """Raise BudgetError unless they are of AttentionUnit, ExpertUnit and Partial."""
    given = {"attention_unit": attention_unit, "expert_unit": expert_unit, "partial": partial}
    known = (AttentionUnit, ExpertUnit, Partial)
    for (name, choice), choices in zip(given.items(), known, strict=True):
        if choice not in get_args(choices):
            raise BudgetError(
                f"{name}={choice!r}: one of {', '.join(get_args(choices))} is needed."
            )


def _in_other_units(
    model: nn.Module, towers: Sequence[Tower], usual: Kind, other: Kind
) -> tuple[Group, ...]:
    def unit_of(kind: BlockKind, block: nn.Module) -> BlockKind:
        return KINDS[other] if kind.name == usual and KINDS[other].divides(block) else kind

    found, _ = map_towers(model, towers, unit_of)
    return tuple(g for g in found if g.kind == other)


def _in_unit(
    kind: BlockKind, block: nn.Module, attention_unit: AttentionUnit, expert_unit: ExpertUnit
) -> BlockKind:
    """The kind whose units a block is divided into, where it can be divided in two ways."""
    if isinstance(block, Skip):
        return kind
    if kind.name == "attention":
        divided = (attention_unit == "query" and shares_keys(block)) or shares_with_layers(block)
        return KINDS["query_heads"] if divided else kind
    if expert_unit == "channel" and kind.name == "experts":
        return KINDS["expert_channels"]
    return kind


def _refusal(
    model: nn.Module, towers: Sequence[Tower], left: Sequence[LeftWhole], others: bool
) -> str:
    """Why a model cannot be pruned, or only in part."""
    listed = "; ".join(left_whole_lines(left))
    adapters = "".join(dict.fromkeys(adapters_in(tower_root(model, tower)) for tower in towers))
    known = "; ".join(
        f"{place}: {' or '.join(' + '.join(p) for p in names.producers)} -> "
        f"{' or '.join(names.consumers)}"
        for place, names in BLOCKS.items()
    )
    known = f" Linear layers of known blocks are, {known}." * (UNKNOWN in listed)
    accept = (
        'The other blocks can be pruned: accept this with find_groups(..., partial="report"), '
        'partial="report" of a planner or allocator, or --partial report.'
    )
    return (
        f"{adapters}{type(model).__name__} has parts that cannot be pruned and would be left "
        f"whole: {listed}.{known} {accept if others else 'It has no other blocks.'}"
    )
