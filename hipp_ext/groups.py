"""A transformers model -> its groups: what can go, what must go together, and what one unit costs.

A decoder layer has two groups. In the attention group a unit is a whole KV group: one key head, one value head and
every query head that shares them (one of each under multi-head attention). In the FFN group a unit is a channel.
Groups are found by structure (which linear layers a block holds), not by a list of class names.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from hipp_ext.errors import UnsupportedModelError

Tower = Literal["language", "vision"]
Kind = Literal["attention", "ffn"]
CONSUMERS = {"attention": ("o_proj", "out_proj"), "ffn": ("down_proj", "fc2")}
PRODUCERS = {"attention": ("q_proj", "k_proj", "v_proj"), "ffn": ("gate_proj", "up_proj", "fc1")}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that a plan chooses among.

    Attributes:
        tower: "language" or "vision".
        layer: index of the layer in its tower, from 0.
        kind: "attention" (unit: a KV group) or "ffn" (unit: a channel).
        width: number of units.
        producers: names of the linear layers whose output rows belong to the units.
        rows: rows of each producer that one unit owns, in the order of `producers`.
        consumer: name of the linear layer that reads the units.
        columns: input columns of the consumer that one unit owns.
        unit_parameters: parameters that leave with one unit, biases included.
        unit_flops: floating-point operations per token that leave with one unit (two per multiply-accumulate of
            its weights); attention over the context comes on top, see `context_flops`.
    """

    tower: Tower
    layer: int
    kind: Kind
    width: int
    producers: tuple[str, ...]
    rows: tuple[int, ...]
    consumer: str
    columns: int
    unit_parameters: int
    unit_flops: int

    @property
    def name(self) -> str:
        """Key of this group in scores, plans and masks, such as "language.3.ffn"."""
        return f"{self.tower}.{self.layer}.{self.kind}"

    @property
    def parameters(self) -> int:
        """Parameters of all units together."""
        return self.width * self.unit_parameters

    def context_flops(self, context: int) -> int:
        """FLOPs per token and unit for scores and weighted sum over `context` keys; 0 for an FFN group."""
        return 4 * self.columns * context if self.kind == "attention" else 0

    def multiple(self, round_to: int) -> int:
        """Smallest number of units whose columns together are a multiple of `round_to`."""
        return round_to // math.gcd(round_to, self.columns)


def find_groups(model: nn.Module, towers: Sequence[Tower] = ("language",)) -> tuple[Group, ...]:
    """The groups of `model`, layer by layer, attention before FFN.

    Args:
        model: a transformers language model or vision-language model (Llama, Mistral, Qwen2/2.5/3, LLaVA, LLaVA-NeXT,
            Qwen2.5-VL, Idefics3/SmolVLM and others built of the same blocks).
        towers: which towers to search. The vision tower (CLIP, SigLIP) is left alone unless asked for.

    Raises:
        UnsupportedModelError: no layers were found, or a layer has no attention or FFN that can be mapped. Nothing is
            ever skipped in silence; the message lists the modules in question.
    """
    names = {module: name for name, module in model.named_modules()}
    groups: list[Group] = []
    for tower in towers:
        for index, layer in enumerate(tower_layers(model, tower)):
            for kind in ("attention", "ffn"):
                groups.append(
                    _map_block(names, tower, index, kind, _find_block(layer, kind, names))
                )
    return tuple(groups)


def tower_layers(model: nn.Module, tower: Tower) -> nn.ModuleList:
    """The layers of a tower, in order."""
    root = decoder(model) if tower == "language" else _vision_tower(model)
    lists = [
        m
        for m in root.modules()
        if isinstance(m, nn.ModuleList) and len(m) and _has_attention(m[0])
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"{_adapters(root)}Looked for the layers of the {tower} tower of {type(model).__name__} and found {len(lists)} "
            f"lists of blocks with {PRODUCERS['attention']} and one of {CONSUMERS['attention']}. Modules of the tower: "
            f"{_listing(root)}"
        )
    return lists[0]


