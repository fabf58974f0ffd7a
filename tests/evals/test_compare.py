"""`hipp compare` on what the real `vlmeval` command left for two real tiny models."""

import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from vlm_tables import picture, pope_rows, save_llava, scienceqa_rows, write_tsv

from hipp_ext.cli import main
from hipp_ext.errors import DataError
from hipp_ext.evals.compare import compare, compare_runs, comparison_table
from hipp_ext.evals.runs import AskedQuestion, Run, read_runs
from hipp_ext.integrations.vlmevalkit import evaluate


@pytest.fixture(scope="module")
def lmu(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lmu")
    write_tsv(folder / "POPE.tsv", pope_rows())
    write_tsv(folder / "ScienceQA_TEST.tsv", scienceqa_rows())
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_llava(folder / f"tiny{seed}", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def scored(models, lmu, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    records = evaluate(
        models, ["POPE", "ScienceQA"], lmu_data=lmu, work_dir=work, device="cpu", progress=False
    )
    return records, sorted(work.glob("tiny?-*"))


def run(answers: list[str], **changes) -> Run:
    """Answers to four questions about two pictures, the first two with Yes."""
    rows = [
        ("0", "Yes", "random,popular", "p"),
        ("1", "No", "random", "p"),
        ("2", "Yes", "popular", "q"),
        ("3", "No", "popular", "q"),
    ]
    questions = tuple(
        AskedQuestion(
            **{
                "index": i,
                "question": f"q{i}",
                "answer": a,
                "category": c,
                "image": p,
                "options": None,
            }
            | changes
        )
        for i, a, c, p in rows
    )
    return Run(model="m", data="POPE", questions=questions, answers=tuple(answers))


# --------------------------------------------------------------------------------------------------
# - the numbers


def test_by_hand():
    rows = compare_runs(run(["Yes", "No", "Yes", "No"]), run(["Yes", "Yes", "No", ""]))
    assert [(row.rule, row.split) for row in rows] == [
        (rule, split) for rule in ("vlmeval", "official") for split in ("all", "random", "popular")
    ]
    ours, _, popular, official, *_ = rows
    assert (ours.paired.a, ours.paired.b, ours.paired.only_a, ours.paired.only_b) == (100, 25, 3, 0)
    assert (
        ours.paired.clusters == 2
        and popular.paired.n == 3
        and popular.paired.b == pytest.approx(100 / 3)
    )
    assert (ours.yes_a, ours.yes_b, official.yes_b) == (
        50,
        50,
        75,
    )  # the empty answer is a yes by the authors' rule
    assert ours.f1 and ours.f1.value == pytest.approx(
        50 - 100
    )  # B: one hit, one false yes, one missed


def test_numbers_agree_with_vlmeval(scored):
    records, folders = scored
    rows = compare(*folders)
    assert {row.data for row in rows} == {"POPE", "ScienceQA_TEST"}
    for row in rows:
        a, b = (
            next(r for r in records if r.data == row.data and folder.name.startswith(r.model))
            for folder in folders
        )
        if row.split == "all" and row.rule != "letter":
            continue  # vlmeval's "overall" counts a question once for each of its splits
        for own, record in ((row.paired.a, a), (row.paired.b, b)):
            place = (
                record.metrics["accuracy"]["overall"]
                if row.rule == "letter"
                else record.metrics[row.rule][row.split]
            )
            assert own == pytest.approx(place["accuracy"])
        if row.f1 is not None:
            f1 = [record.metrics[row.rule][row.split]["f1"] for record in (a, b)]
            yes = [record.metrics[row.rule][row.split]["yes_rate"] for record in (a, b)]
            assert row.f1.value == pytest.approx(f1[1] - f1[0]) and [
                row.yes_a,
                row.yes_b,
            ] == pytest.approx(yes)
    assert any(row.paired.only_a + row.paired.only_b for row in rows)


def test_pictures_are_the_clusters_of_pope_and_questions_of_multiple_choice(scored):
    rows = {(row.data, row.split): row.paired for row in compare(*scored[1])}
    assert (rows["POPE", "all"].n, rows["POPE", "all"].clusters) == (12, 4)
    assert (rows["ScienceQA_TEST", "all"].n, rows["ScienceQA_TEST", "all"].clusters) == (6, 6)


def test_records_and_comparisons_say_what_they_found(scored):
    records, folders = scored
    for record in records:
        place = "vlmeval" if record.data == "POPE" else "accuracy"
        scores = record.metrics[place]["overall"]
        assert record.accuracy == scores["accuracy"] and record.accuracy_se == scores["accuracy_se"]
        said = f"{record.model} on {record.data}: accuracy {scores['accuracy']:.1f} ± "
        assert str(record).startswith(said) and ("F1" in str(record)) == (record.data == "POPE")
    for row in compare(*folders):
        name = "ScienceQA_TEST" if row.data != "POPE" else f"POPE ({row.split})"
        assert str(row).startswith(f"{name}: B - A {row.paired.difference.value:+.1f} points")


def test_every_way_to_name_a_run_gives_the_same(scored, lmu, tmp_path):
    records, (a, b) = scored
    whole = [row for row in compare(a, b) if row.data == "POPE"]
    files = [Path(record.predictions) for record in records if record.data == "POPE"]
    assert compare(a / "POPE", b / "POPE") == whole == compare(files[0].parent, files[1])
    moved = shutil.copytree(a, tmp_path / "elsewhere")  # results.json holds the old absolute path
    assert compare(moved, b)[: len(whole)] == whole
    bare = [shutil.copy(file, tmp_path / f"{number}.jsonl") for number, file in enumerate(files)]
    alone = compare(*bare, tsv=lmu / "POPE.tsv")
    assert [row.paired for row in alone] == [row.paired for row in whole]


def test_a_model_may_be_named_without_its_hash(scored, tmp_path):
    a, b = scored[1]
    assert compare(a.parent / "tiny0", b.parent / "tiny1") == compare(a, b)
    shutil.copytree(a, tmp_path / a.name)
    shutil.copytree(b, tmp_path / f"{a.name[:-8]}{'0' * 8}")
    with pytest.raises(
        DataError,
        match="several models of this name were evaluated. Name one of tiny0-00000000, tiny0-",
    ):
        read_runs(tmp_path / "tiny0")
    with pytest.raises(DataError, match="holds no results"):
        read_runs(tmp_path / "tiny")


def test_rules_that_read_all_answers_alike_share_a_line():
    from rich.console import Console

    def lines(*said: list[str]) -> str:
        console = Console(width=250, record=True)
        console.print(comparison_table(compare_runs(*map(run, said))))
        return console.export_text()

    alike = lines(["Yes", "No", "Yes", "No"], ["Yes", "Yes", "No", "No"])
    assert alike.count("both") == 3 and "official" not in alike
    apart = lines(
        ["Yes", "No", "Yes", "No"], ["Yes", "Yes", "No", ""]
    )  # the empty answer, in popular
    assert apart.count("both") == 1 and apart.count("official") == 2


def printed(width: int, rows: list, **options) -> list[str]:
    """The lines of the table on a terminal of this width."""
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO(), **options)
    console.print(comparison_table(rows))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_terminal_of_80_columns_gets_short_tables():
    rows = compare_runs(run(["Yes", "No", "Yes", "No"]), run(["Yes", "Yes", "No", ""]))
    lines = printed(80, rows)
    assert (
        max(map(len, lines)) <= 80
        and "POPE, rule: vlmeval" in lines
        and "POPE, rule: official" in lines
    )
    for row in rows:
        interval = f"{row.paired.difference.value:+.2f}"
        if not math.isnan(row.paired.difference.low):
            interval += f" ({row.paired.difference.low:+.2f} to {row.paired.difference.high:+.2f})"
        found = [line for line in lines if line.startswith(row.split)]
        assert any(
            interval in line and f"{row.paired.a:.2f}" in line for line in found
        )  # in one line, not broken
        assert any(f"{row.yes_a:.1f}/{row.yes_b:.1f}" in line for line in found)
    wide = printed(250, rows)
    assert sum("vlmeval" in line for line in wide) == 2 and not any(
        "rule: " in line for line in wide
    )


def test_names_are_not_read_as_markup():
    asked = run(["Yes", "No", "Yes", "No"], category="[/b],[red]\x1b[2J," + "x" * 500)
    rows = [replace(row, data="[/b][bold]") for row in compare_runs(asked, asked)]
    for width in (80, 250):
        lines = printed(width, rows)
        assert max(map(len, lines)) <= width and "\x1b[2J" not in "".join(lines)
        assert any("[/b][bold]" in line for line in lines) and any(
            line.lstrip().startswith("[/b]") for line in lines
        )
        assert any("[red]\ufffd[2J" in line for line in lines)


def test_two_counts_of_questions_are_explained():
    rows = compare_runs(run(["Yes"] * 4), run(["No"] * 4))
    said = " ".join(" ".join(printed(80, rows)).split())
    assert (
        "POPE has 4 distinct questions, each counted once where models are compared" in said
        and "5 in all." in said
    )
    once = compare_runs(run(["Yes"] * 4, category="random"), run(["No"] * 4, category="random"))
    assert "distinct questions" not in " ".join(printed(80, once))


@pytest.mark.parametrize(
    "change",
    [{"category": ",".join(map(str, range(101)))}, {"options": {str(n): "x" for n in range(27)}}],
)
def test_more_splits_or_options_than_a_benchmark_has_are_refused(change):
    with pytest.raises(
        DataError,
        match="splits, of 100 that can be compared, or a question with more than 26 options",
    ):
        compare_runs(run(["Yes"] * 4, **change), run(["Yes"] * 4, **change))


def test_a_split_named_twice_counts_a_question_once():
    twice = compare_runs(
        run(["Yes"] * 4, category="random,random"), run(["Yes"] * 4, category="random,random")
    )
    assert [row.paired.n for row in twice if row.split == "random"] == [4, 4]


def test_a_line_that_is_being_written_is_left_alone(scored, tmp_path):
    file = Path(scored[0][0].predictions)
    shutil.copytree(file.parent, tmp_path / "run")
    growing = tmp_path / "run/predictions.jsonl"
    growing.write_bytes(file.read_bytes()[:-5])
    (own,) = read_runs(tmp_path / "run").values()
    assert len(own.answers) == 11 and growing.read_bytes() == file.read_bytes()[:-5]


# --------------------------------------------------------------------------------------------------
# - refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": "other"},
            "the image of index 0 is 'p' in A and 'other' in B. They were asked different data",
        ),
        ({"question": "what?"}, "the question of index 0 is 'q0' in A and 'what\\?' in B"),
        ({"category": "random"}, "the category of index 0"),
        ({"options": {"A": "x"}}, "the options of index 0"),
    ],
)
def test_different_questions_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        compare_runs(run(["Yes"] * 4), run(["Yes"] * 4, **change))


