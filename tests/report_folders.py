"""What `vlmeval`, `hipp chair` and `hipp latency` write, made by hand, for reports about it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

HASH = "ab" * 32


def digest(model: str) -> str:
    """The content hash of a model, made from its name."""
    return hashlib.sha256(model.encode("utf-8", "replace")).hexdigest()


def split(**changes: object) -> dict:
    """Scores of one split of POPE."""
    return {
        "n": 4,
        "accuracy": 50.0,
        "accuracy_se": 1.0,
        "f1": 40.0,
        "f1_se": None,
        "yes_rate": 50.0,
        "yes_rate_se": 2.0,
    } | changes


def record(model: str = "dense", **changes: object) -> dict:
    """A results.json about POPE."""
    splits = {"overall": split(n=6), "random": split(), "popular": split(n=2)}
    return {
        "model": model,
        "model_hash": digest(model),
        "data": "POPE",
        "data_hash": "d" * 64,
        "n": 4,
        "metrics": {"vlmeval": splits, "official": splits},
        "settings": {"dtype": "float32"},
        "command": "vlmeval",
        "predictions": f"/gone/{model}/POPE/run-1/predictions.jsonl",
    } | changes


def latency(*names: str) -> dict:
    """A result of `hipp latency`; its own test makes real ones."""
    spread = {"median": 10.0, "low": 9.0, "high": 12.0, "n": 5}
    ratio = {"median": 1.5, "least": 1.2, "most": 1.7, "n": 5}
    row = {
        "parameters": 10**6,
        "prefill_gflops": 0.5,
        "prefill_ms": spread,
        "decode_ms": spread,
        "weights_mib": 4.0,
        "extra_mib": 2.0,
        "peak_mib": 6.0,
    }
    faster = {"prefill_speedup": ratio, "decode_speedup": ratio}
    return {
        "command": "hipp latency dense small",
        "device": "a CPU",
        "threads": 1,
        "load": {"rows": 1, "repeats": 5, "warmup": 2, "seed": 3},
        "models": {name: row | (faster if number else {}) for number, name in enumerate(names)},
    }


def served(*names: str, runtime: str = "llama.cpp", weights: str = "q8_0") -> dict:
    """A result of `hipp latency --runtime`; its own test makes real ones."""
    row = {"prefill_ms": [9.0, 10.0, 14.0], "decode_ms": [2.0, 2.5, 3.0], "memory_mib": [99.0]}
    faster = {
        "prefill_speedup": {"median": 1.25, "least": 1.1, "most": 1.4, "n": 3},
        "decode_speedup": {"median": 1.1, "least": 0.9, "most": 1.3, "n": 3},
    }
    serving = {
        "runtime": runtime,
        "weights": weights,
        "tokens": 64,
        "new_tokens": 9,
        "repeats": 3,
        "rounds": 3,
        "threads": 2,
        "seed": 0,
    }
    return {
        "command": f"hipp latency --runtime {runtime}",
        "date": "2026-05-04T03:02+00:00",
        "device": "a machine",
        "threads": 2,
        "versions": {"hipp-ext": "9.8.7"},
        "serving": serving,
        "models": {name: row | (faster if number else {}) for number, name in enumerate(names)},
    }


def chair(model: str, counts: Mapping[str, Sequence[int]], **changes: object) -> dict:
    """A scores.json of `hipp chair`, of images that are all different."""
    named, wrong, found, there = (sum(counts[key]) for key in ("named", "wrong", "found", "there"))
    n = len(counts["named"])
    return {
        "model": model,
        "model_hash": digest(model),
        "data": "coco",
        "n": n,
        "images": n,
        "chair_i": 100 * wrong / named,
        "chair_i_se": 1.0,
        "chair_s": 100 * sum(w > 0 for w in counts["wrong"]) / n,
        "chair_s_se": 2.0,
        "recall": 100 * found / there,
        "recall_se": 3.0,
        "silent": 0.0,
        "mentions": named / n,
        "settings": {"prompt": "describe", "device": "cpu"},
        "counts": {"image": [f"image {i}" for i in range(n)], **counts},
        "command": f"hipp chair {model}",
    } | changes


def put_chair(folder: Path, scores: Mapping[str, object], run: str = "run-1") -> None:
    """Write scores.json to where `hipp chair` writes it."""
    place = folder / f"{scores['model']}-hash" / f"CHAIR-{scores['data']}" / run
    place.mkdir(parents=True)
    (place / "scores.json").write_text(json.dumps(scores))


def outputs(
    folder: Path, models: Sequence[str] = ("dense", "small"), image: str = HASH, **changes: object
) -> Path:
    """What `vlmeval` leaves of models that answer four questions about a red picture, each in its
    own way.
    """
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(folder / f"images/{HASH[:32]}.png")
    asked = {
        "question": "q",
        "answer": "Yes",
        "category": "random",
        "image": image,
        "options": None,
    } | changes
    for number, model in enumerate(models):
        said = ["Yes" if (n + number) % 2 else "No" for n in range(4)]
        put_answers(folder, model, [asked] * 4, said, place=f"model{number}")
    return folder


def put_answers(
    folder: Path,
    model: str,
    questions: Sequence[Mapping[str, object]],
    said: Sequence[str],
    *,
    place: str = "",
    **changes: object,
) -> None:
    """Write what `vlmeval` leaves of one model on one data set.

    Args:
        folder: folder of all outputs.
        model: name of the model.
        questions: fields of every question but its index.
        said: answer to every question.
        place: folder of the model below `folder`; "" is its name.
        changes: fields of results.json, such as data and metrics.
    """
    data = str(changes.get("data", "POPE"))
    run = folder / (place or model) / data / "run-1"
    run.mkdir(parents=True)
    own = record(model, predictions=str(run / "predictions.jsonl"), **changes)
    (run.parent / "results.json").write_text(json.dumps(own | {"n": len(said)}))
    asked = [dict(q) | {"index": str(i)} for i, q in enumerate(questions)]
    answers = [{"index": str(i), "prediction": text} for i, text in enumerate(said)]
    for name, rows in (("questions", asked), ("predictions", answers)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
