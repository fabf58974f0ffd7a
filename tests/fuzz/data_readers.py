"""Readers of evaluation data and results: tables, COCO, POPE, ScienceQA, predictions, comparisons,
reports.
"""

import dataclasses
import html.parser
import io
import json
from pathlib import Path
from typing import Any

from report_folders import chair, latency, served

from fuzz.readers import fitted, png, tiny
from fuzz.table import TABLE

# --- tables


def make_pope_tsv(folder: Path) -> None:
    from vlm_tables import pope_rows, write_tsv

    write_tsv(folder / "POPE.tsv", pope_rows()[:6])


def make_choice_tsv(folder: Path) -> None:
    from vlm_tables import scienceqa_rows, write_tsv

    write_tsv(folder / "ScienceQA_TEST.tsv", scienceqa_rows()[:4])


def make_path_tsv(folder: Path) -> None:
    from vlm_tables import pope_rows, write_tsv

    rows = [row | {"image_path": f"images/{n % 2}.png"} for n, row in enumerate(pope_rows()[:5])]
    (folder / "images").mkdir()
    for n in range(2):
        (folder / f"images/{n}.png").write_bytes(png(("red", "blue")[n]))
    write_tsv(folder / "POPE.tsv", rows, drop=("image",))


def answerable(tables: Any, folder: Path) -> None:
    """Every row has a prompt, an answer among its labels and a picture that opens, of the folder or
    of the decoded ones.
    """
    for asked, row in zip(*tables, strict=True):
        assert asked.answer in asked.labels and asked.prompt and row.index, (
            "a question that cannot be answered"
        )
        assert Path(asked.image_path).resolve().is_relative_to(folder.resolve().parent), (
            f"{asked.image_path} lies elsewhere"
        )
        assert asked.image.mode == "RGB"


def _table(name: str, make: Any) -> None:
    @TABLE.reads(name, make, check=answerable)
    def read(folder: Path) -> Any:
        from hipp_ext.evals.questions import table_questions
        from hipp_ext.evals.runs import table_rows
        from hipp_ext.evals.tables import read_table

        file = folder / ("ScienceQA_TEST.tsv" if name == "tsv-choice" else "POPE.tsv")
        table = read_table(file, folder.parent / "pictures", name=file.stem)
        return table_questions(table), table_rows(table)


_table("tsv", make_pope_tsv)
_table("tsv-choice", make_choice_tsv)
_table("tsv-paths", make_path_tsv)


@TABLE.reads("lm-eval", make_pope_tsv, share=0.1)
def read_lm_eval(folder: Path) -> Any:
    from hipp_ext.integrations.lm_eval_data import doc_to_image, load, pope_results

    documents = load("POPE", tsv=str(folder / "POPE.tsv"))["test"]
    return [(doc_to_image(doc), pope_results(doc, ["yes"])) for doc in documents]


# --- COCO and ScienceQA


def make_coco(folder: Path) -> None:
    kinds = ["person", "dog", "cup", "apple", "car", "bus"]
    images = [{"id": 7 + i, "file_name": f"{i}.jpg"} for i in range(4)]
    there = [(7 + i, 1 + (i + k) % 6) for i in range(4) for k in range(2)]
    (folder / "instances.json").write_text(
        json.dumps(
            {
                "images": images,
                "annotations": [{"image_id": i, "category_id": c} for i, c in there],
                "categories": [{"id": 1 + n, "name": name} for n, name in enumerate(kinds)],
            }
        )
    )
    captions = {
        "annotations": [{"image_id": 7 + i, "caption": "a dog and a cup"} for i in range(4)]
    }
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "synonyms.json").write_text(json.dumps({"person": ["girl", "boy"], "car": ["auto"]}))
    (folder / "images").mkdir()
    for i in range(4):
        (folder / f"images/{i}.jpg").write_bytes(png())


def no_other_pictures(written: Any, folder: Path) -> None:
    import base64

    for cell in (
        line.split("\t")[1].strip('"')
        for file in written
        for line in file.read_text().splitlines()[1:]
    ):
        assert len(cell) <= 64 or b"SECRET" not in base64.b64decode(cell), (
            "a picture from outside of the folder"
        )


