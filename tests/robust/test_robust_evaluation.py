"""Evaluation under attack: against independent runs, on models of known robustness, on models that
hide their gradients.
"""

import pytest
import stripes
import torch
import torchattacks
from torch import nn
from torch.nn import functional as F

from hipp_ext.attacks import APGD, PGD, Ball, checkpoints
from hipp_ext.errors import AttackError, DataError, UnsupportedModelError
from hipp_ext.robust import PGDAT, Images, TrainSettings, evaluate, train
from hipp_ext.robust.evaluation import AUTOATTACK
from hipp_ext.robust.masking import masking_signs

WHITE = ("pgd", "apgd", "apgd-ce", "apgd-t")


@pytest.fixture(scope="module")
def trained():
    model = stripes.network()
    train(
        model,
        stripes.data(),
        PGDAT(epsilon=0.1, steps=3),
        TrainSettings(epochs=6, batch_size=32, lr=0.2),
    )
    return model.eval()


class Threshold(nn.Module):
    """Right while pixel [0, 0] is on the label's side of 0.5: its robust accuracy is known
    exactly.
    """

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        margin = self.scale * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([-margin, margin, margin * 0 - 99, margin * 0 - 98], 1)


def threshold_images(n: int = 20) -> Images:
    """Pixel [0, 0] at 0.025, 0.075, ...: within 0.1 of 0.5 are 4 of 20."""
    x = torch.full((n, 1, 2, 2), 0.5)
    x[:, 0, 0, 0] = (torch.arange(n) + 0.5) / n
    return Images(images=x, labels=(x[:, 0, 0, 0] > 0.5).long())


@pytest.mark.parametrize("attack", WHITE + ("fab-t",))
def test_attacks_find_what_can_be_broken_and_nothing_else(attack):
    report = evaluate(
        Threshold(), threshold_images(), 4, epsilon=0.1, attacks=(attack,), checks=False
    )
    assert (
        report.clean == 100
        and report.under[attack] == pytest.approx(80)
        and report.worst == pytest.approx(80)
    )
    assert report.robust_mask.tolist() == [abs(i - 9.5) > 2 for i in range(20)]
    assert report.per_class[:2] == (80.0, 80.0) and report.per_class[2] is None
    assert report.worst_se == pytest.approx(100 * (0.8 * 0.2 / 20) ** 0.5)


def test_autoattack_is_the_last_of_its_parts(trained):
    """As torchattacks' own AutoAttack (3.2.7, which uses an untargeted FAB), image for image, and
    every part hurts or stays.
    """
    images = stripes.data().test.first(24)
    report = evaluate(trained, images, 4, epsilon=0.3, attacks=AUTOATTACK, checks=False, seed=0)
    values = [report.under[name] for name in AUTOATTACK]
    assert values == sorted(values, reverse=True) and report.worst == values[-1] < report.clean
    x, y = images.rows(slice(None))
    with torch.no_grad(), torch.random.fork_rng():
        moved = torchattacks.AutoAttack(trained, eps=0.3, version="standard", n_classes=4, seed=0)(
            x, y
        )
        right = trained(moved).argmax(1) == y
    assert int((right != report.robust_mask).sum()) == 0


def test_nothing_of_the_caller_changes(trained):
    trained.train()
    trained.features[1].eval()
    torch.manual_seed(5)
    state, weights = torch.get_rng_state(), {n: t.clone() for n, t in trained.state_dict().items()}
    images = stripes.data().test.first(12)
    first = evaluate(trained, images, 4, epsilon=0.1, attacks=("pgd", "apgd-ce"))
    assert (
        torch.equal(torch.get_rng_state(), state)
        and trained.training
        and not trained.features[1].training
    )
    assert all(torch.equal(t, weights[n]) for n, t in trained.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in trained.parameters())
    for p in trained.parameters():
        p.grad = torch.ones_like(p)
    evaluate(trained, images.first(4), 4, epsilon=0.1, checks=False)  # all attacks of the default
    assert all(bool((p.grad == 1).all()) for p in trained.parameters())
    trained.zero_grad()
    torch.manual_seed(6)
    second = evaluate(trained, images, 4, epsilon=0.1, attacks=("pgd", "apgd-ce"))
    assert first.as_dict() == second.as_dict()
    trained.eval()


def test_worst_case_is_image_by_image(trained):
    images = stripes.data().test
    report = evaluate(
        trained, images, 4, epsilon=0.25, attacks=("pgd", "apgd-t"), checks=False, batch_size=20
    )
    assert report.worst <= min(report.under.values()) and report.n == 48
    shares = [report.per_class[c] for c in range(4)]
    assert sum(shares) / 4 == pytest.approx(report.worst)
    assert not report.signs


# Gradient masking


class Masked(nn.Module):
    """Right as the model inside, but the loss is flat: logits are blown up until the softmax
    saturates.
    """

    def __init__(self, inner: nn.Module, scale: float):
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x):
        return self.inner(x) * self.scale


