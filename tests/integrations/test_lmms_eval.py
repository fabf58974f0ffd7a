"""lmms-eval for real: our model and tasks through its command line, equal to the `vlmeval` path
answer by answer.

`make test-lmms-eval` installs it; elsewhere the tests that need it are skipped.
"""

import json
import os
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
from command import hipp
from plans import random_plan
from vlm_tables import write_tsv

from hipp_ext import prune, save_pruned, testbed
from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.integrations.lmms_eval import TASKS, _with_tasks, _without_data, main, tasks_path

INSTALLED = find_spec("lmms_eval") is not None
runs = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed: make test-lmms-eval")
N, DATA = 32, "LMUData"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """data/ with the first questions of the testbed's test split, the models dense/ and pruned/."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    testbed.export(folder / "all", splits=("test",), n=N)
    (folder / "all/test").rename(folder / "data")
    model, processor = testbed.load()
    save_pruned(prune(model, random_plan(model, 0.15)), folder / "pruned", processor)
    model.save_pretrained(folder / "dense")
    processor.save_pretrained(folder / "dense")
    return folder


@pytest.fixture(scope="module")
def by_lmms_eval(place) -> dict:
    """What the command line leaves: results; task -> index -> answer."""
    code = main(
        [
            *("--model", "hipp", "--model_args", f"pretrained={place / 'pruned'},dtype=float32"),
            *("--tasks", "hipp_pope,hipp_scienceqa", "--lmu-data", str(place / "data")),
            *("--batch_size", "8", "--device", "cpu"),
            *("--output_path", str(place / "out"), "--log_samples"),
        ]
    )
    assert code == 0
    results = json.loads(next((place / "out").rglob("*_results.json")).read_text())
    samples = {}
    for task in (
        "hipp_pope",
        "hipp_scienceqa",
    ):  # the testbed's index counts from 0, as doc_id does
        lines = next((place / "out").rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
        samples[task] = {str(s["doc_id"]): s["filtered_resps"] for s in map(json.loads, lines)}
    return {"results": results["results"], "samples": samples}


@pytest.fixture(scope="module")
def by_vlmeval(place) -> dict:
    """POPE and ScienceQA_TEST as the `vlmeval` command scores them."""
    from hipp_ext.integrations.vlmevalkit import evaluate

    records = evaluate(
        place / "pruned",
        ["POPE", "ScienceQA"],
        lmu_data=place / "data",
        work_dir=place / "vlmeval",
        batch_size=8,
        device="cpu",
        dtype="float32",
        progress=False,
    )
    return {record.data: record for record in records}


def manager():
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks_path()), include_defaults=False)


def evaluated(monkeypatch, place: Path, model: str, arguments: str, **options) -> dict[str, str]:
    """Index -> answer to the first questions of POPE, by lmms-eval called from a script."""
    from lmms_eval.evaluator import simple_evaluate

    monkeypatch.setenv(DATA, str(place / "data"))
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["hipp_pope"],
        device="cpu",
        limit=8,
        task_manager=manager(),
        **options,
    )
    return {str(s["doc_id"]): s["filtered_resps"][0] for s in found["samples"]["hipp_pope"]}


@pytest.fixture(scope="module")
def model(place):
    from hipp_ext.integrations.lmms_eval_host import HippLMM

    return HippLMM(str(place / "pruned"), device="cpu", dtype="float32", batch_size="3")


# ------------------------------------------------------------------------------- the same numbers


@runs
@pytest.mark.parametrize(
    ("task", "data"), [("hipp_pope", "POPE"), ("hipp_scienceqa", "ScienceQA_TEST")]
)
def test_answers_equal_the_vlmeval_path_one_by_one(by_lmms_eval, by_vlmeval, task, data):
    lines = Path(by_vlmeval[data].predictions).read_text().splitlines()
    theirs = {entry["index"]: entry["prediction"] for entry in map(json.loads, lines)}
    ours = by_lmms_eval["samples"][task]
    assert ours == theirs and len(ours) == N and len(set(ours.values())) > 1


@runs
def test_scores_equal_the_vlmeval_path(by_lmms_eval, by_vlmeval):
    found, record = by_lmms_eval["results"]["hipp_pope"], by_vlmeval["POPE"].metrics
    for rule in ("vlmeval", "official"):
        for split in ("overall", "random", "popular", "adversarial"):
            for metric in ("f1", "accuracy", "yes_rate"):
                expected = record[rule][split][metric]
                assert 100 * found[f"{rule}_{metric}_{split},none"] == pytest.approx(expected)
        error = found[f"{rule}_f1_se,none"]
        assert error and 100 * error == pytest.approx(record[rule]["overall"]["f1_se"])
    found = by_lmms_eval["results"]["hipp_scienceqa"]
    record = by_vlmeval["ScienceQA_TEST"].metrics["accuracy"]["overall"]
    for metric in ("accuracy", "unknown_rate"):
        assert 100 * found[f"{metric},none"] == pytest.approx(record[metric])


@runs
def test_batch_size_changes_no_answer(by_lmms_eval, place, monkeypatch):
    arguments = f"pretrained={place / 'pruned'},dtype=float32"
    alone = evaluated(monkeypatch, place, "hipp", arguments, batch_size=1)
    together = by_lmms_eval["samples"]["hipp_pope"]
    assert len(alone) == 8 and alone.items() <= together.items()


@runs
def test_lmms_evals_own_models_take_the_tasks_too(place, monkeypatch):
    dense = f"pretrained={place / 'dense'}"
    theirs = evaluated(monkeypatch, place, "llava_hf", f"{dense},device_map=cpu,dtype=float32")
    assert evaluated(monkeypatch, place, "hipp", f"{dense},dtype=float32") == theirs
    assert len(set(theirs.values())) > 1


@runs
def test_lmms_eval_finds_the_model_by_its_entry_point():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from hipp_ext.integrations.lmms_eval_host import HippLMM

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("hipp") is HippLMM


@runs
@pytest.mark.parametrize("name", ["dummy", "hipp"])
def test_models_get_requests_in_the_form_that_they_take(place, monkeypatch, name):
    monkeypatch.setenv(DATA, str(place / "data"))
    (task,) = manager().load_task_or_group("hipp_pope", "chat").values()
    task.args = Namespace(model=name, force_simple=False)
    task.build_all_requests(limit=2, rank=0, world_size=1)
    context, first, second, *rest = task.instances[1].args
    doc = task.dataset["test"][1]
    assert context == doc["prompt"] and rest == [1, "hipp_pope", "test"]
    if name == "hipp":  # a chat model
        ((turn,), settings) = first(doc), second
        assert [part["type"] for part in turn["content"]] == ["image", "text"]
    else:
        settings, (picture,) = first, second(doc)
        assert picture.size == (40, 40)
    assert settings["max_new_tokens"] == 16 and settings["until"] == []


# ------------------------------------------------------------------------------------ other tasks


def request(model, messages: list, **settings):
    """A request of lmms-eval for a chat, asked of `model`."""
    from lmms_eval.api.instance import Instance

    known = model.task_dict.setdefault("own", {"test": []})["test"]
    known.append(messages)
    arguments = ("", lambda chat: chat, settings, len(known) - 1, "own", "test")
    metadata = {"task": "own", "doc_id": len(known) - 1, "repeats": 1}
    return Instance("generate_until", arguments, 0, metadata=metadata)


def turn(*parts, role="user") -> dict:
    kinds = {str: "text"}
    content = [
        {"type": kind, "text" if kind == "text" else "url": part}
        for part, kind in ((part, kinds.get(type(part), "image")) for part in parts)
    ]
    return {"role": role, "content": content}


@runs
def test_chats_with_and_without_pictures_are_answered_in_their_order(model):
    asked = testbed.questions("POPE", "test", 8)
    chats = [[turn(q.image, q.prompt)] for q in asked] + [[turn(q.prompt)] for q in asked[:2]]
    chats += [[turn(q.image, "Describe the image.")] for q in asked[::4]]
    chats.append([turn(asked[0].image, "Describe the image."), turn("cup", role="assistant")])
    chats[-1].append(turn(asked[1].prompt))
    chats = chats[::2] + chats[1::2]  # so that batches mix them
    answers = model.generate_until([request(model, chat, max_new_tokens=3) for chat in chats])
    alone = [model.generate_until([request(model, chat, max_new_tokens=3)])[0] for chat in chats]
    assert answers == alone and len(set(answers)) > 2


@runs
def test_settings_of_a_task(model):
    chat = [turn(testbed.questions("POPE", "test", 1)[0].image, "Describe the image.")]
    short, long = (
        model.generate_until([request(model, chat, max_new_tokens=n)])[0] for n in (1, 4)
    )
    assert long.startswith(short) and len(long.split()) > len(short.split()) == 1
    warm = [request(model, chat, max_new_tokens=8, temperature=50.0, top_p=1.0) for _ in range(3)]
    assert len(set(model.generate_until(warm))) == 3
    mixed = [request(model, chat, max_new_tokens=n, until=["\n"]) for n in (1, 4, 1)]
    assert model.generate_until(mixed) == [short, long, short]


@runs
def test_what_it_does_not_take(model):
    clip = {"role": "user", "content": [{"type": "video", "url": "clip.mp4"}]}
    with pytest.raises(DataError, match="takes pictures and text; a question has a video or sound"):
        model.generate_until([request(model, [clip])])
    number = {"role": "user", "content": [{"type": "image", "url": 3}]}
    with pytest.raises(DataError, match="a picture is a int; images, bytes and paths are known"):
        model.generate_until([request(model, [number])])
    with pytest.raises(DataError, match="no tasks by log-likelihoods"):
        model.loglikelihood([])
    with pytest.raises(DataError, match="no tasks of several rounds"):
        model.generate_until_multi_round([])


# -------------------------------------------------------------------------------------- refusals


@runs
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dtype=float32", "needs a folder"),
        ("pretrained=nowhere", "nowhere is not a folder"),
        ("pretrained={pruned},dtype=int4", "dtype=int4: one of auto, float32, bfloat16, float16"),
        ("pretrained={pruned},trust_remote_code=True", "does not take trust_remote_code: its arg"),
        ("pretrained={pruned},batch_size=auto", "batch_size=auto: a whole number above 0"),
    ],
)
def test_model_arguments_are_checked(place, arguments, message):
    from hipp_ext.integrations.lmms_eval_host import HippLMM

    with pytest.raises(CheckpointError, match=message):
        HippLMM.create_from_arg_string(arguments.format(pruned=place / "pruned"), {"device": "cpu"})


@runs
def test_tables_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA, str(tmp_path))
    with pytest.raises(DataError, match="ScienceQA_VAL: there is no .*ScienceQA_VAL.tsv"):
        manager().load_task_or_group("hipp_scienceqa_val", "chat")
    row = {"index": 0, "question": "?", "image_path": "a.png", "answer": "A", "category": "random"}
    write_tsv(tmp_path / "POPE.tsv", [row])
    with pytest.raises(DataError, match="POPE"):
        manager().load_task_or_group("hipp_pope", "chat")


# ------------------------------------------------------------------------------------ the launcher


@runs
def test_exit_codes_tell_what_went_wrong(capfd, place, monkeypatch):
    before, variables = list(sys.argv), dict(os.environ)
    here = ("--lmu-data", str(place / "data"), "--include_path", str(tasks_path()))
    nowhere = ("--model", "hipp", "--model_args", "pretrained=nowhere", "--tasks", "hipp_pope")
    assert main([*nowhere, *here]) == 2
    assert "hipp lmms-eval: nowhere is not a folder" in capfd.readouterr().err
    # What fails in lmms-eval: it prints a traceback, and its own command would exit with 0.
    assert main(["--model", "dummy", "--tasks", "nonsense", *here]) == 1
    assert "Tasks not found: nonsense" in capfd.readouterr().err
    assert main(["eval", "--help"]) == 0 and "--include_path" in capfd.readouterr().out
    assert main(["--no-such-option"]) == main(["--lmu-data"]) == 2
    assert "hipp lmms-eval: --lmu-data needs a folder" in capfd.readouterr().err
    assert sys.argv == before and os.environ.get(DATA) == variables.get(DATA)


def test_our_tasks_are_added_to_evaluations_only():
    ours = ["--include_path", str(tasks_path())]
    for run in (["--tasks", "x"], ["eval", "--tasks", "x"]):
        assert _with_tasks(run) == [*run, *ours]
    for own in (
        *([], ["eval"], ["tasks", "list"], ["--help"], ["eval", "--help"]),
        *(["--tasks", "x", "--include_path=y"], ["--config", "own.yaml"]),
    ):
        assert _with_tasks(own) == own
    assert sorted(file.stem for file in tasks_path().glob("*.yaml")) == sorted(TASKS)
    assert hipp("tasks-path", "lmms-eval").strip() == str(tasks_path())


def test_our_option_is_not_passed_on():
    assert _without_data(["--tasks", "x"]) == (["--tasks", "x"], None)
    for own in (["--lmu-data", "d"], ["--lmu-data=d"], ["--lmu_data", "d"]):
        assert _without_data(["eval", *own, "--tasks", "x"]) == (["eval", "--tasks", "x"], "d")


def test_without_lmms_eval_the_extra_is_named():
    code = (
        "import sys; sys.modules['lmms_eval'] = None; "
        "from hipp_ext.integrations.lmms_eval import main; sys.exit(main(['--tasks', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    wanted = 'Install it with: pip install "hipp-ext[lmms-eval]"'
    assert done.returncode == 2 and wanted in done.stderr
