"""Random models in LLaVA-1.5's proportions, and noise inputs with LLaVA-1.5's token counts."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hipp_ext.calibration import Batch
from hipp_ext.errors import DataError

PICTURE_TOKENS, QUESTION_TOKENS = 576, 60
IMAGE_TOKEN = 999
# Options of the studies of what such a model costs.
Hidden = Annotated[
    int, typer.Option(min=256, help="Width of the language tower, a multiple of 256.")
]
Layers = Annotated[int, typer.Option(min=2, help="Layers of the language tower.")]
OnDevice = Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")]
InDtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
OutFile = Annotated[
    Path | None, typer.Option("--out", "-o", help="Also write the result to this JSON file.")
]


def check_hidden(hidden: int) -> None:
    """Raise DataError unless a whole `random_llava` can be so wide."""
    if hidden % 256:
        raise DataError(
            f"--hidden {hidden}: a multiple of 256 is needed "
            "(heads are 128 wide, those of the vision tower 64)."
        )


def random_llava(
    hidden: int,
    layers: int,
    *,
    whole: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A LLaVA in eval mode; hidden 4096 and 32 layers make the language tower of the 7B model.

    Args:
        hidden: width of the language tower.
        layers: number of layers of the language tower.
        whole: use a vision tower in proportion and LLaVA-1.5's vocabulary. Otherwise both are tiny.
        device: device of the weights.
        dtype: dtype of the weights.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(
        vocab_size=32_064 if whole else IMAGE_TOKEN + 1,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=hidden * 43 // 16,
        num_attention_heads=hidden // 128,
    )
    width, ffn, depth, heads = (
        (hidden // 4, hidden, max(2, layers * 3 // 4), max(1, hidden // 256))
        if whole
        else (64, 128, 2, 4)
    )
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=336,
        patch_size=14,
    )
    image: dict[str, Any] = {"image_token_id": IMAGE_TOKEN}
    config = LlavaConfig(vision_config=vision, text_config=text, **image)
    torch.manual_seed(0)
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def noise(rows: int, *, shared: int = 1, at_once: int = 64, seed: int = 0) -> list[Batch]:
    """Batches of random pictures and questions.

    Args:
        rows: number of rows of all batches together.
        shared: number of rows that ask about the same picture.
        at_once: number of rows of a batch.
        seed: random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(-(-rows // shared), 3, 336, 336, generator=generator)
    batches = []
    for some in torch.arange(rows).split(at_once):
        words = torch.randint(3, IMAGE_TOKEN, (len(some), QUESTION_TOKENS), generator=generator)
        first = torch.ones(len(some), 1, dtype=torch.long)
        picture = torch.full((len(some), PICTURE_TOKENS), IMAGE_TOKEN)
        ids = torch.cat([first, picture, words], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batches.append(inputs | {"pixel_values": pictures[some // shared]})
    return batches
