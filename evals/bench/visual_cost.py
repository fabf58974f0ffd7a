"""`hipp bench visual`: a pass of VisualSensitivity against a plain sdpa forward on the same batch, neither with the head."""

from typing import Any

import torch
from hipp_ext.evals.bench.measuring import paired_times, ratio, report

from hipp_ext import testbed
from hipp_ext.scorers import VisualSensitivity
from hipp_ext.scorers.base import forward_hidden


def llava_shaped(hidden: int, layers: int, rows: int = 2) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A random LLaVA with LLaVA-1.5's token counts (576 of image, 60 of text) and proportions, and one batch of `rows`."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(vocab_size=1000, hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
                       num_attention_heads=hidden // 128)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                              image_size=336, patch_size=14)  # fmt: skip
    image: dict[str, Any] = {"image_token_id": 999}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **image)).eval()
    text_ids = torch.randint(0, 900, (rows, 60))
    ids = torch.cat([torch.ones(rows, 1, dtype=torch.long), torch.full((rows, 576), 999), text_ids], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(rows, 3, 336, 336)}
    return model, [batch]


def run(repeats: int = 7, hidden: int = 1024, layers: int = 8, save: bool = False) -> dict[str, Any]:
    """Time both on a LLaVA-shaped random model and on the testbed; returns and prints the result."""
    small, processor = testbed.load()
    cases = {"llava_shaped": llava_shaped(hidden, layers), "testbed": (small, testbed.calibration_batches(processor, n=64))}
    values: dict[str, Any] = {"target": 1.5, "shape": {"hidden": hidden, "layers": layers, "tokens": 637, "rows": 2}}
    for name, (model, batches) in cases.items():

        @torch.no_grad()
        def plain(model: Any = model, batches: Any = batches) -> None:
            for batch in batches:
                forward_hidden(model, batch)

        def probe(model: Any = model, batches: Any = batches) -> None:
            VisualSensitivity()(model, batches)

        times = paired_times({"forward": plain, "probe": probe}, repeats, warmup=2)
        values[name] = {"probe / forward": ratio(times, "probe", "forward"), "seconds": times}
    return report("visual_cost", f"hipp bench visual --repeats {repeats}", values, save)
