"""`hipp bench visual`: a pass of VisualSensitivity against a plain sdpa forward on the same batch, neither with the head."""

from typing import Any

import torch

from hipp_ext import testbed
from hipp_ext.evals.studies.measuring import paired_times, ratio, report
from hipp_ext.evals.studies.shapes import noise, random_llava
from hipp_ext.scorers import VisualSensitivity
from hipp_ext.scorers.base import forward_hidden


def run(
    repeats: int = 7, hidden: int = 1024, layers: int = 8, save: bool = False
) -> dict[str, Any]:
    """Time both on a LLaVA-shaped random model and on the testbed; returns and prints the result."""
    small, processor = testbed.load()
    cases = {
        "llava_shaped": (random_llava(hidden, layers), noise(2)),
        "testbed": (small, testbed.calibration_batches(processor, n=64)),
    }
    values: dict[str, Any] = {
        "target": 1.5,
        "shape": {"hidden": hidden, "layers": layers, "tokens": 637, "rows": 2},
    }
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