def decoder(model: nn.Module) -> nn.Module:
    """The language tower: the module that turns input embeddings into hidden states."""
    get_decoder = getattr(model, "get_decoder", None)
    if get_decoder is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model with a decoder."
        )
    return get_decoder()


def _vision_tower(model: nn.Module) -> nn.Module:
    for path in ("vision_tower", "vision_model", "visual"):
        for root in (model, getattr(model, "model", None)):
            if isinstance(getattr(root, path, None), nn.Module):
                return getattr(root, path)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no vision tower; its modules: {_listing(model)}"
    )


def _adapters(root: nn.Module) -> str:
    """A sentence on adapters, which stand in front of the linear layers that are looked for; empty where there are none."""
    adapted = [
        name
        for name, module in root.named_modules()
        if type(module).__module__.partition(".")[0] == "peft"
    ]
    return (
        f"The model carries adapters ({adapted[0]}, ...): merge them first, model.merge_and_unload(). "
        if adapted
        else ""
    )


def _has_attention(layer: nn.Module) -> bool:
    return any(_match(block, "attention") for block in layer.children())


def _match(block: nn.Module, kind: Kind) -> tuple[list[str], str] | None:
    """(producers, consumer) as child names when `block` has the shape of an attention or FFN block."""
    children = dict(block.named_children())
    linear = {n for n, m in children.items() if isinstance(m, nn.Linear)}
    producers = [n for n in PRODUCERS[kind] if n in linear]
    consumers = [n for n in CONSUMERS[kind] if n in linear]
    complete = (
        len(producers) == 3
        if kind == "attention"
        else producers in (["gate_proj", "up_proj"], ["up_proj"], ["fc1"])
    )
    return (producers, consumers[0]) if complete and len(consumers) == 1 else None


def _find_block(layer: nn.Module, kind: Kind, names: dict[nn.Module, str]) -> nn.Module:
    found = [child for child in layer.children() if _match(child, kind)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{_adapters(layer)}Layer {names[layer]} ({type(layer).__name__}) has {len(found)} {kind} blocks that can be "
            f"mapped; one with linear layers {' + '.join(PRODUCERS[kind])} -> {' or '.join(CONSUMERS[kind])} is needed "
            f"(mixtures of experts and fused projections are not supported). Its modules: {_listing(layer)}"
        )
    return found[0]


