"""RePOPE, AMBER, HallusionBench and MME end to end: VLMEvalKit's own ratings, `hipp compare`, `hipp
report` and lm-eval on the answers of two tiny models.
"""

import io
import json
import random
from pathlib import Path

import pytest
import torch
from benchmark_files import draw_mme, write_all
from vlm_tables import save_llava

from hipp_ext.errors import DataError
from hipp_ext.evals.benchmarks import BENCHMARKS, benchmark_scores
from hipp_ext.evals.compare import compare, comparison_table
from hipp_ext.evals.data.mme import write_mme
from hipp_ext.evals.report import table_rows as report_rows
from hipp_ext.evals.report import write_report
from hipp_ext.evals.report.entries import main_yes_no
from hipp_ext.evals.report.sources import read_sources
from hipp_ext.evals.runs import read_runs, table_rows
from hipp_ext.evals.tables import read_table
from hipp_ext.integrations.vlmevalkit import _import_vlmeval, evaluate, main, register
from hipp_ext.integrations.vlmevalkit_host import first_rows, open_dataset, score

torch.set_num_threads(1)
NAMES = ("MME", "HallusionBench", "AMBER", "RePOPE")
QUIET = {"device": "cpu", "progress": False}
SAID = ["Yes", "No", "yes.", "no, it is not", "maybe", "", "Yes and no", "There is no square", "NO"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """lmu/ with the four tables, and the models tiny0/ and tiny1/."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_all(folder)
    for seed in (0, 1):
        save_llava(folder / f"tiny{seed}", seed)
    return folder


@pytest.fixture(scope="module")
def records(place):
    """{(model, data): record} of both models on all four."""
    models = [place / f"tiny{seed}" for seed in (0, 1)]
    found = evaluate(models, NAMES, lmu_data=place / "lmu", work_dir=place / "outputs", **QUIET)
    return {(record.model, record.data): record for record in found}


def said_by(record) -> dict[str, str]:
    lines = Path(record.predictions).read_text().splitlines()
    return {entry["index"]: entry["prediction"] for entry in map(json.loads, lines)}


def agree(name: str, ours: dict, theirs: dict) -> None:
    """Assert that our scores by VLMEvalKit's rule are those of VLMEvalKit's rating."""
    if name == "MME":
        row = dict(theirs["none"])
        assert row.pop("perception") == pytest.approx(ours["perception"]["score"])
        cognition = ours.get("cognition", {"score": 0})  # not asked, below a low limit
        assert row.pop("reasoning") == pytest.approx(cognition["score"])
        assert row == pytest.approx({subtask: ours[subtask]["score"] for subtask in row})
        assert row.keys() == ours.keys() - {"overall", "perception", "cognition"}
    elif name == "AMBER":
        row = dict(theirs["none"])
        row.pop("Avg ACC")
        assert row == pytest.approx({kind: ours[kind.lower()]["accuracy"] for kind in row})
        assert set(row) == {"Existence", "Attribute", "Relation"}
    else:
        for split, own in ours.items():
            row = theirs["Overall" if split == "overall" else split]
            assert [row["aAcc"], row["fAcc"], row["qAcc"]] == pytest.approx(
                [own["accuracy"], own["figure_accuracy"], own["pair_accuracy"]]
            )
        assert len(theirs) == len(ours)


# -------------------------------------------------------------------------------------- the numbers


def test_numbers_equal_vlmevalkits_own_loop(records, place, tmp_path, monkeypatch):
    """The same model and files through VLMEvalKit's build_dataset, infer_data_job and evaluate."""
    monkeypatch.setenv("LMUData", str(place / "lmu"))
    monkeypatch.setenv("PRED_FORMAT", "tsv")
    vlmeval = _import_vlmeval()
    register({"tiny0": place / "tiny0"})
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import get_pred_file_path

    model = vlmeval.config.supported_VLM["tiny0"](device="cpu")
    for name in NAMES:
        record = records["tiny0", name]
        dataset = vlmeval.dataset.build_dataset(name)
        infer_data_job(model, work_dir=str(tmp_path), model_name="run", dataset=dataset)
        file = get_pred_file_path(str(tmp_path), "run", name)
        theirs = vlmeval.smp.load(file)
        said = dict(zip(theirs["index"].astype(str), theirs["prediction"].fillna(""), strict=True))
        assert said_by(record) == said and len(set(said.values())) > 2
        for row in dataset.evaluate(file, model="exact_matching").to_dict("records"):
            expected = record.metrics["vlmevalkit"][row.pop("split", "none")]
            assert row == pytest.approx(expected)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_scores_of_any_answers_equal_vlmevalkits(place, tmp_path, name):
    table = read_table(place / f"lmu/{name}.tsv", tmp_path / "images", name=name)
    rows = table_rows(table)
    for seed, n in enumerate((len(rows), len(rows), len(rows) - 3)):  # -3: a picture loses its pair
        draw = random.Random(seed)
        answers = [draw.choice([*SAID, row.answer, row.answer]) for row in rows[:n]]
        theirs = score(first_rows(open_dataset(table, None), n), answers, tmp_path / str(seed))
        agree(name, benchmark_scores(name, answers, rows[:n])["vlmeval"], theirs)


def test_records_hold_both_rules_and_errors(records):
    for (_, name), record in records.items():
        metrics = record.metrics
        if name == "RePOPE":
            assert set(metrics["vlmevalkit"]) == {"Overall", "random", "popular", "adversarial"}
            assert set(metrics["official"]) == {"overall", "random", "popular", "adversarial"}
            assert record.official_file is None  # VLMEvalKit publishes no such table
            continue
        assert list(metrics["scores"]) == list(BENCHMARKS[name].rules)
        agree(name, metrics["scores"]["vlmeval"], metrics["vlmevalkit"])
        overall = metrics["scores"]["vlmeval"]["overall"]
        assert overall["n"] == record.n and overall["accuracy_se"] > 0
        assert 0 < overall["unknown_rate"] < 100


def test_amber_is_asked_as_vlmevalkit_asks_it(place, tmp_path):
    table = read_table(place / "lmu/AMBER.tsv", tmp_path / "images", name="AMBER")
    message = open_dataset(table, None).build_prompt(0)
    assert message[-1]["value"] == f"{table.frame['question'][0]}\nPlease answer yes or no."


# ------------------------------------------------------------------------------------------- limits


def test_a_limit_that_cuts_a_pair_of_mme(place, records):
    """Of three questions the two about one picture are scored, by VLMEvalKit too."""
    (record,) = evaluate(
        place / "tiny0",
        "MME",
        lmu_data=place / "lmu",
        work_dir=place / "outputs-3",
        limit=3,
        **QUIET,
    )
    assert record.n == 3 and record.metrics["scores"]["vlmeval"]["overall"]["n"] == 2
    agree("MME", record.metrics["scores"]["vlmeval"], record.metrics["vlmevalkit"])
    with pytest.raises(DataError, match="MME: the limit of 1 leaves no picture with both"):
        evaluate(place / "tiny0", "MME", lmu_data=place / "lmu", work_dir=place / "x", limit=1)


# ------------------------------------------------------------------------- command, compare, report


def test_the_command_prints_the_numbers_of_each(records, place, capsys):
    arguments = ["--data", *NAMES, "--model", str(place / "tiny0"), "--device", "cpu"]
    arguments += ["--lmu-data", str(place / "lmu"), "--work-dir", str(place / "outputs")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in ("score perception", "accuracy+ OCR", "qAcc VD", "F1 of no relation", "F1 overall"):
        assert text in out
    mme = records["tiny0", "MME"].metrics["scores"]
    line = next(line for line in out.splitlines() if "score cognition" in line)
    assert f"{mme['vlmeval']['cognition']['score']:.2f} ±" in line
    assert f"{mme['official']['cognition']['score']:.2f} ±" in line
    assert "at most 2000 and 800" in " ".join(out.split())


def test_comparisons_are_by_picture_and_have_each_benchmarks_own_number(records, place):
    a, b = (next((place / "outputs").glob(f"tiny{seed}-*")) for seed in (0, 1))
    rows = {(row.data, row.rule, row.split): row for row in compare(a, b)}

    def difference(name, rule, split, field):
        both = [records[f"tiny{seed}", name].metrics["scores"][rule] for seed in (0, 1)]
        return both[1][split][field] - both[0][split][field]

    for rule in ("vlmeval", "official"):
        mme, amber = rows["MME", rule, "color"], rows["AMBER", rule, "attribute"]
        assert mme.f1 is None and amber.whole is None and mme.paired.clusters == 2
        assert mme.whole.value == pytest.approx(difference("MME", rule, "color", "accuracy_plus"))
        assert amber.f1.value == pytest.approx(difference("AMBER", rule, "attribute", "f1"))
        for row, name in ((mme, "MME"), (amber, "AMBER")):
            found = row.paired.difference.value
            assert found == pytest.approx(difference(name, rule, row.split, "accuracy"))
    hallusion = rows["HallusionBench", "vlmeval", "VD"]
    expected = difference("HallusionBench", "vlmeval", "VD", "figure_accuracy")
    assert hallusion.whole.value == pytest.approx(expected)
    assert hallusion.paired.clusters == 5  # sets of pictures
    assert ("HallusionBench", "official", "all") not in rows
    assert rows["RePOPE", "official", "adversarial"].f1 is not None
    from rich.console import Console

    console = Console(width=250, record=True, file=io.StringIO())
    console.print(comparison_table(list(rows.values())))
    assert "all right B - A" in console.export_text()


def test_a_single_file_of_answers_is_compared_by_the_rules_of_its_table(records, place, tmp_path):
    files = [Path(records[f"tiny{seed}", "MME"].predictions) for seed in (0, 1)]
    bare = []
    for number, file in enumerate(files):
        bare.append(tmp_path / f"{number}.jsonl")
        bare[-1].write_bytes(file.read_bytes())
    alone = compare(*bare, tsv=place / "lmu/MME.tsv")
    assert [row.whole for row in alone] == [row.whole for row in compare(*files)]
    questions = files[0].with_name("questions.jsonl")
    text = questions.read_text()
    run = tmp_path / "run"
    run.mkdir()
    (run / "predictions.jsonl").write_bytes(files[0].read_bytes())
    (run / "questions.jsonl").write_text(text.replace('"benchmark": "MME"', '"benchmark": "M"'))
    with pytest.raises(DataError, match="line 1, is damaged: 'M' is no yes/no benchmark"):
        read_runs(run)


def test_the_report_has_the_numbers(records, place):
    entries = read_sources([place / "outputs"]).entries
    assert main_yes_no(entries) == "RePOPE"
    header, rows = report_rows(entries)
    for title in ("MME perception", "MME cognition", "HallusionBench fAcc", "AMBER F1 of no"):
        assert title in header
    cells = dict(zip(header, next(row for row in rows if row[0] == "tiny1"), strict=True))
    own = records["tiny1", "MME"].metrics["scores"]["vlmeval"]["perception"]
    assert cells["MME perception"] == f"{own['score']:.1f} ± {own['score_se']:.1f}"
    page = write_report(place / "outputs", place / "report").read_text()
    assert "MME perception" in page and "out of 2,000" in page
    assert "on HallusionBench" in page  # where the models disagree


def test_damaged_scores_do_not_reach_a_report(records, tmp_path):
    record = json.loads(json.dumps(vars(records["tiny0", "MME"])))
    for value in ("many", -1, 1e300):
        record["metrics"]["scores"]["vlmeval"]["perception"]["score"] = value
        (tmp_path / "results.json").write_text(json.dumps(record))
        with pytest.raises(DataError, match=r"results.json is damaged: .*perception.score"):
            read_sources([tmp_path])


# ------------------------------------------------------------------------------------------ lm-eval


@pytest.fixture(scope="module")
def by_lm_eval(place) -> dict:
    """Results of our tasks by lm-eval on the same model and files."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from hipp_ext.integrations import lm_eval as ours

    ours.register()
    manager = TaskManager(
        include_path=str(ours.tasks_path()),
        include_defaults=False,
        metadata={"lmu_data": str(place / "lmu")},
    )
    return lm_eval.simple_evaluate(
        model="hipp",
        model_args=f"pretrained={place / 'tiny0'},dtype=float32",
        tasks=[f"hipp_{name.lower()}" for name in NAMES],
        batch_size=8,
        device="cpu",
        task_manager=manager,
        apply_chat_template=True,
    )


@pytest.mark.parametrize("name", NAMES)
def test_lm_eval_gives_the_same_answers_and_numbers(records, by_lm_eval, name):
    task, record = f"hipp_{name.lower()}", records["tiny0", name]
    samples = {row["doc"]["index"]: row for row in by_lm_eval["samples"][task]}
    assert {i: row["filtered_resps"][0] for i, row in samples.items()} == said_by(record)
    found = by_lm_eval["results"][task]
    if name == "RePOPE":
        own = record.metrics["official"]["adversarial"]["f1"]
        assert 100 * found["official_f1_adversarial,none"] == pytest.approx(own)
        return
    from hipp_ext.integrations.lm_eval_benchmarks import NUMBERS

    for rule in BENCHMARKS[name].rules:
        for number, (split, field) in NUMBERS[name].items():
            own = record.metrics["scores"][rule][split][field]
            assert 100 * found[f"{rule}_{number},none"] == pytest.approx(own)


def test_unknown_functions_of_the_task_files_are_errors():
    from hipp_ext.integrations import lm_eval_benchmarks

    with pytest.raises(AttributeError, match="has no attribute 'mme_vlmeval_percption'"):
        _ = lm_eval_benchmarks.mme_vlmeval_percption


def test_a_full_mme_is_scored_in_little_time(tmp_path):
    """The standard errors of 14 subtasks and their totals, of 280 pictures and both rules."""
    import time

    file = write_mme(draw_mme(tmp_path / "mme", pictures=20), tmp_path / "MME.tsv")
    rows = table_rows(read_table(file, tmp_path / "images", name="MME"))
    start = time.perf_counter()
    benchmark_scores("MME", ["Yes"] * len(rows), rows)
    assert len(rows) == 560 and time.perf_counter() - start < 10
