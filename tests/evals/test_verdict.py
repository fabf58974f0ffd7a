"""The verdict of a report: its numbers against arithmetic on answers that were made by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from report_folders import chair, latency, outputs, put_answers, put_chair, served

from hipp_ext.evals.report.answers import answers
from hipp_ext.evals.report.changes import LEVEL, MAX_PARTS, MIN_DIFFERING, Change, changes, parts_of
from hipp_ext.evals.report.sources import read_sources
from hipp_ext.evals.report.verdict import Speed, verdicts
from hipp_ext.evals.report.words import difference, points, size, spread, verdict_line
from hipp_ext.evals.report.write import compared
from hipp_ext.evals.runs import AskedQuestion, Run
from hipp_ext.evals.statistics import Estimate

PICTURES, PER_PICTURE = 40, 3
SCIENCE = {"accuracy": {"overall": {"n": 60, "accuracy": 50.0, "accuracy_se": 1.0}}}


def pope() -> list[dict]:
    """Three questions about each picture: two on objects that are there, one on another."""
    return [
        {
            "question": "q",
            "answer": "No" if k == 2 else "Yes",
            "category": "random,popular" if k else "adversarial",
            "image": f"{picture:064x}",
            "options": None,
        }
        for picture in range(PICTURES)
        for k in range(PER_PICTURE)
    ]


def science() -> list[dict]:
    return [
        {
            "question": "q",
            "answer": "A",
            "category": "biology" if n < 40 else "physics",
            "image": "0" * 64,
            "options": {"A": "yes", "B": "no"},
        }
        for n in range(60)
    ]


def said(questions: list[dict], wrong: set[int]) -> list[str]:
    """The right answer to every question but those of `wrong`."""
    other = {"Yes": "No", "No": "Yes", "A": "B"}
    return [other[q["answer"]] if n in wrong else str(q["answer"]) for n, q in enumerate(questions)]


def verdict(folder, **options):
    sources = read_sources([folder])
    return verdicts(sources, compared(sources, [folder]))[0]


def run(wrong: set[int], questions: list[dict] | None = None) -> Run:
    asked = pope() if questions is None else questions
    return Run(
        model="m",
        data="POPE",
        questions=tuple(AskedQuestion(index=str(n), **q) for n, q in enumerate(asked)),
        answers=tuple(said(asked, wrong)),
    )


def change(a: set[int], b: set[int]) -> Change:
    return changes([(run(a), run(b))])[0][0]


# --------------------------------------------------------------------------------------------------
# - differences and intervals


def test_a_difference_and_its_interval_by_hand():
    """Twelve pictures lose one answer each, two win one."""
    lost, won = {3 * n for n in range(12)}, {3 * n for n in (20, 21)}
    own = change(won, lost)
    n = PICTURES * PER_PICTURE
    assert (own.n, own.differing, own.level) == (n, 14, LEVEL)
    assert own.a == pytest.approx(100 * (n - 2) / n) and own.b == pytest.approx(100 * (n - 12) / n)
    assert (
        own.difference.value == pytest.approx(-100 * 10 / n) and own.loss == -own.difference.value
    )
    # Pictures have equally many questions, so the mean over pictures has the usual standard error.
    gains = np.array([-1.0] * 12 + [1.0] * 2 + [0.0] * (PICTURES - 14)) / PER_PICTURE
    half = 196 * gains.std(ddof=1) / math.sqrt(PICTURES)
    assert own.difference.low == pytest.approx(own.difference.value - half, abs=0.7)
    assert own.difference.high == pytest.approx(own.difference.value + half, abs=0.7)
    assert own.told_apart and own.worse and not change(lost, won).worse


def test_an_interval_that_holds_zero_tells_nothing_apart():
    own = change({3 * n for n in range(9)}, {3 * n + 1 for n in range(9, 19)})
    assert own.difference.low < 0 < own.difference.high and own.difference.value < 0
    assert not own.told_apart and not own.worse
    same = change({1}, {1})
    assert same.difference.value == same.differing == 0 and not same.told_apart


def test_questions_about_one_picture_count_as_one():
    """Fifteen answers of five pictures are lost: the interval excludes zero, and five pictures that
    all go one way are no proof.
    """
    few = change(set(), set(range(15)))
    many = change(set(), {3 * n for n in range(15)})
    assert few.difference.value == many.difference.value
    assert few.differing == MIN_DIFFERING - 1 and not few.told_apart and many.told_apart
    assert few.difference.high < 0
    width = [own.difference.high - own.difference.low for own in (few, many)]
    assert width[0] > 1.5 * width[1]


def test_one_picture_has_no_interval():
    question = [q | {"image": "0" * 64} for q in pope()]
    own = changes([(run(set(), question), run({1, 2}, question))])[0][0]
    assert math.isnan(own.difference.low) and not own.told_apart and "(" not in difference(own)


def test_parts_have_intervals_that_hold_together():
    pairs = [(run(set()), run({3 * n for n in range(12)}))]  # adversarial, and there
    ((whole, parts),) = changes(pairs)
    by_name = {c.part: c for c in parts}
    assert list(by_name) == ["adversarial", "answer is yes", "random", "popular", "answer is no"]
    assert {c.level for c in parts} == {1 - (1 - LEVEL) / 5} and whole.level == LEVEL
    assert by_name["adversarial"].n == PICTURES and by_name["adversarial"].difference.value == -30
    assert by_name["answer is yes"].difference.value == -15
    assert by_name["answer is no"].difference.value == 0
    # The whole has the same pictures: at its level the interval of a part would be narrower.
    alone = changes([(run(set(), pope()[::3]), run(set(range(12)), pope()[::3]))])[0][0]
    narrow, wide = (c.difference.high - c.difference.low for c in (alone, by_name["adversarial"]))
    assert alone.difference.value == -30 and wide > 1.15 * narrow


def test_small_parts_and_too_many_are_left_out():
    named = [
        q | {"category": f"part {n // 12}" if n < 108 else f"tiny {n}"}
        for n, q in enumerate(pope())
    ]
    assert [p for p in parts_of(run(set(), named)) if p.startswith(("part", "tiny"))] == []
    choice = [q | {"category": f"{n // 12}"} for n, q in enumerate(science() * 6)]
    parts = parts_of(run(set(), choice))
    assert len(choice) == 360 and len(parts) == MAX_PARTS and set(map(len, parts.values())) == {12}


# --------------------------------------------------------------------------------------------------
# - from files to the line


def test_the_line(tmp_path):
    folder, asked, exam = tmp_path / "outputs", pope(), science()
    worse = {3 * n for n in range(12)}
    for model, wrong, wrong_exam in (("dense", set(), set()), ("small", worse, {50})):
        put_answers(folder, model, asked, said(asked, wrong))
        put_answers(
            folder, model, exam, said(exam, wrong_exam), data="ScienceQA_TEST", metrics=SCIENCE
        )
    timing = latency("dense", "small")
    timing["models"]["small"]["parameters"] = 757_000
    (tmp_path / "latency.json").write_text(json.dumps(timing))
    own = verdict(tmp_path)
    pope_, exam_ = own.changes
    assert pope_.difference.value == pytest.approx(-10) and not exam_.told_apart
    low, high = (points(v) for v in (pope_.difference.low, pope_.difference.high))
    worst = next(c for c in own.parts if c.part == "adversarial")
    assert own.hurt[0] == worst and [c.part for c in own.hurt] == ["adversarial", "answer is yes"]
    assert verdict_line(own).replace("\u00a0", " ") == (
        "24% fewer parameters, first token 1.50 times as fast; "
        f"POPE \u221210.0 points ({low} to {high}); ScienceQA not told apart; "
        f"most lost: POPE “adversarial” \u221230.0 points ({points(worst.difference.low)} to "
        f"{points(worst.difference.high)})"
    )
    smaller, worse_, where = (one.facts["small"] for one in answers([own]))
    assert [f.value for f in smaller] == ["24% fewer", "1.50 times as fast", "1.50 times as fast"]
    assert (
        smaller[0].note == "from 1.00M to 0.76M"
        and smaller[1].note == "1.20 to 1.70, range of 5 runs"
    )
    assert [f.tone for f in worse_] == ["worse", "same"]
    assert worse_[0].note == "from 100.0% to 90.0%"
    assert "misses objects that are there" in where[1].note


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ((1000, 757), "24% fewer parameters"),
        ((1000, 983), "1.7% fewer parameters"),
        ((1000, 1000), "as many parameters"),
        ((1000, 1300), "30% more parameters"),
        (None, "size not known"),
    ],
)
def test_sizes_in_words(tmp_path, parameters, text):
    own = verdict(outputs(tmp_path))
    assert size(replace(own, parameters=parameters)) == text


def test_speeds_are_those_over_the_dense_model(tmp_path):
    folder = outputs(tmp_path)
    slow = latency("dense", "small")
    few = {"median": 1.05, "least": 0.97, "most": 1.2, "n": 5}
    slow["models"]["small"]["prefill_speedup"] = few
    slow["models"]["small"]["decode_speedup"] |= {"least": 0.9, "low": 1.1, "high": 1.6, "n": 9}
    (folder / "latency.json").write_text(json.dumps(slow))
    (folder / "latency_b.json").write_text(json.dumps(latency("small", "dense")))
    (folder / "served.json").write_text(json.dumps(served("dense", "small")))
    own = verdict(folder)
    found = [(s.what, s.where, s.times, s.told_apart) for s in own.speeds]
    assert found == [
        ("first token", "", 1.05, False),
        ("further tokens", "", 1.5, True),
        ("first token", "llama.cpp q8_0", 1.25, True),
        ("further tokens", "llama.cpp q8_0", 1.1, False),
    ]
    assert "first token speed not told apart" in verdict_line(own)
    notes = [fact.note for fact in answers([own])[0].facts["small"][1:3]]
    assert notes == ["0.97 to 1.20, range of 5 runs", "1.10 to 1.60, 9 runs"]
    for file in folder.glob("latency*.json"):
        file.unlink()
    assert "first token in llama.cpp q8_0 1.25 times as fast" in verdict_line(verdict(folder))


def test_the_dense_model_is_the_one_that_times_are_compared_with(tmp_path):
    folder = outputs(tmp_path, ("a", "b"))
    assert read_sources([folder]).names == ["a", "b"]
    assert not read_sources([folder]).dense_is_known
    (folder / "served.json").write_text(json.dumps(served("b", "a")))
    sources = read_sources([folder])
    assert sources.names == ["b", "a"] and sources.dense_is_known


def test_a_table_of_blocks_is_not_taken_for_times(tmp_path):
    folder = outputs(tmp_path)
    (folder / "latency-table.json").write_text(json.dumps({"prefill": {}, "decode": {}}))
    assert read_sources([folder]).latency == ()


# --------------------------------------------------------------------------------------------------
# - captions

COUNTS = {"named": [4] * 30, "wrong": [0] * 30, "found": [4] * 30, "there": [5] * 30}


def captions(folder, **small):
    outputs(folder, ("dense", "small"))
    put_chair(folder, chair("dense", COUNTS))
    put_chair(folder, chair("small", COUNTS | small.pop("counts", {}), **small))
    return verdict(folder)


def test_captions_are_compared_image_by_image(tmp_path):
    counts = {"wrong": [2] * 10 + [0] * 20, "found": [2] * 10 + [4] * 20}
    own = captions(tmp_path, counts=counts)
    invented, named = (c for c in own.changes if c.data == "captions (coco)")
    assert (invented.a, invented.b) == (0, pytest.approx(100 * 20 / 120))
    assert invented.difference.value == pytest.approx(invented.b) and invented.differing == 10
    assert invented.worse and invented.loss > 0 and not invented.higher_is_better
    # Ratios of equally large wholes: the standard error is that of a mean.
    half = 196 * np.std([0.5] * 10 + [0.0] * 20, ddof=1) / math.sqrt(30)
    assert invented.difference.high - invented.difference.value == pytest.approx(half, rel=0.15)
    assert named.difference.value == pytest.approx(-100 * 20 / 150) and named.worse
    assert f"captions (coco): invented objects {difference(invented)}" in verdict_line(own)


def test_captions_of_other_images_or_prompts_are_not_compared(tmp_path):
    other = {"image": [f"other {n}" for n in range(30)]}
    assert not any(c.part for c in captions(tmp_path / "a", counts=other).changes)
    own = captions(tmp_path / "b", settings={"prompt": "list", "device": "cpu"})
    assert not any(c.part for c in own.changes)


def test_the_most_captions_are_compared(tmp_path):
    few = {key: values[:12] for key, values in COUNTS.items()}
    captions(tmp_path)
    for model in ("dense", "small"):
        put_chair(tmp_path, chair(model, few), run="run-2")
    assert [c.n for c in verdict(tmp_path).changes if c.part] == [30, 30]


# --------------------------------------------------------------------------------------------------
# - words


@pytest.mark.parametrize(
    ("value", "text"), [(-4.56, "\u22124.6"), (0.44, "+0.4"), (-0.01, "0.0"), (0.02, "0.0")]
)
def test_points(value, text):
    assert points(value) == text


def test_an_interval_beside_zero_has_more_digits():
    near = Estimate(value=-0.6, se=0.3, low=-1.2, high=-0.04, p_value=0.03)
    own = Change(data="x", n=999, differing=99, a=9.0, b=8.4, difference=near)
    text = difference(own).replace("\u00a0", " ")
    assert text == "\u22120.6 points (\u22121.20 to \u22120.04)"
    fast = Speed(what="first token", times=1.04, low=1.0042, high=1.06, n=25)
    assert fast.told_apart and spread(fast) == "1.004 to 1.060"
    assert spread(replace(fast, low=0.998)) == "1.00 to 1.06"
    across = replace(own, difference=replace(near, high=0.04))
    assert difference(across).endswith("\u22121.2\u00a0to\u00a00.0)")


def test_gains_are_not_called_losses(tmp_path):
    asked, before = pope(), {3 * n for n in range(12)}
    put_answers(tmp_path, "dense", asked, said(asked, before))
    put_answers(tmp_path, "small", asked, said(asked, set()))
    own = verdict(tmp_path)
    assert own.hurt == [] and own.changes[0].told_apart and not own.changes[0].worse
    assert "POPE +10.0" in verdict_line(own) and "no part stands out" in verdict_line(own)
    assert [f.tone for f in answers([own])[1].facts["small"]] == ["better"]


def test_told_apart_needs_both_an_interval_and_pictures():
    estimate = Estimate(value=-3.0, se=1.0, low=-5.0, high=-1.0, p_value=0.01)
    own = Change(data="x", n=99, differing=MIN_DIFFERING, a=9.0, b=6.0, difference=estimate)
    assert own.told_apart and not replace(own, differing=MIN_DIFFERING - 1).told_apart
    for low, high in ((-5.0, 0.0), (0.0, 5.0), (math.nan, math.nan)):
        assert not replace(own, difference=replace(estimate, low=low, high=high)).told_apart
