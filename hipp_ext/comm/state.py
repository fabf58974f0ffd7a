"""One rank's side of the compression: its compressor, its memory, its counts, and the process group that carries the bytes."""

import datetime
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hipp_ext.comm.compressor import Compressor, Options
from hipp_ext.comm.exact import positive_number
from hipp_ext.comm.layout import (
    Parameters,
    agree,
    make_options,
    name_parameters,
    rename_as,
    tell_all,
)
from hipp_ext.comm.saving import (
    SavedState,
    digest_of,
    pack_state,
    parse_state,
    put_state,
    unpack_state,
)
from hipp_ext.comm.transports import run_in_group
from hipp_ext.errors import CompressionError


class LQSGDState:
    """One rank's compressor, its memory and its counts; every rank makes its own.

    Made with parameters, as `LQSGDState(ddp, rank=4)`, it is a collective: the ranks compare layout and options at once. Made
    as torch's PowerSGDState is, `LQSGDState(process_group, matrix_approximation_rank=4)`, it takes the layout from DDP at the
    first step, and the ranks compare then. Both hand out the same gradients.

    Args:
        parameters: the model (wrapped in DDP or not), its named parameters, or a list of tensors; or, in PowerSGDState's style,
            the process group, or None. What DDP was told to ignore is left out of a model.
        matrix_approximation_rank: PowerSGDState's word for `rank`.
        process_group: whose ranks average; None: those of the DDP-wrapped model, else all. A group of its own, with the same
            ranks, carries the bytes.
        timeout: after which a lost rank is an error; None: the default of torch.distributed.
        options: of `Options`: rank, bits, vector_bits, alpha, transport, min_rate, seed; `min_compression_rate` and
            `random_seed` are PowerSGDState's words for the last two.

    Raises:
        CompressionError: torch.distributed is not initialised, an option is out of range or given twice, there is nothing to
            train, parameters are complex, or the ranks' parameters or options differ.

    A copy, by pickle or `copy.deepcopy`, holds all but the process group, which becomes the default one. Unlike `save_state` it
    is unpickled, which runs code: take it from nobody.

    No privacy guarantee: see the README's word on gradient inversion. What `state_dict` returns is made of this rank's data.
    """

    def __init__(
        self,
        parameters: Parameters | Any = None,
        matrix_approximation_rank: int | None = None,
        *,
        process_group: Any = None,
        timeout: datetime.timedelta | None = None,
        **options: Any,
    ):
        if not (dist.is_available() and dist.is_initialized()):
            raise CompressionError(
                "LQSGDState needs torch.distributed: call init_process_group, or start with torchrun."
            )
        if isinstance(parameters, dist.ProcessGroup):
            if process_group is not None:
                raise CompressionError(
                    "Two process groups were given, one before and one as process_group: one is needed."
                )
            parameters, process_group = None, parameters
        elif isinstance(parameters, DistributedDataParallel) and process_group is None:
            process_group = parameters.process_group
        if timeout is not None and not isinstance(timeout, datetime.timedelta):
            raise CompressionError(f"timeout={timeout!r}: a datetime.timedelta is needed.")
        if matrix_approximation_rank is not None:
            options["matrix_approximation_rank"] = matrix_approximation_rank
        self._process_group, self._timeout = process_group, timeout
        self._counts = {"steps": 0, "skipped_steps": 0, "bytes_sent": 0, "dense_bytes": 0}
        self._last = {"bytes_sent": 0, "dense_bytes": 0}
        self._loss_scale = 1.0
        self._forget_group()
        self._compressor: Compressor | None = None
        self._pending: SavedState | None = None  # loaded before the layout is known
        self._shapes: dict[str, list[int]] = {}
        if parameters is None:
            self._options: Mapping[str, Any] = make_options(options).plain()
        else:
            named = name_parameters(parameters)
            self._options = options
            self.lay_out(named)

    @property
    def process_group(self) -> Any:
        """Whose ranks average. May be set, as after unpickling: the next step begins with comparing the ranks anew."""
        return dist.group.WORLD if self._process_group is None else self._process_group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._process_group = group
        self._forget_group()

    @property
    def compressor(self) -> Compressor:
        """What compresses.

        Raises:
            CompressionError: the state was made without parameters, and no step has been taken.
        """
        if self._compressor is None:
            raise CompressionError(
                "This state was made without parameters: its layout is known after the first step."
            )
        return self._compressor

    @property
    def group(self) -> Any:
        """The process group that carries the bytes; making it is a collective."""
        if self._group is None:
            if not dist.is_initialized() or dist.get_rank(self.process_group) < 0:
                raise CompressionError(
                    "LQSGDState needs a process group that this rank belongs to; set state.process_group."
                )
            ranks = dist.get_process_group_ranks(self.process_group)
            some = len(ranks) < dist.get_world_size()
            try:
                self._group = dist.new_group(
                    ranks, timeout=self._timeout, use_local_synchronization=some
                )
            except RuntimeError as error:
                raise CompressionError(
                    f"No group of {len(ranks)} ranks could be made; one may have died: {error}"
                ) from error
        return self._group

    @property
    def names(self) -> list[str]:
        """Of the parameters, in order; empty before the layout is known."""
        return list(self._shapes)

    @property
    def is_laid_out(self) -> bool:
        """Whether the ranks have agreed on a layout, and know which parameter is which."""
        return bool(self._names)

    def lay_out(self, named: Mapping[str, Tensor] | CompressionError) -> None:
        """Agree on the layout with the other ranks, and make the compressor or move it; a collective.

        Args:
            named: name -> parameter, in the same order on every rank; or why this rank has none.

        Raises:
            CompressionError: on all ranks, where one has none, or where they do not agree.
        """
        if self._compressor is not None and not isinstance(named, CompressionError):
            try:
                named = rename_as(self._shapes, named)
            except CompressionError as error:
                named = error
        chosen = agree(self.group, named, self._options)
        assert not isinstance(named, CompressionError)
        self._options = chosen.plain()
        self._shapes = {name: list(p.shape) for name, p in named.items()}
        self._dense = {name: p.element_size() * p.numel() for name, p in named.items()}
        workers, position = dist.get_world_size(self.group), dist.get_rank(self.group)
        device = next(iter(named.values())).device
        fresh = Compressor(self._shapes, chosen, workers=workers, position=position, device=device)
        if self._compressor is not None:
            self._move_to(fresh)
        self._compressor = fresh
        self._names = {id(p): name for name, p in named.items()}
        self._parameters = list(named.values())  # kept alive, so that ids stay theirs

    def name_of(self, parameter: Tensor) -> str:
        """The name of a parameter that DDP handed out.

        Raises:
            CompressionError: it is none of those that the state was made with.
        """
        if id(parameter) not in self._names:
            raise CompressionError(
                f"DDP reduces a parameter of shape {tuple(parameter.shape)} that LQSGDState was not made with: give it the "
                "model that DDP wraps, as it is when DDP wraps it, and each DDP a state of its own."
            )
        return self._names[id(parameter)]

    def mean_(self, gradients: Mapping[str, Tensor]) -> None:
        """Replace each gradient by its compressed mean over the ranks; bit-identical on all of them.

        Where any rank's gradients are not finite, all ranks get NaN everywhere (so GradScaler skips the step), a warning says
        so once, and the memory stays as it was.

        Raises:
            CompressionError: other names or shapes, gradients that are sparse or complex, or the exchange failed.
        """
        if not self.is_laid_out:
            self.lay_out(gradients or CompressionError("No gradients were given."))
        if not self._compared:
            self._compare()
        means, sent = run_in_group(self.compressor.step(gradients), self.group)
        dense = self._dense_bytes()
        self._last = {"bytes_sent": sent, "dense_bytes": dense}
        for name, value in (
            ("steps", 1),
            ("skipped_steps", means is None),
            ("bytes_sent", sent),
            ("dense_bytes", dense),
        ):
            self._counts[name] += int(value)
        if means is None and self._counts["skipped_steps"] == 1:
            warnings.warn(
                "Gradients of a rank are not finite: all ranks get NaN for this step.", stacklevel=2
            )
        for name, gradient in gradients.items():
            if gradient.numel():
                gradient.detach().fill_(torch.nan) if means is None else gradient.detach().copy_(
                    means[name]
                )

    def stats(self) -> dict[str, Any]:
        """Bytes this rank sent to others, and what fp32 or half-precision ring all-reduce of its gradients would have sent.

        Keys: steps, skipped_steps, bytes_sent and dense_bytes (in total); bytes_sent_last_step and dense_bytes_last_step;
        message_bytes (one copy of a step's messages; 0 before the layout is known); transport, workers.
        """
        last = {f"{name}_last_step": value for name, value in self._last.items()}
        if (c := self._compressor) is None:
            plan = {"message_bytes": 0, "transport": self._options["transport"]}
            return {
                **self._counts,
                **last,
                **plan,
                "workers": dist.get_world_size(self.process_group),
            }
        return {
            **self._counts,
            **last,
            "message_bytes": c.message_bytes,
            "transport": c.transport,
            "workers": c.workers,
        }

    def set_loss_scale(self, scale: float) -> None:
        """Say by how much the loss is scaled (GradScaler.get_scale()), so that the memory keeps up when that changes.

        Without it a change of scale weighs what is in memory wrongly for one step.
        """
        try:
            scale = positive_number("scale", scale)
        except CompressionError:
            raise CompressionError(
                f"The loss scale {scale!r} is not a finite number above 0."
            ) from None
        for memory in self._compressor.memory.values() if self._compressor else ():
            memory.mul_(scale / self._loss_scale)
        self._loss_scale = scale

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory and counts: tensors and plain types, keyed by parameter name. Each rank saves its own.

        Raises:
            CompressionError: the state was made without parameters, and no step has been taken.
        """
        return pack_state(self.compressor, {**self._counts, "loss_scale": self._loss_scale})

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from what `state_dict` returned on this rank, to the bit.

        Saved with another number of workers, the shared factors are taken over and this rank's memory is set to zero. Made
        without parameters, the state takes it up at the first step, and what does not fit is an error of all ranks then.

        Returns:
            What had to be dropped, in words; empty where nothing was. The same is warned of.

        Raises:
            CompressionError: the state is malformed, of another rank, or of other parameters.
        """
        saved = parse_state(state)
        if self._compressor is None:
            self._pending, dropped = saved, []
        else:
            counts, dropped = unpack_state(self._compressor, saved)
            self._take_counts(counts)
        self._compared = False
        for line in dropped:
            warnings.warn(line, stacklevel=2)
        return dropped

    def take_saved(self, saved: SavedState) -> None:
        """Go on from a state of this rank that fits; at the first step, where the layout is not known yet."""
        if self._compressor is None:
            self._pending = saved
        else:
            put_state(self._compressor, saved)
            self._take_counts(saved.plain.counts.model_dump())
        self._compared = False

    def start_over(self) -> None:
        """Forget all that was learnt: empty memory, first factors, counts of zero. On all ranks or on none."""
        self._pending, self._compared = None, False
        self._take_counts(dict.fromkeys(self._counts, 0))
        if (c := self._compressor) is not None:
            self._compressor = Compressor(
                self._shapes, c.options, workers=c.workers, position=c.position, device=c.device
            )

    def __getstate__(self) -> dict[str, Any]:
        """All but the process group, and what is bound to this process."""
        warnings.warn(
            "A process group cannot be pickled: it is left out of the saved LQSGDState.",
            stacklevel=2,
        )
        kept = {
            k: getattr(self, k)
            for k in (
                "_timeout",
                "_counts",
                "_last",
                "_loss_scale",
                "_options",
                "_shapes",
                "_pending",
            )
        }
        return {
            **kept,
            "saved": None if self._compressor is None else self.state_dict(),
            "dense": self._dense,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """`process_group` becomes the default group; the parameters are bound at the next step."""
        warnings.warn(
            "The process group of this LQSGDState is the default one now: set state.process_group where it was another.",
            stacklevel=2,
        )
        state = dict(state)
        saved, dense = state.pop("saved"), state.pop("dense")
        self.__dict__.update(state)
        self._process_group, self._compressor = None, None
        self._forget_group()
        self._dense = dense
        if saved is not None:
            found = parse_state(saved)
            at = next((t.device for t in saved["memory"].values()), torch.device("cpu"))
            made = Compressor(
                self._shapes,
                Options(**self._options),
                workers=found.plain.workers,
                position=found.plain.position,
                device=at,
            )
            put_state(made, found)
            self._compressor = made

    def _forget_group(self) -> None:
        self._group: Any = None
        self._names: dict[int, str] = {}
        self._parameters: list[Tensor] = []
        self.queue: list[tuple[Any, Any, list[Tensor], list[Tensor]]] = []
        self._compared = False
        self._dense: dict[str, int] = getattr(self, "_dense", {})

    def _move_to(self, fresh: Compressor) -> None:
        """What a copy brought along, into the compressor of the group it is in now."""
        saved = parse_state(self.state_dict())
        if saved.plain.workers != fresh.workers:
            _, (line,) = unpack_state(fresh, saved)
            warnings.warn(line, stacklevel=2)
            return
        put_state(fresh, saved)
        if saved.plain.position != fresh.position:
            warnings.warn(
                f"This LQSGDState is a copy of rank {saved.plain.position}'s, used by rank {fresh.position}, with its memory "
                "of what was not sent yet.",
                stacklevel=2,
            )

    def _take_counts(self, counts: dict[str, Any]) -> None:
        self._loss_scale = float(counts.pop("loss_scale", 1.0))
        self._counts |= counts

    def _compare(self) -> None:
        """Take up what was loaded before the layout was known, and see that all ranks go on from the same factors.

        Factors that differ would be averaged into noise without a word, so the ranks compare theirs after making or loading.
        """
        problem = None
        if self._pending is not None:
            saved, self._pending = self._pending, None
            try:
                counts, dropped = unpack_state(self.compressor, saved)
                self._take_counts(counts)
                for line in dropped:
                    warnings.warn(line, stacklevel=2)
            except CompressionError as error:
                problem = str(error)
        mine = {
            "factors": digest_of(self.compressor.factors),
            "steps": self._counts["steps"],
            "problem": problem,
        }
        everyone = tell_all(self.group, mine)
        for rank, theirs in enumerate(everyone):
            if theirs["problem"] is not None:
                raise CompressionError(f"Rank {rank}: {theirs['problem']}")
        for rank, theirs in enumerate(everyone):
            if theirs["factors"] != everyone[0]["factors"]:
                raise CompressionError(
                    f"Rank 0 goes on from step {everyone[0]['steps']}, rank {rank} from another state, of step "
                    f"{theirs['steps']}. Load what was saved at one step on every rank, or none on any; load_checkpoint does."
                )
        self._compared = True

    def _dense_bytes(self) -> int:
        workers = self.compressor.workers
        return round(2 * (workers - 1) / workers * sum(self._dense.values()))
