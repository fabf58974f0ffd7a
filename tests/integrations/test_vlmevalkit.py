"""`vlmeval` end to end: the real VLMEvalKit, a real tiny LLaVA, files as users have them."""

import json
import logging
import os
import resource
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from vlm_tables import picture, pope_rows, save_llava, scienceqa_rows, write_tsv

from hipp_ext import prune, save_pruned, testbed
from hipp_ext.budget import keep_counts
from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.evals.hipp_vlm import HippVLM, check_model_folder
from hipp_ext.evals.prediction_log import PredictionLog
from hipp_ext.evals.tables import read_table
from hipp_ext.groups import find_groups
from hipp_ext.integrations.vlmevalkit import _import_vlmeval, evaluate, main, register
from hipp_ext.scorers import Magnitude
from hipp_ext.units import plan_from_counts

torch.set_num_threads(1)
QUIET = {"device": "cpu", "progress": False}


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def lmu(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lmu")
    write_tsv(folder / "POPE.tsv", pope_rows())
    write_tsv(folder / "ScienceQA_TEST.tsv", scienceqa_rows())
    return folder


@pytest.fixture(scope="session")
def records(llava, lmu, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    return evaluate(
        llava, ["POPE", "ScienceQA"], lmu_data=lmu, work_dir=work, batch_size=4, **QUIET
    )


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The size of each batch that a model is asked."""
    sizes, generate = [], HippVLM.generate_batch

    def counted(self, messages):
        sizes.append(len(messages))
        return generate(self, messages)

    monkeypatch.setattr(HippVLM, "generate_batch", counted)
    return sizes


def answers(record) -> dict:
    lines = Path(record.predictions).read_text().splitlines()
    return {entry["index"]: entry["prediction"] for entry in map(json.loads, lines)}


# -------------------------------------------------------------------------------------------------
# the numbers


def test_numbers_equal_vlmevalkits_own_loop(records, llava, lmu, tmp_path, monkeypatch):
    """The same model through VLMEvalKit's build_dataset, infer_data_job and evaluate."""
    monkeypatch.setenv("LMUData", str(lmu))
    monkeypatch.setenv("PRED_FORMAT", "tsv")
    vlmeval = _import_vlmeval()
    register({"tiny": llava})
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import get_pred_file_path

    model = vlmeval.config.supported_VLM["tiny"](device="cpu")
    for record, name in zip(records, ("POPE", "ScienceQA"), strict=True):
        dataset = vlmeval.dataset.build_dataset(name)
        infer_data_job(model, work_dir=str(tmp_path), model_name="run", dataset=dataset)
        file = get_pred_file_path(str(tmp_path), "run", name)
        frame = dataset.evaluate(file, model="exact_matching").set_index("split")
        scale = 1 if name == "POPE" else 100
        expected = {
            split: {k: scale * v for k, v in row.items()}
            for split, row in frame.to_dict("index").items()
        }
        assert record.metrics["vlmevalkit"].keys() == expected.keys()
        for split, row in expected.items():
            assert record.metrics["vlmevalkit"][split] == pytest.approx(row)
        theirs = vlmeval.smp.load(file)
        said = dict(zip(theirs["index"].astype(str), theirs["prediction"].fillna(""), strict=True))
        assert answers(record) == said
    assert (
        len(set(answers(records[0]).values())) > 2
    )  # a model that always says the same would prove little


def test_our_numbers_equal_vlmevalkits(records):
    pope, scienceqa = records
    theirs = pope.metrics["vlmevalkit"]
    assert set(theirs) == {"Overall", "random", "popular", "adversarial"}
    for split, ours in pope.metrics["vlmeval"].items():
        row = theirs["Overall" if split == "overall" else split]
        assert [ours["f1"], ours["accuracy"], ours["precision"], ours["recall"]] == pytest.approx(
            [row["Overall"], row["acc"], row["precision"], row["recall"]]
        )
    assert pope.metrics["official"]["overall"]["n"] == 20 and pope.n == 12
    ours = {group: own["accuracy"] for group, own in scienceqa.metrics["accuracy"].items()}
    theirs = scienceqa.metrics["vlmevalkit"]["none"]
    assert ours == pytest.approx(
        {
            "overall": theirs["Overall"],
            "category=physics": theirs["physics"],
            "category=biology": theirs["biology"],
        }
    )


def test_record_and_results_file_say_the_same(records):
    for record in records:
        file = Path(record.predictions).parents[1] / "results.json"
        assert (
            file.parent.name == record.data
            and file.parents[1].name == f"tiny-{record.model_hash[:8]}"
        )
        saved = json.loads(file.read_text())
        assert saved == json.loads(json.dumps(vars(record)))
        assert saved["seconds"] > 0 and saved["official_file"] is False
        assert (Path(record.predictions).parent / "vlmevalkit").is_dir()
    assert records[1].data == "ScienceQA_TEST"


def test_batch_size_does_not_change_an_answer(records, llava, lmu, tmp_path):
    one = evaluate(
        llava, ["POPE", "ScienceQA"], lmu_data=lmu, work_dir=tmp_path, batch_size=1, **QUIET
    )
    for a, b in zip(one, records, strict=True):
        assert answers(a) == answers(b)
        assert a.metrics == b.metrics


def test_perfect_answers_score_100(lmu, llava, tmp_path, monkeypatch):
    right = iter(
        [row["answer"] for row in pope_rows()] + [row["answer"] for row in scienceqa_rows()]
    )
    monkeypatch.setattr(
        HippVLM, "generate_batch", lambda self, messages: [next(right) for _ in messages]
    )
    pope, scienceqa = evaluate(
        llava, ["POPE", "ScienceQA"], lmu_data=lmu, work_dir=tmp_path, **QUIET
    )
    for table in (pope.metrics["vlmevalkit"]["Overall"], scienceqa.metrics["vlmevalkit"]["none"]):
        assert set(table.values()) == {100}
    assert (
        pope.metrics["official"]["overall"]["f1"]
        == scienceqa.metrics["accuracy"]["overall"]["accuracy"]
        == 100
    )


ODD = [
    "",
    "NA",
    "a\tb\nYes",
    'say "no"',
    "yes\0",
    "\r\nno",
    "None",
    "1.0",
    "はい yes",
    "No" + "x" * 40000,
    "nan no",
    "'",
]


def test_odd_answers_survive_vlmevalkits_files(llava, lmu, tmp_path, monkeypatch):
    odd = iter([*ODD, "A", "blue", "(B)", "", "The C", "B"])
    monkeypatch.setattr(
        HippVLM, "generate_batch", lambda self, messages: [next(odd) for _ in messages]
    )
    pope, scienceqa = evaluate(
        llava, ["POPE", "ScienceQA"], lmu_data=lmu, work_dir=tmp_path, **QUIET
    )
    ours, theirs = pope.metrics["vlmeval"]["overall"], pope.metrics["vlmevalkit"]["Overall"]
    assert [ours["f1"], ours["accuracy"]] == pytest.approx([theirs["Overall"], theirs["acc"]])
    assert scienceqa.metrics["accuracy"]["overall"]["accuracy"] == 50
    assert scienceqa.metrics["vlmevalkit"]["none"] == {"Overall": 50, "physics": 50, "biology": 50}


def test_questions_without_a_picture_can_be_asked(llava):
    assert isinstance(
        HippVLM(llava, "cpu").generate([{"type": "text", "value": "is there a square ?"}]), str
    )


# ---------------------------------------------------------------------------------------- nothing
# twice, nothing stale


def test_interrupted_run_goes_on(records, llava, lmu, tmp_path, monkeypatch, capsys, asked):
    counted = HippVLM.generate_batch

    def interrupted(self, messages):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return counted(self, messages)

    command = [
        "--data",
        "POPE",
        "--model",
        str(llava),
        "--lmu-data",
        str(lmu),
        "--work-dir",
        str(tmp_path),
        "--batch-size",
        "3",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(HippVLM, "generate_batch", interrupted)
    assert main(command) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert asked == [3, 3]
    monkeypatch.setattr(HippVLM, "generate_batch", counted)
    (log,) = tmp_path.rglob("predictions.jsonl")
    with log.open("ab") as file:
        file.write(b'{"index": "6", "predic')  # what a killed process leaves
    assert main(command) == 0
    assert asked == [3, 3, 3, 3]
    again = evaluate(llava, "POPE", lmu_data=lmu, work_dir=tmp_path, **QUIET)[0]
    assert sum(asked) == 12  # everything was answered: the model is not even loaded
    assert answers(again) == answers(records[0])
    assert again.metrics == records[0].metrics


def test_a_full_disk_costs_only_what_did_not_fit(
    records, llava, lmu, tmp_path, monkeypatch, capsys, asked
):
    """The system refuses the rest of a write, as it does when the disk is full, in the middle of a
    line.
    """
    command = [
        "--data",
        "POPE",
        "--model",
        str(llava),
        "--lmu-data",
        str(lmu),
        "--work-dir",
        str(tmp_path),
        "--batch-size",
        "3",
        "--device",
        "cpu",
    ]
    counted, before = HippVLM.generate_batch, resource.getrlimit(resource.RLIMIT_FSIZE)

    def nearly_full(self, messages):
        said = counted(self, messages)
        if len(asked) == 2:
            (log,) = tmp_path.rglob("predictions.jsonl")
            resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 20, before[1]))
        return said

    monkeypatch.setattr(HippVLM, "generate_batch", nearly_full)
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert (
        "answers could not be written" in said
        and "free some space and run the same command again to continue" in said
    )
    assert not list(tmp_path.rglob("results.json"))
    (log,) = tmp_path.rglob("predictions.jsonl")
    assert log.read_bytes().count(b"\n") == 3 and not log.read_bytes().endswith(
        b"\n"
    )  # half a line is there
    monkeypatch.setattr(HippVLM, "generate_batch", counted)
    assert main(command) == 0
    assert asked == [3, 3, 3, 3, 3]  # the second batch again, and the two that were never asked
    again = evaluate(llava, "POPE", lmu_data=lmu, work_dir=tmp_path, **QUIET)[0]
    assert answers(again) == answers(records[0]) and again.metrics == records[0].metrics


def test_limit_then_all(records, llava, lmu, tmp_path, asked):
    few = evaluate(llava, "POPE", lmu_data=lmu, work_dir=tmp_path, limit=5, **QUIET)[0]
    assert few.n == 5 and few.metrics["vlmeval"]["random"]["n"] == 4
    full = evaluate(llava, "POPE", lmu_data=lmu, work_dir=tmp_path, **QUIET)[0]
    assert sum(asked) == 12 and full.metrics == records[0].metrics


def test_changed_weights_are_asked_again(records, lmu, tmp_path, asked):
    other = save_llava(tmp_path / "tiny", seed=1)
    work = Path(records[0].predictions).parents[3]
    record = evaluate(other, "POPE", lmu_data=lmu, work_dir=work, **QUIET)[0]
    assert sum(asked) == 12
    assert record.predictions != records[0].predictions and answers(record) != answers(records[0])


def test_changed_picture_is_seen(records, llava, tmp_path, asked):
    rows = pope_rows()
    rows[0]["image"] = picture("white", 4)
    write_tsv(tmp_path / "POPE.tsv", rows)
    work = Path(records[0].predictions).parents[3]
    record = evaluate(llava, "POPE", lmu_data=tmp_path, work_dir=work, **QUIET)[0]
    assert sum(asked) == 12 and record.data_hash != records[0].data_hash
    old, new = answers(records[0]), answers(record)
    assert [i for i in old if old[i] != new[i]] and all(old[i] == new[i] for i in old if int(i) > 2)


def test_local_tables_of_both_kinds(records, llava, lmu, tmp_path):
    rows = [{**row, "index": f"q-{row['index']}", "image": picture("red")} for row in pope_rows()]
    mine = write_tsv(tmp_path / "a.tsv", rows)
    choice = shutil.copy(lmu / "ScienceQA_TEST.tsv", tmp_path / "b.tsv")
    yes_no, mcq = evaluate(
        llava, [f"MME_mine={mine}", f"exam={choice}"], work_dir=tmp_path, **QUIET
    )
    assert (
        set(yes_no.metrics) == {"vlmevalkit", "vlmeval", "official"}
        and yes_no.official_file is None
    )
    assert set(answers(yes_no)) == {f"q-{n}" for n in range(12)}
    assert yes_no.metrics["vlmeval"]["overall"]["f1_se"] is None  # one picture
    assert mcq.metrics == records[1].metrics and (mcq.data, yes_no.data) == ("exam", "MME_mine")


# --------------------------------------------------------------------------------------------------
# ------ the command


def test_several_models_and_data_in_one_command(llava, lmu, tmp_path, capsys, monkeypatch):
    other = save_llava(tmp_path / "other", seed=2)
    monkeypatch.setenv("LMUData", str(lmu))
    code = main(
        [
            "--data",
            "POPE",
            "ScienceQA_TEST",
            "--model",
            str(llava),
            str(other),
            "--work-dir",
            str(tmp_path / "out"),
            "--limit",
            "4",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--verbose",
        ]
    )
    out, err = capsys.readouterr()
    assert "POPE.tsv is not the published file" in err
    assert code == 0
    assert len(list((tmp_path / "out").glob("*/*/results.json"))) == 4
    for text in (
        "VLMEvalKit's rule",
        "authors' rule",
        "F1 adversarial",
        "accuracy category=physics",
        "±",
    ):
        assert text in out
    assert "other POPE 3: " in out  # --verbose


def test_one_failing_model_costs_exit_code_1_and_not_the_other_numbers(
    llava, lmu, tmp_path, capsys
):
    broken = shutil.copytree(llava, tmp_path / "broken")
    (broken / "chat_template.jinja").unlink()
    code = main(
        [
            "--data",
            "POPE",
            "--model",
            str(broken),
            str(llava),
            "--lmu-data",
            str(lmu),
            "--work-dir",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    out, err = capsys.readouterr()
    assert code == 1 and "has no chat template" in err and "F1 overall" in out
    assert len(list((tmp_path / "out").glob("*/*/results.json"))) == 1


@pytest.mark.parametrize(
    "extra, message",
    [
        (
            ["--data", "POOP"],
            "unknown data set 'POOP'. Known: POPE, RePOPE, MME, AMBER, HallusionBench, "
            "ScienceQA_VAL, ScienceQA_TEST, ScienceQA;",
        ),
        (["--data", "ScienceQA_VAL"], "hipp testbed export"),
        (["--data", "POPE", "--model", "nowhere"], "nowhere is not a folder"),
        (["--data", "POPE", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--data", "POPE", "--limit", "0"], "0 is not 1 or more"),
        (["--data", "POPE", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["--data"], "expected at least one argument"),
        ([], "required: --data"),
    ],
)
def test_bad_usage_is_exit_code_2(llava, lmu, tmp_path, capsys, extra, message):
    code = main(
        ["--model", str(llava), "--lmu-data", str(lmu), "--work-dir", str(tmp_path), *extra]
    )
    assert code == 2 and message in capsys.readouterr().err


def test_help_has_examples_and_exit_code_0(capsys):
    assert main(["--help"]) == 0
    assert "vlmeval --data POPE ScienceQA_TEST --model ./dense ./pruned" in capsys.readouterr().out


FRESH = """
import logging, pathlib, ssl, sys
context, handlers = ssl._create_default_https_context, list(logging.getLogger().handlers)
from hipp_ext.integrations.vlmevalkit import main
assert "vlmeval" not in sys.modules, "imported too early"
code = main(sys.argv[1:])
assert "vlmeval" in sys.modules
assert ssl._create_default_https_context is context, "TLS verification is off"
assert logging.getLogger().handlers == handlers and logging.root.manager.disable == 0
assert not (pathlib.Path.home() / "LMUData").exists()
sys.exit(code)
"""


def test_a_fresh_process_is_left_as_it_was(llava, lmu, tmp_path):
    env = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env.pop("LMUData", None)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FRESH,
            "--data",
            f"POPE={lmu / 'POPE.tsv'}",
            "--model",
            str(llava),
            "--limit",
            "2",
            "--work-dir",
            str(tmp_path / "out"),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert ".env" not in done.stderr and "F1 overall" in done.stdout


def test_without_vlmevalkit_the_extra_is_named():
    code = (
        "import sys; sys.modules['vlmeval'] = None; from hipp_ext.integrations.vlmevalkit import "
        "main; sys.exit(main(['--data', 'POPE', '--model', '.']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert (
        'vlmeval is not installed. Install it with: pip install "hipp-ext[vlmeval]"' in done.stderr
    )


def test_registering_twice_is_harmless_and_imports_leave_no_trace():
    vlmeval = _import_vlmeval()
    register()
    classes, names = list(vlmeval.dataset.DATASET_CLASSES), list(vlmeval.dataset.SUPPORTED_DATASETS)
    register()
    assert classes == vlmeval.dataset.DATASET_CLASSES
    assert names == vlmeval.dataset.SUPPORTED_DATASETS
    assert vlmeval.vlm.HippVLM is HippVLM
    assert logging.root.manager.disable == 0
    assert ssl._create_default_https_context is not ssl._create_unverified_context


# --------------------------------------------------------------------------------------------------
# ------- bad input


def spoil(rows: list[dict], row: int, **cells) -> list[dict]:
    rows[row].update(cells)
    return rows


@pytest.mark.parametrize(
    "rows, drop, message",
    [
        (
            pope_rows(),
            ("category", "image"),
            r"missing column category, image \(or image_path\); a yes/no table needs it",
        ),
        (scienceqa_rows(), ("B",), "missing column B; a multiple choice table needs it"),
        (spoil(pope_rows(), 3, index=1), (), "index 1 occurs more than once"),
        (spoil(pope_rows(), 3, image="!!!" * 30), (), "row 3: the image cannot be decoded"),
        (spoil(pope_rows(), 3, image="A" * 101), (), "row 3: the image is not valid base64"),
        (
            spoil(pope_rows(), 6, image=picture("red")[:-60]),
            (),
            "row 6: the image cannot be decoded",
        ),
        (
            spoil(pope_rows(), 5, image="77"),
            (),
            "row 5: the image cell '77' is neither a base64 picture nor the index",
        ),
        (spoil(pope_rows(), 5, image=""), (), r"row 5 has no image \(1 such rows\)"),
        (
            spoil(pope_rows(), 4, answer="yes"),
            (),
            "row 4 has the answer 'yes'; it must be Yes or No",
        ),
        (spoil(pope_rows(), 4, answer=""), (), "row 4 has no answer"),
        (spoil(pope_rows(), 4, category=" , "), (), "row 4 has the category ' , '"),
        (spoil(pope_rows(), 4, question=""), (), "row 4 has no question"),
        (
            spoil(scienceqa_rows(), 0, answer="C"),
            (),
            "row 10 has the answer 'C'; its options are A, B",
        ),
        (
            spoil(scienceqa_rows(), 4, C="None"),
            (),
            "row 14 has the answer 'C'; its options are A, B .*None",
        ),
        (spoil(scienceqa_rows(), 2, category=""), (), "row 12 has no category"),
        ([{**row, "image": ""} for row in scienceqa_rows()], (), "no row has an image"),
        (
            [{**row, "image_path": "gone.png"} for row in pope_rows()],
            ("image",),
            "row 0: there is no picture .*gone.png",
        ),
    ],
)
def test_mistakes_in_a_table_are_named(tmp_path, rows, drop, message):
    file = write_tsv(tmp_path / "POPE.tsv", rows, drop)
    with pytest.raises(DataError, match=message):
        read_table(file, tmp_path / "images")


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "is empty"),
        (b"index\timage\tquestion\tanswer\tcategory\n", "a header and no rows"),
        (b"index\tanswer\n1\tYes\textra\n", "more cells than the header"),
        (b"\xff\xfe\x00", "tab-separated UTF-8"),
        (b'index\tanswer\n"1\tYes\n2\tNo\tx\n', "missing column|tab-separated"),
    ],
)
def test_files_that_are_no_tables(tmp_path, text, message):
    (tmp_path / "x.tsv").write_bytes(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "x.tsv", tmp_path)


def test_no_cell_of_a_table_is_executed(llava, tmp_path):
    """VLMEvalKit passes index, image and image_path to `eval`."""
    trap = tmp_path / "executed"
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    rows = [
        {**row, "index": code + " " * n, "image": picture("red")}
        for n, row in enumerate(pope_rows())
    ]
    assert (
        evaluate(
            llava,
            f"mine={write_tsv(tmp_path / 'x.tsv', rows)}",
            work_dir=tmp_path,
            limit=2,
            **QUIET,
        )[0].n
        == 2
    )
    rows = [{**row, "image_path": f"[{code}]"} for row in pope_rows()]
    with pytest.raises(DataError, match="there is no picture"):
        read_table(write_tsv(tmp_path / "x.tsv", rows, drop=("image",)), tmp_path)
    assert not trap.exists()


def test_rows_without_a_picture_are_left_out_and_counted(tmp_path):
    table = read_table(
        write_tsv(tmp_path / "x.tsv", spoil(scienceqa_rows(), 2, image="")), tmp_path / "images"
    )
    assert table.without_image == 1 and table.frame["index"].tolist() == [10, 11, 13, 14, 15]


def test_pictures_given_as_files(tmp_path, records):
    import base64

    rows = scienceqa_rows()
    for row in rows:
        (tmp_path / f"{row['index']}.png").write_bytes(base64.b64decode(row["image"]))
        row["image_path"] = f"{row['index']}.png"
    table = read_table(write_tsv(tmp_path / "x.tsv", rows, drop=("image",)), tmp_path)
    assert table.frame["image_path"][0] == str((tmp_path / "10.png").resolve())
    assert table.images == read_table(write_tsv(tmp_path / "y.tsv", rows), tmp_path).images


@pytest.mark.parametrize(
    "lose, message",
    [
        ("config.json", "it has no config.json"),
        ("processor_config.json", "has no processor .*save_pruned"),
        ("model.safetensors", "incomplete or damaged: it has no model.safetensors"),
        ("tokenizer*", "has no tokenizer"),
    ],
)
def test_incomplete_model_folders(llava, tmp_path, lose, message):
    folder = shutil.copytree(llava, tmp_path / "m")
    for file in folder.glob(lose):
        file.unlink()
    with pytest.raises(CheckpointError, match=message):
        check_model_folder(folder)


def test_damaged_model_folders(llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "m")
    weights, config = (
        (folder / "model.safetensors").read_bytes(),
        (folder / "config.json").read_text(),
    )
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="incomplete or damaged: model.safetensors"):
        evaluate(folder, "POPE", work_dir=tmp_path / "out", **QUIET)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(
        CheckpointError, match="lists 'model-2.safetensors', which is no safetensors file"
    ):
        check_model_folder(folder)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="index.json lists no files"):
        check_model_folder(folder)
    index.unlink()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(config[:-9])
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        check_model_folder(folder)


@pytest.mark.parametrize(
    "place",
    [
        "config.json",
        "model.safetensors",
        "own.safetensors",
        "tokenizer.json",
        "additional_chat_templates/own.jinja",
    ],
)
def test_nothing_waits_for_a_pipe_in_a_model_folder(llava, tmp_path, place):
    file = shutil.copytree(llava, tmp_path / "m") / place
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=f"{file.name} is not a regular file"):
        check_model_folder(tmp_path / "m")


