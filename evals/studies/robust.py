"""Does robustness sensitivity (MRS) help to prune? Equal MACs, equal fine-tuning, seeds, controls.

Every job (network, ratio, loss, seed) trains one dense network by PGD-AT, prunes it in every arm to
the MACs of the uniform plan, recomputes batch norms under attack, fine-tunes, and evaluates on the
first test images. Jobs are files, so an interrupted study continues.
"""

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import nn

from hipp_ext.budget import Bounds, Cost
from hipp_ext.errors import DataError
from hipp_ext.evals.measuring import resident
from hipp_ext.evals.studies.measuring import Save, keep_picture, mean_and_se, report, run_command
from hipp_ext.files import write_atomic
from hipp_ext.integrations.torch_pruning import find_channel_groups, prune_channels
from hipp_ext.robust.allocation import allocate, default_min_keep, global_counts, uniform_counts
from hipp_ext.robust.costs import channel_costs
from hipp_ext.robust.data import ImageData
from hipp_ext.robust.evaluation import AUTOATTACK, evaluate
from hipp_ext.robust.image_sets import load_data
from hipp_ext.robust.losses import PGDAT, TRADES
from hipp_ext.robust.models import MODEL_NAMES, build_model
from hipp_ext.robust.scoring import ScoreSettings, attacked_batches, rank_channels, score
from hipp_ext.robust.training import TrainSettings, recalibrate, train
from hipp_ext.runs import RunFolder
from hipp_ext.scorers.channels import ChannelGroup
from hipp_ext.units import top_units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name of an arm -> ranking of the channels, and allocation of the channels to the groups.
ARMS: dict[str, tuple[Any, str]] = {
    "uniform": ("l1", "uniform"),
    "mrs-removal": ("l1", "mrs"),
    "clean-removal": ("l1", "clean"),
    "shuffled": ("l1", "shuffled"),
    "global-l1": ("l1", "global"),
    "bn": ("bn", "global"),
    "taylor": ("taylor", "uniform"),
    "robust-taylor": ("taylor", "uniform"),
    "uniform-bn": ("bn", "uniform"),
    "mrs-bn": ("bn", "mrs"),
    "clean-bn": ("bn", "clean"),
    "shuffled-bn": ("bn", "shuffled"),
    "mrs-taylor": ("taylor", "mrs"),
    "random": ("l1", "random"),
}
# Every arm is compared with these, seed by seed.
AGAINST = ("uniform", "global-l1", "shuffled", "clean-removal")
AGAINST += ("bn", "uniform-bn", "clean-bn", "shuffled-bn")
LOSSES: dict[str, Any] = {"trades": TRADES, "pgd-at": PGDAT}
ATTACKS = ("pgd", "apgd-ce", "apgd-t")
WHOLE_AUTOATTACK = ("pgd", *AUTOATTACK)  # takes three times as long, and hardly breaks more images


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Setting of a study.

    Attributes:
        data: name of the image set.
        root: folder of the image set; None where it needs none.
        epsilon: L-inf radius of the attacks.
        steps: number of steps of the inner attack.
        dense: epochs of PGD-AT before pruning.
        tune: epochs of fine-tuning after pruning.
        attacks: names of attacks, see `hipp_ext.robust.evaluate`.
        test: number of test images that are attacked.
        rows: number of training images for scoring.
    """

    data: str = "digits"
    root: str | None = None
    epsilon: float = 0.1
    steps: int = 5
    dense: int = 25
    tune: int = 15
    attacks: tuple[str, ...] = ATTACKS
    test: int = 300
    rows: int = 512


@dataclass(frozen=True, kw_only=True)
class Job:
    """One dense network, and one pruning ratio and fine-tuning loss."""

    network: str
    ratio: float
    loss: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the job's folder."""
        return f"{self.network}-{round(100 * self.ratio)}-{self.loss}-{self.seed}"


