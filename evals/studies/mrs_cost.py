"""`hipp bench mrs`: what MRS costs on a ResNet-18, beside one epoch of adversarial training on the same images."""

import time
from typing import Any

import torch

from hipp_ext.evals.studies.measuring import report, resident
from hipp_ext.integrations.torch_pruning import find_channel_groups
from hipp_ext.robust.data import Images
from hipp_ext.robust.losses import PGDAT, backward
from hipp_ext.robust.models import build_model
from hipp_ext.robust.scoring import ScoreSettings, attacked_batches, rank_channels, sensitivity

STEPS = 10


def run(save: bool = False, rows: int = 40, batch_size: int = 4) -> dict[str, Any]:
    """Seconds of every form for all modules, as shares of an epoch of PGD-AT with ten steps, and memory beyond what is held
    before [MiB]; one process, one run of each.

    Few small images suffice: both sides are proportional to their number. There are as many batches as steps of the worst-case
    form. The attack on the images, made once for whichever form, is counted apart.
    """
    torch.manual_seed(0)
    model = build_model("resnet18", 10)
    images = Images(images=torch.rand(rows, 3, 32, 32), labels=torch.arange(rows) % 10)
    groups = find_channel_groups(model, images.images[:1])
    settings = {
        f: ScoreSettings(form=f, rows=rows, batch_size=batch_size, steps=STEPS)
        for f in ("worst", "grad", "removal")
    }
    loss, model = PGDAT(steps=STEPS), model.train()
    epoch, _ = _cost(
        lambda: [backward(loss, model, x, y, 0) for x, y in images.batches(batch_size)]
    )
    model.zero_grad()
    model.eval()
    batches = attacked_batches(model, images, settings["removal"])
    ranking = rank_channels(model, groups, batches, "l1")
    costs = {
        f: _cost(lambda s=s: sensitivity(model, groups, batches, ranking, s))
        for f, s in settings.items()
    }
    costs["attack"] = _cost(lambda: attacked_batches(model, images, settings["removal"]))
    values = {
        "rows": rows,
        "modules": len(groups),
        "epoch_seconds": epoch,
        **{f"{f}_share_of_epoch": seconds / epoch for f, (seconds, _) in costs.items()},
        **{f"{f}_peak_mib": peak for f, (_, peak) in costs.items()},
    }
    return report("mrs", "hipp bench mrs", values, save)


def _cost(call: Any) -> tuple[float, float]:
    before, start = resident("VmRSS"), time.process_time()
    resident("VmHWM", reset=True)
    call()
    return time.process_time() - start, max(0.0, resident("VmHWM") - before)
