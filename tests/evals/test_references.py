"""Reference answers in the evaluator: what utility becomes, its error, the files they are read
from, and agreement with what greedy decoding writes.
"""

import base64
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from command import hipp
from scipy.stats import spearmanr

from hipp_ext import HiPPPlanner, masked, testbed
from hipp_ext.calibration import encode
from hipp_ext.errors import CalibrationError, DataError
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.references import References, ReferenceTask
from hipp_ext.evals.statistics import mean_of_means_se
from hipp_ext.groups import find_groups
from hipp_ext.scorers import WandaSP
from hipp_ext.units import plan_from_counts

POPE = testbed.questions("POPE", "validation", 13)
CHOICE = testbed.questions("ScienceQA", "validation", 11)
CAPTIONS = testbed.questions("Captions", "validation", 37)


@pytest.fixture(scope="module")
def loaded():
    return testbed.load()


@pytest.fixture(scope="module")
def evaluator(loaded):
    return Evaluator(*loaded, POPE, CHOICE, references=CAPTIONS, batch_size=7)


def plans(model, processor, ratios):
    """Plans that keep the same share of every group, best units first."""
    groups = find_groups(model)
    scores = WandaSP()(model, testbed.calibration_batches(processor, n=16))
    return [
        plan_from_counts(groups, [round((1 - r) * g.width) for g in groups], scores) for r in ratios
    ]


@torch.no_grad()
def described(model, processor, asked):
    """The words of each caption that greedy decoding writes."""
    batch = encode(processor, [q.prompt for q in asked], [q.image for q in asked])
    written = model.generate(**batch, max_new_tokens=10, do_sample=False)
    written = written[:, batch["input_ids"].shape[1] :]
    return [text.split() for text in processor.batch_decode(written, skip_special_tokens=True)]


def test_captions_are_held_out_and_have_no_candidates():
    splits = [testbed.questions("Captions", split, 20) for split in testbed.SPLITS]
    assert len({q.picture for asked in splits for q in asked}) == 80
    assert testbed.questions("Captions", "search")[:20] == testbed.questions(
        "Captions", "search", 20
    )
    for question in splits[0]:
        assert question.labels == () and question.answer.split() == list(question.scene.present)


def test_plans_that_find_captions_likelier_write_more_of_them(loaded):
    model, processor = loaded
    task = ReferenceTask(model, References.of(processor, CAPTIONS))
    likelihood, verbatim, overlap = [], [], []
    for plan in plans(model, processor, (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)):
        with masked(model, plan):
            likelihood.append(float(task.likelihoods(model).mean()))
            written = described(model, processor, CAPTIONS)
        named = [(set(w), set(q.answer.split())) for w, q in zip(written, CAPTIONS, strict=True)]
        overlap.append(np.mean([len(a & b) / len(a | b) for a, b in named]))
        verbatim.append(
            np.mean([w == q.answer.split() for w, q in zip(written, CAPTIONS, strict=True)])
        )
    assert overlap[0] > 0.8 and verbatim[0] > 0.4 and overlap[-1] < 0.4
    assert spearmanr(likelihood, overlap).statistic > 0.9
    assert spearmanr(likelihood, verbatim).statistic > 0.8


def test_utility_is_the_mean_of_margin_and_probability(loaded, evaluator):
    model, _ = loaded
    scores, measured = evaluator.scores(model), evaluator(model)
    references, choice = scores["references"], scores["choice"]
    assert references.n == len(references.likelihoods) == len(CAPTIONS)
    assert references.probability == pytest.approx(
        np.mean([math.exp(own) for own in references.likelihoods])
    )
    assert measured["utility"] == pytest.approx((choice.margin + references.probability) / 2)
    assert measured["reference_likelihood"] == pytest.approx(np.mean(references.likelihoods))
    # The questions and the captions are about different pictures.
    assert measured["utility_se"] == pytest.approx(
        math.hypot(choice.margin_se, references.probability_se) / 2
    )
    without = Evaluator(*loaded, POPE, CHOICE)(model)
    assert "reference_likelihood" not in without
    assert without["utility"] == pytest.approx(choice.margin)
    assert without["robustness"] == pytest.approx(measured["robustness"])


