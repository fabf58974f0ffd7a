"""Random pictures and sounds, in the forms in which models take them."""

from typing import Any

import torch

from zoo.family import Inputs
from zoo.sizes import IMAGE


def pixels(*shape: int, name: str = "pixel_values", **more: Any) -> Inputs:
    """Pictures of a shape, one per row, and other values that are the same for every row."""

    def make(rows: int, generator: torch.Generator) -> dict[str, Any]:
        values = {name: torch.randn(rows, *shape, generator=generator)}
        return values | {key: torch.tensor([value] * rows) for key, value in more.items()}

    return make


def grid(channels: int = 3 * 2 * 8 * 8, shape: tuple[int, ...] = (), **more: int) -> Inputs:
    """Patches of all pictures in a row, 4 x 4 of each, as the Qwen models take them."""

    def make(rows: int, generator: torch.Generator) -> dict[str, Any]:
        values = torch.randn(rows * 16, *(shape or (channels,)), generator=generator)
        others = {name: torch.tensor([value] * rows) for name, value in more.items()}
        return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]] * rows)} | others

    return make


def patches(count: int, channels: int) -> Inputs:
    """Patches with their places in a square, as Gemma 4 takes them."""
    side = int(count**0.5)
    places = [[i % side, i // side] for i in range(count)]
    return pixels(count, channels, image_position_ids=places)


def two_resolutions(rows: int, generator: torch.Generator) -> dict[str, Any]:
    """A picture in two sizes."""
    return pixels(3, 32, 32)(rows, generator) | pixels(3, 64, 64, name="high_res_pixel_values")(
        rows, generator
    )


def navit(rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Patches of all pictures side by side, as MiniCPM takes them."""
    values = torch.randn(1, 3, 8, 8 * 16 * rows, generator=generator)
    return {"pixel_values": values, "target_sizes": torch.tensor([[4, 4]] * rows)}


def sound(rows: int, generator: torch.Generator) -> dict[str, Any]:
    """A spectrogram, as Qwen2-Audio takes it."""
    mask = torch.ones(rows, 32, dtype=torch.long)
    values = torch.randn(rows, 8, 32, generator=generator)
    return {"input_features": values, "feature_attention_mask": mask}


def flattened(rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Patches that begin with their row and column, as Kosmos-2.5 takes them."""
    values = torch.randn(rows, 16, 24, generator=generator)
    places = torch.tensor([[i // 4 + 1.0, i % 4 + 1.0] for i in range(16)]).expand(rows, 16, 2)
    mask = torch.tensor([[0, *[1] * 4, *[0] * 6]] * rows)
    return {"flattened_patches": torch.cat([places, values], 2), "image_embeds_position_mask": mask}


def visual_words(form: str) -> dict[str, int]:
    """The vocabulary of a model that reads a picture as tokens of its own."""
    words = {form.format(i): 20 + i for i in range(11)}
    return words | {"<image>": IMAGE, "<|extra_200|>": 11}


PICTURE = pixels(3, 32, 32)
