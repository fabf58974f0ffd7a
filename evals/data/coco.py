"""Reads COCO annotation files, for the POPE builder and for CHAIR."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.files.untrusted import read_json, shown, the_only_one


@dataclass(frozen=True, kw_only=True)
class AnnotatedImage:
    """An image and the objects in it.

    Attributes:
        id: id of the image in the annotation file.
        file_name: name of the image file, relative to the image folder.
        objects: names of distinct categories, in the order of their first annotations.
    """

    id: int
    file_name: str
    objects: tuple[str, ...]


def read_instances(path: str | Path) -> tuple[list[AnnotatedImage], tuple[str, ...]]:
    """The images of a COCO instance file, in its order, and the names of all categories.

    A crowd counts as an object like any other: the correct answer to "Is there a person?" is yes
    for a crowd.

    Raises:
        DataError: the file does not exist, is empty or not in COCO's format, or an annotation
            refers to an unknown category or image.
    """
    path = Path(path)
    data = read_json(path)
    try:
        names = {_id(category["id"]): _text(category["name"]) for category in data["categories"]}
        files = {
            _id(image["id"]): _text(
                the_only_one(image["file_name"], f"{path}: image {shown(image['id'])}")
            )
            for image in data["images"]
        }
        pairs = [
            (_id(annotation["image_id"]), _id(annotation["category_id"]))
            for annotation in data["annotations"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a COCO instance file: {error!r}. It needs images (id, file_name), "
            "annotations (image_id, category_id) and categories (id, name), as "
            "instances_val2014.json has them"
        ) from None
    if "" in names.values() or "" in files.values():
        raise DataError(f"{path}: a category or a file name is empty")
    for kind, entries in (("images", files), ("annotations", pairs), ("categories", names)):
        if not entries:
            raise DataError(f"{path}: the list {kind} is empty")
    _refuse_unknown(path, "category", (category for _, category in pairs), names)
    _refuse_unknown(path, "image", (image for image, _ in pairs), files)
    objects: dict[Any, dict[str, None]] = {image: {} for image in files}
    for image, category in pairs:
        objects[image][names[category]] = None
    images = [
        AnnotatedImage(id=i, file_name=file, objects=tuple(objects[i])) for i, file in files.items()
    ]
    return images, tuple(dict.fromkeys(names.values()))


def read_captions(path: str | Path) -> dict[int, list[str]]:
    """The reference captions of a COCO caption file, by image id.

    Raises:
        DataError: the file does not exist, is not in COCO's format, or has no caption.
    """
    found: dict[int, list[str]] = {}
    try:
        for annotation in read_json(path)["annotations"]:
            found.setdefault(_id(annotation["image_id"]), []).append(_text(annotation["caption"]))
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a COCO caption file: {error!r}. It needs annotations (image_id, "
            "caption), as captions_val2014.json has them"
        ) from None
    if not found:
        raise DataError(f"{path}: the list annotations is empty")
    return found


def _id(value: Any) -> Any:
    """The id, which is a number in COCO and a text in files of other authors; other types raise
    TypeError.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{shown(value, 60)} is not an id")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float):  # a category may be named 7
        raise TypeError(f"{shown(value, 60)} is not a text")
    return str(value)


def _refuse_unknown(path: Path, what: str, used: Iterable[Any], known: dict[Any, str]) -> None:
    unknown = [one for one in used if one not in known]
    if unknown:
        first = shown(repr(unknown[0]), 60)
        raise DataError(
            f"{path}: {len(unknown)} annotations refer to an unknown {what}, the first to {what} "
            f"{first}; {len(known)} are listed. Is the file incomplete, or made from two files?"
        )
