"""The parts of a model that hold groups: language tower, vision tower, projector."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn

from hipp_ext.errors import BudgetError, UnsupportedModelError
from hipp_ext.families import LAYER_LISTS, PROJECTORS, VISION_TOWERS
from hipp_ext.kinds import KINDS

Tower = Literal["language", "vision", "projector"]
PICTURE_PATCHES = 1024  # of a tower that takes pictures of any size: 448 x 448 in patches of 14


def check_towers(towers: object) -> tuple[Tower, ...]:
    """The towers, as a tuple.

    Raises:
        BudgetError: there are none, one is unknown, or one is named twice.
    """
    known = get_args(Tower)
    given = tuple(towers) if isinstance(towers, Sequence) and not isinstance(towers, str) else ()
    if not given or len(set(given)) < len(given) or any(tower not in known for tower in given):
        raise BudgetError(
            f"towers={towers!r}: one or several of {', '.join(known)} are needed, each once."
        )
    return given


def decoder(model: nn.Module) -> nn.Module:
    """The language tower: the module that turns input embeddings into hidden states."""
    get_decoder = getattr(model, "get_decoder", None)
    if get_decoder is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model with a decoder."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder and a decoder that reads what the encoder "
            "makes of the prompt; only decoders that read the prompt themselves are supported. "
            f"Its modules: {listing(model)}"
        )
    found: Any = None
    inner: Any = get_decoder()
    if isinstance(inner, nn.Linear):  # what ModernBERT calls its decoder is its head
        inner = model.base_model
    while inner is not found:  # BLIP-2 gives a language model with a head
        found, inner = inner, getattr(inner, "get_decoder", lambda same=inner: same)()
    # Llama 4 gives the language model with its head, which gives itself.
    return inner.model if getattr(inner, "lm_head", None) is not None else inner


def vision_tower(model: nn.Module) -> nn.Module:
    """The module that turns pictures into features, or what holds it."""
    for path in VISION_TOWERS:
        for root in (model, getattr(model, "model", None)):
            if isinstance(getattr(root, path, None), nn.Module):
                return getattr(root, path)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no vision tower; its modules: {listing(model)}"
    )


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
        lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and _has_attention(m)]
    if tower == "vision" and len(lists) > 1:
        return nn.ModuleList(layer for layers in lists for layer in layers)
    if len(lists) != 1:
        names = KINDS["attention"].names
        raise UnsupportedModelError(
            f"{adapters_in(root)}Looked for the layers of the {tower} tower of "
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


def tower_config(config: Any, tower: Tower) -> Any:
    """The part of a model's configuration that describes a tower."""
    if tower == "projector":
        return config
    return config.get_text_config() if tower == "language" else config.vision_config


def adapters_in(root: nn.Module) -> str:
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


def _has_attention(layers: nn.ModuleList) -> bool:
    """Whether a layer has an attention block, or had one."""
    kinds = [kind for kind in KINDS.values() if kind.place == "attention"]
    return any(kind.find(layer) for layer in layers for kind in kinds)


def projector_blocks(model: nn.Module) -> list[nn.Module]:
    """The MLPs that lead from the vision tower to the language tower, in the model's order.

    Raises:
        UnsupportedModelError: there are none: a single linear layer has no units of its own.
    """
    named = [
        (name, module)
        for name, module in model.named_modules()
        if set(PROJECTORS).intersection(name.split("."))
    ]
    of_decoder = set(decoder(model).modules())
    kind = KINDS["ffn"]
    found = [m for _, m in named if m not in of_decoder and kind.match(m) is not None]
    if not found:
        modules = ", ".join(f"{name} ({type(m).__name__})" for name, m in named) or listing(model)
        raise UnsupportedModelError(
            f"{type(model).__name__} has no projector with units: an MLP of linear layers "
            f"{' or '.join('+'.join(names) for names in kind.names.producers)} is needed. "
            f"Leave the projector out of towers. What was found: {modules}"
        )
    return found


def picture_tokens(config: Any) -> int:
    """Patches of a picture in the vision tower; PICTURE_PATCHES where any size is taken."""
    vision = getattr(config, "vision_config", None)
    size, patch = (
        first_number(getattr(vision, name, None)) for name in ("image_size", "patch_size")
    )
    return (size // patch) ** 2 if size and patch else PICTURE_PATCHES


def projected_tokens(config: Any) -> int:
    """Tokens of a picture in the projector, where several patches may have become one."""
    vision = getattr(config, "vision_config", None)
    for owner in (config, vision):
        merged = getattr(owner, "spatial_merge_size", None)
        if isinstance(merged, int) and merged > 0:
            return picture_tokens(config) // merged**2
    ratio = getattr(config, "downsample_ratio", None)
    return int(picture_tokens(config) * (ratio**2 if isinstance(ratio, float) else 1))


def first_number(size: Any) -> int:
    """The first of what may be given by one number or two; 0 where there is none."""
    first = size[0] if isinstance(size, list | tuple) and size else size
    return first if isinstance(first, int) else 0


def listing(module: nn.Module, limit: int = 30) -> str:
    """The names of a module's parts."""
    names = [f"{n} ({type(m).__name__})" for n, m in module.named_modules() if n]
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
