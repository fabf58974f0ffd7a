"""Makes VLMEvalKit's POPE TSV from object annotations, or from the files that the authors of POPE
published.

Each image gets as many questions about objects in it as about absent ones. Absent objects are
chosen in three ways: any objects (random), the most frequent ones (popular), and those that most
often occur with the present ones (adversarial).

Source: arXiv 2305.10355, section 5.1, and main.py and utils.py of the authors' repository
(AoiDragon/POPE).

Differs from the paper: an image needs 3 or more kinds of objects, as in the code (the paper: more
than 3). The authors' COCO file also counts objects that only the captions name; here only the
annotations count. Their draws have no seed, so the published questions can be converted but not
drawn again.
"""

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hipp_ext.errors import DataError
from hipp_ext.evals.data.coco import AnnotatedImage, read_instances
from hipp_ext.evals.data.writing import file_pictures, write_table
from hipp_ext.evals.pope import SPLITS
from hipp_ext.files import content_hash
from hipp_ext.files.untrusted import parse_json, read_plain, shown, the_only_one

ENDING = "Please answer yes or no."
_MAX_PAIRS = 10**7  # pairs of objects in all images; 500 images of COCO have about 10,000


@dataclass(frozen=True, kw_only=True)
class PopeQuestion:
    """A question about an image, with its splits.

    Attributes:
        image: file name of the image.
        text: text of the question, without the ending that asks for yes or no.
        answer: "Yes" or "No".
        splits: splits of the question, in the order of `SPLITS`.
    """

    image: str
    text: str
    answer: str
    splits: tuple[str, ...]


