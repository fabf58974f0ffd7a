"""CHAIR of a model folder, for `hipp chair`. Captions are logged, so a killed run can continue."""

import functools
import hashlib
import io
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hipp_ext.errors import DataError
from hipp_ext.evals.chair import (
    CaptionCounts,
    ChairScores,
    ObjectWords,
    caption_counts,
    chair_scores,
    default_synonyms,
    read_synonyms,
)
from hipp_ext.evals.data.coco import read_captions, read_instances
from hipp_ext.evals.data.writing import Picture, checked_bytes, file_pictures
from hipp_ext.evals.hipp_vlm import HippVLM, check_model_folder
from hipp_ext.evals.measuring import about
from hipp_ext.evals.prediction_log import open_log, writing
from hipp_ext.evals.predictions import answer_rows
from hipp_ext.evals.runs import PREDICTIONS, result_folder, run_folder, shown_name
from hipp_ext.evals.statistics import without_nan
from hipp_ext.evals.text_table import text_table
from hipp_ext.files import content_hash, write_atomic

if TYPE_CHECKING:
    from rich.table import Table

_KEY = 2  # version of how captions are made; earlier ones are not used again
# POPE's second caption instruction (arXiv 2305.10355, section 3.1).
PROMPT = "Provide a brief description of the given image."


@dataclass(frozen=True, kw_only=True)
class CaptionTask:
    """Images to describe.

    Attributes:
        name: name of the data, which can be the name of a folder.
        pictures: images with distinct names.
        objects: objects in each image.
        words: finds objects in captions.
        prompt: prompt of the model.
        max_new_tokens: maximum length of a caption [tokens].
    """

    name: str
    pictures: tuple[Picture, ...]
    objects: tuple[tuple[str, ...], ...]
    words: ObjectWords
    prompt: str
    max_new_tokens: int

    @property
    def names(self) -> list[str]:
        """The name of each image."""
        return [picture.name for picture in self.pictures]


def scenes_task(n: int = 200, *, split: str = "test") -> CaptionTask:
    """The task of describing `n` scenes of the testbed, with the prompt that its model was trained
    on.
    """
    from hipp_ext.testbed import world
    from hipp_ext.testbed.quiz import DESCRIBE

    def png(scene: world.Scene) -> bytes:
        buffer = io.BytesIO()
        world.render(scene).save(buffer, "PNG")
        return buffer.getvalue()

    scenes = list(itertools.islice(world.stream(split), n))
    return CaptionTask(
        name="testbed",
        pictures=tuple(
            Picture(name=f"{split} {number}", stamp=(0, 0), read=functools.partial(png, scene))
            for number, scene in enumerate(scenes)
        ),
        objects=tuple(scene.present for scene in scenes),
        words=ObjectWords(default_synonyms(world.OBJECTS)),
        prompt=DESCRIBE,
        max_new_tokens=16,
    )