def run_job(
    job: Job, setting: Setting, arms: Sequence[str], out: Path, log: Callable[[str], None]
) -> None:
    """Write `out`/<job>/<arm>.json for every arm that has none yet."""
    missing = [a for a in arms if not (out / job.name / f"{a}.json").exists()]
    if not missing:
        return
    data = load_data(setting.data, setting.root, seed=job.seed)
    checkpoints = out / "dense" / f"{job.network}-{job.seed}"
    dense = dense_network(job.network, job.seed, setting, data, checkpoints)
    example = data.train.rows(slice(0, 1))[0]
    groups = find_channel_groups(dense, example)
    macs, parameters = channel_costs(dense, example, groups)
    widths = [g.width for g in groups]
    uniform = uniform_counts(widths, job.ratio)
    loss = LOSSES[job.loss](epsilon=setting.epsilon, steps=setting.steps)
    for arm in missing:
        start, memory = time.process_time(), resident("VmHWM", reset=True)
        counts, ranking = _plan(arm, job, setting, dense, data, groups, macs, uniform)
        scoring = {"seconds": time.process_time() - start, "peak_mb": resident("VmHWM") - memory}
        kept = {g.name: top_units(r, k) for g, k, r in zip(groups, counts, ranking, strict=True)}
        model = copy.deepcopy(dense)
        prune_channels(model, example, kept)
        recalibrate(model, data.train, setting.epsilon, seed=job.seed)
        train(model, data, loss, TrainSettings(epochs=setting.tune, lr=0.05, seed=job.seed))
        found = evaluate(
            model,
            data.test.first(setting.test),
            len(data.classes),
            epsilon=setting.epsilon,
            attacks=setting.attacks,
            checks=False,
            batch_size=600,
            seed=job.seed,
        )
        values = {
            **asdict(job),
            "arm": arm,
            "clean": found.clean,
            **found.under,
            "worst": found.worst,
            "keeps": counts,
            "macs": macs(counts) / macs(widths),
            "scoring": scoring,
            "parameters": parameters(counts) / parameters(widths),
        }
        write_atomic(out / job.name / f"{arm}.json", json.dumps(values) + "\n")
        log(
            f"{job.name} {arm}: clean {found.clean:.1f}, pgd {found.under['pgd']:.1f}, "
            f"worst {found.worst:.1f}"
        )


def dense_network(
    network: str, seed: int, setting: Setting, data: ImageData, folder: Path | None = None
) -> nn.Module:
    """The dense network of a seed, in eval mode.

    With a folder it is trained once for all ratios and losses.
    """
    torch.manual_seed(seed)
    model = build_model(network, len(data.classes), data.shape)
    loss = PGDAT(epsilon=setting.epsilon, steps=setting.steps)
    train(model, data, loss, TrainSettings(epochs=setting.dense, lr=0.1, seed=seed), folder=folder)
    return model.eval()


def _plan(
    arm: str,
    job: Job,
    setting: Setting,
    dense: nn.Module,
    data: ImageData,
    groups: Sequence[ChannelGroup],
    macs: Cost,
    uniform: Sequence[int],
) -> tuple[list[int], Sequence[torch.Tensor]]:
    """(channels kept per module, ranking of the channels) of an arm.

    The MACs are at most those of the uniform plan.
    """
    ranking, allocation = ARMS[arm]
    attacked = allocation in ("mrs", "shuffled") or arm == "robust-taylor"
    budget, bounds = macs(uniform), Bounds(min_keep=default_min_keep(job.ratio))
    settings = ScoreSettings(
        epsilon=setting.epsilon,
        rows=setting.rows,
        seed=job.seed,
        ranking=ranking,
        attack_steps=10 if attacked else 0,
    )
    values: list[float] = []
    if allocation in ("mrs", "clean", "shuffled"):
        found = score(dense, data.train, groups, settings)
        values, ranks = list(found.sensitivity), found.ranking
    else:
        batches = attacked_batches(dense, data.train, settings)
        ranks = rank_channels(dense, groups, batches, ranking)
    generator = torch.Generator().manual_seed(job.seed)
    if allocation == "uniform":
        return list(uniform), ranks
    if allocation == "global":
        return global_counts(ranks, macs, budget, bounds=bounds), ranks
    if allocation == "random":
        values = torch.randn(len(groups), generator=generator).exp().tolist()
    elif allocation == "shuffled":
        values = [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]
    return allocate(values, [g.width for g in groups], macs, budget, bounds=bounds), ranks


