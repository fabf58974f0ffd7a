"""`vlmeval` as people use it: stopped, started twice, under any name, in a narrow terminal, on
folders of strangers.
"""

import builtins
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer
from vlm_tables import pope_rows, save_llava, write_tsv

from hipp_ext.errors import CheckpointError, OutputBusyError
from hipp_ext.evals.hipp_vlm import HippVLM, check_model_folder
from hipp_ext.evals.prediction_log import claim
from hipp_ext.evals.runs import read_runs, result_folder
from hipp_ext.integrations.vlmevalkit import evaluate, main
from hipp_ext.integrations.vlmevalkit_table import print_records
from hipp_ext.testbed import WEIGHTS, world

QUIET = {"device": "cpu", "progress": False}


def command(llava: Path, lmu: Path, work: Path, *more: str) -> list[str]:
    return [
        "--data",
        "POPE",
        "--model",
        str(llava),
        "--lmu-data",
        str(lmu),
        "--work-dir",
        str(work),
        "--device",
        "cpu",
        *more,
    ]


def files(work: Path) -> dict[str, bytes]:
    return {
        p.relative_to(work).as_posix(): p.read_bytes()
        for p in work.rglob("*")
        if p.is_file() and p.name not in ("results.json", "status.json")
    }


# ------------------------------------------------------------------------------------------------
# stopped and started


@pytest.fixture
def telling(monkeypatch) -> None:
    """Models whose answers tell which questions were asked together, as the last bits of logits do
    now and then.
    """

    def answers(self, messages):
        return [f"Yes {' | '.join(other[-1]['value'] for other in messages)}" for _ in messages]

    monkeypatch.setattr(HippVLM, "generate_batch", answers)


def test_a_stopped_run_ends_in_the_same_bytes(telling, llava, lmu, tmp_path, monkeypatch):
    evaluate(llava, "POPE", lmu_data=lmu, work_dir=tmp_path / "calm", batch_size=5, **QUIET)
    told, calm = HippVLM.generate_batch, files(tmp_path / "calm")

    def stopped(self, messages):
        (log,) = (tmp_path / "w").rglob("run-*")
        if (log / "predictions.jsonl").exists():
            raise KeyboardInterrupt
        return told(self, messages)

    monkeypatch.setattr(HippVLM, "generate_batch", stopped)
    monkeypatch.setattr("hipp_ext.files._SWEEP_SECONDS", 0.0)
    assert main(command(llava, lmu, tmp_path / "w", "--batch-size", "5")) == 130
    monkeypatch.setattr(HippVLM, "generate_batch", told)
    (log,) = (tmp_path / "w").rglob("predictions.jsonl")
    data = log.read_bytes()
    assert data.count(b"\n") == 5
    log.write_bytes(data[: data.rfind(b'{"index": "3"')] + b'{"ind')  # killed within the batch
    (log.parent / ".questions.jsonl.hipp-k1ll3d01").write_text("{")
    (few,) = evaluate(
        llava, "POPE", lmu_data=lmu, work_dir=tmp_path / "w", batch_size=5, limit=2, **QUIET
    )
    assert few.n == 2 and len(log.read_bytes().splitlines()) == 5  # the batch is whole
    (all_of_it,) = evaluate(
        llava, "POPE", lmu_data=lmu, work_dir=tmp_path / "w", batch_size=5, **QUIET
    )
    assert all_of_it.n == 12 and files(tmp_path / "w") == calm
    assert {path.name for path in log.parent.iterdir()} == {
        "predictions.jsonl",
        "questions.jsonl",
        "vlmevalkit",
    }


def test_what_is_read_again_is_what_the_results_count(telling, llava, lmu, tmp_path):
    (record,) = evaluate(
        llava, "POPE", lmu_data=lmu, work_dir=tmp_path, batch_size=5, limit=7, **QUIET
    )
    for path in (tmp_path / "tiny", record.predictions, Path(record.predictions).parent):
        assert len(read_runs(path)["POPE"].answers) == 7


def test_a_second_process_on_the_same_is_refused(telling, llava, lmu, tmp_path, capsys):
    (record,) = evaluate(llava, "POPE", lmu_data=lmu, work_dir=tmp_path, limit=1, **QUIET)
    with claim(Path(record.predictions).parent):
        assert main(command(llava, lmu, tmp_path)) == 2
        said = capsys.readouterr().err
        assert (
            f"is being written by process {os.getpid()} on " in said
            and "With another work folder both can run" in said
        )
        with pytest.raises(OutputBusyError):
            evaluate(llava, "POPE", lmu_data=lmu, work_dir=tmp_path, **QUIET)
        evaluate(
            llava, "ScienceQA", lmu_data=lmu, work_dir=tmp_path, **QUIET
        )  # other questions, in the same folder
    assert main(command(llava, lmu, tmp_path)) == 0


