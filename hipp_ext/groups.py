"""A transformers model -> its groups: what can go, what must go together, and what one unit costs.

A decoder layer has two groups. In the attention group a unit is a whole KV group: one key head, one
value head and every query head that shares them (one of each under multi-head attention); or, as a
finer unit, a query head. In the FFN group a unit is a channel. Groups are found by structure (which
linear layers a block holds), not by a list of class names.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hipp_ext.errors import BudgetError, UnsupportedModelError
from hipp_ext.families import (
    BLOCKS,
    LAYER_LISTS,
    first_removable_layer,
    norms_residual,
    varies_by_itself,
)
from hipp_ext.kinds import (
    KINDS,
    BlockKind,
    Kind,
    Look,
    Skip,
    Slice,
    shares_keys,
    shares_with_layers,
)
from hipp_ext.kinds.slices import shape_in
from hipp_ext.layer_parts import UNKNOWN, missing_block, parts_of
from hipp_ext.projections import is_plain_projection, sync_features
from hipp_ext.towers import (
    Tower,
    check_towers,
    decoder,
    listing,
    picture_tokens,
    projected_tokens,
    projector_blocks,
    vision_tower,
)

AttentionUnit = Literal["kv", "query"]  # KV groups, or query heads
ExpertUnit = Literal["expert", "channel"]  # experts, or channels of all experts of a layer
Partial = Literal["refuse", "report"]  # what is done about parts that can only stay whole


@dataclass(frozen=True, kw_only=True)
class LeftWhole:
    """A part of a layer that no group has units of: it stays as it is.

    Attributes:
        module: name of the module.
        type: its class.
        reason: why it cannot be divided into units.
    """

    module: str
    type: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that a plan chooses among.

    Attributes:
        tower: "language", "vision" or "projector" (the MLP between the two).
        layer: index of the layer in its tower, from 0; of the projector's MLPs, one after another.
        kind: a key of KINDS: "attention" (unit: a KV group), "query_heads" (unit: a query head of
            the same block), "latent_attention" (unit: a head), "ffn" (unit: a channel), "experts"
            (unit: an expert), "expert_channels" (unit: a channel of all experts of the block).
        width: number of units.
        owns: what one unit owns: the rows that compute it, then the columns that read it.
        buffers: what one unit owns of buffers: an expert has entries of its router's corrections.
        unit_parameters: parameters that leave with one unit, biases included.
        unit_flops: floating-point operations per token that leave with one unit (two per
            multiply-accumulate of its weights); attention over the context comes on top, see
            `context_flops`.
        unit_active: parameters that compute for a token and leave with one unit; 0: all of the
            unit's. In a mixture of experts a token meets few of the experts, and others instead of
            those that left.
        inputs: inputs of the consumer that belong to one unit, side by side; 0: its columns.
        least: the smallest keep count, apart from 0, with which the block works: every token is
            sent to so many experts. At least one unit of every section.
        sections: the units lie in so many equal sections, one after the other, and every section
            keeps the same number of units: query heads in one section per KV group, which must all
            be shared by equally many. Other units are free (1).
        stock_counts: keep counts that the model's configuration can name for all layers alike, so
            that stock transformers builds such a model; None: any count.
        removable: whether stock transformers builds the model without this layer.
        droppable: whether the model works without this block.
        picture_tokens: how many tokens of a picture pass the units; 0: the tokens of a prompt do.
    """

    tower: Tower
    layer: int
    kind: Kind
    width: int
    owns: tuple[Slice, ...]
    unit_parameters: int
    unit_flops: int
    buffers: tuple[Slice, ...] = ()
    unit_active: int = 0
    inputs: int = 0
    least: int = 1
    sections: int = 1
    stock_counts: tuple[int, ...] | None = None
    removable: bool = True
    droppable: bool = True
    picture_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit_active", self.unit_active or self.unit_parameters)
        object.__setattr__(self, "inputs", self.inputs or (self.columns if self.owns else 0))

    @property
    def name(self) -> str:
        """Key of this group in scores, plans and masks, such as "language.3.ffn"."""
        return f"{self.tower}.{self.layer}.{self.kind}"

    @property
    def place(self) -> str:
        """Place of the block in its layer, "attention" or "ffn"; see `hipp_ext.kinds`."""
        return KINDS[self.kind].place

    @functools.cached_property
    def produced(self) -> tuple[Slice, ...]:
        """What units own of the weights of the linear layers that compute them."""
        return tuple(p for p in self.owns[:-1] if p.linear and p.parameter.endswith(".weight"))

    @functools.cached_property
    def producing(self) -> tuple[str, ...]:
        """Names of the weights that compute the units, and of those that route to them."""
        parts = self.produced if self.is_linear else self.owns[:-1]
        return tuple(dict.fromkeys(p.parameter for p in parts if "bias" not in p.parameter))

    @functools.cached_property
    def producers(self) -> tuple[str, ...]:
        """Names of the linear layers whose output rows belong to the units."""
        return tuple(dict.fromkeys(part.layer for part in self.produced))

    @functools.cached_property
    def cuts(self) -> tuple[tuple[Slice, ...], ...]:
        """What units own, parameter by parameter and buffer by buffer: fused projections hold
        several slices.
        """
        found: dict[str, list[Slice]] = {}
        for part in (*self.owns, *self.buffers):
            found.setdefault(part.parameter, []).append(part)
        return tuple(map(tuple, found.values()))

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules that compute the units or read them."""
        return tuple(dict.fromkeys(p.layer for p in (*self.owns, *self.buffers) if p.linear))

    @property
    def is_linear(self) -> bool:
        """Whether linear layers compute and read the units: not so in mixtures of experts."""
        return KINDS[self.kind].linear

    @property
    def consumer(self) -> str:
        """Name of the linear layer that reads the units."""
        return self.owns[-1].layer

    @property
    def columns(self) -> int:
        """Input columns of the consumer that one unit owns."""
        return self.owns[-1].size

    @property
    def block(self) -> str:
        """Name of the module that holds the layers, such as an attention or FFN module."""
        return self.consumer.rpartition(".")[0]

    @property
    def parameters(self) -> int:
        """Parameters of all units together."""
        return self.width * self.unit_parameters

    def context_flops(self, context: int) -> int:
        """FLOPs per token and unit over `context` keys; 0 where units look at no other tokens."""
        return KINDS[self.kind].context_flops(self.owns, context)

    def multiple(self, round_to: int) -> int:
        """Smallest number of units, the same of every section, whose columns together are a
        multiple of `round_to`, where the sizes of matrices depend on the number of units.
        """
        return KINDS[self.kind].multiple(self.columns, round_to, self.sections)


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
    groups, left = _find_groups(model, towers, lambda kind, block: _in_unit(kind, block, *units))
    if left:
        adapted = any(_adapters(tower_root(model, tower)) for tower in towers)
        if partial == "refuse" or adapted or not groups:
            raise UnsupportedModelError(_refusal(model, towers, left, bool(groups)))
    return groups


def left_whole(model: nn.Module, towers: Sequence[Tower] = ("language",)) -> tuple[LeftWhole, ...]:
    """The parts of layers that no group has units of; see `find_groups`.

    Norms, gates and other vectors are not listed, nor is what lies outside the layers.
    """
    return _find_groups(model, towers, lambda kind, _: kind)[1]


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


def _in_other_units(
    model: nn.Module, towers: Sequence[Tower], usual: Kind, other: Kind
) -> tuple[Group, ...]:
    def unit_of(kind: BlockKind, block: nn.Module) -> BlockKind:
        return KINDS[other] if kind.name == usual and KINDS[other].divides(block) else kind

    found, _ = _find_groups(model, towers, unit_of)
    return tuple(g for g in found if g.kind == other)


def _find_groups(
    model: nn.Module, towers: Sequence[Tower], unit_of: Callable[[BlockKind, nn.Module], BlockKind]
) -> tuple[tuple[Group, ...], tuple[LeftWhole, ...]]:
    """All groups, and what is left whole; `unit_of` says by which kind a block is divided."""
    names = {module: name for name, module in model.named_modules()}
    groups: list[Group] = []
    left: list[LeftWhole] = []
    for tower in towers:
        if tower == "projector":
            groups += _projector_groups(model, names)
            continue
        layers = tower_layers(model, tower)
        seen = 0 if tower == "language" else picture_tokens(model.config)
        config, first = tower_config(model.config, tower), first_removable_layer(model.config)
        parts = [parts_of(layer, names[layer]) for layer in layers]
        # Configurations name the layers of a hybrid by number or by period.
        alike = not any(p.left for p in parts)
        named = tower == "language" and alike and not varies_by_itself(config)
        for index, own in enumerate(parts):
            removable = named and index >= first and not own.others
            removable = removable and not norms_residual(layers[index])
            for kind, block, name in own.blocks:
                if not isinstance(block, Skip):
                    group = _map_block(tower, index, unit_of(kind, block), block, name)
                    counts = _stock_counts(config, group, block)
                    changes: Any = {"stock_counts": counts, "removable": removable}
                    groups.append(replace(group, picture_tokens=seen, **changes))
            if alike and (lacking := missing_block(own)):
                left.append(
                    LeftWhole(
                        module=names[layers[index]],
                        type=type(layers[index]).__name__,
                        reason=f"it has {lacking}",
                    )
                )
            left += [
                LeftWhole(module=name, type=type(module).__name__, reason=reason)
                for module, name, reason in own.left
            ]
    return tuple(groups), tuple(left)


def _refusal(
    model: nn.Module, towers: Sequence[Tower], left: Sequence[LeftWhole], others: bool
) -> str:
    """Why a model cannot be pruned, or only in part."""
    listed = "; ".join(left_whole_lines(left))
    adapters = "".join(dict.fromkeys(_adapters(tower_root(model, tower)) for tower in towers))
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


def _projector_groups(model: Any, names: dict[nn.Module, str]) -> list[Group]:
    """The groups of the projector: its configuration names no width, and it cannot be dropped."""
    kind, found = KINDS["ffn"], []
    for index, block in enumerate(projector_blocks(model)):
        group = _map_block("projector", index, kind, block, names[block])
        own: Any = {"stock_counts": (group.width,), "removable": False, "droppable": False}
        found.append(replace(group, picture_tokens=projected_tokens(model.config), **own))
    return found


def tower_config(config: Any, tower: Tower) -> Any:
    """The part of a model's configuration that describes a tower."""
    if tower == "projector":
        return config
    return config.get_text_config() if tower == "language" else config.vision_config


