"""What a layer of a tower is made of: blocks that are divided into units, norms, and the rest.

A part that is no block of a known kind (a state-space mixer, a short convolution, linear attention,
attention with a norm over all heads) can only stay as it is. None is passed over in silence.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import BLOCKS, SIDE_PATHS, norm_before, norms_after, norms_residual
from hipp_ext.kinds import KINDS, BlockKind, Skip

UNKNOWN = "no block of a known kind"


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """The parts of one layer; names are those of the model.

    Attributes:
        blocks: kind, module and name of every block that can be divided into units, and of those
            that were dropped.
        left: module, name and reason of every part that is neither such a block nor a norm.
        others: names of all parameters outside the blocks and their norms.
    """

    blocks: tuple[tuple[BlockKind, nn.Module, str], ...]
    left: tuple[tuple[nn.Module, str, str], ...]
    others: tuple[str, ...]


def parts_of(layer: nn.Module, name: str = "") -> LayerParts:
    """The parts of a layer that is called `name` in its model."""
    names = {module: n for n, module in layer.named_modules(prefix=name)}
    refused: dict[nn.Module, str] = {}
    blocks: list[tuple[BlockKind, nn.Module, str]] = []
    for kind in KINDS.values():
        found = kind.find(layer)
        for block in found:
            reason = f"one of {len(found)} {kind.name} blocks of its layer" * (len(found) > 1)
            if reason := reason or _refusal(kind, block, names[block]):
                refused |= dict.fromkeys(_owners(kind, block, layer), reason)
            else:
                blocks.append((kind, block, names[block]))
    covered = {owner for kind, block, _ in blocks for owner in _owners(kind, block, layer)}
    covered_names = tuple(f"{names[owner]}." for owner in covered)
    norms = {n for place in BLOCKS.values() for n in (*place.norms_before, *place.norms_after)}
    return LayerParts(
        blocks=tuple(blocks),
        left=tuple((m, names[m], reason) for m, reason in _rest(layer, covered, refused)),
        others=tuple(
            n
            for n, _ in layer.named_parameters(prefix=name)
            if not n.startswith(covered_names)
            and n.removeprefix(f"{name}.").partition(".")[0] not in norms
        ),
    )


def missing_block(parts: LayerParts) -> str:
    """What a layer lacks that all its parts can be divided of; empty: nothing."""
    places = {kind.place for kind, _, _ in parts.blocks}
    return next((f"0 {place} blocks" for place in BLOCKS if place not in places), "")


def own_norms(layer: nn.Module, place: str) -> list[str]:
    """Names of the norms of `layer` that serve its block in this place alone, before or after it.

    They can leave with the block. A norm that several parts of a layer read stays: attention and
    FFN side by side (Cohere), attention beside a state-space mixer (Falcon-H1), or experts beside
    an FFN (Granite); so do norms that the residual stream passes (MiniMax).
    """
    parts = parts_of(layer)
    if norms_residual(layer) or sum(kind.place == place for kind, _, _ in parts.blocks) > 1:
        return []
    before, ffn_input = norm_before(layer, place), norm_before(layer, "ffn")
    names = norms_after(layer, place)
    if before is not None and ffn_input is not None and not parts.others:
        names += [n for n, child in layer.named_children() if child is before]
    return names


def _refusal(kind: BlockKind, block: nn.Module, name: str) -> str:
    """Why a block cannot be divided into units; empty if it can, or was dropped."""
    if isinstance(block, Skip):
        return ""
    try:
        width = kind.width(block, name)
        kind.owns(block, name, width)
        kind.check_rest(block, name, width)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def _owners(kind: BlockKind, block: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The modules that are a block's: itself, or linear layers that lie in the layer itself."""
    if block is not layer:
        return [block]
    producers, consumer = kind.match(block) or ([], "")
    return [getattr(block, n) for n in (*producers, consumer)]


def _rest(
    module: nn.Module, covered: set[nn.Module], refused: Mapping[nn.Module, str]
) -> Iterator[tuple[nn.Module, str]]:
    """The outermost modules with weights that lie outside the blocks, and why they stay whole."""
    for name, child in module.named_children():
        if child in covered or name in SIDE_PATHS:
            continue
        if child in refused:
            yield child, refused[child]
        elif any(inner in covered or inner in refused for inner in child.modules()):
            yield from _rest(child, covered, refused)
        elif any(p.ndim > 1 for p in child.parameters()):
            yield child, UNKNOWN
