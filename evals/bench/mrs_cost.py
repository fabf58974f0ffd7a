"""`hipp bench mrs`: what MRS costs on a ResNet-18, beside one epoch of adversarial training on the same images."""

import time
from typing import Any

import torch
from hipp_ext.evals.bench.measuring import report
from hipp_ext.integrations.torch_pruning import find_channel_groups

from hipp_ext.robust.data import Images
from hipp_ext.robust.losses import PGDAT, backward
from hipp_ext.robust.models import build_model
from hipp_ext.robust.scoring import ScoreSettings, attacked_batches, rank_channels, sensitivity

STEPS = 10


def run(save: bool = False, rows: int = 40, batch_size: int = 4) -> dict[str, Any]:
    """Seconds of every form for all modules, as shares of an epoch of PGD-AT with ten steps; one process, one run of each.

    Few small images suffice: both sides are proportional to their number. There are as many batches as steps of the worst-case
    form.
    """
    torch.manual_seed(0)
    model = build_model("resnet18", 10)
    images = Images(images=torch.rand(rows, 3, 32, 32), labels=torch.arange(rows) % 10)
    groups = find_channel_groups(model, images.images[:1])
    settings = {f: ScoreSettings(form=f, rows=rows, batch_size=batch_size, steps=STEPS) for f in ("worst", "grad", "removal")}
    loss, model = PGDAT(steps=STEPS), model.train()
    epoch = _seconds(lambda: [backward(loss, model, x, y, 0) for x, y in images.batches(batch_size)])
    model.zero_grad()
    model.eval()
    batches = attacked_batches(model, images, settings["removal"])
    ranking = rank_channels(model, groups, batches, "l1")
    times = {f: _seconds(lambda s=s: sensitivity(model, groups, batches, ranking, s)) for f, s in settings.items()}
    values = {
        "rows": rows, "modules": len(groups), "epoch_seconds": epoch,
        "attack_share_of_epoch": _seconds(lambda: attacked_batches(model, images, settings["removal"])) / epoch,
        **{f"{f}_share_of_epoch": t / epoch for f, t in times.items()},
    }  # fmt: skip
    return report("mrs", "hipp bench mrs", values, save)


def _seconds(call: Any) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