def check_choices(attention_unit: object, expert_unit: object, partial: object) -> None:
    """Raise BudgetError unless they are of AttentionUnit, ExpertUnit and Partial."""
    given = {"attention_unit": attention_unit, "expert_unit": expert_unit, "partial": partial}
    known = (AttentionUnit, ExpertUnit, Partial)
    for (name, choice), choices in zip(given.items(), known, strict=True):
        if choice not in get_args(choices):
            raise BudgetError(
                f"{name}={choice!r}: one of {', '.join(get_args(choices))} is needed."
            )


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


def tower_layers(model: nn.Module, tower: Tower) -> nn.ModuleList:
    """The layers of a tower, in order; the MLPs of a projector.

    A vision tower may have two lists of them, one after the other (Llama 3.2 Vision).
    """
    if tower == "projector":
        return nn.ModuleList(projector_blocks(model))
    root = tower_root(model, tower)
    own = [getattr(root, name, None) for name in LAYER_LISTS]
    lists = [layers for layers in own if isinstance(layers, nn.ModuleList) and len(layers)]
    if len(lists) != 1:
        lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and _is_tower(m)]
    if tower == "vision" and len(lists) > 1:
        return nn.ModuleList(layer for layers in lists for layer in layers)
    if len(lists) != 1:
        names = KINDS["attention"].names
        raise UnsupportedModelError(
            f"{_adapters(root)}Looked for the layers of the {tower} tower of "
            f"{type(model).__name__} "
            f"and found {len(lists)} lists of blocks with {names.producers[0]} and one of "
            f"{names.consumers}. Modules of the tower: {listing(root)}"
        )
    return lists[0]