def _map_block(
    names: dict[nn.Module, str], tower: Tower, index: int, kind: Kind, block: nn.Module
) -> Group:
    matched = _match(block, kind)
    assert matched is not None
    producers = [getattr(block, n) for n in matched[0]]
    consumer = getattr(block, matched[1])
    columns, width = (
        _attention_units(block, names) if kind == "attention" else (1, consumer.in_features)
    )
    rows = tuple(p.out_features // width for p in producers)
    if consumer.in_features != width * columns or any(
        p.out_features != width * r for p, r in zip(producers, rows, strict=True)
    ):
        raise UnsupportedModelError(
            f"{names[block]}: {width} units do not divide its linear layers: "
            + ", ".join(
                f"{names[m]} {m.in_features}->{m.out_features}" for m in (*producers, consumer)
            )
        )
    _check_rest(block, kind, width, names)
    weights = (
        sum(p.in_features * r for p, r in zip(producers, rows, strict=True))
        + consumer.out_features * columns
    )
    biases = sum(r for p, r in zip(producers, rows, strict=True) if p.bias is not None)
    return Group(
        tower=tower,
        layer=index,
        kind=kind,
        width=width,
        producers=tuple(names[p] for p in producers),
        rows=rows,
        consumer=names[consumer],
        columns=columns,
        unit_parameters=weights + biases,
        unit_flops=2 * weights,
    )


def _attention_units(block: Any, names: dict[nn.Module, str]) -> tuple[int, int]:
    """(columns of one KV group, number of KV groups) of an attention block."""
    head_dim = getattr(block, "head_dim", None)
    if not isinstance(head_dim, int) or block.k_proj.out_features % head_dim:
        raise UnsupportedModelError(
            f"{names[block]} ({type(block).__name__}) has no head_dim that divides its k_proj."
        )
    kv_groups = block.k_proj.out_features // head_dim
    return block.q_proj.out_features // kv_groups, kv_groups


def _check_rest(block: Any, kind: Kind, width: int, names: dict[nn.Module, str]) -> None:
    """Raise UnsupportedModelError where a block has parameters beside its projections that may belong to single units.

    In attention a norm of the heads may stay, one that they share: a child of the block whose parameters are head_dim long. One
    in a list of norms is another matter, and so is a parameter of the block itself (a sink for every head).
    """
    projections = set(PRODUCERS[kind] + CONSUMERS[kind])
    for name, parameter in block.named_parameters():
        owner, *rest = name.split(".")
        if owner in projections:
            continue
        if kind == "attention" and (len(rest) != 1 or parameter.shape != (block.head_dim,)):
            raise UnsupportedModelError(
                f"{names[block]}.{name} has shape {tuple(parameter.shape)}: only the parameters of a norm that all heads "
                f"share, of shape ({block.head_dim},), can stay when heads go."
            )
        if kind == "ffn" and width in parameter.shape:
            raise UnsupportedModelError(
                f"{names[block]}.{name} has shape {tuple(parameter.shape)}: a parameter with entries for the {width} channels "
                "would have to go along with them, which is not supported."
            )


def _listing(module: nn.Module, limit: int = 30) -> str:
    names = [f"{n} ({type(m).__name__})" for n, m in module.named_modules() if n]
    return ", ".join(names[:limit]) + (
        f", and {len(names) - limit} more" if len(names) > limit else ""
    )


def linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer called `name`."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear), (name, type(module))
    return module


def check_plain(model: nn.Module, groups: Iterable[Group]) -> None:
    """Raise UnsupportedModelError where a layer of `groups` is quantised, adapted or otherwise no plain linear layer."""
    for group in groups:
        for name in (*group.producers, group.consumer):
            if reason := not_plain(module := model.get_submodule(name)):
                raise UnsupportedModelError(
                    f"{name} is a {type(module).__name__} {reason}. Score, plan and prune the floating-point model, before it "
                    "is quantised or given adapters."
                )


def not_plain(module: nn.Module) -> str:
    """Why the entries of a layer's weight are not the numbers it computes with, in words; empty for a plain linear layer."""
    weight = getattr(module, "weight", None)  # a layer that llm-compressor has packed has none
    if hasattr(module, "quantization_scheme"):  # its scales would stay behind
        return "that is quantised"
    if type(module) is nn.Linear and type(weight) is nn.Parameter and weight.is_floating_point():
        return ""
    return f"with a {type(weight).__name__} weight of {getattr(weight, 'dtype', 'no dtype')}"


def sync_sizes(model: nn.Module, group: Group, width: int) -> None:
    """Bring the size attributes of the linear layers and blocks of `group` in line with `width` units."""
    for name, rows in zip(group.producers, group.rows, strict=True):
        linear(model, name).out_features = width * rows
    linear(model, group.consumer).in_features = width * group.columns
    block = block_of(model, group)
    if group.kind == "ffn":
        sizes = {"intermediate_size": width}
    else:
        sizes = {"num_heads": width * group.columns // block.head_dim, "num_key_value_heads": width}
    for attribute, size in sizes.items():
        if isinstance(getattr(block, attribute, None), int):
            setattr(block, attribute, size)


def check_loaded(model: nn.Module, name: str = "") -> None:
    """Raise UnsupportedModelError where weights of `model`, or of its module called `name`, are not in memory."""
    for parameter, weight in model.get_submodule(name).named_parameters(prefix=name):
        if weight.is_meta:
            raise UnsupportedModelError(
                f"{parameter} is not in memory (offloaded, or on the meta device). Load the model whole; several GPUs may "
                'share it (device_map="auto").'
            )


def block_of(model: nn.Module, group: Group) -> Any:
    """The attention or FFN module that holds the layers of `group`."""
    return model.get_submodule(group.consumer.rpartition(".")[0])


def total_parameters(groups: Iterable[Group]) -> int:
    """Prunable parameters: those of all units of all groups."""
    return sum(g.parameters for g in groups)
