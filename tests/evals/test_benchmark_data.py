"""`hipp data repope | amber | hallusionbench | mme` on files in the authors' layouts."""

import base64
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from benchmark_files import draw, draw_amber, draw_hallusionbench, draw_mme, draw_repope, write_all

from hipp_ext.cli import main
from hipp_ext.errors import DataError, OutputExistsError
from hipp_ext.evals.data.amber import write_amber
from hipp_ext.evals.data.hallusionbench import write_hallusionbench
from hipp_ext.evals.data.mme import write_mme
from hipp_ext.evals.data.pope import pope_from_published
from hipp_ext.evals.mme import SUBTASKS
from hipp_ext.evals.runs import table_rows
from hipp_ext.evals.tables import locate, read_table


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """drawn/, the files in their authors' layouts, and lmu/, the four tables."""
    folder = tmp_path_factory.mktemp("made")
    write_all(folder)
    return folder


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t")


# --------------------------------------------------------------------------------------------- MME


def test_mme_of_both_layouts(tmp_path):
    source = draw_mme(tmp_path / "release")
    raw = read(write_mme(source, tmp_path / "MME.tsv"))
    assert raw.columns.tolist() == [
        *("index", "image", "image_path", "question", "answer", "category")
    ]
    assert raw["category"].tolist() == [name for name in SUBTASKS for _ in range(4)]
    assert raw["answer"].tolist() == ["Yes", "No"] * 28
    assert raw["image_path"][0] == "existence/0000.png"
    posters = raw[raw["category"] == "posters"]["image_path"].tolist()
    assert posters[::2] == ["posters/images/0000.png", "posters/images/0001.jpg"] == posters[1::2]
    assert not raw["question"].str.contains("[\r\n\t]", regex=True).any()
    first = (source / "MME_Benchmark/existence/0000.png").read_bytes()
    assert base64.b64decode(raw["image"][0]) == first and raw["image"][1] == "0"
    # the folder of the subtasks may be given itself
    again = write_mme(source / "MME_Benchmark", tmp_path / "again.tsv")
    assert again.read_bytes() == (tmp_path / "MME.tsv").read_bytes()


def test_pictures_of_equal_content_stay_two_pictures_of_mme(tmp_path):
    source = draw_mme(tmp_path / "release")
    place = source / "MME_Benchmark/count"
    (place / "0001.jpg").write_bytes((place / "0000.png").read_bytes())
    table = read_table(write_mme(source, tmp_path / "MME.tsv"), tmp_path / "images", name="MME")
    own = [row for row in table_rows(table) if row.category == "perception,count"]
    assert len({row.image for row in own}) == 1 and len({row.group for row in own}) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "OCR").rename(d / "ocr "), "has no folder OCR; .* with the 14 subtasks"),
        (lambda d: (d / "OCR/0000.png").unlink(), "0000.txt: there is no picture 0000.jpg or .png"),
        (
            lambda d: (d / "OCR/0000.txt").write_text("a\tYes\n"),
            "MME asks 2 questions about a picture, and here are 1",
        ),
        (
            lambda d: (d / "OCR/0000.txt").write_text("a Yes\nb\tNo\n"),
            "0000.txt, line 1: a question, a tab, and Yes or No are needed, not 'a Yes'",
        ),
        (lambda d: (d / "OCR/0000.txt").write_bytes(b"\xff\tYes\nb\tNo\n"), "is not UTF-8 text"),
        (
            lambda d: (d / "scene/images/0000.png").write_bytes(b"no picture"),
            "the image scene/images/0000.png is broken",
        ),
        (
            lambda d: [file.unlink() for file in (d / "count").glob("*.txt")],
            "count holds no questions",
        ),
    ],
)
def test_mistakes_in_mme_are_named(tmp_path, spoil, message):
    source = draw_mme(tmp_path / "release")
    spoil(source / "MME_Benchmark")
    with pytest.raises(DataError, match=message):
        write_mme(source, tmp_path / "MME.tsv")
    assert not (tmp_path / "MME.tsv").exists()


# ------------------------------------------------------------------------------------------- AMBER


