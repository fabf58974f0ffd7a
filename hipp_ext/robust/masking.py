"""Signs of gradient masking: a model whose gradients mislead attacks looks robust and is not."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hipp_ext.attacks import PGD, Ball, loss_and_gradient
from hipp_ext.robust.data import Images

SLACK = 0.02  # share of images that may go the wrong way by chance


def masking_signs(
    model: nn.Module,
    images: Images,
    epsilon: float,
    survived: Mapping[str, Tensor],
    clean: Tensor,
    seed: int = 0,
) -> tuple[str, ...]:
    """What looks like gradient masking, in words; empty where nothing does.

    - a black-box attack (square) breaks images that no white-box attack broke;
    - five times as many steps of PGD leave more images standing;
    - PGD with a radius of 0.5, which can turn any image grey, leaves more than chance would;
    - the loss is flat: no gradient at all on some images;
    - the loss surface: random points of the ball are worse than where the gradient leads.

    Args:
        model: in eval mode.
        images: a part of those evaluated, for the checks that attack again.
        survived: attack -> which images stayed right under it; parts of AutoAttack as `evaluate` runs them, one after the
            other.
        clean: which were right without an attack.

    Source: Carlini et al. (arXiv 1902.06705), section 3; Athalye et al. (arXiv 1802.00420), section 3.1.
    """
    signs = []
    white = [v for k, v in survived.items() if k != "square"]
    if "square" in survived and white:
        left = torch.stack(white).all(0)
        broken = float((left & ~survived["square"]).double().mean())
        if broken > max(SLACK, 2.5 / len(left)):  # two images are chance
            signs.append(
                f"the black-box attack Square breaks {100 * broken:.1f}% of the images, which no white-box attack broke"
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
    if many > few + SLACK:
        signs.append(
            f"50 steps of PGD leave {100 * many:.1f}% right, 10 steps {100 * few:.1f}%: more steps must not help the model"
        )
    wide = accuracy(0.5, 50)
    chance = float(torch.bincount(y).max()) / len(y)
    if wide > chance + SLACK:
        signs.append(
            f"PGD with a radius of 0.5 leaves {100 * wide:.1f}% right; any image can be turned grey within it"
        )
    right = clean[: len(y)].to(device)
    value, gradient = loss_and_gradient(loss, y, x)
    flat = float((right & (gradient.flatten(1).abs().amax(1) == 0)).double().mean())
    if flat > SLACK:
        signs.append(f"the loss of {100 * flat:.1f}% of the images has no gradient at all")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        step = Ball(epsilon=epsilon).on(x).project(x + epsilon * gradient.sign(), x)
        ahead = loss(y, step) - value
        random = torch.stack(
            [loss(y, Ball(epsilon=epsilon).on(x).random(x, generator)) - value for _ in range(8)]
        ).amax(0)
    rough = float((right & (random > ahead)).double().mean())
    if rough > 0.1:
        signs.append(
            f"on {100 * rough:.1f}% of the images a random point is worse than a step along the gradient: a rough surface"
        )
    return tuple(signs)