def test_references_may_be_all_of_utility(loaded, evaluator):
    model, _ = loaded
    alone = Evaluator(*loaded, POPE, (), references=CAPTIONS)
    references = evaluator.scores(model)["references"]
    measured = alone(model)
    assert measured["utility"] == pytest.approx(references.probability, rel=1e-4)
    assert measured["utility_se"] == pytest.approx(references.probability_se, rel=1e-3)
    assert set(alone.scores(model)) == {"pope", "references"} and "choice_accuracy" not in measured
    for questions in ((POPE, ()), ((), CHOICE)):
        with pytest.raises(CalibrationError, match="multiple choice, references or both"):
            Evaluator(*loaded, *questions)


def test_a_better_model_has_a_higher_utility(loaded, evaluator):
    model, processor = loaded
    measured = []
    for plan in plans(model, processor, (0, 0.3, 0.6)):
        with masked(model, plan):
            measured.append(evaluator(model))
    for name in ("utility", "reference_likelihood"):
        values = [own[name] for own in measured]
        assert values == sorted(values, reverse=True) and values[0] > values[-1] + 0.3


def test_likelihoods_come_in_the_order_of_the_references(loaded):
    model, processor = loaded
    mixed = [*CAPTIONS[:4], dataclasses.replace(CHOICE[0], scene=None), *CAPTIONS[4:6]]
    blind = dataclasses.make_dataclass("Blind", ["prompt", "answer", "image"])
    mixed[2] = blind("Name an object.", "cup", None)  # without a picture, in a batch of its own
    together = ReferenceTask(model, References.of(processor, mixed, 3))
    found = together.scores(together.likelihoods(model)).likelihoods
    for likelihood, question in zip(found, mixed, strict=True):
        alone = ReferenceTask(model, References.of(processor, [question]))
        assert likelihood == pytest.approx(float(alone.likelihoods(model)), rel=1e-4)


def test_the_digest_is_of_the_references_too(loaded):
    def digest(references=CAPTIONS[:3]):
        return Evaluator(*loaded, POPE[:2], CHOICE[:2], references=references).digest

    other = dataclasses.replace(CAPTIONS[2], answer="cup")
    elsewhere = dataclasses.replace(CAPTIONS[2], scene=CAPTIONS[3].scene)
    found = [
        digest(),
        digest(()),
        digest(CAPTIONS[:2]),
        digest((*CAPTIONS[:2], other)),
        digest((*CAPTIONS[:2], elsewhere)),
    ]
    assert len(set(found)) == 5 and digest() == found[0]


def test_choices_and_references_about_one_picture_are_counted_together(loaded):
    """References that repeat the pictures of the choices move with them."""
    seen = [dataclasses.replace(q, scene=CAPTIONS[i].scene) for i, q in enumerate(CHOICE)]
    apart = Evaluator(*loaded, POPE[:2], CHOICE, references=CAPTIONS[20:31])
    joint = Evaluator(*loaded, POPE[:2], seen, references=CAPTIONS[:11])
    margins, probabilities = (values for values, _ in _parts(joint, loaded[0]))
    pictures = [q.picture for q in CAPTIONS[:11]]
    order = [part for _, part in _parts(joint, loaded[0])]
    assert set(order[0]) == set(order[1]) == set(pictures)
    assert not set(_parts(apart, loaded[0])[0][1]) & set(_parts(apart, loaded[0])[1][1])
    assert joint(loaded[0])["utility_se"] == pytest.approx(
        mean_of_means_se([(margins, order[0]), (probabilities, order[1])])
    )


def _parts(evaluator, model):
    """The values and clusters that the utility is the mean of."""
    return evaluator._utility(
        evaluator._tasks["choice"].log_probabilities(model),
        evaluator._references.likelihoods(model),
    )