STARTED = """
import sys
from hipp_ext.integrations.vlmevalkit import main
print("started", flush=True)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("seconds", [0.05, 0.6, 4])
def test_ctrl_c_while_it_starts(llava, lmu, tmp_path, seconds):
    arguments = [sys.executable, "-c", STARTED, *command(llava, lmu, tmp_path / "out")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"started\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert (
        process.returncode == 130 and b"vlmeval: interrupted." in said and b"Traceback" not in said
    )


def test_the_entry_point_imports_next_to_nothing():
    code = (
        "import sys; from hipp_ext.integrations.vlmevalkit import main; from "
        "hipp_ext.integrations import vlmevalkit_cli;print(sorted({'torch', 'numpy', 'pandas', "
        "'pydantic', 'rich', 'transformers', 'vlmeval'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )


# --------------------------------------------------------------------------------------------------
# ----------- names


def test_results_are_found_under_the_names_that_were_typed(
    telling, llava, lmu, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    names = ["link", "my prüned", "[red]:dog:["]
    for name in names:
        Path(name).symlink_to(llava)
    typed = ["./link", "my prüned/", "[red]:dog:["]
    assert main([*command(llava, lmu, Path("outputs"), "--limit", "1"), "--model", *typed]) == 0
    out = capsys.readouterr().out
    for name in ("tiny", *names):
        assert read_runs(f"outputs/{name}")["POPE"].answers
        assert f"│ {name} " in out and f"{name} on POPE: answers in " in out


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("plain/.", "plain"),
        ("plain/../link", "link"),
        ("a*[bc]?", "a*[bc]?"),
        ("x-12345678", "x-12345678"),
        ("u\u0308", "ü"),
        ("line\nbreak", "line-break"),
        ("ü" * 127, "ü" * 123),
    ],
)
def test_odd_names(telling, llava, tmp_path, monkeypatch, typed, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llava, "plain", copy_function=os.link)
    if not Path(typed).exists():
        Path(typed.split("/")[-1]).symlink_to("plain")
    place = result_folder(Path("outputs"), check_model_folder(typed), "0123456789abcdef")
    assert place.name == f"{name}-01234567"
    run = place / "mine/run-0"
    run.mkdir(parents=True)
    (place / "mine/results.json").write_text('{"predictions": "run-0/predictions.jsonl"}')
    (run / "predictions.jsonl").write_text('{"index": "0", "prediction": "Yes"}\n')
    question = {
        "index": "0",
        "question": "?",
        "answer": "No",
        "category": "random",
        "image": "0",
        "options": None,
    }
    (run / "questions.jsonl").write_text(json.dumps(question) + "\n")
    assert read_runs(Path("outputs") / Path(typed).name)["mine"].answers == ("Yes",)


def test_dots_stand_for_the_folder_they_lead_to(llava, tmp_path, monkeypatch):
    folder = shutil.copytree(llava, tmp_path / "deep/mine", copy_function=os.link)
    (tmp_path / "link").symlink_to(folder)
    (folder / "sub").mkdir()
    for where, typed in ((folder, "."), (folder / "sub", ".."), (tmp_path, "deep/mine/sub/..")):
        monkeypatch.chdir(where)
        assert check_model_folder(typed) == folder
    assert check_model_folder(tmp_path / "link/sub/..") == folder and check_model_folder(
        "~/../" + str(folder)
    ).samefile(folder)


def test_two_models_of_one_name(telling, llava, lmu, tmp_path, capsys):
    one, other = shutil.copytree(llava, tmp_path / "a/m"), save_llava(tmp_path / "b/m", seed=1)
    assert main([*command(one, lmu, tmp_path / "out", "--limit", "1"), "--model", str(other)]) == 0
    folders = sorted(path.name for path in (tmp_path / "out").glob("m-*"))
    out = capsys.readouterr().out
    assert len(folders) == 2 and all(f"│ {folder} │" in out for folder in folders)
    with pytest.raises(
        Exception,
        match=f"several models of this name were evaluated. Name one of {folders[0]}, {folders[1]}",
    ):
        read_runs(tmp_path / "out/m")


# --------------------------------------------------------------------------------------------------
# ----------- table


def printed(records, width: int) -> str:
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=True,
        color_system=None,
        legacy_windows=False,
    )
    print_records(records, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_loses_nothing_in_a_narrow_terminal(telling, llava, lmu, tmp_path):
    long = tmp_path / "a-rather-long-name-of-a-pruned-model[b]"
    long.symlink_to(llava)
    records = evaluate(
        [llava, long], ["POPE", "ScienceQA"], lmu_data=lmu, work_dir=tmp_path / "out", **QUIET
    )
    for width in (80, 200):
        said = printed(records, width)
        table, rest = said.split("POPE: 12 questions were asked; ", 1)
        assert "…" not in said and "hipp compare" in rest
        assert max(map(len, table.splitlines())) <= width
        words = set(table.replace("│", " ").split())
        assert {"tiny", long.name, "POPE", "ScienceQA_TEST", "n", "yes", "unknown"} <= words
        for split, ours in records[0].metrics["official"].items():
            (row, *_) = [
                line
                for line in table.splitlines()
                if f"accuracy {split} " in line and f" {ours['n']} " in f" {line} "
            ]
            assert (
                f"{ours['accuracy']:.2f} ± {ours['accuracy_se']:.2f}" in row
                and f"{ours['yes_rate']:.1f}" in row
            )


def test_what_n_counts_is_said_where_it_is_not_the_questions(telling, llava, lmu, tmp_path, capsys):
    assert main(command(llava, lmu, tmp_path, "--limit", "4")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "POPE: 4 questions were asked; n is 6 because, as in VLMEvalKit, a question counts once "
        "for each split" in out
    )
    rows = [row | {"category": "random"} for row in pope_rows()]
    assert (
        main(
            [
                "--data",
                f"mine={write_tsv(tmp_path / 'x.tsv', rows)}",
                *command(llava, lmu, tmp_path)[2:],
            ]
        )
        == 0
    )
    assert "questions were asked" not in capsys.readouterr().out


# ------------------------------------------------------------------------------- what is asked, and
# how it is answered


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> list:
    folder, asked = tmp_path_factory.mktemp("pictures"), []
    for number, scene in enumerate(itertools.islice(world.stream("test"), 6)):
        world.render(scene).save(folder / f"{number}.png")
        for name in list(world.OBJECTS)[:2]:
            question = f"Is there a {name} in the image? Please answer Yes or No."
            asked.append(
                [
                    {"type": "image", "value": str(folder / f"{number}.png")},
                    {"type": "text", "value": question},
                ]
            )
    return asked


def test_decoding_is_greedy_whatever_the_folder_asks_for(messages, tmp_path):
    expected = HippVLM(WEIGHTS, "cpu").generate_batch(messages)
    assert len(set(expected)) > 1
    yes = AutoTokenizer.from_pretrained(WEIGHTS).encode(" Yes", add_special_tokens=False)
    asked = {
        "repetition_penalty": 20.0,
        "min_new_tokens": 4,
        "suppress_tokens": yes,
        "begin_suppress_tokens": yes,
        "no_repeat_ngram_size": 1,
        "bad_words_ids": [yes],
        "forced_eos_token_id": 9,
        "forced_bos_token_id": 9,
        "exponential_decay_length_penalty": [1, 9.0],
        "guidance_scale": 3.0,
        "sequence_bias": [[yes, -50.0]],
        "min_length": 90,
        "do_sample": True,
        "temperature": 9.0,
        "num_beams": 3,
        "num_return_sequences": 2,
        "stop_strings": ["e"],
        "max_time": 0.0,
        "max_length": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
        "renormalize_logits": True,
    }
    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | asked))
    model = HippVLM(folder, "cpu")
    assert model.generate_batch(messages) == expected
    assert (
        model.model.generation_config.eos_token_id == 2
    )  # which is kept, or answers would not end


def test_chats_begin_once(messages, tmp_path):
    """A template that writes the beginning-of-text token, and a tokenizer that adds it."""
    folder = shutil.copytree(WEIGHTS, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(folder)
    bos, number = processor.tokenizer.bos_token, processor.tokenizer.bos_token_id
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, number)]
    )
    processor.save_pretrained(folder)
    model, seen = HippVLM(folder, "cpu"), {}
    generate = model.model.generate
    model.model.generate = lambda **given: (seen.update(given), generate(**given))[1]
    assert model.generate_batch(messages) == HippVLM(WEIGHTS, "cpu").generate_batch(messages)
    assert (seen["input_ids"] == number).sum(1).tolist() == [1] * len(messages)
    assert (
        AutoProcessor.from_pretrained(folder).tokenizer("x")["input_ids"][0] == number
    )  # else nothing was tested


@pytest.mark.parametrize(
    "file", ["processor_config.json", "tokenizer_config.json", "preprocessor_config.json"]
)
def test_no_code_of_a_folder_is_run_and_nobody_is_asked(llava, tmp_path, monkeypatch, file):
    folder, trap = shutil.copytree(llava, tmp_path / "m"), tmp_path / "executed"
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n")
    config = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    names = ("AutoProcessor", "AutoImageProcessor")
    maps = {name: "own.Own" for name in names} | {"AutoTokenizer": ["own.Own", "own.Own"]}
    kinds = {"processor_class": "Own", "tokenizer_class": "Own", "image_processor_type": "Own"}
    (folder / file).write_text(json.dumps(config | {"auto_map": maps} | kinds))

    def asked(*_):
        raise AssertionError("a question on standard input")

    monkeypatch.setattr(builtins, "input", asked)
    try:
        HippVLM(folder, "cpu")
    except CheckpointError as error:
        assert "cannot be loaded" in str(error)
    else:
        assert file != "processor_config.json"  # the others name code that is not needed
    assert not trap.exists()


def test_a_template_that_cannot_be_used_is_named(llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only text') }}")
    with pytest.raises(CheckpointError, match="the chat template of .* cannot be used: only text"):
        HippVLM(folder, "cpu").generate([{"type": "text", "value": "x"}])