def tower_root(model: nn.Module, tower: Tower) -> nn.Module:
    """The module that holds the layers of a tower; of a projector, the model."""
    if tower == "projector":
        return model
    return decoder(model) if tower == "language" else vision_tower(model)


def _adapters(root: nn.Module) -> str:
    """A sentence on adapters, which stand in front of the linear layers; empty without any."""
    adapted = [
        name
        for name, module in root.named_modules()
        if type(module).__module__.partition(".")[0] == "peft"
    ]
    if not adapted:
        return ""
    return (
        f"The model carries adapters ({adapted[0]}, ...): merge them first, "
        "model.merge_and_unload(). "
    )


def _is_tower(layers: nn.ModuleList) -> bool:
    """Whether a layer has an attention block, or had one."""
    kinds = [kind for kind in KINDS.values() if kind.place == "attention"]
    return any(kind.find(layer) for layer in layers for kind in kinds)


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


def _map_block(tower: Tower, index: int, kind: BlockKind, block: nn.Module, name: str) -> Group:
    width = kind.width(block, name)
    owns = kind.owns(block, name, width)
    kind.check_rest(block, name, width)
    buffer_names = {f"{name}.{own}" for own, _ in block.named_buffers()}
    buffers = tuple(part for part in owns if part.parameter in buffer_names)
    owns = tuple(part for part in owns if part not in buffers)
    parameters, active, multiplied = 0, 0.0, 0.0
    for part in owns:
        shape = shape_in(block, part.parameter.removeprefix(f"{name}."))
        size = math.prod(shape) // shape[part.dim] * part.size
        parameters += size
        active += size * kind.active_share(block, part)
        if part.linear and len(shape) > 1:
            multiplied += size * kind.active_share(block, part)
    return Group(
        tower=tower,
        layer=index,
        kind=kind.name,
        width=width,
        owns=owns,
        buffers=buffers,
        unit_parameters=parameters,
        unit_active=round(active),
        unit_flops=round(2 * multiplied),
        inputs=kind.inputs(block, owns),
        least=kind.least(block),
        sections=kind.sections(block),
        droppable=kind.droppable(block),
    )