def png(question) -> str:
    question.image.save(buffer := io.BytesIO(), "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def chats(path, asked, folder):
    """A file of chats: the pictures as files, one row without an answer, and a text."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number, question in enumerate(asked):
        question.image.save(folder / f"{number}.png")
        content = [
            {"type": "image", "image": f"{number}.png"},
            {"type": "text", "text": question.prompt},
        ]
        answer = {"role": "assistant", "content": question.answer}
        rows.append({"messages": [{"role": "user", "content": content}, answer]})
    rows.insert(1, {"messages": rows[0]["messages"][:1]})
    rows.append({"text": "cup and dog"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path, asked):
    header = "index\timage\tquestion\tanswer\n"
    rows = [f"{i}\t{png(q)}\t{q.prompt}\t{q.answer}\n" for i, q in enumerate(asked)]
    path.write_text(header + "".join(rows) + f"99\t0\t{asked[0].prompt}\t\n")
    return path


def test_files_give_what_questions_give(loaded, tmp_path):
    model, processor = loaded
    some = CAPTIONS[:9]
    expected = ReferenceTask(model, References.of(processor, some))
    expected = expected.scores(expected.likelihoods(model))
    left_out = "2 of 11 rows of .* left out of the references: row 2: it has no answer; row 11"
    with pytest.warns(UserWarning, match=left_out):
        read = References.from_file(
            chats(tmp_path / "a.jsonl", some, tmp_path / "images"),
            processor,
            image_folder=tmp_path / "images",
            batch_size=4,
        )
    assert len(read.skipped) == 2 and read.skipped[0].endswith("row 2: it has no answer")
    with pytest.warns(UserWarning, match="1 of 10 rows"):
        cells = References.from_file(table(tmp_path / "a.tsv", some), processor)
    for references in (read, cells):
        task = ReferenceTask(model, references)
        scores = task.scores(task.likelihoods(model))
        assert scores.likelihoods == pytest.approx(expected.likelihoods, rel=1e-4)
        assert scores.probability_se == pytest.approx(expected.probability_se, rel=1e-3)


def test_rows_about_one_picture_are_one_cluster(loaded, tmp_path):
    _, processor = loaded
    twice = [CAPTIONS[0], dataclasses.replace(CAPTIONS[0], answer="cup"), *CAPTIONS[1:3]]
    with pytest.warns(UserWarning, match="left out"):
        read = References.from_file(chats(tmp_path / "a.jsonl", twice, tmp_path), processor)
    order = dict(zip(read.order, read.clusters, strict=True))
    assert order[0] == order[1] and len(set(order.values())) == 3
    # A text alone is no picture that rows share.
    (tmp_path / "b.jsonl").write_text(
        "".join(
            json.dumps(
                {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": a}]}
            )
            + "\n"
            for a in ("cup", "dog")
        )
    )
    assert len(set(References.from_file(tmp_path / "b.jsonl", processor).clusters)) == 2


def test_files_and_questions_without_answers_are_refused(loaded, tmp_path):
    (tmp_path / "a.txt").write_text("cup dog " * 40)
    with pytest.raises(CalibrationError, match="None of the 1 rows .* row 1: it has no answer"):
        References.from_file(tmp_path / "a.txt", loaded[1])
    with pytest.raises(CalibrationError, match="Reference 1 has an empty answer"):
        References.of(loaded[1], [CAPTIONS[0], dataclasses.replace(CAPTIONS[1], answer=" ")])


def test_a_fit_on_references_is_resumed_by_the_same_ones_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chats(tmp_path / "captions.jsonl", CAPTIONS[:12], tmp_path / "images")
    size = ("--pruning-ratio", "0.3", "--steps", "1", "--calibration-rows", "8")
    command = ("fit", "testbed", *size, "--questions", "9")
    given = ("--references", "captions.jsonl", "--image-folder", "images")
    told = hipp(*command, *given, "-o", "planner")
    assert "4 plans evaluated" in told and "1 of 9 rows of captions.jsonl were left out" in told
    dense = HiPPPlanner.load("planner").history.dense
    model, processor = testbed.load()
    with pytest.warns(UserWarning, match="left out"):
        references = References.from_file(
            "captions.jsonl", processor, image_folder="images", rows=9
        )
    tasks = (testbed.questions(task, "search", 9) for task in testbed.TASKS)
    again = Evaluator(model, processor, *tasks, references=references)(model)
    assert {name: again[name] for name in dense} == pytest.approx(dense, abs=1e-4)
    ask = ("front", "planner", "-u", "1", "--model", "testbed", "--questions", "9")
    assert "non-dominated" in hipp(*ask, *given)
    with pytest.raises(DataError, match="not what the plans of the fit were measured on"):
        hipp(*ask, "-r", "0.3")
    with pytest.raises(DataError, match="--references may stand for --scienceqa"):
        hipp("fit", "testbed", "-o", "x", "--scienceqa", "a.tsv", "--references", "captions.jsonl")