def test_half_written_pruned_folders(lmu, tmp_path, capsys):
    """What a copy that was cut off leaves is refused before a question is asked, and named; the
    weights tell widths.
    """
    model, processor = testbed.load()
    groups = find_groups(model)
    plan = plan_from_counts(
        groups, keep_counts(groups, [0.1 * i for i in range(len(groups))], 0.3), Magnitude()(model)
    )
    whole = save_pruned(prune(model, plan), tmp_path / "whole", processor)
    manifest = (whole / "hipp_ext.json").read_bytes()
    spoilt = {"half-manifest": manifest[: len(manifest) // 2], "other-manifest": b"{}"}
    for name, content in spoilt.items():
        folder = shutil.copytree(whole, tmp_path / name)
        (folder / "hipp_ext.json").write_bytes(content)
    bare = shutil.copytree(whole, tmp_path / "no-manifest")
    (bare / "hipp_ext.json").unlink()
    half = shutil.copytree(whole, tmp_path / "half-weights")
    (half / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:-1000])
    arguments = [
        "--data",
        "POPE",
        "--lmu-data",
        str(lmu),
        "--work-dir",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--model",
    ]
    assert main([*arguments, str(half)]) == 2 and "model.safetensors: " in capsys.readouterr().err
    for name in spoilt:
        assert main([*arguments, str(tmp_path / name)]) == 2
        assert "hipp_ext.json is damaged or of another format" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("results.json"))
    assert main([*arguments, str(bare), "--limit", "2"]) == 0


