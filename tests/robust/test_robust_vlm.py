"""Image attacks on vision-language models, and POPE under attack as a planner's objective, on the
testbed's LLaVA.
"""

import copy

import pytest
import torch
from models import batch, build

from hipp_ext import HiPPPlanner, Preference, masked, testbed
from hipp_ext.errors import AttackError, CalibrationError, UnsupportedModelError
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.references import answered
from hipp_ext.groups import find_groups
from hipp_ext.image_attacks import answer_losses, pixel_ball
from hipp_ext.planner import FitSettings
from hipp_ext.robust import ImageAttack
from hipp_ext.scorers import MRS, Magnitude
from hipp_ext.units import plan_from_counts


@pytest.fixture(scope="module")
def loaded():
    return testbed.load()


@pytest.fixture(scope="module")
def questions():
    return testbed.questions("POPE", "validation", 12), testbed.questions(
        "ScienceQA", "validation", 4
    )


@pytest.mark.parametrize("kind", ["pgd", "apgd"])
def test_images_move_within_the_ball_of_pixels(loaded, questions, kind):
    model, processor = loaded
    inputs, images = answered(processor, questions[0]), processor.image_processor
    attack = ImageAttack(processor, epsilon=8 / 255, steps=4, kind=kind)
    moved = attack(model, inputs)
    std, mean = (torch.tensor(v).view(3, 1, 1) for v in (images.image_std, images.image_mean))
    before, after = (b["pixel_values"] * std + mean for b in (inputs, moved))
    assert float((after - before).abs().max()) == pytest.approx(8 / 255, rel=1e-3)
    assert float(after.min()) >= -1e-5 and float(after.max()) <= 1 + 1e-5
    assert all(torch.equal(moved[k], inputs[k]) for k in inputs if k != "pixel_values")
    with torch.no_grad():
        rise = answer_losses(model, moved) - answer_losses(model, inputs)
    assert float(rise.min()) > -1e-3 and float(rise.mean()) > 0.05


def test_every_row_keeps_its_prompt(loaded, questions):
    """Attacked alone or among others, a picture ends in the same place: prompts of different rows
    do not mix.
    """
    model, processor = loaded
    rows = questions[0][:3]
    attack = ImageAttack(processor, epsilon=4 / 255, steps=2)
    attack.method = type(attack.method)(ball=attack.ball, steps=2, random_start=False)
    together = attack(model, answered(processor, rows))["pixel_values"]
    for i, row in enumerate(rows):
        alone = attack(model, answered(processor, [row]))["pixel_values"]
        assert float(((alone[0] - together[i]).abs() > 1e-4).float().mean()) < 0.02


def test_answer_losses_are_those_of_the_model(loaded, questions):
    model, processor = loaded
    one = answered(processor, questions[0][:1])
    with torch.no_grad():
        count = int((one["labels"] != -100).sum())
        assert float(answer_losses(model, one)[0]) == pytest.approx(
            float(model(**one).loss) * count, rel=1e-4
        )


def test_evaluator_under_attack(loaded, questions):
    model, processor = loaded
    attack = ImageAttack(processor, epsilon=12 / 255, steps=4)
    before = copy.deepcopy(model.state_dict())
    kinds = {
        r: Evaluator(model, processor, *questions, robustness=r, attack=attack)
        for r in ("pope", "adversarial", "both")
    }
    values = {r: e(model) for r, e in kinds.items()}
    assert values["pope"] == Evaluator(model, processor, *questions)(model)
    assert values["adversarial"]["robustness"] < values["pope"]["robustness"] - 0.1
    mean = (values["pope"]["robustness"] + values["adversarial"]["robustness"]) / 2
    assert values["both"]["robustness"] == pytest.approx(mean)
    assert set(kinds["both"].scores(model)) == {"choice", "pope", "pope_attacked"}
    assert (
        all(torch.equal(t, before[k]) for k, t in model.state_dict().items()) and not model.training
    )
    adaptive = Evaluator(
        model, processor, *questions, robustness="adversarial", attack=attack, adaptive=True
    )
    assert adaptive(model) == pytest.approx(
        values["adversarial"], abs=1e-4
    )  # the dense model: attacked once or anew, the same
    plan = plan_from_counts(
        groups := find_groups(model), [g.width // 2 for g in groups], Magnitude()(model)
    )
    with masked(model, plan):
        fixed, anew = kinds["adversarial"](model), adaptive(model)
    assert anew["robustness"] < fixed["robustness"]  # attacks made on another model are weaker
    with pytest.raises(
        CalibrationError, match="robustness is one of pope, adversarial, both; got 'pgd'"
    ):
        Evaluator(model, processor, *questions, robustness="pgd")


def test_a_planner_is_fitted_for_pope_under_attack(loaded, questions, tmp_path):
    model, processor = loaded
    attack = ImageAttack(processor, epsilon=8 / 255, steps=2)
    evaluator = Evaluator(model, processor, *questions, robustness="adversarial", attack=attack)
    planner = HiPPPlanner(Preference(0.1, 0.8, 0.1), pruning_ratio=0.3)
    calibration = testbed.calibration_batches(processor, n=8)
    result = planner.fit(
        model,
        evaluator,
        FitSettings(steps=1, preferences=1, budgets=1, updates=0),
        folder=tmp_path / "fit",
        calibration=calibration,
    )
    assert result.evaluations >= 2 and planner.plan(
        model, calibration=calibration
    ).pruning_ratio == pytest.approx(0.3, abs=0.01)


def test_mrs_takes_an_attack_that_is_exact_in_pixels(loaded, questions):
    model, processor = loaded
    inputs = answered(processor, questions[0][:4])
    exact = MRS(form="grad", attack=ImageAttack(processor, epsilon=8 / 255, steps=2)).sensitivity(
        model, [inputs]
    )
    clean = MRS(form="grad", attack_steps=0).sensitivity(model, [inputs])
    assert sum(exact.values()) > sum(clean.values())


def test_bad_input(loaded):
    model, processor = loaded
    for epsilon in (0.0, -0.1):
        with pytest.raises(AttackError, match="epsilon must be above zero"):
            ImageAttack(processor, epsilon=epsilon)
    attack = ImageAttack(processor)
    with pytest.raises(
        AttackError, match="has no image_mean and image_std, so epsilon cannot be converted"
    ):
        pixel_ball(processor.tokenizer, 0.1)
    inputs = batch("qwen2_5_vl", labels=True)
    with pytest.raises(AttackError, match=r"has \(128, 96\). Flattened patches are not pictures"):
        attack(build("qwen2_5_vl"), inputs)
    good = batch("llava", labels=True)
    good["pixel_values"] = good["pixel_values"].clamp(-1, 1)
    with pytest.raises(
        CalibrationError, match="raises the loss of the labels, and the batch has none, only"
    ):
        attack(build("llava"), {k: v for k, v in good.items() if k != "labels"})
    with pytest.raises(UnsupportedModelError, match=r"has weights in torch.bfloat16"):
        attack(build("llava").bfloat16(), good)
    with pytest.raises(AttackError, match="An image attack is pgd or apgd, not 'fgsm'"):
        ImageAttack(processor, kind="fgsm")
    with pytest.raises(AttackError, match=r"Values must lie in \[-.*, ...\], got"):
        attack(build("llava"), good | {"pixel_values": good["pixel_values"] + 9})
