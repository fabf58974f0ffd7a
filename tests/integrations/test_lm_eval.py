"""lm-eval for real: our tasks and model through its command line, equal to the `vlmeval` path
answer by answer.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import build
from vlm_tables import WORDS, pope_rows, scienceqa_rows, write_tsv

from hipp_ext import load_pruned, prune, save_pruned, testbed
from hipp_ext.budget import keep_counts
from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.evals.pope import pope_scores, split_rates
from hipp_ext.evals.tables import read_table
from hipp_ext.groups import find_groups
from hipp_ext.integrations.lm_eval import TASKS, _with_tasks, main, register, tasks_path
from hipp_ext.scorers import Magnitude
from hipp_ext.units import plan_from_counts

N = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """data/ with the first questions of the testbed's test split, and the model pruned/."""
    folder = tmp_path_factory.mktemp("lm_eval")
    testbed.export(folder / "all", splits=("test",), n=N)
    (folder / "all/test").rename(folder / "data")
    model, processor = testbed.load()
    groups = find_groups(model)
    counts = keep_counts(groups, [0.2 * (i % 3) for i in range(len(groups))], 0.15)
    save_pruned(
        prune(model, plan_from_counts(groups, counts, Magnitude()(model))),
        folder / "pruned",
        processor,
    )
    return folder


@pytest.fixture(scope="module")
def by_lm_eval(place) -> dict:
    """What the command line leaves: results and samples."""
    code = main(
        [
            "--model",
            "hipp",
            "--model_args",
            f"pretrained={place / 'pruned'},dtype=float32",
            "--tasks",
            "hipp_pope,hipp_scienceqa",
            "--metadata",
            f"lmu_data={place / 'data'}",
            "--apply_chat_template",
            "--batch_size",
            "8",
            "--device",
            "cpu",
            "--output_path",
            str(place / "out"),
            "--log_samples",
        ]
    )
    assert code == 0
    results = json.loads(next((place / "out").rglob("results_*.json")).read_text())
    samples = {
        task: {
            row["doc"]["index"]: row
            for row in map(json.loads, next((place / "out").rglob(f"samples_{task}_*")).open())
        }
        for task in ("hipp_pope", "hipp_scienceqa")
    }
    return {"results": results, "samples": samples}


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


def evaluated(
    place: Path,
    *,
    batch_size: int,
    limit: int,
    tasks: tuple[str, ...] = ("hipp_pope",),
    **metadata: str,
) -> dict:
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    given = {"lmu_data": str(place / "data"), **metadata}
    manager = TaskManager(include_path=str(tasks_path()), include_defaults=False, metadata=given)
    arguments = f"pretrained={place / 'pruned'},dtype=float32"
    return lm_eval.simple_evaluate(
        model="hipp",
        model_args=arguments,
        tasks=list(tasks),
        batch_size=batch_size,
        device="cpu",
        limit=limit,
        task_manager=manager,
        apply_chat_template=True,
    )


# --------------------------------------------------------------------------------------------------
# - the same numbers


@pytest.mark.parametrize(
    ("task", "data"), [("hipp_pope", "POPE"), ("hipp_scienceqa", "ScienceQA_TEST")]
)
def test_answers_equal_the_vlmeval_path_one_by_one(by_lm_eval, by_vlmeval, task, data):
    lines = Path(by_vlmeval[data].predictions).read_text().splitlines()
    theirs = {entry["index"]: entry["prediction"] for entry in map(json.loads, lines)}
    ours = {index: row["filtered_resps"][0] for index, row in by_lm_eval["samples"][task].items()}
    assert ours == theirs and len(ours) == N and len(set(ours.values())) > 1


def test_pope_equals_the_vlmeval_path(by_lm_eval, by_vlmeval):
    found, record = by_lm_eval["results"]["results"]["hipp_pope"], by_vlmeval["POPE"].metrics
    for rule in ("vlmeval", "official"):
        for split in ("overall", "random", "popular", "adversarial"):
            for metric in ("f1", "accuracy", "yes_rate"):
                assert 100 * found[f"{rule}_{metric}_{split},none"] == pytest.approx(
                    record[rule][split][metric]
                )
        for metric in ("f1_se", "accuracy_se"):
            assert (
                100 * found[f"{rule}_{metric},none"]
                == pytest.approx(record[rule]["overall"][metric])
                and found[f"{rule}_{metric},none"]
            )
    assert 100 * found["vlmeval_unknown_rate,none"] == pytest.approx(
        record["vlmeval"]["overall"]["unknown_rate"]
    )


def test_scienceqa_equals_the_vlmeval_path(by_lm_eval, by_vlmeval):
    found, record = (
        by_lm_eval["results"]["results"]["hipp_scienceqa"],
        by_vlmeval["ScienceQA_TEST"].metrics["accuracy"],
    )
    assert 100 * found["accuracy,none"] == pytest.approx(record["overall"]["accuracy"])
    assert 100 * found["unknown_rate,none"] == pytest.approx(record["overall"]["unknown_rate"])


