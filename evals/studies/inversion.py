"""How well a picture can be rebuilt from a worker's messages, by naive and adaptive attackers.

One picture per gradient (scikit-learn's 8 x 8 digits in 0..1), a known label, an untrained network
for each picture, rank 1: the easiest case for an attacker. The attacker sees one worker's messages
and knows the model, the codec and the first factors. The naive attack matches the dummy gradient to
the decoded low-rank gradient; the adaptive attack maps the dummy gradient through the public
projections and matches the transmitted factors. The mean image is the answer without any message.

Source: DLG (arXiv 1906.08935) for LeNet: squared distance, L-BFGS. Geiping et al. (arXiv
2003.14053) for the CNN: cosine distance, total variation, Adam, without their signed gradients.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from hipp_ext.comm import Compressor, Options
from hipp_ext.comm.compressor import orthonormal
from hipp_ext.errors import DataError
from hipp_ext.evals.studies.comm_baselines import gradients_of
from hipp_ext.evals.studies.measuring import Save, mean_and_se, report, run_command

EF_STEPS = 10
VARIANTS = (
    "raw",
    "PowerSGD naive",
    "PowerSGD adaptive",
    "LQ-SGD 8 bits naive",
    "LQ-SGD 8 bits adaptive",
    "LQ-SGD 4 bits naive",
    "LQ-SGD 4 bits adaptive",
    "PowerSGD naive, mean of 10 steps",
    "LQ-SGD 8 bits naive, mean of 10 steps",
    "LQ-SGD 4 bits naive, mean of 10 steps",
)


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the attacker matches: `features(gradients)` of the dummy against `target`, both flat."""

    features: Callable[[Mapping[str, Tensor]], Tensor]
    target: Tensor


def run(
    images: Annotated[int, typer.Option(min=2, help="Pictures to attack.")] = 64,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations of each attack.")] = 100,
    network: Annotated[
        str, typer.Option(help="lenet (squared distance, L-BFGS) or cnn (cosine distance, Adam).")
    ] = "lenet",
    save: Save = False,
) -> dict[str, Any]:
    """Rebuild pictures from raw and compressed gradients by naive and adaptive attacks.

    Prints MSE, PSNR [dB] and SSIM, means over pictures.

    Example: `python -m hipp_ext.evals.studies.inversion --network cnn`
    """
    from sklearn.datasets import load_digits

    if network not in NETWORKS:
        raise DataError(f"--network {network}: one of {', '.join(NETWORKS)} is needed.")

    torch.set_num_threads(1)
    data: Any = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(1))
    pictures = torch.tensor(data.images, dtype=torch.float32)[order] / 16
    labels = torch.tensor(data.target)[order]
    truth, mean_image = pictures[:images], pictures[images:].mean(0)
    table: dict[str, Any] = {}
    name, build, attack = NETWORKS[network]
    table[name] = {"mean image": quality([mean_image] * images, list(truth))}
    for variant in VARIANTS:
        rebuilt = []
        for i, (picture, label) in enumerate(zip(truth, labels[:images], strict=True)):
            torch.manual_seed(i)
            model = build()
            seen = observe(variant, gradients_of(model, picture[None, None], label[None]))
            rebuilt.append(attack(model, label[None], seen, iterations))
        table[name][variant] = quality(rebuilt, list(truth))
        _print_row(name, variant, table[name][variant])
    _print_row(name, "mean image", table[name]["mean image"])
    values = {"images": images, "iterations": iterations, "restarts": 1, "rank": 1, "batch": 1}
    return report(f"inversion_{network}", values | {"table": table}, save)


def lenet() -> nn.Module:
    """DLG's LeNet for 8 x 8 pictures: sigmoids, parameters uniform in -0.5..0.5."""
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(192, 10),
    )
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    return model


def cnn() -> nn.Module:
    """Two convolutions and two linear layers with ReLU, torch's initial parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def observe(variant: str, gradients: Mapping[str, Tensor]) -> Observed:
    """What the attacker of this variant observes of one worker's gradients."""
    if variant == "raw":
        return Observed(features=_flat, target=_flat(gradients))
    bits = None if variant.startswith("PowerSGD") else int(variant.split()[1])
    compressor = Compressor(
        {n: g.shape for n, g in gradients.items()}, Options(rank=1, bits=bits or 8)
    )
    if "mean of" in variant:
        sent = [_send(compressor, gradients, bits)[3] for _ in range(EF_STEPS)]
        mean = {n: torch.stack([s[n] for s in sent]).mean(0) for n in sent[0]}
        return Observed(features=_flat, target=_flat(mean))
    bases = {n: orthonormal(q) for n, q in compressor.factors.items()}
    lefts, rights, vectors, mean = _send(compressor, gradients, bits)
    if "naive" in variant:
        return Observed(features=_flat, target=_flat(mean))
    spans = {n: orthonormal(p) for n, p in lefts.items()}

    def features(g: Mapping[str, Tensor]) -> Tensor:
        matrices = {n: g[n].flatten(1) for n in lefts}
        first = [bases[n] @ m.t() for n, m in matrices.items()]
        second = [spans[n] @ m for n, m in matrices.items()]
        return _flat([*first, *second, *(g[n] for n in vectors)])

    target = _flat([*lefts.values(), *rights.values(), *vectors.values()])
    return Observed(features=features, target=target)