def test_different_numbers_and_order_are_refused(models, lmu, scored, tmp_path):
    own = run(["Yes"] * 4)
    other = Run(model="m", data="POPE", questions=own.questions[::-1], answers=own.answers)
    with pytest.raises(DataError, match="the questions are in another order"):
        compare_runs(own, other)
    with pytest.raises(DataError, match="A answers index 0, B does not"):
        compare_runs(
            Run(model="m", data="d", questions=own.questions[:2], answers=own.answers[:2]),
            Run(model="m", data="d", questions=own.questions[2:], answers=own.answers[2:]),
        )
    (record,) = evaluate(
        models[1], "POPE", lmu_data=lmu, work_dir=tmp_path, device="cpu", progress=False, limit=5
    )
    with pytest.raises(DataError, match="A answers 12 questions and B 5. Ask both the same"):
        compare(scored[1][0] / "POPE", record.predictions)


def test_another_picture_is_another_data_set(models, scored, lmu, tmp_path):
    rows = pope_rows()
    rows[3]["image"] = picture("purple")
    file = write_tsv(tmp_path / "POPE.tsv", rows)
    (record,) = evaluate(
        models[1], f"POPE={file}", work_dir=tmp_path / "w", device="cpu", progress=False
    )
    with pytest.raises(DataError, match="the image of index 3 is"):
        compare(scored[1][0] / "POPE", record.predictions)