def write_pope(
    out: str | Path,
    questions: Sequence[PopeQuestion],
    images: str | Path,
    source: dict[str, object],
    *,
    maker: str = "hipp data pope",
    ending: str = ENDING,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write the questions, each followed by `ending`, to the TSV `out`.

    Raises:
        DataError, OutputExistsError, WriteError: see `file_pictures` and `write_table`.
    """
    pictures = file_pictures(images, [question.image for question in questions])
    rows = [
        {
            "index": index,
            "question": f"{question.text} {ending}".strip(),
            "answer": question.answer,
            "category": ",".join(question.splits),
        }
        for index, question in enumerate(questions)
    ]
    made = {"made_by": maker, **source, "ending": ending}
    return write_table(out, rows, pictures, source=made, overwrite=overwrite, progress=progress)


def pope_from_annotations(
    path: str | Path, *, n_images: int = 500, per_image: int = 3, seed: int = 0
) -> tuple[list[PopeQuestion], dict[str, object]]:
    """The questions about `n_images` images of a COCO instance file, and a description of their
    source.

    Raises:
        DataError: see `read_instances` and `build_pope`.
    """
    images, _ = read_instances(path)
    made = build_pope(images, n_images=n_images, per_image=per_image, seed=seed)
    source = {
        "annotations": Path(path).name,
        "annotations_sha256": content_hash(path),
        "images": n_images,
        "objects_per_image": per_image,
        "seed": seed,
    }
    return made, source


def build_pope(
    images: Sequence[AnnotatedImage], *, n_images: int = 500, per_image: int = 3, seed: int = 0
) -> list[PopeQuestion]:
    """The questions about a sample of the images, grouped by image. A question in several splits is
    there once.

    Args:
        images: images with their objects.
        n_images: number of images to draw from those with `per_image` or more kinds of objects.
        per_image: number of questions per image with the answer yes, and with no in each split.
            Those with yes are about the first objects of the image, as in the authors' code.
        seed: random seed of the sample and of the random objects.

    Raises:
        DataError: there are too few images with enough objects, or an image leaves too few absent
            objects.
    """
    if n_images < 1 or per_image < 1:
        raise DataError(
            f"POPE needs at least 1 image and 1 object per image, not {n_images} and {per_image}"
        )
    rich = [image for image in images if len(image.objects) >= per_image]
    if len(rich) < n_images:
        raise DataError(
            f"{n_images} images with {per_image} kinds of objects or more are needed, and "
            f"{len(rich)} of the {len(images)} annotated ones have as many. Ask for fewer images, "
            "or fewer objects per image"
        )
    rng = random.Random(f"pope {seed}")
    sample = rng.sample(rich, n_images)
    if (pairs := sum(len(image.objects) ** 2 for image in sample)) > _MAX_PAIRS:
        raise DataError(
            f"the sampled images hold {pairs:,} pairs of objects, and {_MAX_PAIRS:,} are counted "
            "at most: so many kinds of objects in one image are a mistake in the annotations"
        )
    # Counters keep the order of insertion, and sorting is stable, so ties are broken as in the
    # authors' code.
    frequency = Counter(name for image in sample for name in image.objects)
    popular = sorted(frequency, key=lambda name: -frequency[name])
    companions = _companions(sample)
    return [
        question
        for image in sample
        for question in _ask(image, per_image, popular, companions, rng)
    ]


def _companions(sample: Sequence[AnnotatedImage]) -> dict[str, list[str]]:
    """The objects that occur together with each object, the most frequent ones first."""
    seen: dict[str, Counter] = {}
    for image in sample:
        for name, other in itertools.permutations(image.objects, 2):
            seen.setdefault(name, Counter())[other] += 1
    return {name: sorted(others, key=lambda other: -others[other]) for name, others in seen.items()}


def _ask(
    image: AnnotatedImage,
    per_image: int,
    popular: Sequence[str],
    companions: Mapping[str, Sequence[str]],
    rng: random.Random,
) -> list[PopeQuestion]:
    there = set(image.objects)
    absent = [name for name in popular if name not in there]
    if len(absent) < per_image:
        raise DataError(
            f"{image.file_name}: {per_image} absent objects are needed, and it lacks only "
            f"{len(absent)} of the {len(popular)} kinds that the sampled images hold: too few "
            "objects to ask about. Use more images"
        )
    present, adversarial, missing = image.objects[:per_image], [], set(absent)
    for name in present:
        usual = next(
            (o for o in companions.get(name, ()) if o in missing and o not in adversarial), None
        )
        left = [other for other in absent if other not in adversarial] if usual is None else []
        adversarial.append(rng.choice(left) if usual is None else usual)
    chosen = {
        "random": rng.sample(absent, per_image),
        "popular": absent[:per_image],
        "adversarial": adversarial,
    }
    asked: dict[str, tuple[str, tuple[str, ...]]] = {}
    for step, name in enumerate(present):
        asked[name] = ("Yes", SPLITS)
        for split in SPLITS:
            other = chosen[split][step]
            asked.setdefault(other, ("No", tuple(own for own in SPLITS if other in chosen[own])))
    return [
        PopeQuestion(image=image.file_name, text=_text(name), answer=answer, splits=splits)
        for name, (answer, splits) in asked.items()
    ]


def _text(name: str) -> str:
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def pope_from_published(
    folder: str | Path, name: str = "pope"
) -> tuple[list[PopeQuestion], dict[str, object]]:
    """The questions of the authors' three files (such as coco_pope_random.json) in a folder, each
    once.

    Args:
        folder: folder of the files.
        name: what the names of the files contain: "pope", or "repope" for the files of RePOPE
            (arXiv 2504.15707), which have POPE's form, corrected labels, and no ambiguous question.

    Raises:
        DataError: a split has no file or several, a line is not in the authors' format, or a
            question has two answers.
    """
    files = {split: _published_file(Path(folder), split, name) for split in SPLITS}
    found: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for split, file in files.items():
        for where, image, text, answer in _read_published(file):
            known, splits = found.setdefault(image, {}).setdefault(text, (answer, []))
            if known != answer:
                raise DataError(
                    f"{where}: the answer to {text!r} about {image} is {answer}, and elsewhere "
                    f"{known}"
                )
            if split not in splits:
                splits.append(split)
    questions = [
        PopeQuestion(image=image, text=text, answer=answer, splits=tuple(splits))
        for image, asked in found.items()
        for text, (answer, splits) in asked.items()
    ]
    return questions, {"files": {file.name: content_hash(file) for file in files.values()}}


def _published_file(folder: Path, split: str, name: str) -> Path:
    # The authors of RePOPE publish POPE's files beside their own.
    found = sorted(
        file
        for file in folder.glob(f"*{name}*_{split}.json")
        if name != "pope" or "repope" not in file.name.lower()
    )
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{folder}: one file like coco_{name}_{split}.json is needed, and there is: {names}"
        )
    return found[0]


def _read_published(file: Path) -> list[tuple[str, str, str, str]]:
    """For each line: its place, image, question, and "Yes" or "No"."""
    rows = []
    for number, line in enumerate(read_plain(file).splitlines(), start=1):
        where = f"{file}, line {number}"
        entry = parse_json(line, where)
        if not isinstance(entry, dict) or not {"image", "text", "label"} <= entry.keys():
            raise DataError(
                f"{where} is not a POPE question (image, text, label): {shown(line.decode(), 100)}"
            )
        image, text, label = the_only_one(entry["image"], where), entry["text"], entry["label"]
        if not isinstance(image, str) or not isinstance(text, str):
            raise DataError(
                f"{where} is not a POPE question (image, text, label): image and text must be texts"
            )
        if label not in ("yes", "no"):
            raise DataError(f"{where}: the label is {shown(repr(label), 60)}; it must be yes or no")
        rows.append((where, image, text, label.capitalize()))
    if not rows:
        raise DataError(f"{file} is empty")
    return rows
