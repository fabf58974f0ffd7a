"""Signs of gradient masking: gradients that mislead attacks make a model look robust."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hipp_ext.attacks import PGD, Ball, loss_and_gradient
from hipp_ext.robust.data import Images

TOLERANCE = 0.02  # fraction of images that may contradict by chance


def masking_signs(
    model: nn.Module,
    images: Images,
    epsilon: float,
    robust_masks: Mapping[str, Tensor],
    clean: Tensor,
    seed: int = 0,
) -> tuple[str, ...]:
    """Signs of gradient masking, as sentences; empty where there are none.

    - A black-box attack (square) breaks images that no white-box attack broke.
    - Five times as many steps of PGD leave more images correct.
    - PGD with a radius of 0.5, which can turn any image grey, leaves more correct than chance.
    - The loss is flat: some images have no gradient.
    - The loss is rough: random points of the ball have a higher loss than a step along the
      gradient.

    Args:
        model: classifier, in eval mode.
        images: the first of the evaluated images, for the checks that attack again.
        epsilon: L-inf radius.
        robust_masks: attack -> which images stayed correct under it; parts of AutoAttack as
            `evaluate` runs them, one after the other.
        clean: which images are correct without an attack.
        seed: random seed of PGD.

    Source: Carlini et al. (arXiv 1902.06705), section 3; Athalye et al. (arXiv 1802.00420), section
    3.1.
    """
    signs = []
    white = [v for k, v in robust_masks.items() if k != "square"]
    if "square" in robust_masks and white:
        left = torch.stack(white).all(0)
        broken = float((left & ~robust_masks["square"]).double().mean())
        if broken > max(TOLERANCE, 2.5 / len(left)):  # two images are chance
            signs.append(
                f"the black-box attack Square breaks {100 * broken:.1f}% of the images, which no "
                "white-box attack broke"
            )
    device = next(model.parameters()).device
    x, y = (t.to(device) for t in images.rows(slice(None)))

    def loss(labels: Tensor, moved: Tensor) -> Tensor:
        return F.cross_entropy(model(moved), labels, reduction="none")

    def accuracy(radius: float, steps: int) -> float:
        moved = PGD(ball=Ball(epsilon=radius), steps=steps, seed=seed)(loss, y, x)
        with torch.no_grad():
            return float((model(moved).argmax(1) == y).double().mean())

    few, many = accuracy(epsilon, 10), accuracy(epsilon, 50)
    if many > few + TOLERANCE:
        signs.append(
            f"50 steps of PGD leave {100 * many:.1f}% correct and 10 steps {100 * few:.1f}%, but "
            "more steps must not help the model"
        )
    wide = accuracy(0.5, 50)
    chance = float(torch.bincount(y).max()) / len(y)
    if wide > chance + TOLERANCE:
        signs.append(
            f"PGD with a radius of 0.5 leaves {100 * wide:.1f}% correct, although it can turn any "
            "image grey"
        )
    correct = clean[: len(y)].to(device)
    value, gradient = loss_and_gradient(loss, y, x)
    flat = float((correct & (gradient.flatten(1).abs().amax(1) == 0)).double().mean())
    if flat > TOLERANCE:
        signs.append(f"the loss of {100 * flat:.1f}% of the images has no gradient")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        step = Ball(epsilon=epsilon).on(x).project(x + epsilon * gradient.sign(), x)
        ahead = loss(y, step) - value
        random = torch.stack(
            [loss(y, Ball(epsilon=epsilon).on(x).random(x, generator)) - value for _ in range(8)]
        ).amax(0)
    rough = float((correct & (random > ahead)).double().mean())
    if rough > 0.1:
        signs.append(
            f"on {100 * rough:.1f}% of the images a random point has a higher loss than a step "
            "along the gradient, so the loss is rough"
        )
    return tuple(signs)
