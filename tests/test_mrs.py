"""MRS: each form against an independent computation, on language towers and on convolutions."""

import copy

import numpy as np
import pytest
import torch
import torch_pruning as tp
from models import batch, build
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from hipp_ext import HiPPPlanner, Preference, masked
from hipp_ext.attacks import PGD, Ball
from hipp_ext.errors import AttackError, CalibrationError, PlanError, UnsupportedModelError
from hipp_ext.groups import find_groups
from hipp_ext.integrations.torch_pruning import (
    HippImportance,
    channel_mrs,
    find_channel_groups,
    prune_channels,
)
from hipp_ext.robust import ScoreSettings
from hipp_ext.robust.scoring import unit_norms
from hipp_ext.scorers import MRS, Taylor
from hipp_ext.scorers.gates import unit_taylor
from hipp_ext.scorers.group_loss import first_order, removal_mask, worst_case
from hipp_ext.units import plan_from_counts, top_units

FORMS = ("removal", "worst", "grad")


def cross_entropy(model, data):
    return nn.functional.cross_entropy(model(data[0]), data[1])


@pytest.fixture(scope="module")
def cnn():
    """A ResNet-10 that has seen no data, and attacked pictures with their classes."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7).eval()
    pictures, classes = torch.rand(6, 3, 32, 32), torch.arange(6)
    pgd = PGD(ball=Ball(epsilon=0.05), steps=3)
    adversarial = pgd(
        lambda y, x: nn.functional.cross_entropy(model(x), y, reduction="none"), classes, pictures
    )
    return model, adversarial, classes


# Language towers


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_shares_of_the_sensitivity(form):
    model, inputs = build("llava_gqa"), batch("llava_gqa", labels=True)
    scorer = MRS(form=form, attack_steps=2, steps=3)
    scores, values = scorer(model, [inputs]), scorer.sensitivity(model, [inputs])
    attacked = scorer._attacked(model, inputs)
    taylor = Taylor()(model, [attacked])
    for g in find_groups(model):
        assert (
            float(scores[g.name].mean()) == pytest.approx(values[g.name], rel=1e-4)
            and values[g.name] > 0
        )
        assert torch.allclose(
            scores[g.name], taylor[g.name] * values[g.name] / taylor[g.name].mean(), rtol=1e-3
        )


def test_removal_is_the_loss_under_the_mask_of_a_plan():
    model, inputs = build("llava"), batch("llava", labels=True)
    scorer = MRS(attack_steps=2)
    values, attacked = scorer.sensitivity(model, [inputs]), scorer._attacked(model, inputs)
    assert (attacked["pixel_values"] - inputs["pixel_values"]).abs().max() > 0
    groups, scores = find_groups(model), Taylor()(model, [attacked])
    with torch.no_grad():
        dense = model(**attacked).loss
        for i, g in enumerate(groups):
            counts = [h.width // 2 if i == j else h.width for j, h in enumerate(groups)]
            with masked(model, plan_from_counts(groups, counts, scores)):
                assert values[g.name] == pytest.approx(
                    max(0.01, float(model(**attacked).loss - dense)), abs=2e-4
                )


def test_attacks_raise_the_loss_within_the_ball():
    for name, key in (("llava", "pixel_values"), ("llama", "inputs_embeds")):
        model, inputs = build(name), batch(name, labels=True)
        attacked = MRS(epsilon=0.1)._attacked(model, inputs)
        with torch.no_grad():
            assert float(model(**attacked).loss) > float(model(**inputs).loss) + 0.01
        before = inputs.get(key, model.get_input_embeddings()(inputs["input_ids"])).detach()
        size = (
            before.max() - before.min() if key == "pixel_values" else before.square().mean().sqrt()
        )
        assert float((attacked[key] - before).detach().abs().max()) <= 0.1 * float(size) * (
            1 + 1e-4
        )


def test_clean_counterpart_and_own_attack():
    model, inputs = build("llava"), batch("llava", labels=True)
    clean = MRS(attack_steps=0)
    assert torch.equal(clean._attacked(model, inputs)["pixel_values"], inputs["pixel_values"])
    own = MRS(attack=lambda m, b: b | {"pixel_values": -b["pixel_values"]})
    flipped = clean(model, [inputs | {"pixel_values": -inputs["pixel_values"]}])
    assert all(torch.equal(v, flipped[k]) for k, v in own(model, [inputs]).items())
    assert clean.name == "MRS attack_steps=0" and MRS().name == "MRS"


def test_in_a_planner():
    model = build("llava")
    planner = HiPPPlanner(Preference(1, 1, 1), pruning_ratio=0.3, scorer=MRS(attack_steps=2))
    plan = planner.plan(model, calibration=[batch("llava", 4, labels=True)])
    assert plan.scorer == "MRS attack_steps=2" and plan.pruning_ratio == pytest.approx(
        0.3, abs=0.02
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ScoreSettings(steps="10"),
            "steps='10': a whole number is needed",
        ),  # the numbers of MRS
        (lambda: ScoreSettings(rho=True), "rho=True: a finite number is needed"),
        (lambda: ScoreSettings(attack_steps=2.5), "attack_steps=2.5: a whole number"),
        (lambda: ScoreSettings(epsilon="8/255"), "epsilon='8/255': a number is needed"),
        (lambda: PGD(ball=Ball(epsilon=0.1), steps=True), "steps=True: a whole number"),
        (lambda: PGD(ball=Ball(epsilon=0.1), step_size="1"), "step_size='1': a finite number"),
        (lambda: Ball(epsilon=0.1, low=None), "low=None: a number is needed"),
    ],
)
def test_numbers_are_numbers(make, message):
    with pytest.raises(AttackError, match=message):
        make()


def test_whole_numbers_of_any_type_are_taken():
    settings = ScoreSettings(steps=4.0, seed=np.int64(3), rho=np.float32(0.5))
    assert (settings.steps, settings.seed, settings.rho) == (4, 3, 0.5) and type(
        settings.steps
    ) is type(settings.seed) is int
    assert PGD(ball=Ball(epsilon=np.float32(0.5)), steps=2.0).steps == 2


def test_bad_input():
    model, inputs = build("llava"), batch("llava", labels=True)
    with pytest.raises(
        CalibrationError, match=r"MRS has the forms removal, worst, grad; got 'best'"
    ):
        MRS(form="best")
    with pytest.raises(
        CalibrationError, match="MRS needs a loss: calibration batch 0 has no labels"
    ):
        MRS()(model, [batch("llava")])
    with pytest.raises(AttackError, match="epsilon must be above zero and finite, got 0"):
        MRS(epsilon=0.0)(model, [inputs])
    for wrong in ({"rho": 0.0}, {"ratio": 5.0}, {"steps": 0}, {"attack_steps": -1}):
        with pytest.raises(AttackError, match=f"MRS needs .*{next(iter(wrong))}"):
            MRS(**wrong)
    for form in FORMS:  # pixels in float32, as a processor gives them
        with pytest.raises(
            UnsupportedModelError,
            match=r"has weights in torch.bfloat16: gradients of attacks vanish",
        ):
            MRS(form=form)(build("llava").bfloat16(), [inputs])
    assert MRS(form="grad", attack_steps=0)(
        build("llava").bfloat16(), [inputs]
    )  # nothing is attacked


# Convolutions


def test_groups_of_a_resnet(cnn):
    model, pictures, _ = cnn
    model.layer1.requires_grad_(False)
    model.train()
    groups = {g.name: g for g in find_channel_groups(model, pictures[:1])}
    assert (
        model.training
        and not model.layer1[0].conv1.weight.requires_grad
        and model.fc.weight.requires_grad
    )
    model.requires_grad_(True).eval()
    assert list(groups) == [
        "conv1",
        "layer1.0.conv1",
        "layer2.0.conv1",
        "layer2.0.conv2",
        "layer3.0.conv1",
        "layer3.0.conv2",
        "layer4.0.conv1",
        "layer4.0.conv2",
    ]
    assert groups["layer2.0.conv2"].producers == ("layer2.0.conv2", "layer2.0.downsample.0")
    assert [r.layer for r in groups["layer2.0.conv2"].consumers] == [
        "layer3.0.conv1",
        "layer3.0.downsample.0",
    ]


@pytest.mark.parametrize("form", FORMS)
def test_mrs_prunes_a_cnn_in_the_stock_pruner(form, cnn):
    model, pictures, classes = copy.deepcopy(cnn[0]), *cnn[1:]
    dense, groups = copy.deepcopy(model), find_channel_groups(model, pictures[:1])
    model.train()
    scores = channel_mrs(model, [(pictures, classes)], cross_entropy, groups, form, steps=2)
    assert model.training and all(
        torch.equal(v, dense.state_dict()[k]) for k, v in model.state_dict().items()
    )
    tp.pruner.BasePruner(
        model,
        pictures[:1],
        importance=HippImportance(scores),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    assert model(pictures).shape == (6, 7)
    inner, outer = (
        list(top_units(scores["layer2.0.conv1"], 64)),
        list(top_units(scores["layer2.0.conv2"], 64)),
    )
    assert torch.equal(model.layer2[0].conv2.weight, dense.layer2[0].conv2.weight[outer][:, inner])


def test_scores_of_different_groups_are_comparable(cnn):
    model, pictures, classes = copy.deepcopy(cnn[0]), *cnn[1:]
    groups, data = find_channel_groups(model, pictures[:1]), [(pictures, classes)]
    scores, values = (
        channel_mrs(model, data, cross_entropy, groups, "grad"),
        first_order(model, groups, cross_entropy, data),
    )
    assert [float(scores[g.name].mean()) for g in groups] == pytest.approx(values, rel=1e-4)
    assert torch.equal(scores["layer2.0.conv2"], scores["layer2.0.downsample.0"])
    tp.pruner.BasePruner(
        model,
        pictures[:1],
        importance=HippImportance(scores),
        pruning_ratio=0.3,
        ignored_layers=[model.fc],
        global_pruning=True,
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    threshold = (
        torch.cat([scores[g.name] for g in groups])
        .sort()
        .values[-sum(model.get_submodule(g.name).out_channels for g in groups)]
    )
    for g in groups:  # one threshold for all; torch-pruning may spare single channels of ties
        assert (
            abs(model.get_submodule(g.name).out_channels - int((scores[g.name] >= threshold).sum()))
            <= 1
        )
    assert model(pictures).shape == (6, 7)


def test_removal_and_taylor_close_what_pruning_removes(cnn):
    """Gating a residual stream everywhere it is read equals cutting it out."""
    model, pictures, classes = cnn
    groups = find_channel_groups(model, pictures[:1])
    scores = channel_mrs(model, [(pictures, classes)], cross_entropy, groups)
    for g in groups:
        small, values = copy.deepcopy(model), scores[g.name]
        kept = removal_mask(values, 0.5).nonzero()[:, 0].tolist()
        prune_channels(small, pictures[:1], {g.name: kept})
        with torch.no_grad():
            rise = float(
                cross_entropy(small, (pictures, classes))
                - cross_entropy(model, (pictures, classes))
            )
        assert float(values.mean()) == pytest.approx(max(0.01, rise), abs=1e-4)


def test_taylor_averages_squares_over_batches(cnn):
    model, pictures, classes = cnn
    groups = find_channel_groups(model, pictures[:1])
    halves = [(pictures[:3], classes[:3]), (pictures[3:], classes[3:])]
    together = unit_taylor(model, groups, cross_entropy, halves)
    a, b = (unit_taylor(model, groups, cross_entropy, [half]) for half in halves)
    for t, x, y in zip(together, a, b, strict=True):
        assert torch.allclose(t, ((x.square() + y.square()) / 2).sqrt())


def test_worst_case_beats_chance_and_first_order_foretells_small_balls(cnn):
    model, pictures, classes = cnn
    groups = [
        g for g in find_channel_groups(model, pictures[:1]) if g.name in ("conv1", "layer3.0.conv1")
    ]
    before, data = copy.deepcopy(model.state_dict()), [(pictures, classes)]
    small = worst_case(model, groups, cross_entropy, data, rho=1e-3, steps=4)
    assert small == pytest.approx(
        [v for v in first_order(model, groups, cross_entropy, data, rho=1e-3)], rel=0.15
    )
    worst = worst_case(model, groups[1:], cross_entropy, data, rho=0.1)[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    weight, generator = model.layer3[0].conv1.weight, torch.Generator().manual_seed(0)
    original, start = weight.detach().clone(), cross_entropy(model, data[0])
    for _ in range(5):
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(original + 0.1 * original.norm() * noise / noise.norm())
        assert float(cross_entropy(model, data[0]).detach() - start) < worst / 3
    weight.data.copy_(original)


def test_unit_norms_weigh_every_tensor_alike(cnn):
    model, pictures, _ = cnn
    g = next(g for g in find_channel_groups(model, pictures[:1]) if g.name == "layer2.0.conv2")
    norms = unit_norms(model, g)
    a, b = (
        w.detach().abs().flatten(1).sum(1)
        for w in (model.layer2[0].conv2.weight, model.layer2[0].downsample[0].weight)
    )
    assert torch.allclose(norms.float(), a / a.sum() + b / b.sum(), rtol=1e-4)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x):
        return self.b(self.a(x).detach()).mean((2, 3)).numpy()


class Stiff(Untraceable):
    def forward(self, x):
        return self.b(self.a(x).view(-1, 4, 6, 6)).mean((2, 3))


def test_models_and_channels_that_cannot_be_removed(cnn):
    model, pictures, classes = cnn
    x = torch.rand(1, 3, 8, 8)
    with pytest.raises(UnsupportedModelError, match=r"torch-pruning cannot trace this Untraceable"):
        find_channel_groups(Untraceable(), x)
    with pytest.raises(UnsupportedModelError, match="No channels of this Conv2d can be removed"):
        find_channel_groups(nn.Conv2d(3, 4, 3), x)
    with pytest.raises(
        UnsupportedModelError, match="ran before its channels were removed and does not now"
    ):
        prune_channels(Stiff(), x, {"a": [0, 1]})
    with pytest.raises(PlanError, match="'layer9' is not a channel group of this ResNet"):
        prune_channels(copy.deepcopy(model), pictures[:1], {"layer9": [0]})
    with pytest.raises(
        PlanError, match=r"conv1 has channels 0 to 63, of which one at least must stay; got \[64\]"
    ):
        prune_channels(copy.deepcopy(model), pictures[:1], {"conv1": [64]})
    with pytest.raises(CalibrationError, match="channel_mrs needs at least one batch"):
        channel_mrs(model, [], cross_entropy, find_channel_groups(model, pictures[:1]))
    with pytest.raises(UnsupportedModelError, match="MRS gave NaN or infinity for conv1"):
        channel_mrs(
            model,
            [(pictures * float("nan"), classes)],
            cross_entropy,
            find_channel_groups(model, pictures[:1]),
        )
