"""The in-process evaluator: agrees with full forward passes, reuses them under masks and pruning,
refuses what does not fit.
"""

import dataclasses

import pytest
import torch
from models import build
from plans import random_plan

from hipp_ext import masked, prune, testbed
from hipp_ext.calibration import encode, find_processor
from hipp_ext.errors import CalibrationError
from hipp_ext.evals.evaluator import YES_BIAS_WEIGHT, Evaluator
from hipp_ext.evals.questions import read_questions, table_questions
from hipp_ext.evals.tables import read_table
from hipp_ext.planner import HiPPPlanner
from hipp_ext.planner.reward import read_reward
from hipp_ext.preference import Preference

POPE, CHOICE = (
    testbed.questions("POPE", "validation", 47),
    testbed.questions("ScienceQA", "validation", 41),
)


@pytest.fixture(scope="module")
def loaded():
    return testbed.load()


@pytest.fixture(scope="module")
def evaluator(loaded):
    return Evaluator(*loaded, POPE, CHOICE, batch_size=17)


@torch.no_grad()
def expected_answers(model, processor, questions):
    batch = encode(processor, [q.prompt for q in questions], [q.image for q in questions])
    logits = model(**batch).logits[:, -1]
    tokens = processor.tokenizer.convert_tokens_to_ids
    return tuple(
        q.labels[int(row[tokens(list(q.labels))].argmax())]
        for q, row in zip(questions, logits, strict=True)
    )


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_answers_are_those_of_a_full_forward_dense_masked_and_pruned(loaded, evaluator, ratio):
    model, processor = loaded
    plan = random_plan(model, ratio)
    small = prune(model, plan)
    scores = evaluator.scores(small)
    assert scores["pope"].answers == expected_answers(small, processor, POPE)
    assert scores["choice"].answers == expected_answers(small, processor, CHOICE)
    right = sum(a == q.answer for a, q in zip(scores["pope"].answers, POPE, strict=True))
    assert scores["pope"].accuracy == pytest.approx(100 * right / len(POPE))
    with masked(model, plan):
        assert evaluator(model) == pytest.approx(evaluator(small), abs=1e-4)


def test_questions_about_one_picture_have_no_standard_error(loaded):
    about_one = [q for q in POPE if q.picture == POPE[0].picture]
    measured = Evaluator(*loaded, about_one, CHOICE[:1])(loaded[0])
    assert len(about_one) > 1 and not {"utility_se", "robustness_se"} & set(measured)
    assert read_reward(measured, 0.1).robustness_se == 0


def test_the_digest_is_of_what_is_asked(loaded):
    def digest(pope=POPE[:6], choice=CHOICE[:5], **options):
        return Evaluator(*loaded, pope, choice, **options).digest

    flipped = dataclasses.replace(POPE[5], answer={"Yes": "No", "No": "Yes"}[POPE[5].answer])
    elsewhere = dataclasses.replace(POPE[5], scene=POPE[-1].scene)
    found = [
        digest(),
        digest(POPE[:7]),
        digest(choice=CHOICE[1:6]),
        digest((*POPE[:5], flipped)),
        digest((*POPE[:5], elsewhere)),
    ]
    assert len(set(found)) == 5 and digest() == found[0]


def test_guessing_scores_nothing_and_certainty_one(loaded):
    model, processor = testbed.load()
    evaluator = Evaluator(model, processor, POPE, CHOICE)
    assert evaluator(model)["utility"] > 0.9 and evaluator(model)["robustness"] > 0.75
    with torch.no_grad():
        model.lm_head.weight.zero_()
    measured = evaluator(model)
    assert measured["utility"] == pytest.approx(0, abs=1e-6) and abs(measured["robustness"]) < 0.2


@pytest.mark.parametrize("answer", ["Yes", "No"])
def test_one_answer_to_all_gains_nothing_on_a_table_of_few_yes(loaded, answer):
    model, processor = testbed.load()
    present = [q for q in POPE if q.answer == "Yes"][:4]
    absent = [q for q in POPE if q.answer == "No"][:12]
    evaluator = Evaluator(model, processor, [*present, *absent], CHOICE)
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[processor.tokenizer.convert_tokens_to_ids(answer)] = 30.0
    assert evaluator(model)["robustness"] == pytest.approx(-YES_BIAS_WEIGHT / 2, abs=1e-4)
    assert evaluator.scores(model)["pope"].yes_rate == 100 * (answer == "Yes")


def test_questions_of_a_table_are_those_of_the_testbed(tmp_path):
    testbed.export(tmp_path / "data", splits=("validation",), n=47)
    for task, name in (("POPE", "POPE"), ("ScienceQA", "ScienceQA_TEST")):
        table = read_table(tmp_path / f"data/validation/{name}.tsv", tmp_path / "images", name=name)
        whole = table_questions(table)
        some = read_questions(table.path, tmp_path / "images", 9)
        assert [q for q in whole if q in some] == some and len(some) == 9
        assert some == read_questions(table.path, tmp_path / "images", 9)
        if task == "POPE":  # its first rows are about one picture or two
            assert len({q.picture for q in some}) > len({q.picture for q in whole[:9]})
        for n in (None, 47, 100):
            assert read_questions(table.path, tmp_path / "images", n) == whole
        pictures = set()
        for ours, theirs in zip(
            testbed.questions(task, "validation", 47), table_questions(table), strict=True
        ):
            assert (ours.prompt, ours.answer, tuple(ours.labels)) == (
                theirs.prompt,
                theirs.answer,
                tuple(theirs.labels),
            )
            assert ours.image.tobytes() == theirs.image.tobytes()
            pictures.add((ours.picture, theirs.picture))
        if task == "POPE":  # standard errors count questions about one picture together
            assert (
                1
                < len(pictures)
                == len({ours for ours, _ in pictures})
                == len({theirs for _, theirs in pictures})
                < 10
            )
        else:
            assert {theirs for _, theirs in pictures} == {None}


def test_a_processor_of_another_model_is_refused(loaded):
    _, processor = loaded
    with pytest.raises(
        CalibrationError,
        match=r"does not belong to the model: its vocabulary has \d+ tokens, the model 97",
    ):
        Evaluator(build("llava"), processor, POPE, CHOICE)
    with pytest.raises(CalibrationError, match="does not belong"):
        HiPPPlanner(Preference(1, 1, 1)).plan(build("llava"), processor=processor)
    other, _ = testbed.load()
    other.config.image_token_id = 11
    with pytest.raises(
        CalibrationError, match="image token '<image>' has the id 4, the model expects 11"
    ):
        Evaluator(other, processor, POPE, CHOICE)


def test_no_questions_are_refused(loaded):
    with pytest.raises(CalibrationError, match="at least one question of each task"):
        Evaluator(*loaded, [], CHOICE)


def test_the_testbed_is_the_default_calibration(loaded):
    """None means the built-in pictures, through the processor beside the weights."""
    model, processor = loaded
    assert find_processor(model) is not None
    plan = HiPPPlanner(Preference(1, 1, 0), pruning_ratio=0.3).plan(model, rows=8)
    assert plan == HiPPPlanner(Preference(1, 1, 0), pruning_ratio=0.3).plan(
        model, rows=8, processor=processor
    )
