"""`hipp bench autoattack`: AutoAttack as `hipp_ext.robust.evaluate` runs it, against its authors' code, image by image."""

import contextlib
import os
import time
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import DataError
from hipp_ext.evals.studies.measuring import report
from hipp_ext.evals.studies.robust import Setting, dense_network
from hipp_ext.modes import restored
from hipp_ext.robust.data import Images, load_data
from hipp_ext.robust.evaluation import AUTOATTACK, evaluate, percent

NETWORKS = ("small-resnet", "small-vgg")


def run(
    images: int = 150, epsilons: tuple[float, ...] = (0.1, 0.15), seed: int = 0, save: bool = False
) -> dict[str, Any]:
    """Attack adversarially trained networks on digits by both; returns and prints the result: accuracies in percent.

    Raises:
        DataError: the authors' code is not installed.
    """
    try:
        from autoattack import AutoAttack  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise DataError(
            "The authors' code is needed beside ours, and no package index has it: put the folder autoattack of the repository "
            "fra31/auto-attack on PYTHONPATH."
        ) from None
    torch.set_num_threads(1)
    data = load_data("digits", None, seed=seed)
    test, rows = data.test.first(images), []
    for network in NETWORKS:
        model = dense_network(network, seed, Setting(), data)
        for epsilon in epsilons:
            start = time.process_time()
            found = evaluate(
                model,
                test,
                len(data.classes),
                epsilon=epsilon,
                attacks=AUTOATTACK,
                checks=False,
                seed=seed,
            )
            ours, middle = found.robust_mask, time.process_time()
            theirs = _published(AutoAttack, model, test, epsilon, seed)
            rows.append(
                {
                    "network": network,
                    "epsilon": epsilon,
                    "n": len(test.labels),
                    "clean": found.clean,
                    "ours": percent(ours),
                    "theirs": percent(theirs),
                    "after_apgd": found.under["apgd-t"],
                    "images_apart": int((ours != theirs).sum()),
                    "seconds_ours": middle - start,
                    "seconds_theirs": time.process_time() - middle,
                }
            )
            print(rows[-1], flush=True)
    apart = max(abs(r["ours"] - r["theirs"]) for r in rows)
    return report(
        "autoattack",
        f"hipp bench autoattack --images {images}",
        {"rows": rows, "most_points_apart": apart},
        save,
    )


def _published(attack: Any, model: nn.Module, images: Images, epsilon: float, seed: int) -> Tensor:
    """Which images are still classified right after the published standard version."""
    with (
        restored(model, random_state=True),
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
    ):
        model.eval()
        made = attack(
            model,
            norm="Linf",
            eps=epsilon,
            version="standard",
            seed=seed,
            device="cpu",
            verbose=False,
        )
        moved = made.run_standard_evaluation(images.images, images.labels, bs=len(images.labels))
        with torch.no_grad():
            return model(moved).argmax(1) == images.labels