@TABLE.reads("coco", make_coco, check=no_other_pictures, errors=("DataError", "WriteError"))
def read_coco(folder: Path) -> Any:
    """`hipp data pope` and `hipp chair`."""
    from hipp_ext.evals.captions import coco_task
    from hipp_ext.evals.data.pope import pope_from_annotations, write_pope

    questions, source = pope_from_annotations(folder / "instances.json", n_images=3, per_image=2)
    task = coco_task(
        folder / "instances.json",
        folder / "images",
        2,
        captions=folder / "captions.json",
        synonyms=folder / "synonyms.json",
    )
    task.words("two girls and an apple")
    return [write_pope(folder.parent / "out/POPE.tsv", questions, folder / "images", source)]


def make_published(folder: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": n,
                "image": f"{n % 2}.png",
                "text": f"Is there a {split} cup {n} in the image?",
                "label": ("yes", "no")[n % 2],
            }
            for n in range(4)
        ]
        (folder / f"coco_pope_{split}.json").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    (folder / "images").mkdir()
    for n in range(2):
        (folder / f"images/{n}.png").write_bytes(png())


@TABLE.reads("pope", make_published, check=no_other_pictures, errors=("DataError", "WriteError"))
def read_published(folder: Path) -> Any:
    from hipp_ext.evals.data.pope import pope_from_published, write_pope

    return [
        write_pope(
            folder.parent / "out/POPE.tsv", *pope_from_published(folder)[:1], folder / "images", {}
        )
    ]


def _problem(n: int) -> dict[str, Any]:
    return {
        "question": f"Which is {n}?",
        "choices": ["red", "NA", "blue"][: 2 + n % 2],
        "answer": n % 2,
        "hint": "h" * n,
        "topic": "physics",
        "subject": "natural science",
    }


def make_scienceqa(folder: Path) -> None:
    problems = {str(n): _problem(n) | {"image": "image.png", "split": "val"} for n in range(3)}
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"val": ["0", "1", "2"]}))
    for n in range(3):
        (folder / f"images/val/{n}").mkdir(parents=True)
        (folder / f"images/val/{n}/image.png").write_bytes(png())


def make_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        _problem(n) | {"image": {"bytes": png(), "path": "x.png"} if n else None} for n in range(4)
    ]
    pq.write_table(
        pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet", row_group_size=2
    )


def _scienceqa(name: str, make: Any) -> None:
    @TABLE.reads(
        name, make, check=no_other_pictures, errors=("DataError", "WriteError", "MissingExtraError")
    )
    def read(folder: Path) -> Any:
        from hipp_ext.evals.data.scienceqa import write_scienceqa

        return write_scienceqa(folder, folder.parent / "out", ["val"])


_scienceqa("scienceqa", make_scienceqa)
_scienceqa("parquet", make_parquet)


# --- results and reports