def test_amber_joins_queries_and_annotations(tmp_path):
    source = draw_amber(tmp_path / "AMBER")
    raw = read(write_amber(source, source / "image", tmp_path / "AMBER.tsv"))
    truths = {
        entry["id"]: entry for entry in json.loads((source / "data/annotations.json").read_text())
    }
    assert raw["index"].tolist() == list(range(6, 36)) and len(raw) == 30
    for index, answer, category in zip(raw["index"], raw["answer"], raw["category"], strict=True):
        assert (answer.lower(), category) == (truths[index]["truth"], truths[index]["type"])
    assert set(raw["answer"]) == {"Yes", "No"} and raw["image_path"][0] == "AMBER_1.jpg"
    assert not raw["question"].str.contains("yes or no").any()  # VLMEvalKit adds it
    again = write_amber(source / "data", source / "image", tmp_path / "again.tsv")
    assert again.read_bytes() == (tmp_path / "AMBER.tsv").read_bytes()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("annotations.json", lambda d: d[10].update(truth="maybe"), "id 11 has the type .*'maybe'"),
        ("annotations.json", lambda d: d[10].update(type="other"), "id 11 has the type 'other'"),
        ("annotations.json", lambda d: d.pop(), "id 35 has no annotation .* one version"),
        ("annotations.json", lambda d: d[10].update(id=10), "id 10 occurs more than once"),
        ("query/query_discriminative.json", lambda d: d[0].pop("image"), "needs id and image"),
        ("query/query_discriminative.json", lambda d: d[0].update(query=" "), "id 6 needs the"),
        (
            "query/query_discriminative.json",
            lambda d: d[0].update(image="gone.jpg"),
            "1 of 6 images are missing",
        ),
        ("query/query_discriminative.json", lambda d: d.clear(), "a list of questions is needed"),
    ],
)
def test_mistakes_in_amber_are_named(tmp_path, name, change, message):
    source = draw_amber(tmp_path / "AMBER")
    file = source / "data" / name
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(DataError, match=message):
        write_amber(source, source / "image", tmp_path / "AMBER.tsv")
    assert not (tmp_path / "AMBER.tsv").exists()


# ----------------------------------------------------------------------------------- HallusionBench


def test_hallusionbench_keeps_what_has_a_picture(tmp_path):
    source = draw_hallusionbench(tmp_path / "repo")
    file, without = write_hallusionbench(source, source / "hallusion_bench", tmp_path / "H.tsv")
    raw = read(file)
    asked = json.loads((source / "HallusionBench.json").read_text())
    seen = [entry for entry in asked if entry["filename"]]
    assert (len(raw), without) == (len(seen), len(asked) - len(seen)) and without == 6
    assert raw["index"][0] == "HallusionBench_VD_math_0_0_0"
    assert raw["answer"].tolist() == [("No", "Yes")[int(entry["gt_answer"])] for entry in seen]
    assert raw["l2-category"].tolist() == [
        f"{entry['category']}_{entry['subcategory']}" for entry in seen
    ]
    ends = raw["question"].str.endswith("Please answer yes or no.")
    assert ends.tolist() == [entry["subcategory"] != "illusion" for entry in seen]  # asks already
    record = json.loads((tmp_path / "H.tsv.json").read_text())
    assert record["without_picture"] == 6 and list(record["files"]) == ["HallusionBench.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt_answer": "2"}, "question 1: gt_answer is '2'; it must be '0' or '1'"),
        ({"set_id": 0}, "question 1: set_id must be a text, and is '0'"),
        ({"figure_id": "0_1"}, "question 1: figure_id must be letters and digits, not '0_1'"),
        ({"filename": None}, "question 1 has no filename, and its visual_input is not 0"),
        ({"filename": "../x.png"}, "leads out of the image folder"),
        ({"question_id": "1"}, "HallusionBench_VD_math_0_0_1 occurs more than once"),
        ({"question": ""}, "question 1: question must be a text"),
    ],
)
def test_mistakes_in_hallusionbench_are_named(tmp_path, change, message):
    source = draw_hallusionbench(tmp_path / "repo")
    file = source / "HallusionBench.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps([data[0] | change, *data[1:]]))
    with pytest.raises(DataError, match=message):
        write_hallusionbench(file, source / "hallusion_bench", tmp_path / "H.tsv")
    assert not (tmp_path / "H.tsv").exists()


# ------------------------------------------------------------------------------------------ RePOPE


def test_repope_has_its_own_labels_and_fewer_questions(tmp_path):
    folder = draw_repope(tmp_path) / "annotations"  # with the files of POPE beside it
    pope, _ = pope_from_published(folder)
    repope, source = pope_from_published(folder, "repope")
    old, new = ({(q.image, q.text): q for q in own} for own in (pope, repope))
    assert new.keys() < old.keys() and all("repope" in name for name in source["files"])
    changed = [key for key in new if new[key].answer != old[key].answer]
    assert [image for image, _ in changed] == ["COCO_val2014_000000000001.jpg"]
    assert all(new[key].splits == old[key].splits for key in new)


# -------------------------------------------------------------------------------------- the tables


