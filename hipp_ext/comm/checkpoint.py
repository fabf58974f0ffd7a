"""The states of all ranks in the folder of a checkpoint, one file per rank.

Any number of workers can read them. Reading is a collective decision: each rank reports what it
found, and all go on alike or raise the same error.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hipp_ext.comm.group import gather_objects, raise_problems
from hipp_ext.comm.saving import Plain, SavedState, check_fit, parse_state, read_state, save_state
from hipp_ext.comm.state import LQSGDState
from hipp_ext.errors import CompressionError
from hipp_ext.files.sealed import digest


def save_checkpoint(state: LQSGDState, folder: str | Path) -> Path:
    """Write this rank's state to its file in `folder`, and return the file. Every rank calls this.

    Files of ranks that no longer exist, from a run with more workers, are removed.
    """
    folder, position = Path(folder), dist.get_rank(state.group)
    if position == 0:
        for other in folder.glob("lqsgd.rank*.safetensors"):
            number = other.name.removeprefix("lqsgd.rank").removesuffix(".safetensors")
            if number.isdecimal() and int(number) >= dist.get_world_size(state.group):
                other.unlink(missing_ok=True)
    return save_state(state, rank_file(folder, position))


def load_checkpoint(state: LQSGDState, folder: str | Path) -> list[str]:
    """Go on, bit-identically, from what `save_checkpoint` wrote. A collective.

    All ranks go on with the shared factors, which every file holds. The residual of a rank starts
    at zero if it has no file or its file is from another save than that of the first rank. With
    another number of workers the residual of every rank starts at zero. If no rank has a file, all
    start from the beginning.

    Returns:
        Lines on what had to be dropped, also given as warnings; empty if nothing was.

    Raises:
        CompressionError: on all ranks, if a file is damaged, belongs to other parameters, or has
            factors of another rank.
    """
    group = state.group
    workers, position = dist.get_world_size(group), dist.get_rank(group)
    found, problem = _find(state, rank_file(folder, position))
    save = None if found is None else _save_of(found)
    everyone = gather_objects(group, {"problem": problem, "save": save})
    raise_problems(everyone)
    saves = {rank: theirs["save"] for rank, theirs in enumerate(everyone) if theirs["save"]}
    if not saves:
        state.start_over()
        return _warn(f"{folder} holds no LQ-SGD state: compression goes on with an empty residual.")
    lender, (saved_with, _, *rest) = next(iter(saves.items()))
    keep = [rank for rank, save in saves.items() if save == (workers, rank, *rest)]
    if len(keep) < workers:
        lent = _lend(group, lender, found, workers, position)
        found = replace(lent, residual=found.residual if found and position in keep else None)
    assert found is not None
    state.take_saved(found)
    if len(keep) == workers:
        return []
    if saved_with != workers:
        what = (
            f"was saved with {saved_with} workers and goes on with {workers}: the residual is "
            "dropped"
        )
    else:
        lost = [rank for rank in range(workers) if rank not in keep]
        what = (
            f"holds no LQ-SGD state of ranks {lost}, or one of another save: their residual starts "
            "at zero"
        )
    return _warn(f"{folder} {what}, the shared factors are kept.")


def rank_file(folder: str | Path, position: int) -> Path:
    """The file of a rank in the folder of a checkpoint."""
    return Path(folder) / f"lqsgd.rank{position}.safetensors"


def _find(state: LQSGDState, file: Path) -> tuple[SavedState | None, str | None]:
    """(state in a rank's file or None, what is wrong with it or None)."""
    try:
        if not file.exists():
            return None, None
        found = parse_state(read_state(file))
        if state.names:
            check_fit(state.compressor, found)
    except (CompressionError, OSError) as error:
        return None, str(error)
    return found, None


def _save_of(found: SavedState) -> tuple[int, int, int, str]:
    """Workers, rank, and what the files of one save have in common: step and shared factors."""
    plain = found.plain
    return plain.workers, plain.position, plain.counts.steps, digest(found.factors)


def _lend(
    group: Any, lender: int, found: SavedState | None, workers: int, position: int
) -> SavedState:
    """The lender's factors and counts on every rank, without its residual."""
    mine = None
    if found is not None and dist.get_rank(group) == lender:
        mine = {n: f.cpu() for n, f in found.factors.items()}, found.plain.model_dump()
    factors, plain = gather_objects(group, mine)[lender]
    plain = Plain.model_validate(plain | {"workers": workers, "position": position})
    return SavedState(plain=plain, residual=None, factors=factors)


def _warn(line: str) -> list[str]:
    warnings.warn(line, stacklevel=3)
    return [line]