def coco_task(
    annotations: str | Path,
    images: str | Path,
    n: int = 200,
    *,
    captions: str | Path | None = None,
    synonyms: str | Path | None = None,
    prompt: str = PROMPT,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> CaptionTask:
    """The task of describing `n` random images with at least one object of a COCO instance file.

    Args:
        annotations: instance file, such as instances_val2014.json.
        images: folder of the images.
        n: number of images.
        captions: reference captions, such as captions_val2014.json. The objects that they name
            count as present, as in the paper. Without them, objects without an annotation count as
            hallucinated.
        synonyms: file for `read_synonyms`. Default: only names and plurals are found, and so fewer
            mentions.
        prompt: prompt of the model.
        max_new_tokens: maximum length of a caption [tokens].
        seed: random seed of the sample.

    Raises:
        DataError: a file is missing or malformed, or there are fewer images.
    """
    annotated, names = read_instances(annotations)
    given = read_synonyms(synonyms) if synonyms else {}
    words = ObjectWords(default_synonyms(names) | given)
    known = [image for image in annotated if image.objects]
    if len(known) < n:
        raise DataError(
            f"{annotations}: {n} images with objects are needed, and there are {len(known)}. "
            "Lower --n"
        )
    sample = random.Random(f"chair {seed}").sample(known, n)
    reference = read_captions(captions) if captions else {}
    named = [words(" . ".join(reference.get(image.id, []))) for image in sample]
    pictures = file_pictures(images, [image.file_name for image in sample])
    return CaptionTask(
        name="coco",
        pictures=tuple(pictures),
        objects=tuple(
            tuple(dict.fromkeys([*image.objects, *more]))
            for image, more in zip(sample, named, strict=True)
        ),
        words=words,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
    )


def measure_chair(
    model_dir: str | Path,
    task: CaptionTask,
    *,
    work_dir: str | Path = "outputs",
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = False,
    command: str | None = None,
) -> tuple[ChairScores, Path]:
    """CHAIR of a model folder, and the file of its captions.

    The file is <work_dir>/<model>-<hash>/CHAIR-<task>/run-<key>/predictions.jsonl; scores.json is
    written beside it, with the counts of every caption and the `command` if it is given. Decoding
    is greedy. Existing captions of the same model, images and settings are used again.

    Raises:
        CheckpointError: the folder is not a complete model, or the device does not exist.
        DataError: an image is broken.
        OutputBusyError: another process is making the same captions in this `work_dir`.
        WriteError: the disk is full, or `work_dir` cannot be written.
    """
    from hipp_ext.surgery.checkpoint import resolve_device

    folder = check_model_folder(model_dir)
    device = resolve_device(device)
    pictures = list(map(checked_bytes, task.pictures))
    model_hash = content_hash(folder)
    settings = {
        "prompt": task.prompt,
        "max_new_tokens": task.max_new_tokens,
        "dtype": dtype or "auto",
        "device": device.partition(":")[0],
    }
    names = task.names
    hashes = [hashlib.sha256(data).hexdigest() for data in pictures]
    work_dir = Path(work_dir).expanduser()
    place = run_folder(
        result_folder(work_dir, folder, model_hash) / f"CHAIR-{task.name}",
        [_KEY, model_hash, names, hashes, settings],
    )

    def message(row: int) -> list[dict]:
        return [{"type": "image", "value": pictures[row]}, {"type": "text", "value": task.prompt}]

    with open_log(place / PREDICTIONS, names) as log, writing(place):
        answer_rows(
            lambda: HippVLM(folder, device, dtype, task.max_new_tokens),
            log,
            names,
            message,
            batch_size=batch_size,
            progress=f"{shown_name(folder)} describes" if progress else None,
        )
        captions = [log.answers[name] for name in names]
        scores = chair_scores(captions, task.objects, hashes, task.words)
        counts = [
            caption_counts(caption, there, task.words)
            for caption, there in zip(captions, task.objects, strict=True)
        ]
        record = {
            "model": shown_name(folder),
            "model_hash": model_hash,
            "data": task.name,
            **without_nan(asdict(scores)),
            "settings": settings,
            "counts": {
                "image": hashes,
                **{name: [getattr(own, name) for own in counts] for name in CaptionCounts._fields},
            },
            "made": about(device),
            "command": command,
        }
        write_atomic(place / "scores.json", json.dumps(record, indent=1) + "\n")
    return scores, log.path


def chair_table(rows: Sequence[tuple[str, ChairScores]]) -> "Table":
    """A rich table with one line per model."""
    rates = ("chair_i", "chair_s", "recall", "silent", "mentions")
    cells = [
        [model, own.n, *(f"{getattr(own, f):.2f} ± {getattr(own, f + '_se'):.2f}" for f in rates)]
        for model, own in rows
    ]
    return text_table(
        ("model", "captions", "CHAIR_i", "CHAIR_s", "recall", "silent", "objects per caption"),
        cells,
        title="percent, ± standard error over images; lower CHAIR and higher recall are better",
    )