def test_tables_know_their_splits_and_groups(made, tmp_path):
    lmu = made / "lmu"
    rows = {
        name: table_rows(read_table(lmu / f"{name}.tsv", tmp_path / "images", name=name))
        for name in ("MME", "AMBER", "HallusionBench", "RePOPE")
    }
    assert {row.benchmark for row in rows["MME"]} == {"MME"}
    assert {row.benchmark for row in rows["RePOPE"]} == {""}  # read and compared as POPE
    assert rows["MME"][0].category == "perception,existence"
    assert {row.category for row in rows["AMBER"]} == {
        *("existence", "relation", "attribute,state", "attribute,number", "attribute,action")
    }
    first = rows["HallusionBench"][0]
    assert (first.category, first.group, first.cluster) == (
        "VD,VD_math",
        "VD_math_0_0",
        "VD_math_0",
    )
    assert rows["MME"][0].cluster == rows["MME"][0].image


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("MME", {"category": "colour"}, "row 0 has the category 'colour'; those of MME are"),
        ("MME", {"category": "count"}, "the picture .* of count has 1"),
        ("AMBER", {"category": "generative"}, "row 6 has the category 'generative'"),
        ("AMBER", {"answer": "maybe"}, "row 6 has the answer 'Maybe'; it must be Yes or No"),
        ("HallusionBench", {"index": "VD_math_0_0_0"}, "is not an index of HallusionBench such as"),
        ("HallusionBench", {"l2-category": "VD,math"}, "has the category 'VD,math'"),
        ("HallusionBench", {"category": "overall"}, "has the category 'overall'"),
    ],
)
def test_mistakes_in_the_tables_are_named(made, tmp_path, name, change, message):
    frame = read(made / f"lmu/{name}.tsv")
    for column, cell in change.items():
        frame[column] = [cell, *frame[column].tolist()[1:]]
    frame.to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "x.tsv", tmp_path / "images", name=name)


def test_published_forms_are_read_too(made, tmp_path):
    """AMBER with small letters; MME without names of pictures; HallusionBench with questions that
    have no picture.
    """
    lmu = made / "lmu"
    frame = read(lmu / "AMBER.tsv")
    small = frame.assign(answer=frame["answer"].str.lower())
    small.to_csv(tmp_path / "small.tsv", sep="\t", index=False)
    table = read_table(tmp_path / "small.tsv", tmp_path / "images", name="AMBER")
    assert table.frame["answer"].tolist() == frame["answer"].tolist()
    bare = read(lmu / "MME.tsv").drop(columns="image_path")
    bare.to_csv(tmp_path / "bare.tsv", sep="\t", index=False)
    table = read_table(tmp_path / "bare.tsv", tmp_path / "images", name="MME")
    groups = [row.group for row in table_rows(table)]
    assert len(set(groups)) == len(groups) / 2 and groups[::2] == groups[1::2]
    whole = read(lmu / "HallusionBench.tsv")
    text = whole.iloc[:1].assign(index="HallusionBench_VS_map_0_0_0", image=None)
    pd.concat([text, whole]).to_csv(tmp_path / "more.tsv", sep="\t", index=False)
    table = read_table(tmp_path / "more.tsv", tmp_path / "images", name="HallusionBench")
    assert (table.without_image, len(table.frame)) == (1, len(whole))


def test_files_that_are_not_there_are_named_with_the_way_to_make_them(tmp_path):
    with pytest.raises(DataError, match="MME: there is no .*MME.tsv. Make one with `hipp data`"):
        locate("MME", tmp_path)
    with pytest.raises(DataError, match=r"RePOPE: there is no .*`hipp testbed export`; its folder"):
        locate("RePOPE", tmp_path)  # there is no published table of RePOPE


# ------------------------------------------------------------------------------------- the commands


def hipp(capsys, monkeypatch, cwd: Path, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["hipp", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


def test_the_commands_write_the_same_files(made, tmp_path, capsys, monkeypatch):
    lmu, drawn = made / "lmu", made / "drawn"
    commands = {
        "MME": ("mme", "mme"),
        "AMBER": ("amber", "amber", "--images", "amber/image"),
        "HallusionBench": ("hallusionbench", "hallusion", "--images", "hallusion/hallusion_bench"),
        "RePOPE": ("repope", "repope/annotations", "--images", "repope/val2014"),
    }
    for name, arguments in commands.items():
        out = tmp_path / f"made/{name}.tsv"
        code, said, _ = hipp(capsys, monkeypatch, drawn, "data", *arguments, "-o", str(out))
        assert code == 0 and name in said
        assert out.read_bytes() == (lmu / f"{name}.tsv").read_bytes()
    code, _, wrong = hipp(capsys, monkeypatch, drawn, "data", "mme", "amber", "-o", "x.tsv")
    assert code == 2 and "has no folder existence, count" in wrong and not Path("x.tsv").exists()


def test_another_file_is_kept(tmp_path):
    source, out = draw_mme(tmp_path / "release"), tmp_path / "MME.tsv"
    before = write_mme(source, out).read_bytes()
    draw(source / "MME_Benchmark/OCR/0000.png", 99)
    with pytest.raises(OutputExistsError, match=r"MME.tsv exists"):
        write_mme(source, out)
    assert out.read_bytes() == before
    assert write_mme(source, out, overwrite=True).read_bytes() != before
