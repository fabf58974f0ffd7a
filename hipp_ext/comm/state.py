"""LQSGDState: one rank's compressor with its layout and the group that carries the bytes."""

import datetime
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hipp_ext.comm.compressor import Compressor
from hipp_ext.comm.exchange import run_in_group
from hipp_ext.comm.group import OwnGroup, agree, compare_factors
from hipp_ext.comm.naming import Parameters, name_parameters, rename_as
from hipp_ext.comm.options import Options, make_options
from hipp_ext.comm.resumable import Resumable
from hipp_ext.comm.saving import parse_state, put_state, unpack_state
from hipp_ext.errors import CompressionError


class LQSGDState(Resumable):
    """One rank's compressor, residual and counts; every rank makes its own.

    `LQSGDState(ddp, rank=4)` is a collective: the ranks compare layout and options immediately.
    `LQSGDState(process_group, matrix_approximation_rank=4)`, as for torch's PowerSGDState, takes
    the layout from DDP at the first step, where the ranks compare. Both hand out equal gradients.

    Args:
        parameters: the model (wrapped in DDP or not), its named parameters, or a list of tensors;
            or a process group or None, as for PowerSGDState. Parameters of a model that DDP
            ignores are left out.
        matrix_approximation_rank: PowerSGDState's name of `rank`.
        process_group: group of the ranks that average; None: that of the DDP-wrapped model, or
            all ranks. The bytes travel over a separate group of the same ranks.
        timeout: time after which a lost rank is an error; None: the default of torch.distributed.
        options: keyword arguments of `Options`: rank, bits, alpha, transport,
            min_compression_rate, seed; `random_seed` is PowerSGDState's name of the last one.

    Raises:
        CompressionError: torch.distributed is not initialised, an option is out of range or given
            twice, there is nothing to train, parameters are complex, or the ranks' parameters or
            options differ.

    A copy by pickle or `copy.deepcopy` holds everything but the process group, which becomes the
    default group. Unlike a file of `save_state`, a pickle can run code: load only your own.

    There is no privacy guarantee: see the README on gradient inversion. The result of
    `state_dict` is made of this rank's data.
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
                "LQSGDState needs torch.distributed: call init_process_group, or start with "
                "torchrun."
            )
        if isinstance(parameters, dist.ProcessGroup):
            if process_group is not None:
                raise CompressionError(
                    "Two process groups were given, one as the first argument and one as "
                    "process_group: give one."
                )
            parameters, process_group = None, parameters
        elif isinstance(parameters, DistributedDataParallel) and process_group is None:
            process_group = parameters.process_group
        if matrix_approximation_rank is not None:
            options["matrix_approximation_rank"] = matrix_approximation_rank
        super().__init__()
        self._last = {"bytes_sent": 0, "dense_bytes": 0}
        self._bind(OwnGroup(process_group, timeout))
        self._gradient_bytes = 0
        if parameters is None:
            self._options: Mapping[str, Any] = make_options(options).plain()
        else:
            self._options = options
            self.lay_out(name_parameters(parameters))

    @property
    def process_group(self) -> Any:
        """The group of the ranks that average.

        It may be set, for example after unpickling; then the next step starts with a comparison
        of the ranks.
        """
        return self._ranks.given

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._bind(OwnGroup(group, self._ranks.timeout))

    @property
    def group(self) -> Any:
        """The process group that carries the bytes; making it is a collective."""
        return self._ranks.own

    @property
    def names(self) -> list[str]:
        """Names of the parameters, in order; empty before the layout is known."""
        return list(self._shapes)

    @property
    def is_laid_out(self) -> bool:
        """Whether the ranks have agreed on a layout, and the name of each parameter is known."""
        return bool(self._names)

    def lay_out(self, named: Mapping[str, Tensor] | CompressionError) -> None:
        """Agree with the other ranks on the layout, and make or move the compressor. A collective.

        Args:
            named: name -> parameter, in the same order on every rank; or why this rank has none.

        Raises:
            CompressionError: on all ranks, if one has none, or if they do not agree.
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
        self._gradient_bytes = sum(p.element_size() * p.numel() for p in named.values())
        fresh = Compressor(
            self._shapes,
            chosen,
            workers=dist.get_world_size(self.group),
            position=dist.get_rank(self.group),
            device=next(iter(named.values())).device,
        )
        if self._compressor is not None:
            for line in unpack_state(fresh, parse_state(self.state_dict()), is_copy=True):
                warnings.warn(line, stacklevel=2)
        self._compressor = fresh
        self._names = {id(p): name for name, p in named.items()}
        self._parameters = list(named.values())  # kept alive, so that their ids stay unique

    def name_of(self, parameter: Tensor) -> str:
        """The name of a parameter that DDP handed out.

        Raises:
            CompressionError: the state was not made with it.
        """
        if id(parameter) not in self._names:
            raise CompressionError(
                f"DDP reduces a parameter of shape {tuple(parameter.shape)} that LQSGDState was "
                "not made with: pass the model that DDP wraps, in the form that DDP wraps, and "
                "give each DDP a state of its own."
            )
        return self._names[id(parameter)]

    def mean_(self, gradients: Mapping[str, Tensor]) -> None:
        """Replace each gradient by its compressed mean over the ranks, bit-identical on all.

        If any rank's gradients are not finite, all ranks get NaN everywhere (so GradScaler skips
        the step), the residual stays as it was, and one warning is given.

        Raises:
            CompressionError: other names or shapes, sparse or complex gradients, or a failed
                exchange.
        """
        if not self.is_laid_out:
            self.lay_out(gradients or CompressionError("No gradients were given."))
        if not self._compared:
            problem = self.take_pending()
            compare_factors(self.group, self.compressor, self.counts.steps, problem)
            self._compared = True
        means, sent = run_in_group(self.compressor.step(gradients), self.group)
        workers = self.compressor.workers
        dense = round(2 * (workers - 1) / workers * self._gradient_bytes)
        self._last = {"bytes_sent": sent, "dense_bytes": dense}
        self.counts.steps += 1
        self.counts.bytes_sent += sent
        self.counts.dense_bytes += dense
        if means is None:
            self.counts.skipped_steps += 1
            if self.counts.skipped_steps == 1:
                warnings.warn(
                    "Gradients of a rank are not finite: all ranks get NaN for this step.",
                    stacklevel=2,
                )
        for name, gradient in gradients.items():
            if means is None:
                gradient.detach().fill_(torch.nan)
            elif gradient.numel():
                gradient.detach().copy_(means[name])

    def stats(self) -> dict[str, Any]:
        """Bytes sent to other ranks, and the bytes that a ring all-reduce of the gradients sends.

        Keys: steps, skipped_steps, bytes_sent and dense_bytes (totals); bytes_sent_last_step and
        dense_bytes_last_step; message_bytes (one copy of a step's messages; 0 before the layout is
        known); transport; workers. The all-reduce has the precision of the parameters.
        """
        counts = self.counts.model_dump(exclude={"loss_scale"})
        last = {f"{name}_last_step": value for name, value in self._last.items()}
        c = self._compressor
        return {
            **counts,
            **last,
            "message_bytes": c.message_bytes if c else 0,
            "transport": c.transport if c else self._options["transport"],
            "workers": c.workers if c else dist.get_world_size(self.process_group),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the process group and what is bound to this process."""
        warnings.warn(
            "A process group cannot be pickled: it is left out of the saved LQSGDState.",
            stacklevel=2,
        )
        kept = ("counts", "_last", "_options", "_shapes", "_pending", "_gradient_bytes")
        return {
            **{name: getattr(self, name) for name in kept},
            "timeout": self._ranks.timeout,
            "saved": None if self._compressor is None else self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """`process_group` becomes the default group; parameters are bound at the next step."""
        warnings.warn(
            "The process group of this LQSGDState is the default one now: set state.process_group "
            "if it was another one.",
            stacklevel=2,
        )
        state = dict(state)
        saved, timeout = state.pop("saved"), state.pop("timeout")
        self.__dict__.update(state)
        self._bind(OwnGroup(None, timeout))
        self._compressor = None
        if saved is not None:
            found = parse_state(saved)
            plain = found.plain
            self._compressor = Compressor(
                self._shapes,
                Options(**self._options),
                workers=plain.workers,
                position=plain.position,
                device=next((t.device for t in saved["residual"].values()), "cpu"),
            )
            put_state(self._compressor, found)

    def _bind(self, ranks: OwnGroup) -> None:
        self._ranks = ranks
        self._names: dict[int, str] = {}
        self._parameters: list[Tensor] = []
        self.queue: list[tuple[Any, Any, list[Tensor], list[Tensor]]] = []
        self._compared = False