def _send(
    compressor: Compressor, gradients: Mapping[str, Tensor], bits: int | None
) -> tuple[dict[str, Tensor], ...]:
    """What one worker's messages decode to: first and second factors, vectors, and the gradient.

    With bits None nothing is quantized, as in PowerSGD.
    """
    if bits is None:
        work = {
            n: compressor.residual[n] + gradients[n].reshape(compressor.residual[n].shape)
            for n in compressor.shapes
        }
        lefts = {n: orthonormal(q) @ work[n].t() for n, q in compressor.factors.items()}
        rights = {n: orthonormal(p) @ work[n] for n, p in lefts.items()}
        vectors = {n: gradients[n].flatten() for n in compressor.vectors}
        mean = {
            n: (orthonormal(p).t() @ rights[n]).view(gradients[n].shape) for n, p in lefts.items()
        }
        for n in lefts:
            compressor.residual[n] = work[n] - mean[n].reshape(work[n].shape)
            compressor.factors[n] = rights[n]
        return lefts, rights, vectors, {n: mean.get(n, gradients[n]) for n in gradients}
    exchange = compressor.step(gradients)
    decoded: list[Tensor] = []
    packet = next(exchange)
    for stage in compressor.stages:
        decoded.append(stage.decode(packet.rows).flatten()[: stage.size])
        try:
            packet = exchange.send(packet.rows)
        except StopIteration as finished:
            mean = finished.value
    rows = {n: (r, rows) for n, (rows, _, r) in compressor.matrices.items()}
    columns = {n: (r, columns) for n, (_, columns, r) in compressor.matrices.items()}
    split = sum(int(np.prod(s)) for s in rows.values())
    return (
        _cut(decoded[0][:split], rows),
        _cut(decoded[1], columns),
        _cut(decoded[0][split:], {n: (v,) for n, v in compressor.vectors.items()}),
        mean,
    )


def dlg(model: nn.Module, label: Tensor, seen: Observed, iterations: int) -> Tensor:
    """The picture whose gradient is nearest in squared distance, found by L-BFGS from noise."""
    picture = torch.rand(1, 1, 8, 8, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [picture],
        lr=1.0,
        max_iter=iterations,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )
    size = seen.target.square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        features = seen.features(gradients_of(model, picture, label, graph=True))
        loss = (features - seen.target).square().sum() / size
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return picture.detach()[0, 0].nan_to_num(0.5).clamp(0, 1)


def cosine(model: nn.Module, label: Tensor, seen: Observed, iterations: int) -> Tensor:
    """The smooth picture whose gradient is nearest in cosine distance, found by Adam from noise."""
    picture = torch.rand(1, 1, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([picture], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        features = seen.features(gradients_of(model, picture, label, graph=True))
        variation = picture.diff(dim=2).abs().mean() + picture.diff(dim=3).abs().mean()
        similarity = functional.cosine_similarity(features, seen.target, dim=0)
        (1 - similarity + 1e-3 * variation).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            picture.clamp_(0, 1)
    return picture.detach()[0, 0]


def quality(rebuilt: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, Any]:
    """MSE (at least 1e-12), PSNR [dB] and scikit-image's SSIM: means, standard errors, n."""
    from skimage import metrics

    structural_similarity: Any = metrics.structural_similarity
    pairs = list(zip(rebuilt, truth, strict=True))
    mse = [max(float((a - b).square().mean()), 1e-12) for a, b in pairs]
    ssim = [float(structural_similarity(b.numpy(), a.numpy(), data_range=1.0)) for a, b in pairs]
    psnr = [float(-10 * np.log10(m)) for m in mse]
    return {"MSE": mean_and_se(mse), "PSNR": mean_and_se(psnr), "SSIM": mean_and_se(ssim)}


NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "lenet": ("LeNet, DLG", lenet, dlg),
    "cnn": ("CNN, cosine", cnn, cosine),
}


def _flat(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    listed = tensors.values() if isinstance(tensors, Mapping) else tensors
    return torch.cat([t.flatten() for t in listed])


def _cut(values: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    sizes = [int(np.prod(s)) for s in shapes.values()]
    parts = zip(shapes, values.split(sizes), strict=True)
    return {name: part.view(shapes[name]) for name, part in parts}


def _print_row(network: str, variant: str, row: Mapping[str, Any]) -> None:
    figures = "  ".join(f"{k} {v['mean']:.4f} ± {v['se'] or 0:.4f}" for k, v in row.items())
    print(f"{network:12} {variant:40} {figures}", flush=True)


if __name__ == "__main__":
    run_command(run)
