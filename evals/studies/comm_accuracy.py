"""Bytes on the wire and accuracy of LQ-SGD and its alternatives, with iid and non-iid workers.

Data: scikit-learn's 8 x 8 digits, 897 to train and 900 to test. Model: an MLP 64-256-256-10, global
batch 64, SGD with momentum 0.9 and a learning rate that falls from 0.05 to 0. Non-iid: examples are
sorted by digit, so each worker sees a few digits only. Workers are simulated, see
comm_baselines.py. Differences are paired by seed.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from hipp_ext.evals.studies.comm_baselines import Averager, gradients_of, methods
from hipp_ext.evals.studies.measuring import Save, mean_and_se, report, run_command

REFERENCE = "PowerSGD"
RANK = 1  # where compression hurts most


def run(
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each method.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a run.")] = 300,
    save: Save = False,
) -> dict[str, Any]:
    """Compare LQ-SGD with fp32, fp16, PowerSGD, QSGD and top-k on digits.

    Accuracies are in percent, bytes are per worker and step.

    Example: `python -m hipp_ext.evals.studies.comm_accuracy --seeds 10`
    """
    torch.set_num_threads(1)
    train, test = _digits()
    table: dict[str, Any] = {}
    for workers in (2, 4):
        for split in ("iid", "non-iid"):
            shapes = {n: p.shape for n, p in _mlp(0).named_parameters()}
            runs = {
                name: [
                    _train(make(seed), workers, split, seed, steps, train, test)
                    for seed in range(seeds)
                ]
                for name, make in methods(shapes, workers, RANK).items()
            }
            table[f"{workers} workers, {split}"] = rows = summary(runs)
            print(f"{workers} workers, {split}")
            for name, row in rows.items():
                a, d = row["accuracy"], row["minus PowerSGD"]
                print(
                    f"  {name:15} {a['mean']:6.2f} ± {a['se']:.2f}  {d['mean']:+.2f} ± "
                    f"{d['se']:.2f}  loss {row['loss']['mean']:.4f}  {row['bytes']:10.0f} bytes"
                )
    values = {"task": "digits", "rank": RANK, "seeds": seeds, "steps": steps, "table": table}
    return report("comm", values, save)


def summary(runs: Mapping[str, Sequence[tuple[float, float, float]]]) -> dict[str, Any]:
    """Method -> accuracy, paired difference to PowerSGD, loss, bytes.

    Args:
        runs: method -> (accuracy, loss, bytes) of every seed.
    """
    rows = {}
    for name, measured in runs.items():
        accuracy, loss, sent = zip(*measured, strict=True)
        reference = [m[0] for m in runs[REFERENCE]]
        rows[name] = {
            "accuracy": mean_and_se(accuracy),
            "minus PowerSGD": mean_and_se(list(map(operator.sub, accuracy, reference))),
            "loss": mean_and_se(loss),
            "bytes": sent[0],
            "bytes of PowerSGD / bytes": runs[REFERENCE][0][2] / sent[0],
        }
    return rows


def _train(
    average: Averager,
    workers: int,
    split: str,
    seed: int,
    steps: int,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> tuple[float, float, float]:
    """(test accuracy [%], training loss over all examples, bytes per step)."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = train
    order = torch.randperm(len(labels), generator=generator)
    if split == "non-iid":
        order = order[labels[order].argsort(stable=True)]
    shares = order.chunk(workers)
    model = _mlp(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    named = dict(model.named_parameters())
    sent = 0.0
    for step in range(steps):
        gradients = []
        for share in shares:
            rows = share[torch.randint(len(share), (64 // workers,), generator=generator)]
            gradients.append(gradients_of(model, images[rows], labels[rows]))
        means, sent = average(gradients)
        for name, p in named.items():
            p.grad = means[name]
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.step()
    with torch.no_grad():
        accuracy = 100 * float((model(test[0]).argmax(1) == test[1]).float().mean())
        return accuracy, float(functional.cross_entropy(model(images), labels)), sent


def _mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(data.target)[order]
    return (images[:897], labels[:897]), (images[897:], labels[897:])


if __name__ == "__main__":
    run_command(run)