def test_200_questions_on_the_testbed_take_less_than_a_minute(tmp_path):
    """The whole path: reading the table, loading, answering, scoring by VLMEvalKit."""
    testbed.export(tmp_path / "data", splits=("test",), n=200)
    start = time.perf_counter()
    (record,) = evaluate(
        testbed.WEIGHTS,
        "POPE",
        lmu_data=tmp_path / "data/test",
        work_dir=tmp_path / "out",
        limit=200,
        **QUIET,
    )
    assert record.n == 200 and record.seconds < time.perf_counter() - start < 60
    assert record.metrics["vlmeval"]["overall"]["accuracy"] > 90


@pytest.mark.parametrize(
    "change, message",
    [
        ({"limit": 0}, "limit and batch_size must be 1 or more"),
        ({"batch_size": 0}, "must be 1 or more"),
        ({"dtype": "int4"}, "dtype 'int4' is not one of float32"),
        ({"data": []}, "nothing to evaluate"),
        ({"data": ["../x=POPE.tsv"]}, "the name of a data set consists of"),
        ({"data": ["x=nowhere.tsv"]}, "there is no file 'nowhere.tsv'"),
        ({"data": ["POPE", "POPE={lmu}/ScienceQA_TEST.tsv"]}, "two files for one name"),
        ({"work_dir": "{llava}/outputs"}, "is in the model folder"),
    ],
)
def test_arguments_are_checked(llava, lmu, tmp_path, change, message):
    def fill(value):
        return value.format(lmu=lmu, llava=llava) if isinstance(value, str) else value

    change = {
        key: [fill(v) for v in own] if isinstance(own, list) else fill(own)
        for key, own in change.items()
    }
    arguments = {"data": "POPE", "lmu_data": lmu, "work_dir": tmp_path, **QUIET, **change}
    with pytest.raises(DataError, match=message):
        evaluate(llava, **arguments)


def test_a_damaged_log_is_not_guessed_at(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"index": "1"}\n{"index": "2", "prediction": "Yes"}\n')
    with pytest.raises(DataError, match="line 1, is damaged"):
        PredictionLog(file)