def test_the_model_is_the_folder(by_lm_eval, by_vlmeval, place):
    config = by_lm_eval["results"]["config"]
    small = load_pruned(place / "pruned")
    assert config["model_num_parameters"] == sum(p.numel() for p in small.parameters())
    assert config["model_sha"] == by_vlmeval["POPE"].model_hash


def test_batch_size_changes_no_answer(place, by_lm_eval):
    alone = evaluated(place, batch_size=1, limit=8)["samples"]["hipp_pope"]
    together = by_lm_eval["samples"]["hipp_pope"]
    assert [row["filtered_resps"][0] for row in alone] == [
        together[row["doc"]["index"]]["filtered_resps"][0] for row in alone
    ]


def test_rates_of_a_split_are_those_of_pope_scores():
    said, labels, images = ["yes", "no", "unknown", "yes"], ["Yes", "Yes", "No", "No"], list("aabb")
    scores = pope_scores(["yes", "no", "", "yes"], labels, ["random"] * 4, images)
    whole = vars(scores["vlmeval"]["random"])
    assert split_rates(said, labels, images, errors=True) | {"n": 4, "images": 2} == whole
    assert split_rates(said, labels, images).items() <= whole.items()


def test_stock_models_take_the_tasks_too(place):
    """`lm_eval --include_path $(hipp tasks-path)` without the launcher: only the tasks are ours."""
    import lm_eval
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from lm_eval.tasks import TaskManager

    model, _ = testbed.load()
    manager = TaskManager(
        include_path=str(tasks_path()),
        include_defaults=False,
        metadata={"lmu_data": str(place / "data")},
    )
    stock = HFMultimodalLM(pretrained=model, batch_size=4)
    found = lm_eval.simple_evaluate(
        model=stock, tasks=["hipp_pope"], limit=12, task_manager=manager, apply_chat_template=True
    )
    assert found["results"]["hipp_pope"]["official_accuracy_overall,none"] > 0.8


def test_a_split_that_is_not_asked_is_nan(place, tmp_path):
    rows = [row | {"category": "random"} for row in pope_rows()]
    file = write_tsv(tmp_path / "mine.tsv", rows)
    found = evaluated(place, batch_size=4, limit=4, tsv=str(file))["results"]["hipp_pope"]
    assert found["official_f1_popular,none"] != found["official_f1_popular,none"]
    assert found["official_yes_rate_random,none"] == found["official_yes_rate_overall,none"]


# --------------------------------------------------------------------------------------------------
# ------ language models