def _stock_counts(config: Any, group: Group, block: nn.Module) -> tuple[int, ...] | None:
    """See `Group.stock_counts`; only its width where the configuration names no width at all."""
    kind = KINDS[group.kind]
    if varies_by_itself(config):
        return (group.width,)
    common = kind.common_width(config, group.tower)
    if common is None:
        return (group.width,)
    counts = kind.stock_counts(config, group.tower, common, block, group.columns)
    return counts and tuple(n for n in counts if n < group.width) + (group.width,)


def block_of(model: nn.Module, group: Group) -> Any:
    """The module that holds the layers of `group`, such as an attention or FFN module."""
    return model.get_submodule(group.block)


def total_parameters(groups: Iterable[Group]) -> int:
    """Prunable parameters: those of all units of all groups."""
    return sum(g.parameters for g in groups)


def sync_sizes(model: nn.Module, group: Group, width: int) -> None:
    """Bring the size attributes of the linear layers and block of `group` in line with `width`.

    Those of the linear layers follow their weights.
    """
    for name in group.layers:
        sync_features(model.get_submodule(name))
    KINDS[group.kind].resize(block_of(model, group), group.columns, width)


def watching(model: nn.Module, group: Group, look: Look) -> contextlib.AbstractContextManager[None]:
    """Inside the `with` block `look` sees, and may change, what a group's units are read by.

    See `hipp_ext.kinds.Look`.
    """
    block, consumer = block_of(model, group), model.get_submodule(group.consumer)
    return KINDS[group.kind].watch(block, consumer, look)


