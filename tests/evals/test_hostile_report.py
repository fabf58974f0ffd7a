"""`hipp report` on files from strangers: no text becomes markup, no number breaks a figure, no
picture is from elsewhere.
"""

import copy
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_folders import HASH, chair, latency, outputs, put_chair, record, served

from hipp_ext.errors import DataError
from hipp_ext.evals.report import write_report
from hipp_ext.evals.report.page import page
from hipp_ext.evals.report.sources import read_sources
from hipp_ext.evals.report.write import compared

TRAP = (
    "\"'><script>alert(1)</script><img src=//evil onerror=alert(2)>${7*7}{{7*7}}{%x%}\ud800</style>"
)


class Tags(HTMLParser):
    """Every tag with its attributes, and the texts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def made(folder: Path) -> str:
    """The page without its figures, which take seconds."""
    sources = read_sources([folder])
    return page(sources, [], compared(sources, [folder]))


# --------------------------------------------------------------------------------------------------
# - texts


def test_no_text_of_a_file_becomes_markup(tmp_path):
    folder = outputs(tmp_path, ("dense" + TRAP, "small" + TRAP), question=TRAP)
    timed = latency("dense") | {"command": TRAP, "device": TRAP}
    timed["models"] = {TRAP: timed["models"]["dense"]}
    (folder / "latency.json").write_text(json.dumps(timed))
    made_so = {"date": TRAP, "device": TRAP, "versions": {TRAP: TRAP}}
    timing = served(TRAP, "small" + TRAP, runtime=TRAP, weights=TRAP) | made_so | {"command": TRAP}
    (folder / "served.json").write_text(json.dumps(timing))
    counts = dict.fromkeys(("named", "wrong", "found", "there"), [1, 1])
    for number, model in enumerate(("dense" + TRAP, "small" + TRAP)):
        scores = chair(model, counts, settings={TRAP: TRAP}, made=made_so, command=TRAP)
        (place := folder / f"model{number}/CHAIR-x/run-1").mkdir(parents=True)
        (place / "scores.json").write_text(json.dumps(scores | {"data": TRAP}))
    settings = {TRAP: TRAP, "noise": [TRAP]}
    (folder / "run.json").write_text(json.dumps({"identity": {"settings": settings}}))
    (folder / "archive.jsonl").touch()
    for file in folder.rglob("results.json"):
        own = json.loads(file.read_text())
        own |= {"command": TRAP, "data_hash": TRAP, "settings": {TRAP: TRAP}, "made": made_so}
        file.write_text(json.dumps(own))
    read = Tags(made(folder))
    assert not {"script", "iframe", "object", "link", "form", "base"} & {
        tag for tag, _ in read.tags
    }
    assert sum(tag == "style" for tag, _ in read.tags) == 1
    for _, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    said = "".join(read.texts)
    assert said.count("alert(1)") >= 40 and "${7*7}{{7*7}}{%x%}" in said  # shown
    assert "${7*7}49" not in said and "${49}" not in said  # and not carried out


def test_half_a_character_does_not_stop_a_report(tmp_path):
    own = record(
        "m" + TRAP,
        data="mine",
        metrics={"accuracy": {"overall": {"n": 4, "accuracy": 50.0, "accuracy_se": 1.0}}},
    )
    (tmp_path / "results.json").write_text(json.dumps(own))
    whole = write_report(tmp_path, tmp_path / "out").read_bytes()
    assert b"<script" not in whole and "50.0 ± 1.0" in whole.decode()


def test_the_page_forbids_what_it_does_not_need(tmp_path):
    read = Tags(made(outputs(tmp_path)))
    policy = next(
        a["content"] for tag, a in read.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.split(" ", 1) for rule in (policy or "").split("; "))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    order = [tag for tag, _ in read.tags]
    assert order.index("meta") < order.index("style")


def test_two_counts_of_questions_are_explained(tmp_path):
    said = "".join(Tags(made(outputs(tmp_path))).texts)
    assert (
        "POPE has 4 distinct questions, each counted once where models are compared" in said
        and "6 in all." in said
    )


# --------------------------------------------------------------------------------------------------
# - pictures and answers


def test_the_picture_of_a_question_is_shown(tmp_path):
    assert made(outputs(tmp_path)).count('src="data:image/png') == 4


@pytest.mark.parametrize(
    "image", ["../../secret", "/" + "x" * 31, "..", HASH[:32], HASH.upper(), "a\0b", "x" * 5000, ""]
)
def test_a_picture_that_is_not_named_by_a_hash_is_not_shown(tmp_path, image):
    folder = outputs(tmp_path / "in", image=image)
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    try:
        text = made(folder)
    except DataError:
        return
    assert "src=" not in text


def test_a_picture_that_lies_elsewhere_is_not_shown(tmp_path):
    folder = outputs(tmp_path / "in")
    file, secret = folder / f"images/{HASH[:32]}.png", tmp_path / "secret.png"
    file.rename(secret)
    for make in (
        lambda: file.symlink_to(secret),
        lambda: file.symlink_to("/dev/zero"),
        lambda: os.mkfifo(file),
        lambda: file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    ):
        make()
        text = made(folder)
        assert "src=" not in text and "image not found" in text
        file.unlink()
    file.parent.rmdir()
    file.parent.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    secret.rename(tmp_path / "elsewhere" / file.name)
    assert "src=" in made(
        folder
    )  # a folder of pictures that is itself a link was put there by who made the folder


def test_answers_that_lie_elsewhere_are_not_shown(tmp_path):
    theirs = outputs(tmp_path / "theirs", question="a secret question")
    mine = outputs(tmp_path / "mine")
    for number in (0, 1):
        file = mine / f"model{number}/POPE/results.json"
        own = json.loads(file.read_text())
        own["predictions"] = own["predictions"].replace("/mine/", "/theirs/")
        file.write_text(json.dumps(own))
    assert "a secret question" not in made(mine) and "a secret question" in made(theirs)


# --------------------------------------------------------------------------------------------------
# - numbers and types


def put(data: dict, path: str, value: object) -> dict:
    data = copy.deepcopy(data)
    *way, last = path.split(".")
    inner = data
    for name in way:
        inner = inner[name]
    inner[last] = value
    return data


@pytest.mark.parametrize(
    "value", [TRAP, None, [], {}, True, -1, 10**400, 1e308, float("inf"), float("nan")]
)
@pytest.mark.parametrize(
    "path",
    [
        "threads",
        "load.rows",
        "load.repeats",
        "load.warmup",
        "load",
        "models",
        "models.dense",
        "models.dense.parameters",
        "models.dense.peak_mib",
        "models.dense.prefill_ms.median",
    ],
)
def test_latency_of_other_types_and_sizes_is_refused(tmp_path, path, value):
    outputs(tmp_path / "outputs")
    (tmp_path / "latency.json").write_text(json.dumps(put(latency("dense"), path, value)))
    with pytest.raises(
        DataError, match=f"latency.json is not a result of `hipp latency`: '{path.split('.')[0]}"
    ):
        read_sources([tmp_path])


@pytest.mark.parametrize("value", [TRAP, {}, True, -1, 1e308, float("inf"), [TRAP], [0.0], []])
@pytest.mark.parametrize(
    "path", ["serving.runtime", "serving.rounds", "models.dense", "models.dense.prefill_ms"]
)
def test_served_times_of_other_types_and_sizes_are_refused(tmp_path, path, value):
    if path == "serving.runtime" and value == TRAP:
        value = 7
    outputs(tmp_path / "outputs")
    (tmp_path / "served.json").write_text(json.dumps(put(served("dense"), path, value)))
    with pytest.raises(
        DataError, match=f"served.json is not a result of .*: '{path.split('.')[0]}"
    ):
        read_sources([tmp_path])


@pytest.mark.parametrize("value", [[1, 2], ["1"], [-1], 7, [1.5]])
def test_captions_of_other_types_are_refused(tmp_path, value):
    scores = chair("dense", dict.fromkeys(("named", "wrong", "found", "there"), [1]))
    put_chair(tmp_path, put(scores, "counts.wrong", value))
    with pytest.raises(DataError, match="scores.json is damaged: 'counts"):
        read_sources([tmp_path])


@pytest.mark.parametrize("value", [[], {}, 7, None, float("nan")])
@pytest.mark.parametrize(
    "path", ["model", "model_hash", "data", "predictions", "metrics.vlmeval.random.accuracy"]
)
def test_results_of_other_types_are_refused(tmp_path, path, value):
    folder = outputs(tmp_path)
    if path.startswith("metrics") and value == 7:
        value = 100.5
    (folder / "model0/POPE/results.json").write_text(json.dumps(put(record(), path, value)))
    with pytest.raises(DataError, match=f"results.json is damaged: '{path}'"):
        read_sources([folder])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planner": "/etc"}, "its planner '/etc' leads out of the folder"),
        ({"planner": "../x"}, "its planner '../x' leads out of the folder"),
        ({"commands": [TRAP, 7]}, "'commands.1'"),
        ({"seeds": {}}, "'seeds'"),
        (
            {
                "entries": [
                    {
                        "name": "x",
                        "preference": None,
                        "plan": "{",
                        "reward": None,
                        "parameters": 1,
                        "records": {},
                    }
                ]
            },
            "the plan of 'x'",
        ),
        (
            {
                "entries": [
                    {
                        "name": "x",
                        "preference": None,
                        "plan": None,
                        "parameters": 1,
                        "records": {},
                        "reward": {"utility": "1", "robustness": 1.0, "compression": 1.0},
                    }
                ]
            },
            "'entries.0.reward.utility'",
        ),
    ],
)
def test_summaries_are_checked(tmp_path, changes, message):
    data = {"entries": [], "commands": [], "seeds": [], "planner": None} | changes
    (tmp_path / "summary.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=f"summary.json is damaged: .*{message}"):
        read_sources([tmp_path])


def test_files_that_never_end_or_nest_too_deeply_are_refused(tmp_path):
    folder = outputs(tmp_path)
    file = folder / "model0/POPE/results.json"
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match="results.json is damaged: .* is not valid JSON"):
        read_sources([folder])
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="results.json is damaged: .* is a pipe or a device"):
        read_sources([folder])


def test_a_report_has_a_largest_size(tmp_path):
    with pytest.raises(DataError, match="65 evaluated models; a report holds 64"):
        read_sources([outputs(tmp_path, tuple(f"m{n}" for n in range(65)))])