def test_a_pruned_language_model_scores_text_tasks(tmp_path):
    """`--model hipp` on a folder without pictures: log-likelihoods are the pruned model's own."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    model = build("llama")
    groups = find_groups(model)
    plan = plan_from_counts(
        groups, keep_counts(groups, [0.1, 0.3] * (len(groups) // 2), 0.3), Magnitude()(model)
    )
    save_pruned(prune(model, plan), tmp_path / "small", tokenizer)
    register()
    made = get_model("hipp").create_from_arg_string(
        f"pretrained={tmp_path / 'small'}", {"device": "cpu", "batch_size": 2}
    )
    assert type(made).__name__ == "HippTextLM"
    pairs = [("is there a", " red square"), ("not", " a blue square")]
    said = made.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    small = load_pruned(tmp_path / "small")
    for (context, continuation), (value, _) in zip(pairs, said, strict=True):
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        n = len(tokenizer(continuation)["input_ids"])
        with torch.no_grad():
            logs = small(ids).logits[0, -n - 1 : -1].log_softmax(-1)
        assert value == pytest.approx(float(logs.gather(1, ids[0, -n:, None]).sum()), abs=1e-4)


# --------------------------------------------------------------------------------------------------
# --------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dtype=float32", "needs a folder"),
        ("pretrained=nowhere", "nowhere is not a folder"),
        (
            "pretrained={pruned},dtype=int4",
            "dtype=int4: one of auto, float32, bfloat16, float16 is needed",
        ),
        ("pretrained={pruned},trust_remote_code=True", "does not take trust_remote_code"),
        ("pretrained={pruned},peft=x,gguf_file=y", "does not take peft, gguf_file"),
    ],
)
def test_model_arguments_are_checked(place, arguments, message):
    from hipp_ext.integrations.lm_eval_host import HippLM

    with pytest.raises(CheckpointError, match=message):
        HippLM.create_from_arg_string(arguments.format(pruned=place / "pruned"), {"device": "cpu"})


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_no_code_of_a_folder_is_run_and_nobody_is_asked(place, tmp_path, monkeypatch, file):
    from hipp_ext.integrations.lm_eval_host import HippLM

    folder, trap = shutil.copytree(place / "pruned", tmp_path / "m"), tmp_path / "executed"
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n")
    own = {
        "auto_map": dict.fromkeys(
            ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoModelForImageTextToText"),
            "own.Own",
        )
    }
    kinds = (
        {"processor_class": "Own", "tokenizer_class": "Own"}
        if file != "config.json"
        else {"model_type": "own"}
    )
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | own | kinds))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    try:
        HippLM.create_from_arg_string(f"pretrained={folder}", {"device": "cpu"})
    except CheckpointError as error:
        assert "cannot be loaded" in str(error)
    else:
        assert file == "tokenizer_config.json"  # the only one that names code that is not needed
    assert not trap.exists()


def test_chats_begin_once_and_decoding_is_plain(place, tmp_path):
    """A template that writes the beginning-of-text token, a tokenizer that adds it, and settings
    that change logits.
    """
    from PIL import Image
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoProcessor

    from hipp_ext.integrations.lm_eval_host import HippLM

    folder = shutil.copytree(place / "pruned", tmp_path / "m")
    processor = AutoProcessor.from_pretrained(folder)
    bos, number = processor.tokenizer.bos_token, processor.tokenizer.bos_token_id
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, number)]
    )
    processor.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        '{"repetition_penalty": 9.0, "min_new_tokens": 3, "eos_token_id": 2}'
    )
    model = HippLM.create_from_arg_string(
        f"pretrained={folder},trust_remote_code=None", {"device": "cpu"}
    )
    chats = [
        model.apply_chat_template([{"role": "user", "content": f"<image>{text}"}])
        for text in ("Is there a kite?", "Why?")
    ]
    batch = model.tok_batch_multimodal_encode(chats, [[Image.new("RGB", (32, 32))]] * 2)
    assert (batch["input_ids"] == number).sum(1).tolist() == [1, 1] and batch["attention_mask"][
        1, 0
    ] == 0
    assert model.processor.tokenizer("x")["input_ids"][0] == number  # else nothing was tested
    settings = model.model.generation_config
    assert (settings.repetition_penalty, settings.min_new_tokens, settings.eos_token_id) == (
        None,
        None,
        2,
    )


def test_pictures_need_the_chat_template(place):
    from lm_eval.api.instance import Instance

    from hipp_ext.integrations.lm_eval_host import HippLM

    model = HippLM.create_from_arg_string(f"pretrained={place / 'pruned'}", {"device": "cpu"})
    asked = Instance("generate_until", {}, ("<image>?", {"until": []}, {"visual": []}), 0)
    with pytest.raises(CheckpointError, match="add --apply_chat_template"):
        model.generate_until([asked])


def test_data_is_checked(tmp_path, monkeypatch):
    from hipp_ext.integrations import lm_eval_data

    monkeypatch.setenv("LMUData", str(tmp_path))
    for name in ("POPE", "ScienceQA_VAL"):
        with pytest.raises(DataError, match=f"{name}: there is no .*{name}.tsv"):
            lm_eval_data.load(name, pretrained="x")  # lm-eval passes the model's arguments along
    file = write_tsv(tmp_path / "x.tsv", scienceqa_rows())
    with pytest.raises(DataError, match="answer 'A'; it must be Yes or No"):
        lm_eval_data.load("POPE", tsv=str(file))
    with pytest.raises(DataError, match="there is no file"):
        lm_eval_data.load("POPE", tsv="nowhere.tsv")
    assert len(lm_eval_data.load("ScienceQA_TEST", tsv=str(file))["test"]) == 6


def test_pictures_go_elsewhere_when_the_data_cannot_be_written(tmp_path, monkeypatch):
    from hipp_ext.integrations import lm_eval_data

    file = write_tsv(tmp_path / "POPE.tsv", pope_rows())
    monkeypatch.setattr(lm_eval_data.os, "access", lambda *_: False)
    documents = lm_eval_data.load("POPE", tsv=str(file))["test"]
    table = read_table(file, tmp_path / "images")
    assert not documents[0]["image_path"].startswith(str(tmp_path)) and documents["image"] == list(
        table.images
    )
    assert lm_eval_data.doc_to_image(documents[0])[0].size == (40, 32)


def test_bad_input_and_help_of_the_launcher(capsys, tmp_path):
    before = list(sys.argv)
    assert (
        main(
            [
                "run",
                "--model",
                "hipp",
                "--model_args",
                "pretrained=nowhere",
                "--tasks",
                "hipp_pope",
                "--include_path",
                str(tasks_path()),
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    assert "hipp lm-eval: nowhere is not a folder" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "lm-eval run" in capsys.readouterr().out
    assert main(["run", "--no-such-option"]) == 2
    assert sys.argv == before
    assert sorted(file.stem for file in tasks_path().glob("*.yaml")) == sorted(TASKS)


def test_our_tasks_are_added_to_runs_only():
    ours = ["--include_path", str(tasks_path())]
    assert (
        _with_tasks(["run", "--tasks", "x"])
        == _with_tasks(["--tasks", "x"])
        == ["run", "--tasks", "x", *ours]
    )
    for own in (
        ["ls", "tasks"],
        [],
        ["--help"],
        ["run", "--help"],
        ["run", "--include_path=y"],
        ["-C", "own.yaml"],
    ):
        assert _with_tasks(own) == own


def test_without_lm_eval_the_extra_is_named():
    code = (
        "import sys; sys.modules['lm_eval'] = None; "
        "from hipp_ext.integrations.lm_eval import main; sys.exit(main(['--tasks', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (
        done.returncode == 2 and 'Install it with: pip install "hipp-ext[lm-eval]"' in done.stderr
    )