def results(out: Path) -> list[dict[str, Any]]:
    """All finished arms of all jobs."""
    return [json.loads(p.read_text()) for p in sorted(out.glob("*/*.json"))]


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Network, ratio and loss -> arm -> means, and paired differences over seeds."""
    found: dict[str, Any] = {}
    keys = sorted({(r["network"], r["ratio"], r["loss"]) for r in rows})
    for network, ratio, loss in keys:
        mine = [r for r in rows if (r["network"], r["ratio"], r["loss"]) == (network, ratio, loss)]
        by: dict[str, dict[int, Any]] = {}
        for row in mine:
            by.setdefault(row["arm"], {})[row["seed"]] = row
        entry = {}
        for arm, runs in by.items():
            means = {
                k: mean_and_se([r[k] for r in runs.values()])
                for k in ("clean", "pgd", "worst", "macs", "parameters")
            }
            if scored := [r["scoring"] for r in runs.values() if r["scoring"]]:
                means["scoring_seconds"] = mean_and_se([s["seconds"] for s in scored])
                means["scoring_peak_mb"] = {"most": max(s["peak_mb"] for s in scored)}
            against = {b: _paired(runs, by[b]) for b in AGAINST if b in by and b != arm}
            entry[arm] = means | {"difference": against}
        found[f"{network} {ratio} {loss}"] = entry
    return found


def _paired(a: Mapping[int, Mapping], b: Mapping[int, Mapping]) -> dict[str, Any]:
    """Differences a - b over the seeds that both have [percentage points]."""
    seeds = sorted(set(a) & set(b))
    return {
        k: mean_and_se([a[s][k] - b[s][k] for s in seeds]) if seeds else None
        for k in ("clean", "worst")
    }


def power(spread: float) -> int:
    """Number of seeds that show a paired difference of 2 points with probability 0.8.

    Args:
        spread: standard deviation of the paired differences [points].
    """
    level, power_level = 1.96, 0.8416  # normal quantiles: two-sided 5%, and 80%
    return max(2, math.ceil(((level + power_level) * spread / 2) ** 2))


def jobs(
    networks: Sequence[str], ratios: Sequence[float], losses: Sequence[str], seeds: int
) -> Iterator[Job]:
    """All jobs, seed by seed, so that an interrupted study has as many seeds in every cell."""
    for seed, network, ratio, loss in itertools.product(range(seeds), networks, ratios, losses):
        yield Job(network=network, ratio=ratio, loss=loss, seed=seed)


def run(
    out: Path,
    setting: Setting,
    networks: Sequence[str],
    ratios: Sequence[float],
    losses: Sequence[str],
    seeds: int,
    arms: Sequence[str],
    save: bool,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the jobs that are missing in `out`, then report all of them.

    Raises:
        DataError: an unknown arm, network or loss, or a ratio outside (0, 1).
        CheckpointError: `out` holds a study with another setting.
    """
    for what, given, known in (
        ("arms", arms, ARMS),
        ("losses", losses, LOSSES),
        ("networks", networks, MODEL_NAMES),
    ):
        if unknown := [x for x in given if x not in known]:
            raise DataError(f"Known {what} are {', '.join(known)}; got {unknown}.")
    if outside := [r for r in ratios if not 0 < r < 1]:
        raise DataError(
            f"Ratios are fractions of the channels, above 0 and below 1; got {outside}."
        )
    torch.set_num_threads(1)
    with RunFolder(out, asdict(setting)):
        for job in jobs(networks, ratios, losses, seeds):
            run_job(job, setting, arms, out, log)
    return conclude(out, setting, save)


def conclude(out: Path, setting: Setting, save: bool) -> dict[str, Any]:
    """Report the finished jobs in `out`, and draw a picture there; with `save` also in results."""
    cells = table(results(out))
    values = {"setting": asdict(setting), "seeds_needed": needed(cells), "cells": cells}
    whole = setting.attacks == WHOLE_AUTOATTACK
    name = "robust_autoattack" if whole else "robust"
    keep_picture(name, _picture(cells), save=save, folder=out)
    return report(name, values, save)


