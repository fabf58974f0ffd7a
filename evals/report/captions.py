"""CHAIR on the page: which results belong together, and how they differ, image by image."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hipp_ext.evals.report.changes import LEVEL, Change
from hipp_ext.evals.report.entries import Entry
from hipp_ext.evals.statistics import bootstrap_estimate, cluster_sums, ratio

WRONG, FOUND = "invented objects", "named objects"
# Name of the score: (its field, what is counted, out of what, whether more is better).
_SCORES = {WRONG: ("chair_i", "wrong", "named", False), FOUND: ("recall", "found", "there", True)}
CHAIR_COLUMNS = (
    "model",
    "data",
    "captions",
    "CHAIR_i: mentions that are not there",
    "CHAIR_s: captions with one",
    "recall",
    "silent",
    "objects per caption",
)


def caption_changes(dense: Entry, other: Entry) -> Iterator[Change]:
    """How the captions of `other` differ, on the largest set of images of each data set that both
    described with the same settings.
    """
    pairs: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for a in dense.chair:
        for b in other.chair:
            best = pairs.get(a["data"])
            if _comparable(a, b) and (best is None or a["n"] > best[0]["n"]):
                pairs[a["data"]] = a, b
    for data, (a, b) in pairs.items():
        for part in _SCORES:
            yield _change(data, part, a, b)


def _comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    same = ("data", "n", "settings")
    counts = [one.get("counts") or {} for one in (a, b)]
    return all(a[key] == b[key] for key in same) and (
        bool(counts[0].get("image")) and counts[0]["image"] == counts[1].get("image")
    )


def _change(data: str, part: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Change:
    field, counted, whole, higher_is_better = _SCORES[part]
    images = a["counts"]["image"]
    columns = [one["counts"][name] for one in (a, b) for name in (counted, whole)]
    counts = np.stack(columns, axis=1).astype(float)

    def difference(sums: np.ndarray) -> np.ndarray:
        part_a, whole_a, part_b, whole_b = np.moveaxis(sums, -1, 0)
        return 100 * (ratio(part_b, whole_b) - ratio(part_a, whole_a))

    unlike = cluster_sums(counts[:, :2] != counts[:, 2:], images)
    return Change(
        data=f"captions ({data})",
        part=part,
        n=len(images),
        differing=int(np.count_nonzero(unlike.any(axis=1))),
        a=a[field],
        b=b[field],
        difference=bootstrap_estimate(counts, images, difference, level=LEVEL),
        higher_is_better=higher_is_better,
    )


def chair_rows(entries: Sequence[Entry]) -> list[list[str]]:
    """The cells of `CHAIR_COLUMNS` for each result, results of one kind together."""
    found = [(one, e.name) for e in entries for one in e.chair]
    found.sort(key=lambda own: (own[0]["data"], own[0]["n"]))
    return [
        [
            name,
            one["data"],
            f"{one['n']:,}",
            *(_with_error(one, key) for key in ("chair_i", "chair_s", "recall")),
            f"{one['silent']:.1f}",
            f"{one['mentions']:.2f}",
        ]
        for one, name in found
    ]


def _with_error(one: Mapping[str, Any], key: str) -> str:
    error = one[f"{key}_se"]
    return f"{one[key]:.1f}" + (f" ± {error:.1f}" if error is not None else "")
