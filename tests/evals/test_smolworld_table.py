"""The table of the small world: its rates and rules without a model, its cells on a tiny one."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from smolworld_models import letters_processor, llava

from hipp_ext.calibration import encode
from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.evals.chair import ObjectWords, chair_scores, default_synonyms
from hipp_ext.evals.pope import SPLITS, pope_scores
from hipp_ext.evals.studies.measuring import RESULTS
from hipp_ext.evals.studies.smolworld import packages
from hipp_ext.evals.studies.smolworld.conversations import Conversations
from hipp_ext.evals.studies.smolworld.model import save
from hipp_ext.evals.studies.smolworld.questions.asking import ON_TEST, fitting
from hipp_ext.evals.studies.smolworld.questions.collapse import caught_share
from hipp_ext.evals.studies.smolworld.questions.command import LETTERS, questions, write_answers
from hipp_ext.evals.studies.smolworld.questions.contrasts import Contrasts
from hipp_ext.evals.studies.smolworld.questions.curves import curves
from hipp_ext.evals.studies.smolworld.questions.needed import QUANTISED, W8A8, needed, plain
from hipp_ext.evals.studies.smolworld.questions.rules import all_of, answered, any_of
from hipp_ext.evals.studies.smolworld.questions.variants import quantising
from hipp_ext.evals.studies.smolworld.scenes import read_world
from hipp_ext.evals.studies.smolworld.table.asked import Asked, Paper
from hipp_ext.evals.studies.smolworld.table.cells import CHIEF, Cell, Filters
from hipp_ext.evals.studies.smolworld.table.command import chosen_sizes, table
from hipp_ext.evals.studies.smolworld.table.methods import FITTED, IN_TABLE, Shuffled
from hipp_ext.evals.studies.smolworld.table.picture import SILENT, ratios_picture, repairs_picture
from hipp_ext.evals.studies.smolworld.table.place import Place
from hipp_ext.evals.studies.smolworld.table.rates import Measured, Rates
from hipp_ext.evals.studies.smolworld.table.recovering import Lessons
from hipp_ext.evals.studies.smolworld.table.rewards import kept_rewards, read_rewards
from hipp_ext.evals.studies.smolworld.table.section import section
from hipp_ext.evals.studies.smolworld.table.sizes import QUICK, Sizes
from hipp_ext.evals.studies.smolworld.table.summary import summarize
from hipp_ext.evals.studies.smolworld.table.variants import half_of_the_picture, quantised
from hipp_ext.evals.studies.smolworld.table.work import Work
from hipp_ext.scorers import Magnitude

needs_packages = pytest.mark.skipif(
    packages.missing() is not None, reason="pictures come from packages: make smolworld"
)

NAMES = ("dog", "cat", "owl", "cup of coffee")


def some_asked(pictures: int = 40) -> Asked:
    rng = random.Random(0)
    pope, choice, captions = [], [], []
    for number in range(pictures):
        shown = tuple(rng.sample(NAMES, 2))
        captions.append((shown, f"picture {number}"))
        for _ in range(4):
            yes = rng.random() < 0.5
            kinds = ",".join(SPLITS) if yes else ",".join(rng.sample(SPLITS, rng.randint(1, 3)))
            pope.append(("Yes" if yes else "No", kinds, f"picture {number}"))
        relation = rng.choice(("class", "picture, name"))
        choice.append((rng.choice("ABCD"), relation, f"picture {number}"))
    return Asked(names=NAMES, pope=tuple(pope), choice=tuple(choice), captions=tuple(captions))


def some_values(asked: Asked, right: float, seed: int) -> dict:
    """Answers that are right with a probability, else random."""
    rng = random.Random(seed)
    said = [a[0] if rng.random() < right else rng.choice("YN") for a, _, _ in asked.pope]
    chosen = [a if rng.random() < right else rng.choice("ABCD") for a, _, _ in asked.choice]
    named = [
        [name if rng.random() < right else rng.choice(NAMES) for name in shown]
        for shown, _ in asked.captions
    ]
    return {
        "pope": "".join(said),
        "choice": "".join(chosen),
        "captions": [f"The image shows {' and '.join(own)}." if own else "" for own in named],
        "loss": [rng.random() for _ in named],
    }


# --------------------------------------------------------------------------------------- the rates


def test_rates_are_those_of_pope_and_chair():
    asked = some_asked()
    values = some_values(asked, 0.7, 1)
    found = Rates(asked).contrast([(1.0, values)])
    answers = [{"Y": "Yes", "N": "No"}[a] for a in values["pope"]]
    truth, kinds, pictures = zip(*asked.pope, strict=True)
    scores = pope_scores(answers, truth, kinds, pictures)["vlmeval"]
    for split, own in scores.items():
        named = {"accuracy": own.accuracy, "F1": own.f1, "yes": own.yes_rate}
        for rate, value in named.items():
            assert found[f"POPE {rate} {split}"].value == pytest.approx(value)
        assert found[f"POPE F1 {split}"].se == pytest.approx(own.f1_se, rel=1e-6)
    words = ObjectWords(default_synonyms(NAMES))
    objects, pictures = zip(*asked.captions, strict=True)
    chair = chair_scores(values["captions"], objects, pictures, words)
    for name, value in (("CHAIR_i", chair.chair_i), ("recall", chair.recall)):
        assert found[name].value == pytest.approx(value)
    assert found["CHAIR_i"].se == pytest.approx(chair.chair_i_se, rel=1e-6)
    assert found["loss"].value == pytest.approx(np.mean(values["loss"]))
    hits = np.array(list(values["choice"])) == [a for a, _, _ in asked.choice]
    assert found["choice"].value == pytest.approx(100 * hits.mean())


def test_contrasts_are_paired():
    asked = some_asked()
    good, bad = some_values(asked, 0.9, 1), some_values(asked, 0.4, 2)
    rates = Rates(asked)
    same = rates.contrast([(1.0, good), (-1.0, good)])
    assert all(own == Measured(value=0.0, se=0.0) for own in same.values())
    one, other, both = (
        rates.contrast(terms) for terms in ([(1.0, good)], [(1.0, bad)], [(1.0, good), (-1.0, bad)])
    )
    for name, own in both.items():
        assert own.value == pytest.approx(one[name].value - other[name].value)
    assert both["POPE accuracy overall"].value > 3 * both["POPE accuracy overall"].se > 0
    # The same questions: less spread than of two models that were asked different ones.
    nearly = good | {"pope": good["pope"][:-4] + bad["pope"][-4:]}
    paired = rates.contrast([(1.0, good), (-1.0, nearly)])["POPE accuracy overall"].se
    assert paired < 0.5 * one["POPE accuracy overall"].se
    mean = rates.contrast([(0.5, good), (0.5, bad)])["choice"].value
    assert mean == pytest.approx((one["choice"].value + other["choice"].value) / 2)


def test_the_truth_is_kept_as_json():
    asked = some_asked()
    assert Asked.from_json(json.loads(json.dumps(asked.to_json()))) == asked


# --------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("value", "se", "answer"),
    [
        (2.0, 0.9, "yes"),
        (2.0, 1.1, "not shown"),
        (0.1, 0.01, "yes"),  # small, and shown
        (0.2, 0.3, "no"),  # less than a point
        (-3.0, 1.0, "no"),
        (-3.0, 2.5, "not shown"),
        (0.0, 0.0, "no"),  # the same answers
        (float("nan"), 1.0, "not shown"),
        (1.0, float("nan"), "not shown"),
    ],
)
def test_a_difference_is_shown_beyond_two_errors(value, se, answer):
    assert answered(Measured(value=value, se=se)) == answer


def test_answers_together():
    assert all_of(["yes", "yes"]) == "yes" and any_of(["no", "no"]) == "no"
    assert all_of(["yes", "not shown"]) == any_of(["no", "not shown"]) == "not shown"
    assert all_of(["yes", "no"]) == "no" and any_of(["yes", "no"]) == "yes"


def test_a_threshold_catches_what_lies_below_it():
    score, collapsed = np.arange(100.0), np.arange(100) < 20
    assert caught_share(score, collapsed) == 100.0
    assert caught_share(-score, collapsed) == 0.0
    assert caught_share(score, score < 0) is None


def test_an_order_that_turns_round_is_noticed():
    asked = some_asked(80)
    levels = dict(zip(QUANTISED, np.linspace(0.2, 0.95, len(QUANTISED)), strict=True))
    rows = {Cell().name: some_values(asked, 1.0, 0), Cell(variant=W8A8).name: {}}
    rows[Cell(variant=W8A8).name] = rows[Cell().name]
    for number, (method, level) in enumerate(levels.items()):
        cell = plain(method, repair="reconstruct")
        rows[cell.name] = some_values(asked, level, number)
        rows[replace(cell, variant=W8A8).name] = some_values(asked, level, number)

    def found():
        measured = {name: {"values": values} for name, values in rows.items()}
        return quantising(Contrasts(measured, asked, 1, resamples=100))

    before = found()
    assert before.answer == "no" and before.figures["pairs apart"] > 5
    best, worst = (
        replace(plain(m, repair="reconstruct"), variant=W8A8).name
        for m in (QUANTISED[-1], QUANTISED[0])
    )
    rows[best], rows[worst] = rows[worst], rows[best]
    assert found().answer == "yes"


def with_answers(asked: Asked, values: dict, **rates: float) -> dict:
    """The values, with more answers of a task changed: right ones, or "Yes" to what is absent."""
    rng = random.Random(1)
    pope, choice = list(values["pope"]), list(values["choice"])
    for i, (answer, _, _) in enumerate(asked.pope):
        if answer == "No" and rng.random() < rates.get("false_yes", 0):
            pope[i] = "Y"
        if rng.random() < rates.get("pope", 0):
            pope[i] = answer[0]
    for i, (answer, _, _) in enumerate(asked.choice):
        if rng.random() < rates.get("choice", 0):
            choice[i] = answer
    return values | {"pope": "".join(pope), "choice": "".join(choice)}


def changed_cell(cell: Cell) -> dict[str, float]:
    """What would be measured if every question were to be answered yes."""
    match cell:
        case Cell(method=method) if method == FITTED:
            right = {"utility": {"choice": 0.9}, "robustness": {"pope": 0.9}}
            return right.get(cell.corner, {"choice": 0.9, "pope": 0.9})
        case Cell(method="uniform" | "FLAP adaptive" | "sensitivity, anchored", repair="none"):
            return {"false_yes": 0.8}
    return {}


def test_questions_are_answered_yes_where_everything_is_so():
    asked = some_asked(120)
    base = some_values(asked, 0.3, 7)
    cells = {Cell(), *(c for own in needed(2).values() for c in own)}
    same = {c.name: {"values": base} for c in cells}
    rows = {c.name: {"values": with_answers(asked, base, **changed_cell(c))} for c in cells}
    for measured, expected in (
        (rows, {"a": "yes", "b": "yes", "c": "yes", "e": "yes", "f": "yes"}),
        (same, {"a": "no", "b": "no", "c": "no", "e": "no", "f": "yes"}),
    ):
        contrasts = Contrasts(measured, asked, 2, resamples=60)
        for letter in expected:
            ask = ON_TEST.get(letter) or (lambda c: fitting(c, 60, {}))
            found = ask(contrasts)
            assert found.answer == expected[letter], found
            assert json.loads(json.dumps(found.as_json()))["answer"] == expected[letter]


# --------------------------------------------------------------------------------------- the cells


def test_cells_are_those_of_the_table():
    cells = Filters().cells()
    assert cells[0] == Cell() and len(set(cells)) == len(cells)
    assert len({c.name for c in cells}) == len(cells)
    assert {c.ratio for c in cells if c.repair == "distil"} == {CHIEF}
    assert {c.ratio for c in cells if c.method == FITTED} == {CHIEF}
    fits = {(c.corner, c.seed) for c in cells if c.method == FITTED and c.repair == "none"}
    assert len(fits) == 6 and {seed for _, seed in fits} == {0, 1}
    # A run that ends early has every method at the chief ratio first.
    first = [c for c in cells[1:] if c.repair == "none" and c.seed == 0 and c.corner == "middle"]
    assert {c.method for c in first[: len(IN_TABLE)]} == set(IN_TABLE)
    assert not any(c.method == "ShortGPT" and c.repair == "reconstruct" for c in cells)
    few = Filters(methods=["uniform"], ratios=(0.2,), repairs=["none"]).cells()
    assert few == [Cell(), Cell(method="uniform", ratio=0.2)]


def test_unknown_methods_repairs_and_sizes():
    with pytest.raises(DataError, match="No method is called \\['best'\\]"):
        Filters(methods=["best"])
    with pytest.raises(DataError, match="No repair is called"):
        Filters(repairs=["glue"])
    with pytest.raises(DataError, match="pictures=1: a whole number of at least 2"):
        Sizes(pictures=1)
    with pytest.raises(DataError, match="dtype='int8'"):
        Sizes(dtype="int8")
    with pytest.raises(DataError, match="A ratio of 0 is the dense model"):
        Filters(ratios=(0.0, 0.3))
    with pytest.raises(DataError, match="No model is left to measure"):
        Filters(methods=["uniform"], ratios=(0.5,), repairs=["distil"])
    assert chosen_sizes(True, pictures=9, steps=None) == replace(QUICK, pictures=9)


def test_what_cells_share_is_counted_once():
    cells = Filters(seeds=1).cells()
    work = Work(Sizes(), lambda name: False)
    each = dict(zip(cells, work.of(cells), strict=True))
    one, other = (Cell(method=FITTED, ratio=CHIEF, corner=c) for c in ("middle", "utility"))
    assert each[one] > 5 * each[other]
    known = Work(Sizes(), lambda name: name.startswith("fit"))
    assert sum(work.of(cells)) - sum(known.of(cells)) == pytest.approx(
        Sizes().evaluations * Sizes().search * (40 + 24 + 85) * (1 - 0.75 * CHIEF)
    )


def test_questions_need_models_of_the_table():
    table_cells, cells = set(Filters().cells()), needed(2)
    assert set(cells) == set(LETTERS)
    for letter in "abe":
        assert set(cells[letter]) <= table_cells


def test_shuffled_scores_are_the_same_in_another_order():
    model = llava(letters_processor())
    batches = [{"input_ids": torch.tensor([[5, 17, 30]])}]
    plain_scores = Magnitude()(model)
    mixed = Shuffled(scorer=Magnitude())(model, batches)
    for name, own in plain_scores.items():
        assert torch.equal(own.sort().values, mixed[name].sort().values)
    assert any(not torch.equal(own, mixed[name]) for name, own in plain_scores.items())


# ------------------------------------------------------------------------------------ the variants


@pytest.fixture(scope="module")
def processor():
    return letters_processor()


def seen(processor) -> dict:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)) for _ in range(2)]
    return encode(processor, ["Is it?", "What is there?"], images)


@torch.no_grad()
def test_half_of_the_picture_is_what_other_patches_look_at(processor):
    model = llava(processor)
    whole = model(**seen(processor)).logits
    with half_of_the_picture(model, processor) as fewer:
        batch = seen(fewer)
        assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [18, 18]
        found = model(**batch).logits
        chosen = model.model.multi_modal_projector.attention.topk(18).indices.sort().values
    full = seen(processor)
    assert torch.equal(model(**full).logits, whole)
    # The same by hand: embeddings of the whole prompt without the other patches.
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")  # which alone tells the attention
    attention = tower(full["pixel_values"], output_attentions=True).attentions[-1]
    looked = attention[:, :, 1:, 1:].mean((1, 2)).topk(18).indices.sort().values
    assert torch.equal(looked, chosen)
    tower.set_attn_implementation("sdpa")
    features = torch.stack(list(model.get_image_features(full["pixel_values"]).pooler_output))
    embedded = model.get_input_embeddings()(full["input_ids"])
    picture = full["input_ids"] == processor.image_token_id
    embedded[picture] = features.flatten(0, 1)
    kept = ~picture
    for row, patches in enumerate(chosen):
        kept[row, picture[row].nonzero()[:, 0][patches]] = True
    mask = full["attention_mask"][kept].view(2, -1)
    by_hand = model(
        inputs_embeds=embedded[kept].view(2, -1, embedded.shape[-1]), attention_mask=mask
    ).logits
    torch.testing.assert_close(found[:, -1], by_hand[:, -1], rtol=0, atol=1e-5)
    assert (found[:, -1] - whole[:, -1]).abs().max() > 1e-4


@torch.no_grad()
def test_eight_bits_are_near_and_not_the_same(processor, tmp_path):
    save(llava(processor), processor, tmp_path / "model")
    model = type(llava(processor)).from_pretrained(tmp_path / "model").eval()
    batch = seen(processor)
    before = model(**batch).logits
    after = quantised(model)(**batch).logits
    assert 0 < (after - before).norm() / before.norm() < 0.1
    assert torch.equal(
        model.model.vision_tower(batch["pixel_values"]).pooler_output,
        llava(processor).model.vision_tower(batch["pixel_values"]).pooler_output,
    )


# ------------------------------------------------------------------------ with the packages alone

SMALL = {"pictures": 4, "choices": 8, "search": 8, "calibration": 8, "evaluations": 8, "steps": 2}
ARGUMENTS = [a for name, size in SMALL.items() for a in (f"--{name}", str(size))]
CHOSEN = ["uniform", "torch-pruning", "TPE", FITTED]


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolworld")
    save(llava(processor), processor, folder / "model")
    return folder


@pytest.fixture(scope="module")
def killed(folder):
    """Modification times of the cells of a table that was killed."""
    command = [sys.executable, "-m", "hipp_ext.evals.studies.smolworld", "table"]
    command += ["--model", str(folder / "model"), "--out", str(folder / "out")]
    command += [a for method in CHOSEN for a in ("--method", method)]
    command += ["--ratio", "0.3", "--repair", "none", "--seeds", "1", "--concepts", "60"]
    process = subprocess.Popen([*command, *ARGUMENTS], env=os.environ | {"OMP_NUM_THREADS": "1"})
    cells = folder / "out/cells"
    deadline = time.monotonic() + 400
    while len(list(cells.glob("*.json"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = {file: file.stat().st_mtime_ns for file in cells.glob("*.json")}
    assert len(found) >= 2
    return found


def run_table(folder, method=CHOSEN, repair=("none",), **options) -> dict:
    chosen = {"ratio": [0.3], "seeds": 1, "concepts": 60, "threads": 1} | SMALL | options
    table(folder / "model", folder / "out", method=method, repair=repair, **chosen)
    return json.loads((folder / "out/smolworld_table.json").read_text())


@needs_packages
@pytest.mark.timeout(900)
def test_a_killed_table_goes_on(folder, killed, capsys):
    run_table(folder)
    said = capsys.readouterr().out
    assert "models are left: about" in said and "min left: " in said
    result = run_table(folder, ["torch-pruning"], ["distil"])
    assert all(file.stat().st_mtime_ns == before for file, before in killed.items())
    cells = Filters(methods=CHOSEN, ratios=(0.3,), repairs=["none"], seeds=1).cells()
    assert len(list((folder / "out/cells").glob("*.json"))) == len(cells) + 1
    assert len(result["cells"]) == len(cells)
    assert len(read_rewards(folder / "out/searches/TPE-30-0")) == SMALL["evaluations"]
    for own in result["cells"]:
        assert own["removed"] == pytest.approx(0.3, abs=0.02)
        assert own["parameters"] < result["parameters of dense"]
        comparable = own["method"] != "uniform" and own["repair"] == "none"
        assert ("minus uniform" in own) == comparable
    assert result["identity"]["sizes"]["dtype"] == "bfloat16"
    assert set(result["splits"]) == {"train", "calibration", "search", "validation", "test"}
    text = section(result)
    assert all(method in text for method in CHOSEN) and "After equal recovery" in text
    for name in ("smolworld_table", "smolworld_repairs"):
        assert (folder / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def numbers(found, name=""):
    """Number by name, without standard errors, which depend on the number of resamples."""
    if isinstance(found, dict):
        parts = [numbers(own, f"{name}/{key}") for key, own in found.items()]
        return {key: own for part in parts for key, own in part.items()}
    if isinstance(found, list) and len(found) == 2 and isinstance(found[0], float):
        return {name: found[0]}
    return {name: found} if isinstance(found, int | float) else {}


def test_the_committed_run_gives_the_committed_figures(tmp_path):
    with tarfile.open(RESULTS / "smolworld_run.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    files = sorted((tmp_path / "cells").glob("*.json"))
    rows = {file.stem: json.loads(file.read_text()) for file in files}
    asked = Asked.from_json(json.loads((tmp_path / "asked.json").read_text()))
    told = json.loads((RESULTS / "smolworld_table.json").read_text())
    found = summarize(rows, asked, resamples=2)
    for own, other in zip([*found.pop("cells"), found], [*told["cells"], told], strict=True):
        names = ("method", "corner", "repair")
        assert [own.get(name) for name in names] == [other.get(name) for name in names]
        same = {name: other[name] for name in own}
        assert numbers(own) == pytest.approx(numbers(same), abs=2e-3)

    told = json.loads((RESULTS / "smolworld_questions.json").read_text())
    contrasts = Contrasts(rows, asked, told["seeds"])
    findings = {letter: answer(contrasts) for letter, answer in ON_TEST.items()}
    reached = curves(tmp_path / "searches", told["seeds"])
    findings["e"] = fitting(contrasts, told["identity"]["sizes"]["evaluations"], reached)
    for letter, own in findings.items():
        known = numbers(told["questions"][letter]["figures"])
        assert own.answer == told["questions"][letter]["answer"]
        assert numbers(own.as_json()["figures"]) == pytest.approx(known, abs=2e-3)
    assert len(read_rewards(tmp_path / "collapse")) == 32


def test_pictures_show_what_the_committed_result_says():
    result = json.loads((RESULTS / "smolworld_table.json").read_text())
    pruned = [e for e in result["cells"] if e["repair"] == "none" and e["corner"] == "middle"]
    accuracy, chair, _ = ratios_picture(result).axes[:3]
    assert len(accuracy.containers) == len({e["method"] for e in pruned})
    talking = {e["method"] for e in pruned if e["rates"]["silent"][0] <= SILENT}
    assert 1 < len(chair.containers) == len(talking)

    at = [e for e in result["cells"] if e["ratio"] == CHIEF and e["corner"] == "middle"]
    shown = repairs_picture(result, CHIEF).axes[0]
    methods = {label.get_text(): y for y, label in enumerate(shown.get_yticklabels())}
    points = [tuple(xy) for own in shown.containers for xy in zip(*own[0].get_data(), strict=True)]
    for e in at:
        assert (e["rates"]["POPE accuracy overall"][0], methods[e["method"]]) in points
    assert len(points) == len(at)


@needs_packages
def test_processes_share_the_models(folder, tmp_path):
    (tmp_path / "model").symlink_to(folder / "model")
    chosen = ["uniform", "sensitivity, anchored", "hipp, untrained"]
    repairs = ["none", "distil"]
    shared = run_table(tmp_path, chosen, repairs, processes=2, threads=2)
    alone = run_table(folder, chosen, repairs)
    known = {(own["method"], own["corner"], own["repair"]): own for own in alone["cells"]}
    assert len(shared["cells"]) == len({str(own) for own in shared["cells"]}) > len(chosen)
    for own in shared["cells"]:
        same = known[own["method"], own["corner"], own["repair"]]
        assert own["removed"] == same["removed"] and own["parameters"] == same["parameters"]
    assert not list((tmp_path / "out/training").glob("*"))


@needs_packages
def test_a_table_of_other_sizes_is_not_mixed_in(folder, killed):
    with pytest.raises(CheckpointError, match="sizes.pictures is 4 there, and 5 was asked for"):
        run_table(folder, pictures=5)


@needs_packages
def test_questions_go_on_from_the_table(folder, killed):
    options = SMALL | {"seeds": 1, "concepts": 60, "threads": 1, "plans": 6}
    questions(folder / "model", folder / "out", question=["b", "d", "f"], **options)
    file = folder / "out/smolworld_questions.json"
    whole = json.loads(file.read_text())
    result = whole["questions"]
    assert set(result) == {"b", "d", "f"}
    assert {own["answer"] for own in result.values()} <= {"yes", "no", "not shown"}
    figures = result["d"]["figures"]
    assert figures["collapsed plans"] + figures["sound plans"] == 6
    text = (folder / "out/smolworld_questions.md").read_text()
    assert all(own["question"] in text for own in result.values())
    # A later command about one question leaves the answers to the others.
    later = {"b": result["b"] | {"answer": "yes"}}
    write_answers(whole["identity"], later, 1, folder / "out", False)
    again = json.loads(file.read_text())["questions"]
    assert again["b"]["answer"] == "yes" and again["f"] == result["f"]
    with pytest.raises(DataError, match="No question has the letter"):
        questions(folder / "model", folder / "out", question=["x"], **options)


@needs_packages
def test_rewards_of_another_evaluator_are_not_mixed_in(folder, killed):
    run_table(folder, ["TPE"])
    place = Place(model=folder / "model", out=folder / "out", sizes=Sizes(**SMALL), concepts=60)
    bench, kept = place.study((), 1).bench, folder / "out/searches/TPE-30-0"
    known = read_rewards(kept)
    options = {"title": "plans", "plans": len(known)}
    with kept_rewards(bench, bench.search, bench.quick_signals, kept, **options) as reward:
        assert all(reward(keeps) == own for keeps, own in known)
    with (
        pytest.raises(CheckpointError, match="holds another run: evaluator"),
        kept_rewards(bench, bench.validation, bench.quick_signals, kept, **options),
    ):
        pass


@needs_packages
def test_papers_ask_every_question_about_their_pictures():
    world = read_world(60)
    paper = Paper.of(world, "validation", 5, 6)
    assert len({q.picture for q in paper.pope}) == 5 and len(paper.choice) == 6
    assert [q.picture for q in paper.captions] == list(dict.fromkeys(q.picture for q in paper.pope))
    more = Paper.of(world, "validation", 9, 6)
    assert more.pope[: len(paper.pope)] == paper.pope


@needs_packages
def test_lessons_are_the_same_for_teacher_and_student(processor):
    lessons = Lessons(Conversations(read_world(60), processor, rows=(1, 1, 1), seed=1), 2)
    once = list(lessons.once(0))
    assert len(once) == len(lessons) == 2 and len(list(lessons.once(1))) == 1
    for told, learnt in zip(once, lessons.batches(0, 1, 0), strict=False):
        for a, b in zip(told, learnt, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


ONE_WORKER = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from hipp_ext.evals.studies.smolworld.table.sharing import end_with_parent

pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 600).result()
"""


def test_workers_end_with_a_killed_parent():
    with subprocess.Popen([sys.executable, "-c", ONE_WORKER], stdout=subprocess.PIPE) as parent:
        worker = int(parent.stdout.readline())
        assert running(worker)
        parent.kill()
    until = time.monotonic() + 30
    while running(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not running(worker)


def running(pid: int) -> bool:
    """Whether a process exists that is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
