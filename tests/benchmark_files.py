"""RePOPE, AMBER, HallusionBench and MME in the layouts of their authors, about drawn squares."""

import json
from pathlib import Path

from PIL import Image
from vlm_tables import COLOURS

from hipp_ext.evals.mme import SUBTASKS

SPLIT = ("artwork", "celebrity", "landmark", "posters", "scene")  # of MME: two folders each
HALLUSION = {  # subcategory -> its category, number of sets, figures in a set, questions
    "math": ("VD", 2, 2, 2),
    "illusion": ("VD", 3, 3, 1),
    "chart": ("VS", 2, 3, 3),
}


def draw(path: Path, number: int) -> Path:
    """A square on grey; every number is another picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (40, 32), (100, 100, number % 256))
    image.paste(Image.new("RGB", (14, 14), COLOURS[number % 4]), (number % 24, number % 17))
    image.save(path)
    return path


def _question(number: int) -> str:
    return f"is there a {COLOURS[number % 4]} square ?" + " the" * (number % 5)


def draw_mme(folder: Path, pictures: int = 2) -> Path:
    """MME_Benchmark_release_version with so many pictures in each of the 14 subtasks."""
    number = 0
    for subtask in SUBTASKS:
        place = folder / "MME_Benchmark" / subtask
        texts, images = (
            (place / "questions_answers_YN", place / "images") if subtask in SPLIT else (place,) * 2
        )
        texts.mkdir(parents=True, exist_ok=True)
        for picture in range(pictures):
            stem = f"{picture:04d}"
            draw(images / f"{stem}{'.jpg' if picture % 2 else '.png'}", number)
            lines = [f"{_question(number)}\tYes", f"{_question(number + 1)}\tNo"]
            end = "\r\n" if picture % 2 else "\n"
            (texts / f"{stem}.txt").write_bytes((end.join(lines) + end).encode())
            number += 1
    (folder / "eval_tool").mkdir()
    return folder


def draw_amber(folder: Path, pictures: int = 5) -> Path:
    """The authors' repository with `image` beside its data: six questions about each picture."""
    kinds = ["hallucination", "attribute-state", "attribute-number", "attribute-action", "relation"]
    types = [f"discriminative-{kind}" for kind in kinds] + ["relation"]
    annotations = [
        {"id": n + 1, "type": "generative", "truth": ["square"], "hallu": ["dog"]}
        for n in range(pictures)
    ]
    queries = []
    for picture in range(pictures):
        name = f"AMBER_{picture + 1}.jpg"
        draw(folder / "image" / name, picture)
        for place, kind in enumerate(types):
            number = pictures + len(queries) + 1
            yes = kind != types[0] and kind != "relation" and (place + picture) % 2
            annotations.append({"id": number, "type": kind, "truth": "yes" if yes else "no"})
            queries.append({"id": number, "image": name, "query": _question(number)})
    (folder / "data/query").mkdir(parents=True)
    (folder / "data/query/query_discriminative.json").write_text(json.dumps(queries))
    (folder / "data/annotations.json").write_text(json.dumps(annotations))
    return folder


def draw_hallusionbench(folder: Path) -> Path:
    """HallusionBench.json and hallusion_bench/; VS questions are also asked without a picture."""
    rows, number = [], 0
    for kind, (category, sets, figures, questions) in HALLUSION.items():
        for one in range(sets):
            for figure in range(figures):
                name = f"./{category}/{kind}/{one}_{figure}.png"
                seen = category == "VD" or figure > 0
                if seen:
                    draw(folder / "hallusion_bench" / name, number)
                for question in range(questions):
                    number += 1
                    asked = _question(number) + " Yes or No" * (kind == "illusion")
                    rows.append(
                        {
                            "category": category,
                            "subcategory": kind,
                            "visual_input": str(min(figure + (category == "VD"), 2)),
                            "set_id": str(one),
                            "figure_id": str(figure),
                            "sample_note": "square",
                            "question_id": str(question),
                            "question": asked,
                            "gt_answer_details": "It is.",
                            "gt_answer": str((figure + question + one) % 2),
                            "filename": name if seen else None,
                        }
                    )
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    return folder


def draw_repope(folder: Path) -> Path:
    """annotations/ with the files of POPE and of RePOPE, and val2014/: RePOPE has other labels, and
    leaves out the third question of each picture.
    """
    (folder / "annotations").mkdir(parents=True)
    for split, name in enumerate(("random", "popular", "adversarial")):
        rows = [
            {
                "question_id": 6 * picture + ask + 1,
                "image": f"COCO_val2014_{picture:012d}.jpg",
                "text": f"Is there a {COLOURS[(ask + split * (ask > 2)) % 4]} square"
                f"{' here' if ask > 2 else ''}?",
                "label": "no" if ask % 2 else "yes",
            }
            for picture in range(4)
            for ask in range(4)
        ]
        kept = [row for row in rows if row["question_id"] % 6 != 3]
        other = {"yes": "no", "no": "yes"}
        mended = [
            row | {"label": other[row["label"]] if row["question_id"] == 7 else row["label"]}
            for row in kept
        ]
        for kind, own in (("pope", rows), ("repope", mended)):
            text = "".join(json.dumps(row) + "\n" for row in own)
            (folder / f"annotations/coco_{kind}_{name}.json").write_text(text)
    for picture in range(4):
        draw(folder / f"val2014/COCO_val2014_{picture:012d}.jpg", 10 + picture)
    return folder


def write_all(folder: Path) -> Path:
    """The four TSVs, made by the builders from drawn files."""
    from hipp_ext.evals.data.amber import write_amber
    from hipp_ext.evals.data.hallusionbench import write_hallusionbench
    from hipp_ext.evals.data.mme import write_mme
    from hipp_ext.evals.data.pope import pope_from_published, write_pope

    lmu, drawn = folder / "lmu", folder / "drawn"
    write_mme(draw_mme(drawn / "mme"), lmu / "MME.tsv")
    amber = draw_amber(drawn / "amber")
    write_amber(amber, amber / "image", lmu / "AMBER.tsv")
    hallusion = draw_hallusionbench(drawn / "hallusion")
    write_hallusionbench(hallusion, hallusion / "hallusion_bench", lmu / "HallusionBench.tsv")
    repope = draw_repope(drawn / "repope")
    questions, source = pope_from_published(repope / "annotations", "repope")
    write_pope(lmu / "RePOPE.tsv", questions, repope / "val2014", source)
    return lmu