def test_what_is_no_run_is_refused(scored, tmp_path):
    (a, b) = scored[1]
    other = shutil.copytree(b, tmp_path / "other")
    shutil.rmtree(other / "ScienceQA_TEST")
    (other / "POPE").rename(other / "mine")
    with pytest.raises(
        DataError, match="no data set in common: A has POPE, ScienceQA_TEST, B has mine"
    ):
        compare(a, other)
    with pytest.raises(
        DataError,
        match=f"holds no results of `vlmeval`; name one of the models in it: {a.name}, {b.name}",
    ):
        compare(a.parent, b)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError,
        match="a folder such as outputs/MODEL-HASH is needed, or a file predictions.jsonl",
    ):
        compare(tmp_path / "empty", b)
    with pytest.raises(DataError, match="nowhere holds no results"):
        compare(tmp_path / "nowhere", b)


def test_damaged_files_are_named(scored, tmp_path):
    place = shutil.copytree(Path(scored[0][0].predictions).parents[1], tmp_path / "POPE")
    (folder,) = place.glob("run-*")
    answers = (folder / "predictions.jsonl").read_text()
    for text, message in (
        (
            "{}\n" + answers,
            "predictions.jsonl, line 1, is damaged: an object with index, prediction is needed",
        ),
        (
            '{"index": "77", "prediction": ""}\n',
            "it answers index 77, which is not among the questions",
        ),
        ("", "predictions.jsonl holds no answers"),
    ):
        (folder / "predictions.jsonl").write_text(text)
        with pytest.raises(DataError, match=message):
            read_runs(place)
    (folder / "predictions.jsonl").write_text(answers)
    (folder / "questions.jsonl").unlink()
    with pytest.raises(
        DataError, match="questions.jsonl is missing, so the questions are unknown. Pass the TSV"
    ):
        read_runs(place)
    (place / "results.json").write_text("[]")
    with pytest.raises(DataError, match="results.json is damaged"):
        read_runs(place)
    for path in ("predictions.jsonl", "", "/", "run-0/..", "/predictions.jsonl"):
        (place / "results.json").write_text(json.dumps({"predictions": path}))
        with pytest.raises(
            DataError, match="results.json is damaged: .* is not a file of predictions"
        ):
            read_runs(place)
    (place / "results.json").write_text('{"predictions": "run-0/predictions.jsonl"}')
    with pytest.raises(DataError, match="run-0/predictions.jsonl cannot be read: No such file"):
        read_runs(place)


# --------------------------------------------------------------------------------------------------
# - the command


def hipp(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["hipp", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


def test_command_prints_a_table_or_json(scored, capsys, monkeypatch):
    a, b = map(str, scored[1])
    ask = ("compare", a, b, "--level", "0.9")
    code, said, _ = hipp(capsys, monkeypatch, *ask)
    assert (
        code == 0
        and "with its 90% interval" in said
        and "n for 1 point" in said
        and "official" in said
    )
    saved = json.loads(hipp(capsys, monkeypatch, *ask, "--json")[1])
    assert saved["level"] == 0.9 and len(saved["comparisons"]) == 2 * 4 + 1
    first = saved["comparisons"][0]
    expected = compare(a, b, level=0.9)[0]
    assert first["paired"]["difference"]["low"] == expected.paired.difference.low
    assert first["questions_for_a_point"] == expected.questions_for_a_point > 1000


def test_command_says_why_it_refuses(scored, capsys, monkeypatch):
    a, b = scored[1]
    code, _, wrong = hipp(
        capsys, monkeypatch, "compare", str(a / "POPE"), str(b / "ScienceQA_TEST")
    )
    assert (
        code == 2
        and "cannot be compared: A answers 12 questions and B 6.\n  Ask both the same" in wrong
    )
