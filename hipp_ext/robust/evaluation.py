"""How much accuracy an image classifier keeps under attack: AutoAttack as the field runs it, and signs that it was fooled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hipp_ext.attacks import APGD, PGD, Ball, check_precision
from hipp_ext.errors import AttackError, DataError, MissingExtraError
from hipp_ext.robust.data import Images, check_images
from hipp_ext.robust.masking import masking_signs
from hipp_ext.robust.training import restored

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
ATTACKS = ("pgd", "apgd", *AUTOATTACK)
MOST_TARGETS = 9  # of the targeted attacks, as in AutoAttack's standard version


@dataclass(frozen=True, kw_only=True, eq=False)
class RobustReport:
    """Accuracies of a model, clean and under attack.

    Attributes:
        n: images.
        epsilon: L-inf radius, in units of images in [0, 1].
        clean: accuracy on the images as they are [%].
        under: attack -> accuracy under it [%]. The parts of AutoAttack attack what is left of the parts before, so the last of
            them is AutoAttack's figure.
        worst: accuracy under the worst of all attacks, image by image [%].
        worst_se: its standard error [percentage points], images taken as independent.
        per_class: worst-case accuracy per class [%]; None for classes without images.
        signs: of gradient masking, in words; empty where none was found. With any, the figures may be too good.
        right: (n,) which images were classified right under all attacks.
    """

    n: int
    epsilon: float
    clean: float
    under: Mapping[str, float]
    worst: float
    worst_se: float
    per_class: tuple[float | None, ...]
    signs: tuple[str, ...]
    right: Bool[Tensor, " n"]

    @property
    def suspicious(self) -> bool:
        """Whether there are signs of gradient masking."""
        return bool(self.signs)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("n", "epsilon", "clean", "worst", "worst_se", "per_class", "signs")
        return {k: getattr(self, k) for k in names} | {
            "under": dict(self.under),
            "right": self.right.int().tolist(),
        }


Say = Callable[[str], None]


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
    say: Say | None = None,
) -> RobustReport:
    """Accuracy of `model` on `images`, clean and under `attacks`; random state, flags and gradients are as before afterwards.

    Args:
        model: images in [0, 1] -> logits (rows, classes), in float32.
        attacks: of ATTACKS. "pgd" is PGD-20, "apgd" Auto-PGD with 100 steps, both ours; "apgd-ce", "apgd-t", "fab-t" and
            "square" together are AutoAttack's standard version, through torchattacks with all settings given: 100 steps, 5,000
            queries, one restart, nine target classes.
        checks: look for gradient masking; costs about three runs of PGD-20.

    Raises:
        DataError: images outside [0, 1], labels out of range, or the model has another number of classes.
        AttackError: epsilon is not above zero, an unknown attack, or fewer than four classes with a targeted attack.
        UnsupportedModelError: the model is in half precision.
        MissingExtraError: torchattacks is not installed.

    Source: AutoAttack, Croce & Hein (arXiv 2003.01690), section 5; the settings of its published code (`standard`).
    """
    check_images(images, classes, "images")
    check_precision(model)
    _check_attacks(attacks, classes, epsilon)
    right_all, clean_all = [], []
    under: dict[str, list[Tensor]] = {name: [] for name in attacks}
    device = next(model.parameters()).device
    with restored(model):
        model.eval()
        for x, y in images.batches(batch_size):
            x, y = x.to(device), y.to(device)
            clean = _right(model, x, y, classes)
            right = clean
            standing = clean  # of AutoAttack's parts, each of which attacks what is left
            for name in attacks:
                here = standing if name in AUTOATTACK else clean
                survives = here.clone()
                survives[here] = _survives(name, model, x[here], y[here], classes, epsilon, seed)
                standing = standing & survives if name in AUTOATTACK else standing
                right = right & survives
                under[name].append(survives.cpu())
                if say is not None:
                    say(f"{name}: {100 * float(survives.float().mean()):.1f}% of {len(y)}")
            right_all.append(right.cpu())
            clean_all.append(clean.cpu())
    right, labels = torch.cat(right_all), images.labels.cpu()
    found = {name: torch.cat(values) for name, values in under.items()}
    with restored(model):
        signs = (
            masking_signs(
                model.eval(), images.first(batch_size), epsilon, found, torch.cat(clean_all), seed
            )
            if checks
            else ()
        )
    share = float(right.float().mean())
    return RobustReport(
        n=len(right),
        epsilon=epsilon,
        clean=percent(torch.cat(clean_all)),
        under={k: percent(v) for k, v in found.items()},
        worst=100 * share,
        worst_se=100 * (share * (1 - share) / len(right)) ** 0.5,
        signs=signs,
        right=right,
        per_class=tuple(
            percent(right[labels == c]) if bool((labels == c).any()) else None
            for c in range(classes)
        ),
    )


def _check_attacks(attacks: Sequence[str], classes: int, epsilon: float) -> None:
    Ball(epsilon=epsilon)
    if unknown := [a for a in attacks if a not in ATTACKS]:
        raise AttackError(f"Known attacks are {', '.join(ATTACKS)}; got {unknown}.")
    if classes < 4 and "apgd-t" in attacks:
        raise AttackError(
            f"apgd-t compares the four highest logits, and there are {classes} classes: say attacks=('pgd', 'apgd', 'square'), "
            "and do not call the result AutoAttack."
        )


def _survives(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Int[Tensor, " rows"],
    classes: int,
    epsilon: float,
    seed: int,
) -> Bool[Tensor, " rows"]:
    """Which rows are still classified right under an attack."""
    if not len(y):
        return torch.zeros(0, dtype=torch.bool, device=y.device)
    ball = Ball(epsilon=epsilon)
    if name in AUTOATTACK:
        with _quiet_attack(model):
            moved = _torchattack(name, model, classes, epsilon, seed)(x, y)
    elif name == "pgd":
        moved = PGD(ball=ball, steps=20, seed=seed)(_cross_entropy(model), y, x)
    else:
        moved = APGD(ball=ball, steps=100, seed=seed)(_cross_entropy(model), y, x)
    if (
        float((moved - x).abs().max()) > epsilon + 1e-5
        or float(moved.min()) < 0
        or float(moved.max()) > 1
    ):
        raise AttackError(
            f"{name} left the ball of radius {epsilon} or the range [0, 1]; its result would not count."
        )
    return _right(model, moved, y, classes)


def _cross_entropy(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y, x: F.cross_entropy(model(x), y, reduction="none")


def _torchattack(name: str, model: nn.Module, classes: int, epsilon: float, seed: int) -> Any:
    """The part of AutoAttack called `name`. Defaults differ between versions of torchattacks, so nothing is left to them."""
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
    # The published code has nine targets however many classes there are; torchattacks would take them all.
    attack.n_target_classes = min(MOST_TARGETS, classes - 1)
    return attack


@contextmanager
def _quiet_attack(model: nn.Module) -> Iterator[None]:
    """Inside the block torchattacks may seed and switch as it likes.

    no_grad, as its results carry all steps' histories; the weights frozen, as its `backward` would add to their gradients.
    """
    with restored(model), torch.no_grad():
        model.requires_grad_(False)
        yield


def _right(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    if logits.dim() != 2 or logits.shape[1] != classes:
        raise DataError(
            f"The model gives outputs of shape {tuple(logits.shape)} for {classes} classes; (rows, classes) is needed."
        )
    return logits.argmax(1) == y


def percent(right: Tensor) -> float:
    """Share of true values [%]."""
    return 100 * float(right.double().mean())