def needed(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Number of seeds that a difference of two points needs, by the spread found in each cell."""
    found: dict[str, Any] = {"planned, spread 3.1": power(3.1)}  # the spread of a trial run
    for name, arms in cells.items():
        difference = arms.get("mrs-removal", {}).get("difference", {}).get("uniform")
        if difference and difference["worst"]["se"] is not None:
            spread = difference["worst"]["se"] * difference["worst"]["n"] ** 0.5
            found[f"{name}, spread {spread:.1f}"] = power(spread)
    return found


def _picture(cells: Mapping[str, Any]) -> "Figure":
    """Accuracy under attack minus the uniform plan's, per arm, with standard errors over seeds."""
    from matplotlib.figure import Figure

    columns = min(4, max(len(cells), 1))
    lines = max(math.ceil(len(cells) / columns), 1)
    figure = Figure(figsize=(3.4 * columns, 3.4 * lines), layout="constrained")
    for i, (name, arms) in enumerate(cells.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        differences = {a: v["difference"].get("uniform", {}).get("worst") for a, v in arms.items()}
        rows = sorted((r for r in differences.items() if r[1]), key=lambda r: r[1]["mean"])
        axes.errorbar(
            [r[1]["mean"] for r in rows],
            [f"{r[0]} (n={r[1]['n']})" for r in rows],
            xerr=[r[1]["se"] or 0 for r in rows],
            fmt="o",
            capsize=3,
        )
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("points above uniform")
    return figure


def main(
    out: Annotated[Path, typer.Option(help="Folder of finished jobs.")] = Path("robust"),
    data: Annotated[
        str, typer.Option(help="digits, svhn, cifar10, cifar100 or tiny-imagenet.")
    ] = "digits",
    root: Annotated[
        Path | None, typer.Option(help="Folder of the image set's files; digits needs none.")
    ] = None,
    networks: Annotated[
        str,
        typer.Option(help="Default: small-resnet,small-vgg for digits, else resnet18,vgg16_bn."),
    ] = "",
    ratios: Annotated[
        str, typer.Option(help="Fractions of channels that the uniform plan removes.")
    ] = "0.5,0.75,0.9",
    losses: Annotated[
        str, typer.Option(help="Losses of the fine-tuning: trades, pgd-at.")
    ] = "trades,pgd-at",
    arms: Annotated[str, typer.Option(help=f"Default: {', '.join(ARMS)}.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 20,
    dense: Annotated[
        int, typer.Option(min=0, help="Epochs of adversarial training before pruning.")
    ] = 25,
    tune: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning.")] = 15,
    test: Annotated[int, typer.Option(min=1, help="Test images that are attacked.")] = 300,
    autoattack: Annotated[
        bool, typer.Option("--autoattack", help="Run all four parts of AutoAttack, not two.")
    ] = False,
    save: Save = False,
) -> None:
    """Compare MRS with uniform ratios, global L1, BN scale, Taylor and controls.

    All arms have equal MACs and equal fine-tuning. An arm takes some 15 seconds on one core for
    digits; the whole study takes a day. An interrupted study continues. Other image sets need a
    GPU.

    Examples:

    `python -m hipp_ext.evals.studies.robust --out robust`

    `python -m hipp_ext.evals.studies.robust --data cifar10 --root DIR --out robust-cifar10`
    """
    digits = data == "digits"
    setting = Setting(
        data=data,
        root=str(root) if root else None,
        epsilon=0.1 if digits else 8 / 255,
        steps=5 if digits else 10,
        dense=dense,
        tune=tune,
        test=test,
        attacks=WHOLE_AUTOATTACK if autoattack else ATTACKS,
    )
    run(
        out,
        setting,
        (networks or ("small-resnet,small-vgg" if digits else "resnet18,vgg16_bn")).split(","),
        [float(r) for r in ratios.split(",")],
        losses.split(","),
        seeds,
        arms.split(",") if arms else list(ARMS),
        save,
    )


if __name__ == "__main__":
    run_command(main)
