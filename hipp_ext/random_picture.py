"""A small random picture, in whatever form a vision-language model takes pictures."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hipp_ext.families import PICTURES
from hipp_ext.groups import Tower, tower_layers, tower_root
from hipp_ext.modes import evaluating
from hipp_ext.towers import first_number

# Dimensions before those of a picture: pictures, rows of them, and as many tiles as some models cut
# a picture into.
LEADING = ((1,), (1, 1), (1, 2), (1, 3), (1, 5), (1, 1, 1))
CHANNELS = ("num_channels", "in_channels", "in_chans")


def random_picture(model: nn.Module) -> dict[str, Any]:
    """Arguments of `picture_features` that the model takes.

    Pictures are tried in several forms and sizes, small ones first.

    Raises:
        Exception: whatever the model raises that takes none of them.
    """
    failed: Exception | None = None
    for picture in _pictures(model, _way_in(model)[1]):
        try:
            picture_features(model, picture, ())
            return picture
        except Exception as error:  # another form, or another size, is needed
            failed = error
    assert failed is not None
    raise failed


@torch.no_grad()
def picture_features(
    model: nn.Module, picture: Mapping[str, Any], towers: Sequence[Tower]
) -> list[Tensor]:
    """What a picture becomes: the features, and the output of the last layer of each of `towers`.

    That of the last layer, because some models read the features of a layer below it.
    """
    seen: list[Any] = []
    lasts = [tower_layers(model, tower)[-1] for tower in towers]
    handles = [m.register_forward_hook(lambda *args: seen.append(args[2])) for m in lasts]
    try:
        with evaluating(model):
            features = _way_in(model)[0](**picture)
    finally:
        for handle in handles:
            handle.remove()
    return [t for t in tree_leaves((features, seen)) if _is_feature(t)]


def _way_in(model: nn.Module) -> tuple[Callable[..., Any], dict[str, inspect.Parameter]]:
    """What turns pixels into features, and its parameters by name."""
    base: Any = getattr(model, "model", model)
    look = getattr(base, "get_image_features", None)
    if look is None:  # Llama 3.2 Vision
        look = tower_root(model, "vision")
        return look, dict(inspect.signature(look.forward).parameters)
    return look, dict(inspect.signature(look).parameters)


def _pictures(model: Any, parameters: dict[str, inspect.Parameter]) -> Iterator[dict[str, Any]]:
    """Arguments of what `_way_in` returns."""
    config = getattr(model.config, "vision_config", model.config)
    patch = first_number(getattr(config, "patch_size", None)) or 1
    merged = getattr(config, "spatial_merge_size", None) or 2
    known = [getattr(config, name, None) for name in CHANNELS]
    channels = next((n for n in known if isinstance(n, int)), 3)
    like = next(tower_root(model, "vision").parameters())
    generator = torch.Generator().manual_seed(0)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    name = next((n for n in PICTURES if n in parameters), PICTURES[0])
    if "image_grid_thw" in parameters:
        side = 2 * merged
        grid = {"image_grid_thw": torch.tensor([[1, side, side]], device=like.device)}
        if "image_merge_sizes" in parameters:
            grid["image_merge_sizes"] = torch.tensor([merged], device=like.device)
        frames = getattr(config, "temporal_patch_size", None) or 1
        volume = channels * frames * patch**2
        yield {"pixel_values": pixels(side**2, volume), **grid}
        yield {"pixel_values": pixels(side**2, channels, patch, patch), **grid}
        yield {"pixel_values": pixels(1, side**2, channels, patch, patch), **grid}
        return
    built = getattr(config, "model_args", None) or {}  # of a tower from timm
    if "spatial_shapes" in parameters:  # SigLIP 2, whose patches come side by side
        side = 2 * merged
        mask = torch.ones(1, side**2, dtype=torch.long, device=like.device)
        shapes = torch.tensor([[side, side]], device=like.device)
        patches = pixels(1, side**2, channels * patch**2)
        yield {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}
    whole = first_number(getattr(config, "image_size", None) or built.get("img_size"))
    for size in dict.fromkeys((2 * merged * patch, whole or 2 * merged * patch)):
        others = _other_arguments(model.config, parameters, size, like.device)
        for leading in LEADING:
            picture = pixels(*leading, channels, size, size)
            yield {name: picture, **others}


def _other_arguments(
    config: Any, parameters: dict[str, inspect.Parameter], size: int, device: torch.device
) -> dict[str, Any]:
    """What else is asked for, beside pixels."""
    vision = getattr(config, "vision_config", config)
    tiles = getattr(vision, "max_num_tiles", 1)
    detailed = getattr(config, "high_res_vision_config", vision)
    large = first_number(getattr(detailed, "image_size", None)) or size
    known: dict[str, Any] = {
        "high_res_pixel_values": torch.ones(1, 3, large, large, device=device),
        "image_sizes": torch.tensor([[size, size]], device=device),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long, device=device),
        "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long, device=device),
        "vision_feature_select_strategy": getattr(
            vision, "vision_feature_select_strategy", "default"
        ),
    }
    needed = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    return {name: known[name] for name in needed if name in known}


def _is_feature(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