def make_results(folder: Path) -> None:
    """What `vlmeval` leaves of two models, with the files and rules of the product; only the model
    is missing.
    """
    from vlm_tables import pope_rows, write_tsv

    from hipp_ext.evals.pope import pope_scores
    from hipp_ext.evals.prediction_log import PredictionLog
    from hipp_ext.evals.runs import write_questions
    from hipp_ext.evals.tables import read_table

    tsv = write_tsv(folder / "POPE.tsv", pope_rows())
    table = read_table(tsv, folder / "outputs/images", name="POPE")
    answers = {"dense": ["Yes", "No"] * 6, "small": ["Yes", "yes it is", "", "No", "no", "Yes"] * 2}
    for number, (model, said) in enumerate(answers.items()):
        digest = str(number) * 64
        place = folder / f"outputs/{model}-{digest[:8]}/POPE"
        log = PredictionLog(place / "run-0/predictions.jsonl")
        log.add(zip(table.frame["index"].astype(str), said, strict=True))
        write_questions(table, log.path.parent)
        rules = pope_scores(
            said, table.frame["answer"].tolist(), table.frame["category"].tolist(), table.images
        )
        metrics = {
            rule: {split: dataclasses.asdict(own) for split, own in splits.items()}
            for rule, splits in rules.items()
        }
        record = {
            "model": model,
            "model_hash": digest,
            "data": "POPE",
            "data_hash": table.content_hash,
            "n": len(said),
            "metrics": metrics,
            "settings": {"dtype": None, "device": "cpu"},
            "official_file": None,
            "without_image": 0,
            "predictions": str(log.path),
            "seconds": 1.0,
            "command": f"vlmeval {model}",
        }
        (place / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    tsv.unlink()


@TABLE.reads("compare", make_results, share=0.2)
def read_compare(folder: Path) -> str:
    """`hipp compare`, with its table and its JSON."""
    from rich.console import Console

    from hipp_ext.evals.compare import compare, comparison_table, plain

    rows = compare(folder / "outputs/dense-00000000", folder / "outputs/small-11111111")
    Console(file=(shown := io.StringIO()), width=400).print(comparison_table(rows))
    return shown.getvalue() + json.dumps(plain(rows), allow_nan=False)


def make_predictions(folder: Path) -> None:
    from hipp_ext.evals.prediction_log import PredictionLog

    PredictionLog(folder / "predictions.jsonl").add([("0", "Yes"), ("1", "no"), ("2", "")])


@TABLE.reads("predictions", make_predictions)
def read_predictions(folder: Path) -> Any:
    from hipp_ext.evals.prediction_log import PredictionLog

    return PredictionLog(folder / "predictions.jsonl").answers


def make_report(folder: Path) -> None:
    make_results(folder)
    fitted().save(folder / "planner")
    (folder / "latency.json").write_text(json.dumps(latency("dense", "small")))
    (folder / "served.json").write_text(json.dumps(served("dense", "small")))
    counts = {"named": [3, 4, 2], "wrong": [1, 0, 0], "found": [2, 3, 2], "there": [3, 3, 3]}
    for file in sorted((folder / "outputs").glob("*/POPE/results.json")):
        of = json.loads(file.read_bytes())
        place = file.parents[1] / "CHAIR-coco/run-1"
        place.mkdir(parents=True)
        scores = chair(of["model"], counts, model_hash=of["model_hash"])
        (place / "scores.json").write_text(json.dumps(scores))


def make_summary(folder: Path) -> None:
    from hipp_ext.evals.report.sources import read_sources
    from hipp_ext.evals.report.summary import write_summary

    make_report(folder)
    entries = list(read_sources([folder]).entries)
    entries[1] = dataclasses.replace(
        entries[1],
        plan=fitted().plan(tiny()[0]),
        parameters=10**5,
        preference="utility 1",
        reward=fitted().archive.records[0].reward,
    )
    write_summary(folder, entries, ["hipp demo"], ["seed 0"], "planner")


class Page(html.parser.HTMLParser):
    """Finds what a report must not hold: scripts, event handlers, and anything that is fetched."""

    ALLOWED = frozenset(
        [
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "main",
            "header",
            "nav",
            "section",
            "h1",
            "h2",
            "h3",
            "p",
            "a",
            "b",
            "i",
            "small",
            "code",
            "pre",
            "div",
            "span",
            "ul",
            "ol",
            "li",
            "dl",
            "dt",
            "dd",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "figure",
            "figcaption",
            "img",
            "details",
            "summary",
            "article",
            "br",
            "em",
            "strong",
        ]
    )

    DRAWN = frozenset(["svg", "defs", "g", "path", "use", "clippath", "rect", "text", "image"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.ALLOWED | self.DRAWN, f"<{tag}> in the page"
        for name, value in attrs:
            assert not name.startswith("on"), f"{name}= in the page"
            if name in ("src", "srcset", "href", "xlink:href"):
                assert (value or "").startswith(("data:image/", "#")), (
                    f"{name}={str(value)[:60]} in the page"
                )
            assert "SECRET" not in (value or "")


def harmless(pages: list[str], folder: Path) -> None:
    for page in pages:
        parser = Page()
        parser.feed(page.encode().decode())
        parser.close()


REPORT_ERRORS = ("DataError", "CheckpointError", "PlanError", "PreferenceError", "BudgetError")


def read_page(folder: Path) -> list[str]:
    """The page of `hipp report`, without its drawings, which take most of the time."""
    from hipp_ext.evals.report.disagreements import disagreements
    from hipp_ext.evals.report.page import page
    from hipp_ext.evals.report.sources import read_sources

    sources = read_sources([folder])
    dense, *others = sources.entries
    found = {e.name: disagreements(dense.records, e.records, [folder]) for e in others}
    return [page(sources, [], {name: own for name, own in found.items() if own})]


TABLE.reads("report", make_report, check=harmless, errors=REPORT_ERRORS, share=0.2)(read_page)
TABLE.reads("summary", make_summary, check=harmless, errors=REPORT_ERRORS, share=0.2)(read_page)


@TABLE.reads("drawings", make_summary, check=harmless, errors=REPORT_ERRORS, share=0.01)
def read_drawings(folder: Path) -> list[str]:
    """`hipp report` as a whole."""
    from hipp_ext.evals.report import write_report

    return [write_report(folder, folder.parent / "out").read_text()]
