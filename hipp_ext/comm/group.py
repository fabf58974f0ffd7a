"""The process group that carries the bytes, and whether its ranks agree."""

import datetime
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hipp_ext.comm.compressor import Compressor
from hipp_ext.comm.options import Options, make_options
from hipp_ext.errors import CompressionError
from hipp_ext.files.sealed import digest


class OwnGroup:
    """A process group of the same ranks as `process_group`, used for compressed gradients only.

    Args:
        process_group: group of the ranks that average; None: all ranks.
        timeout: time after which a lost rank is an error; None: the default of torch.distributed.

    Raises:
        CompressionError: `timeout` is not a timedelta.
    """

    def __init__(self, process_group: Any, timeout: datetime.timedelta | None):
        if timeout is not None and not isinstance(timeout, datetime.timedelta):
            raise CompressionError(f"timeout={timeout!r}: a datetime.timedelta is needed.")
        self.timeout = timeout
        self._given, self._own = process_group, None

    @property
    def given(self) -> Any:
        """The group of the ranks that average."""
        return dist.group.WORLD if self._given is None else self._given

    @property
    def own(self) -> Any:
        """The group that carries the bytes; making it is a collective.

        Raises:
            CompressionError: this rank is not in the group, or the group cannot be made.
        """
        if self._own is None:
            if not dist.is_initialized() or dist.get_rank(self.given) < 0:
                raise CompressionError(
                    "LQSGDState needs a process group with this rank; set state.process_group."
                )
            ranks = dist.get_process_group_ranks(self.given)
            some = len(ranks) < dist.get_world_size()
            try:
                self._own = dist.new_group(
                    ranks, timeout=self.timeout, use_local_synchronization=some
                )
            except RuntimeError as error:
                raise CompressionError(
                    f"A group of {len(ranks)} ranks could not be made; one may have died: {error}"
                ) from error
        return self._own


def gather_objects(group: Any, mine: Any) -> list[Any]:
    """The objects of all ranks of `group`, in their order.

    Raises:
        CompressionError: a rank does not answer.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(everyone, mine, group=group)
    except RuntimeError as error:
        raise CompressionError(
            f"The {len(everyone)} ranks could not agree; a worker may have died: {error}"
        ) from error
    return everyone


def raise_problems(everyone: list[dict[str, Any]]) -> None:
    """Raise the first "problem" of a rank as CompressionError, on all ranks."""
    for rank, theirs in enumerate(everyone):
        if theirs["problem"] is not None:
            raise CompressionError(f"Rank {rank}: {theirs['problem']}")


def agree(
    group: Any, named: Mapping[str, Tensor] | CompressionError, options: Mapping[str, Any]
) -> Options:
    """The options, after all ranks have compared theirs; so no rank waits for one that failed.

    Args:
        group: process group; each of its ranks calls this.
        named: name -> parameter, or the reason why this rank has none.
        options: the user's keyword arguments.

    Raises:
        CompressionError: on all ranks, if one has an error, or if layouts or options differ.
    """
    problem = str(named) if isinstance(named, CompressionError) else None
    try:
        chosen = make_options(options)
    except CompressionError as error:
        chosen, problem = Options(), problem or str(error)
    tensors = {} if isinstance(named, CompressionError) else named
    shapes = {f"shape of {name}": list(p.shape) for name, p in tensors.items()}
    everyone = gather_objects(group, {"problem": problem, **chosen.plain(), **shapes})
    raise_problems(everyone)
    first = everyone[0]
    for rank, theirs in enumerate(everyone):
        if theirs != first or list(theirs) != list(first):
            differing = (k for k in {**first, **theirs} if first.get(k) != theirs.get(k))
            key = next(differing, "the parameters' order")
            raise CompressionError(
                f"The ranks do not compress alike: {key} is {first.get(key)} on rank 0, "
                f"{theirs.get(key)} on rank {rank}."
            )
    return chosen


def compare_factors(group: Any, compressor: Compressor, steps: int, problem: str | None) -> None:
    """Check that all ranks go on from the same factors; a collective.

    Factors that differ would be averaged into noise without an error.

    Raises:
        CompressionError: on all ranks, if factors differ, or if a rank has a `problem`.
    """
    mine = {"factors": digest(compressor.factors), "steps": steps, "problem": problem}
    everyone = gather_objects(group, mine)
    raise_problems(everyone)
    for rank, theirs in enumerate(everyone):
        if theirs["factors"] != everyone[0]["factors"]:
            raise CompressionError(
                f"Rank 0 goes on from step {everyone[0]['steps']}, rank {rank} from another "
                f"state, of step {theirs['steps']}. Load what was saved at one step on every "
                "rank, or on none; load_checkpoint does this."
            )
