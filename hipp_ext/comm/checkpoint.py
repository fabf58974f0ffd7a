"""All ranks' states in a checkpoint's folder, a file per rank; read again by as many workers as there are then.

Reading is a collective decision: each rank tells what it found, and all go on alike or raise the same error.
"""

import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hipp_ext.comm.layout import tell_all
from hipp_ext.comm.saving import (
    Plain,
    SavedState,
    check_fit,
    digest_of,
    parse_state,
    read_state,
    save_state,
)
from hipp_ext.comm.state import LQSGDState
from hipp_ext.errors import CompressionError


def save_checkpoint(state: LQSGDState, folder: str | Path) -> Path:
    """Write this rank's state to its file in `folder`, and return the file; every rank does so.

    Files of ranks that there are no longer, from a run with more workers, are removed: they belong to no state of this one.
    """
    folder, position = Path(folder), dist.get_rank(state.group)
    if position == 0:
        for other in folder.glob("lqsgd.rank*.safetensors"):
            number = other.name.removeprefix("lqsgd.rank").removesuffix(".safetensors")
            if number.isdecimal() and int(number) >= dist.get_world_size(state.group):
                other.unlink(missing_ok=True)
    return save_state(state, _own_file(folder, position))


def load_checkpoint(state: LQSGDState, folder: str | Path) -> list[str]:
    """Go on from what `save_checkpoint` wrote, to the bit; a collective, with as many workers as there are now.

    All ranks go on with the shared factors, which any file holds. The memory of a rank that has no file, or one that was not
    saved with the first rank's, begins empty; with another number of workers that of all ranks does. Where no rank has a file,
    all start over.

    Returns:
        What had to be dropped, in words; empty where nothing was. The same is warned of.

    Raises:
        CompressionError: on all ranks, where a file is damaged, or is of other parameters or of another rank of the factors.
    """
    group = state.group
    workers, position = dist.get_world_size(group), dist.get_rank(group)
    found, problem = _find(state, _own_file(folder, position))
    everyone = tell_all(
        group, {"problem": problem, "save": None if found is None else _save_of(found)}
    )
    for rank, theirs in enumerate(everyone):
        if theirs["problem"] is not None:
            raise CompressionError(f"Rank {rank}: {theirs['problem']}")
    saves = {
        rank: theirs["save"] for rank, theirs in enumerate(everyone) if theirs["save"] is not None
    }
    if not saves:
        state.start_over()
        return _say(
            f"{folder} holds no LQ-SGD state: compression goes on with an empty memory of what was not sent yet."
        )
    lender, (was, _, *rest) = next(iter(saves.items()))
    keep = [rank for rank, save in saves.items() if save == (workers, rank, *rest)]
    if len(keep) < workers:
        factors, plain = _lend(group, lender, found)
        plain = plain.model_copy(update={"workers": workers, "position": position})
        found = SavedState(
            plain=plain,
            memory=found.memory if found and position in keep else None,
            factors=factors,
        )
    assert found is not None
    state.take_saved(found)
    if len(keep) == workers:
        return []
    if was != workers:
        what = f"was saved with {was} workers and goes on with {workers}: the memory of what was not sent yet is dropped"
    else:
        lost = [rank for rank in range(workers) if rank not in keep]
        what = f"holds no LQ-SGD state of ranks {lost}, or one of another save: their memory begins empty"
    return _say(f"{folder} {what}, the shared factors are kept.")


def _own_file(folder: str | Path, position: int) -> Path:
    return Path(folder) / f"lqsgd.rank{position}.safetensors"


def _find(state: LQSGDState, file: Path) -> tuple[SavedState | None, str | None]:
    """What lies in a rank's file, None where there is none; or what is wrong with it."""
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
    """Workers, rank, and what the files of one save have in common: the step, and the shared factors."""
    return (
        found.plain.workers,
        found.plain.position,
        found.plain.counts.steps,
        digest_of(found.factors),
    )


def _lend(group: Any, lender: int, found: SavedState | None) -> tuple[dict[str, Tensor], Plain]:
    """The lender's factors and counts on all ranks, without its memory, which is its own."""
    mine = None
    if found is not None and dist.get_rank(group) == lender:
        mine = {n: f.cpu() for n, f in found.factors.items()}, found.plain.model_dump()
    factors, plain = tell_all(group, mine)[lender]
    return factors, Plain.model_validate(plain)


def _say(line: str) -> list[str]:
    warnings.warn(line, stacklevel=3)
    return [line]