def reading_weight(model: nn.Module, group: Group) -> Float[Tensor, "outputs inputs"]:
    """Weight of the linear layer that reads a group's units, whose inputs lie side by side.

    Of a mixture of experts it is put together of their down projections: a copy.
    """
    consumer = model.get_submodule(group.consumer)
    return KINDS[group.kind].reading_weight(block_of(model, group), consumer)


@contextlib.contextmanager
def gated(model: nn.Module, keep_masks: Mapping[Group, Bool[Tensor, " width"]]) -> Iterator[None]:
    """Inside the block, units whose mask is False add nothing to what the model computes.

    The inputs of every consumer are multiplied by the mask; of a mixture of experts, tokens are
    sent to the experts that are left. Where no unit is kept, the block adds nothing, its biases
    included.
    """
    with contextlib.ExitStack() as stack:
        for group, mask in keep_masks.items():
            if bool(mask.all()):
                continue
            kind, block = KINDS[group.kind], block_of(model, group)
            consumer = model.get_submodule(group.consumer)
            check_loaded(model, group.consumer)
            if mask.any():
                stack.enter_context(kind.mask(block, consumer, group.inputs, mask))
            else:
                ends = kind.output(block, consumer)
                stack.enter_context(ends.register_forward_hook(_nothing))
        yield


def _nothing(_: nn.Module, __: tuple, output: Any) -> Any:
    """Zeros instead of what a module puts out, or of the first part of it."""
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def check_plain(model: nn.Module, groups: Iterable[Group]) -> None:
    """Raise UnsupportedModelError where a layer of `groups` is no plain floating-point linear
    layer.

    Layers that are quantised, adapted or parametrised are not.
    """
    for group in groups:
        for name in group.layers:
            if reason := not_plain(module := model.get_submodule(name), group.is_linear):
                raise UnsupportedModelError(
                    f"{name} is a {type(module).__name__} {reason}. Score, plan and prune the "
                    "floating-point model, before it is quantised or given adapters."
                )


def not_plain(module: nn.Module, required: bool = True) -> str:
    """Why the entries of a module's parameters are not the numbers it computes with; empty if they
    are.

    Args:
        module: the module.
        required: whether it has to be a linear layer; otherwise it may be any.
    """
    if hasattr(module, "quantization_scheme"):  # its scales would stay behind
        return "that is quantised"
    weights = [p for p in module._parameters.values() if p is not None]
    plain = all(type(w) is nn.Parameter and w.is_floating_point() for w in weights)
    if plain and (not required or (weights and is_plain_projection(module))):
        return ""
    weight = getattr(module, "weight", weights[0] if weights else None)
    return f"with a {type(weight).__name__} weight of {getattr(weight, 'dtype', 'no dtype')}"


def check_loaded(model: nn.Module, name: str = "") -> None:
    """Raise UnsupportedModelError where weights of `model`, or of its module `name`, are not in
    memory.
    """
    for parameter, weight in model.get_submodule(name).named_parameters(prefix=name):
        if weight.is_meta:
            raise UnsupportedModelError(
                f"{parameter} is not in memory (offloaded, or on the meta device). Load the model "
                'whole; several GPUs may share it (device_map="auto").'
            )


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
    "check_towers",
    "decoder",
    "find_groups",
    "find_skips",
    "gated",
    "left_whole",
    "left_whole_lines",
    "not_plain",
    "query_groups",
    "reading_weight",
    "sync_sizes",
    "total_parameters",
    "tower_layers",
    "tower_root",
    "watching",
]
