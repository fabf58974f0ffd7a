"""The models that the study serves: SmolLM2 dense, and pruned in three shapes at three ratios."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hipp_ext.allocators import Sensitivity
from hipp_ext.budget import Bounds
from hipp_ext.evals.studies.real_lm.text import Corpus, perplexity, row_losses
from hipp_ext.files import write_atomic
from hipp_ext.groups import find_groups
from hipp_ext.progress import progress_bar
from hipp_ext.scorers import WandaSP
from hipp_ext.surgery.checkpoint import save_pruned
from hipp_ext.surgery.prune import prune
from hipp_ext.units import plan_from_counts

RATIOS = (0.2, 0.3, 0.4)
ROUND_TO = 32  # columns of a block of q8_0
SHAPES: dict[str, Bounds] = {
    "free": Bounds(round_to=ROUND_TO),
    "free, any width": Bounds(),
    "uniform": Bounds(shape="uniform", round_to=ROUND_TO),
    "layers": Bounds(shape="layers"),
}
ODD_RATIO = 0.3  # the only one at which "free, any width" is measured
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Version:
    """One model of the study.

    Attributes:
        shape: key of SHAPES; None: the dense model.
        ratio: pruning_ratio.
    """

    shape: str | None = None
    ratio: float = 0.0

    @property
    def name(self) -> str:
        """Name in tables, and of its folder."""
        return DENSE if self.shape is None else f"{self.ratio:.0%} {self.shape}"


def all_versions() -> list[Version]:
    """The dense model first."""
    pruned = [
        Version(shape=shape, ratio=ratio)
        for ratio in RATIOS
        for shape in SHAPES
        if shape != "free, any width" or ratio == ODD_RATIO
    ]
    return [Version(), *pruned]


def version_folders(folder: Path) -> dict[str, Path]:
    """Name of each version -> its model folder, below `folder`."""
    names = [version.name for version in all_versions()]
    return {name: folder / name.replace(" ", "_").replace(",", "") for name in names}


def versions_to_make(models: Mapping[str, Path]) -> list[Version]:
    """Those of the versions in `models` that are not in their folders yet."""
    return [v for v in all_versions() if v.name in models and not about(models[v.name]).exists()]


def make_versions(models: Mapping[str, Path], model: Any, tokenizer: Any, corpus: Corpus) -> None:
    """Make the versions that are missing in their folders.

    Beside each lies a JSON file with its perplexity on the corpus's test and its size. All plans
    are those of `Sensitivity`, measured once, and reconstructed on the same calibration.
    """
    missing = versions_to_make(models)
    if not missing:
        return
    done = len(models) - len(missing)
    with progress_bar(True, "models", len(models), done) as update:
        for number, (version, small) in enumerate(_pruned(model, corpus, missing), done + 1):
            save_pruned(small, models[version.name], tokenizer, overwrite=True)
            losses = row_losses(small, corpus.test).tolist()
            facts = {
                "perplexity": perplexity(losses),
                "parameters": sum(p.numel() for p in small.parameters()),
            }
            write_atomic(about(models[version.name]), json.dumps(facts))
            update(number, version.name)


def about(folder: Path) -> Path:
    """The file with what is known of a version."""
    return folder.with_suffix(".json")


def _pruned(model: Any, corpus: Corpus, versions: list[Version]) -> Iterator[tuple[Version, Any]]:
    calibration, groups = corpus.calibration(0), find_groups(model)
    allocator, scorer = Sensitivity(pruning_ratio=0.0, effort="fisher"), WandaSP()
    scores = scorer(model, calibration, groups=groups)
    measured = allocator.measure(model, groups, scores, calibration, progress=True)
    for version in versions:
        if version.shape is None:
            yield version, model
            continue
        bounds = SHAPES[version.shape]
        chosen = replace(allocator, pruning_ratio=version.ratio, bounds=bounds)
        counts = chosen.keep_counts(groups, scores, measured)
        plan = plan_from_counts(groups, counts, scores, scorer=scorer.name)
        yield version, prune(model, plan, reconstruct=True, calibration=calibration)
