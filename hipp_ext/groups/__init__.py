"""Groups of units of a transformers model: what can go, and what must go together."""

from hipp_ext.groups.finding import (
    channel_groups,
    check_choices,
    find_groups,
    find_skips,
    known_towers,
    left_whole,
    left_whole_lines,
    query_groups,
)
from hipp_ext.groups.group import (
    AttentionUnit,
    ExpertUnit,
    Group,
    LeftWhole,
    Partial,
    total_parameters,
)
from hipp_ext.groups.sliceable import check_loaded, check_plain, check_sliceable
from hipp_ext.groups.using import block_of, gated, reading_weight, sync_sizes, watching
from hipp_ext.kinds import Kind, Slice
from hipp_ext.towers import Tower, check_towers, decoder, tower_config, tower_layers, tower_root

__all__ = [
    "AttentionUnit",
    "ExpertUnit",
    "Group",
    "Kind",
    "LeftWhole",
    "Partial",
    "Slice",
    "Tower",
    "block_of",
    "channel_groups",
    "check_choices",
    "check_loaded",
    "check_plain",
    "check_sliceable",
    "check_towers",
    "decoder",
    "find_groups",
    "find_skips",
    "gated",
    "known_towers",
    "left_whole",
    "left_whole_lines",
    "query_groups",
    "reading_weight",
    "sync_sizes",
    "total_parameters",
    "tower_config",
    "tower_layers",
    "tower_root",
    "watching",
]
