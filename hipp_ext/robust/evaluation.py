"""Accuracy of an image classifier under attack: AutoAttack, and signs of gradient masking."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hipp_ext.attacks import APGD, PGD, Ball, check_precision
from hipp_ext.errors import AttackError, DataError, MissingExtraError
from hipp_ext.modes import restored
from hipp_ext.robust.data import Images, check_images
from hipp_ext.robust.masking import masking_signs

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
ATTACKS = ("pgd", "apgd", *AUTOATTACK)
MAX_TARGETS = 9  # classes of a targeted attack, as in AutoAttack's standard version


@dataclass(frozen=True, kw_only=True, eq=False)
class RobustReport:
    """Accuracies of a model, clean and under attack.

    Attributes:
        n: number of images.
        epsilon: L-inf radius, in units of images in [0, 1].
        clean: accuracy on the images as they are [%].
        under: attack -> accuracy under it [%]. Each part of AutoAttack attacks only the images that
            withstood the parts before it, so the last of them gives AutoAttack's figure.
        worst: accuracy under the worst attack on each image [%].
        worst_se: standard error of `worst` [percentage points], for independent images.
        per_class: worst-case accuracy per class [%]; None for classes without images.
        signs: signs of gradient masking, as sentences. With any, the figures may be too high.
        robust_mask: (n,) which images are classified correctly under all attacks.
    """

    n: int
    epsilon: float
    clean: float
    under: Mapping[str, float]
    worst: float
    worst_se: float
    per_class: tuple[float | None, ...]
    signs: tuple[str, ...]
    robust_mask: Bool[Tensor, " n"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"robust_mask": self.robust_mask.int().tolist()}


def evaluate(
    model: nn.Module,
    images: Images,
    classes: int,
    *,
    epsilon: float = 8 / 255,
    attacks: Sequence[str] = ("pgd", *AUTOATTACK),
    checks: bool = True,
    batch_size: int = 256,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> RobustReport:
    """Accuracy of `model` on `images`, clean and under `attacks`.

    Args:
        model: images in [0, 1] -> logits (rows, classes), in float32. Its modes, requires_grad and
            gradients stay as they were, and so does the global random state.
        images: images to attack.
        classes: number of classes.
        epsilon: L-inf radius, in units of images in [0, 1].
        attacks: names from ATTACKS. "pgd" is PGD-20 and "apgd" Auto-PGD with 100 steps, both of
            this package. "apgd-ce", "apgd-t", "fab-t" and "square" together are AutoAttack's
            standard version, through torchattacks with all settings given: 100 steps, 5,000
            queries, one restart, nine target classes.
        checks: look for gradient masking; this costs about three runs of PGD-20.
        batch_size: images per batch.
        seed: random seed of the attacks.
        log: called with one line of progress per attack and batch.

    Raises:
        DataError: images outside [0, 1], labels out of range, or the model has another number of
            classes.
        AttackError: epsilon is not above zero, an attack is unknown, or a targeted attack has fewer
            than four classes.
        UnsupportedModelError: the model is in half precision.
        MissingExtraError: torchattacks is not installed.

    Source: AutoAttack, Croce & Hein (arXiv 2003.01690), section 5; the settings of its published
    code (`standard`).
    """
    check_images(images, classes, "images")
    check_precision(model)
    _check_attacks(attacks, classes, epsilon)
    clean_parts: list[Tensor] = []
    under: dict[str, list[Tensor]] = {name: [] for name in attacks}
    device = next(model.parameters()).device
    with restored(model, random_state=True):
        model.eval()
        for x, y in images.batches(batch_size):
            x, y = x.to(device), y.to(device)
            correct = _correct(model, x, y, classes)
            clean_parts.append(correct.cpu())
            robust = correct  # to the parts of AutoAttack so far, each of which attacks the rest
            for name in attacks:
                attacked = robust if name in AUTOATTACK else correct
                mask = attacked.clone()
                mask[attacked] = _withstood(
                    name, model, x[attacked], y[attacked], classes, epsilon, seed
                )
                if name in AUTOATTACK:
                    robust = mask
                under[name].append(mask.cpu())
                if log is not None:
                    log(f"{name}: {100 * float(mask.float().mean()):.1f}% of {len(y)}")
    clean = torch.cat(clean_parts)
    masks = {name: torch.cat(parts) for name, parts in under.items()}
    signs: tuple[str, ...] = ()
    if checks:
        with restored(model, random_state=True):
            model.eval()
            signs = masking_signs(model, images.first(batch_size), epsilon, masks, clean, seed)
    return _report(images.labels.cpu(), classes, epsilon, clean, masks, signs)


def _report(
    labels: Tensor,
    classes: int,
    epsilon: float,
    clean: Tensor,
    masks: Mapping[str, Tensor],
    signs: tuple[str, ...],
) -> RobustReport:
    robust = torch.stack([clean, *masks.values()]).all(0)
    accuracy = float(robust.float().mean())
    return RobustReport(
        n=len(robust),
        epsilon=epsilon,
        clean=percent(clean),
        under={name: percent(mask) for name, mask in masks.items()},
        worst=100 * accuracy,
        worst_se=100 * (accuracy * (1 - accuracy) / len(robust)) ** 0.5,
        signs=signs,
        robust_mask=robust,
        per_class=tuple(
            percent(robust[labels == c]) if bool((labels == c).any()) else None
            for c in range(classes)
        ),
    )


def _check_attacks(attacks: Sequence[str], classes: int, epsilon: float) -> None:
    Ball(epsilon=epsilon)
    if unknown := [a for a in attacks if a not in ATTACKS]:
        raise AttackError(f"Known attacks are {', '.join(ATTACKS)}; got {unknown}.")
    if classes < 4 and "apgd-t" in attacks:
        raise AttackError(
            f"apgd-t compares the four highest logits, and there are {classes} classes. Pass "
            "attacks=('pgd', 'apgd', 'square'), and do not call the result AutoAttack."
        )


def _withstood(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Int[Tensor, " rows"],
    classes: int,
    epsilon: float,
    seed: int,
) -> Bool[Tensor, " rows"]:
    """Which rows are still classified correctly under an attack."""
    if not len(y):
        return torch.zeros(0, dtype=torch.bool, device=y.device)
    if name in AUTOATTACK:
        # torchattacks may change seeds and modes. Gradients are off, because its results carry the
        # history of all steps; the weights are frozen, because its `backward` would add to their
        # gradients.
        with restored(model, random_state=True), torch.no_grad():
            model.requires_grad_(False)
            moved = _torchattack(name, model, classes, epsilon, seed)(x, y)
    else:
        kind, steps = (PGD, 20) if name == "pgd" else (APGD, 100)
        attack = kind(ball=Ball(epsilon=epsilon), steps=steps, seed=seed)
        moved = attack(lambda y, x: F.cross_entropy(model(x), y, reduction="none"), y, x)
    outside = (moved - x).abs().max() > epsilon + 1e-5 or moved.min() < 0 or moved.max() > 1
    if bool(outside):
        raise AttackError(
            f"{name} left the ball of radius {epsilon} or the range [0, 1]: its result is invalid."
        )
    return _correct(model, moved, y, classes)


def _torchattack(name: str, model: nn.Module, classes: int, epsilon: float, seed: int) -> Any:
    """The part of AutoAttack called `name`, with all settings given.

    Defaults differ between versions of torchattacks.
    """
    try:
        import torchattacks
    except ModuleNotFoundError:
        raise MissingExtraError("torchattacks", "robust") from None
    common = {"norm": "Linf", "eps": epsilon, "n_restarts": 1, "seed": seed, "verbose": False}
    if name == "apgd-ce":
        return torchattacks.APGD(model, steps=100, loss="ce", eot_iter=1, rho=0.75, **common)
    if name == "square":
        return torchattacks.Square(
            model, n_queries=5000, p_init=0.8, loss="margin", resc_schedule=False, **common
        )
    if name == "apgd-t":
        attack = torchattacks.APGDT(
            model, steps=100, eot_iter=1, rho=0.75, n_classes=classes, **common
        )
    else:
        attack = torchattacks.FAB(
            model,
            steps=100,
            alpha_max=0.1,
            eta=1.05,
            beta=0.9,
            targeted=True,
            n_classes=classes,
            **common,
        )
        attack.targeted = True  # 3.2.7 ignores the argument
    # The published code has nine targets for any number of classes; torchattacks would use all
    # classes.
    attack.n_target_classes = min(MAX_TARGETS, classes - 1)
    return attack


def _correct(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    if logits.dim() != 2 or logits.shape[1] != classes:
        raise DataError(
            f"The model's output has shape {tuple(logits.shape)} for {classes} classes; (rows, "
            "classes) is needed."
        )
    return logits.argmax(1) == y


def percent(mask: Tensor) -> float:
    """Fraction of true values [%]."""
    return 100 * float(mask.double().mean())