class Rounded(nn.Module):
    """Pixels rounded to eight steps: no gradient passes."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((x * 7).round() / 7)


def test_masked_gradients_are_flagged(trained):
    images = stripes.data().test
    honest = evaluate(trained, images, 4, epsilon=0.15, attacks=("pgd",))
    assert honest.signs == ()
    blown = evaluate(Masked(trained, 1e5), images, 4, epsilon=0.15, attacks=("pgd",))
    assert any("has no gradient" in s for s in blown.signs)
    rounded = evaluate(Rounded(trained), images, 4, epsilon=0.3, attacks=("pgd",))
    assert any("radius of 0.5 leaves" in s for s in rounded.signs) and any(
        "no gradient" in s for s in rounded.signs
    )


def test_a_black_box_that_breaks_more_is_a_sign(trained):
    images, stands = stripes.data().test, torch.ones(48, dtype=torch.bool)
    for broken, expected in (
        (2, ()),
        (3, ("the black-box attack Square breaks 6.2% of the images",)),
    ):
        square = stands.clone()
        square[:broken] = False
        signs = masking_signs(trained, images, 0.15, {"pgd": stands, "square": square}, stands)
        assert len(signs) == len(expected) and all(
            s.startswith(e) for s, e in zip(signs, expected, strict=True)
        )


# Own attacks


def test_apgd_climbs_at_least_as_far_as_the_published_one(trained):
    x, y = stripes.data().test.rows(slice(None))
    loss = lambda labels, moved: F.cross_entropy(trained(moved), labels, reduction="none")  # noqa: E731
    ours = APGD(ball=Ball(epsilon=0.2), steps=50)(loss, y, x)
    with torch.no_grad(), torch.random.fork_rng():
        theirs = torchattacks.APGD(
            trained,
            norm="Linf",
            eps=0.2,
            steps=50,
            n_restarts=1,
            seed=0,
            loss="ce",
            eot_iter=1,
            rho=0.75,
        )(x, y)
        values = [float(loss(y, v).mean()) for v in (ours, theirs)]
        accuracies = [float((trained(v).argmax(1) == y).float().mean()) for v in (ours, theirs)]
    assert abs(accuracies[0] - accuracies[1]) <= 0.05 and values[0] > 0.9 * values[1]
    assert float((ours - x).abs().max()) <= 0.2 + 1e-6
    assert sorted(checkpoints(100))[:4] == [22, 41, 57, 70] and max(checkpoints(100)) == 99


def test_rows_do_not_notice_each_other(trained):
    """A row's own prompt or label goes with it: attacked alone, it ends in the same place."""
    x, y = stripes.data().test.rows(slice(0, 6))
    loss = lambda labels, moved: F.cross_entropy(trained(moved), labels, reduction="none")  # noqa: E731
    for attack in (
        PGD(ball=Ball(epsilon=0.1), random_start=False),
        APGD(ball=Ball(epsilon=0.1), steps=20, random_start=False),
    ):
        together = attack(loss, y, x)
        for i in range(3):
            assert torch.allclose(
                attack(loss, y[i : i + 1], x[i : i + 1])[0], together[i], atol=1e-4
            )


def test_balls_with_a_radius_per_channel():
    x = torch.zeros(2, 3, 4, 4)
    std = torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1)
    ball = Ball(epsilon=0.02 / std, low=-0.01 / std, high=1 / std)
    up = PGD(ball=ball, steps=5, random_start=False)(lambda _, m: m.sum((1, 2, 3)), None, x)
    assert torch.allclose(up, (0.02 / std).expand_as(x), rtol=1e-4)
    down = PGD(ball=ball, steps=5)(lambda _, m: -m.sum((1, 2, 3)), None, x)
    assert torch.allclose(down, (-0.01 / std).expand_as(x), rtol=1e-4)


def test_bad_input(trained):
    images = stripes.data().test.first(8)
    x, y = images.rows(slice(None))
    for epsilon in (0.0, -8 / 255, float("inf")):
        with pytest.raises(AttackError, match="epsilon must be above zero and finite, got"):
            evaluate(trained, images, 4, epsilon=epsilon)
    with pytest.raises(DataError, match=r"images must lie in \[0, 1\], got -"):
        evaluate(trained, Images(images=(x - 0.5) / 0.25, labels=y), 4)
    with pytest.raises(DataError, match="labels must be 0 to 3 for 4 classes, got 1 to 4"):
        evaluate(trained, Images(images=x, labels=y + 1), 4)
    with pytest.raises(
        AttackError, match="apgd-t compares the four highest logits, and there are 3 classes"
    ):
        evaluate(trained, Images(images=x, labels=y % 3), 3)
    with pytest.raises(
        DataError, match=r"output has shape \(8, 4\) for 5 classes; \(rows, classes\) is needed"
    ):
        evaluate(trained, images, 5, attacks=("pgd",))
    with pytest.raises(AttackError, match=r"Known attacks are .*; got \['fgsm'\]"):
        evaluate(trained, images, 4, attacks=("fgsm",))
    with pytest.raises(UnsupportedModelError, match=r"has weights in torch.float16"):
        evaluate(stripes.network().half(), images, 4)
    pgd = PGD(ball=Ball(epsilon=0.1))
    with pytest.raises(AttackError, match=r"Values must lie in \[0, 1\], got -"):
        pgd(lambda b, v: v.sum(), None, x - 0.5)
    with pytest.raises(
        AttackError, match="must be floating point, got torch.uint8; divide bytes by 255"
    ):
        pgd(lambda b, v: v.sum(), None, (x * 255).byte())
    with pytest.raises(AttackError, match=r"is torch.float16: steps of an attack are lost"):
        pgd(lambda b, v: v.sum(), None, x.half())
    with pytest.raises(AttackError, match="does not depend on the perturbed tensor"):
        pgd(lambda b, v: torch.ones(()), None, x)
    with pytest.raises(AttackError, match="loss under attack is NaN or infinite"):
        pgd(lambda b, v: v.sum() / 0, None, x)
    with pytest.raises(AttackError, match=r"one loss per row, 8 of them; the loss has shape \(\)"):
        APGD(ball=Ball(epsilon=0.1))(lambda b, v: v.sum(), None, x)
    with pytest.raises(AttackError, match="range of valid values must not be empty"):
        Ball(epsilon=0.1, low=1.0, high=0.0)
