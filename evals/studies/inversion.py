"""`hipp bench inversion`: how well a picture can be rebuilt from what a worker sends, by attackers who do and do not adapt.

One picture per gradient (scikit-learn's 8 x 8 digits in 0..1), its label known, an untrained network of its own for each,
rank 1: the easiest case for an attacker. The observer sees one worker's messages and knows model, codec and first factors.
"naive" matches the dummy gradient to the decoded low-rank gradient; "adaptive" pushes the dummy gradient through the public
maps and matches the transmitted factors. The mean image is what anyone could answer without seeing anything.

Source: DLG (arXiv 1906.08935) for LeNet: squared distance, L-BFGS. Geiping et al. (arXiv 2003.14053) for the CNN: cosine
distance, total variation, Adam, signs left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hipp_ext.comm import Compressor, Options
from hipp_ext.comm.compressor import orthonormal
from hipp_ext.evals.studies.measuring import mean_and_se, report

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
    """What was seen, and how a gradient would show: `features(gradients)` should come out as `target` (flat)."""

    features: Callable[[Mapping[str, Tensor]], Tensor]
    target: Tensor


def run(
    images: int = 64, iterations: int = 100, network: str = "lenet", save: bool = False
) -> dict[str, Any]:
    """Attack every picture in every way; returns and prints the result: MSE, PSNR [dB] and SSIM, means over pictures."""
    from sklearn.datasets import load_digits

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
            seen = observe(variant, _gradients(model, picture[None, None], label[None]))
            rebuilt.append(attack(model, label[None], seen, iterations))
        table[name][variant] = quality(rebuilt, list(truth))
        _print_row(name, variant, table[name][variant])
    _print_row(name, "mean image", table[name]["mean image"])
    command = (
        f"hipp bench inversion --network {network} --images {images} --iterations {iterations}"
    )
    values = {
        "images": images,
        "iterations": iterations,
        "restarts": 1,
        "rank": 1,
        "batch": 1,
        "table": table,
    }
    return report(f"inversion_{network}", command, values, save)


def lenet() -> nn.Module:
    """DLG's LeNet, narrowed to 8 x 8 pictures: sigmoids, parameters uniform in -0.5..0.5."""
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
    """What the attacker of this variant works with, for one worker's gradients."""
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
        parts = [bases[n] @ m.t() for n, m in matrices.items()] + [
            spans[n] @ m for n, m in matrices.items()
        ]
        return torch.cat([p.flatten() for p in parts] + [g[n].flatten() for n in vectors])

    target = torch.cat(
        [p.flatten() for p in (*lefts.values(), *rights.values(), *vectors.values())]
    )
    return Observed(features=features, target=target)


def _send(
    compressor: Compressor, gradients: Mapping[str, Tensor], bits: int | None
) -> tuple[dict[str, Tensor], ...]:
    """One step of one worker; what its messages decode to: first factors, second factors, vectors, and the gradient they make.

    bits None: no quantisation, as PowerSGD sends them.
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
    """The picture whose gradient is nearest in squared distance, by L-BFGS from noise."""
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
        loss = (
            seen.features(_gradients(model, picture, label, graph=True)) - seen.target
        ).square().sum() / size
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return picture.detach()[0, 0].nan_to_num(0.5).clamp(0, 1)


def cosine(model: nn.Module, label: Tensor, seen: Observed, iterations: int) -> Tensor:
    """The picture whose gradient points in the same direction, smooth by total variation, by Adam from noise."""
    picture = torch.rand(1, 1, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([picture], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        features = seen.features(_gradients(model, picture, label, graph=True))
        variation = picture.diff(dim=2).abs().mean() + picture.diff(dim=3).abs().mean()
        (
            1 - functional.cosine_similarity(features, seen.target, dim=0) + 1e-3 * variation
        ).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            picture.clamp_(0, 1)
    return picture.detach()[0, 0]


def quality(rebuilt: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, Any]:
    """MSE, PSNR [dB] (MSE of at least 1e-12) and scikit-image's SSIM, each with its standard error over pictures."""
    from skimage import metrics

    structural_similarity: Any = metrics.structural_similarity
    mse = [max(float((a - b).square().mean()), 1e-12) for a, b in zip(rebuilt, truth, strict=True)]
    ssim = [
        float(structural_similarity(b.numpy(), a.numpy(), data_range=1.0))
        for a, b in zip(rebuilt, truth, strict=True)
    ]
    psnr = [float(-10 * np.log10(m)) for m in mse]
    return {"MSE": mean_and_se(mse), "PSNR": mean_and_se(psnr), "SSIM": mean_and_se(ssim)}


NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "lenet": ("LeNet, DLG", lenet, dlg),
    "cnn": ("CNN, cosine", cnn, cosine),
}


def _gradients(
    model: nn.Module, picture: Tensor, label: Tensor, graph: bool = False
) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    loss = functional.cross_entropy(model(picture), label)
    return dict(
        zip(named, torch.autograd.grad(loss, list(named.values()), create_graph=graph), strict=True)
    )


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def _cut(values: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    sizes = [int(np.prod(s)) for s in shapes.values()]
    return {
        n: part.view(s) for (n, s), part in zip(shapes.items(), values.split(sizes), strict=True)
    }


def _print_row(network: str, variant: str, row: Mapping[str, Any]) -> None:
    said = "  ".join(f"{k} {v['mean']:.4f} ± {v['se'] or 0:.4f}" for k, v in row.items())
    print(f"{network:12} {variant:40} {said}", flush=True)
