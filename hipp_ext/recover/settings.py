"""What a recovery is told, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from hipp_ext.errors import HippError
from hipp_ext.quantities import finite_option, whole_option

Train = Literal["full", "lora", "norms"]
Precision = Literal["auto", "float32", "bf16"]
WHOLES = ("steps", "save_every", "accumulation", "lora_rank")
OPTIONAL_WHOLES = ("evaluate_every", "patience", "top_k", "warmup", "local_steps")
NUMBERS = ("lr", "muon_lr", "clip", "lora_alpha", "cross_entropy_share", "hidden_share")


@dataclass(frozen=True, kw_only=True)
class RecoverSettings:
    """How a pruned model is fine-tuned.

    Attributes:
        steps: optimizer steps.
        optimizer: "muon": Muon for the hidden matrices of the language model and AdamW for the
            rest; "adamw": AdamW for all parameters. Adapters and norms are always AdamW's.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon.
        schedule: "trapezoid": warm-up, plateau, and a linear decay over the last 70% of the steps;
            "cosine": warm-up, and half a cosine down to zero.
        warmup: steps of the warm-up; None: a tenth of the steps, 30 at most.
        clip: largest norm of the averaged gradient.
        accumulation: batches of the data that make one step; gradients are exchanged once.
        train: "full": all parameters; "lora": adapters on all linear layers but the head, merged at
            the end (peft); "norms": the weights and biases of the norms.
        lora_rank, lora_alpha: rank of the adapters; their output is scaled by alpha / rank.
        whole_modules: with adapters, names of modules that get none and are trained whole, such as
            "multi_modal_projector".
        freeze_vision: whether the vision tower stays as it is.
        precision: "bf16": forward and backward pass in bfloat16, parameters that are trained in
            float32; "float32"; "auto": bf16 for a model that was loaded in half precision. The
            result has the types that the model was loaded in.
        gradient_checkpointing: keep no activations within layers, and compute them again.
        compression: "lqsgd", or "none" for DDP's own all-reduce. One process sends nothing.
        rank, bits, transport: options of LQ-SGD; see `hipp_ext.comm.Options`.
        local_steps: steps that every process takes alone, with an optimizer of its own, before
            all average what has changed (DiLoCo); None: gradients are averaged at every step.
            `compression` is of the changes then. Checkpoints and evaluations wait for the average.
        outer_lr, outer_momentum: SGD that applies the average of the changes; see `OuterLoop`.
        sharding: "none": every process holds the whole model; "fsdp": parameters, gradients and
            optimizer states are spread over the processes (FSDP2), and nothing is compressed.
        seed: random seed of dropout, adapters and the first factors; the data source has its own.
        save_every: steps between checkpoints.
        evaluate_every: steps between evaluations of the held-out rows; None: a tenth of the steps.
        keep: the weights that the model ends with: "best": those of the evaluation with the least
            loss; "last"; None: best with held-out rows, otherwise last.
        patience: stop after so many evaluations without a smaller loss; None: never.
        temperature, positions, top_k, cross_entropy_share, hidden_share, hidden_layers: what is
            learnt from a teacher; see `Distillation`.

    Raises:
        HippError: a setting is out of range.
    """

    steps: int = 400
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 1e-3
    muon_lr: float = 0.01
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"
    warmup: int | None = None
    clip: float = 1.0
    accumulation: int = 1
    train: Train = "full"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    whole_modules: tuple[str, ...] = ()
    freeze_vision: bool = False
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compression: Literal["lqsgd", "none"] = "lqsgd"
    rank: int = 4
    bits: int = 8
    transport: str = "auto"
    local_steps: int | None = None
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    sharding: Literal["none", "fsdp"] = "none"
    seed: int = 0
    save_every: int = 50
    evaluate_every: int | None = None
    keep: Literal["best", "last"] | None = None
    patience: int | None = None
    temperature: float = 1.0
    positions: Literal["answers", "text"] = "answers"
    top_k: int | None = None
    cross_entropy_share: float = 0.0
    hidden_share: float = 0.0
    hidden_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in (*WHOLES, *OPTIONAL_WHOLES):
            if (value := getattr(self, name)) is not None or name in WHOLES:
                object.__setattr__(self, name, whole_option(name, value, HippError, 1))
        for name in (*NUMBERS, "temperature"):
            number = finite_option(name, getattr(self, name), HippError, zero=name in NUMBERS)
            object.__setattr__(self, name, number)
        object.__setattr__(self, "seed", whole_option("seed", self.seed, HippError, -(2**63)))
        if (layers := self.hidden_layers) is not None:
            layers = tuple(whole_option("hidden_layers", n, HippError, 0) for n in layers)
            object.__setattr__(self, "hidden_layers", layers)
            if not layers or not self.hidden_share:
                raise HippError(
                    f"hidden_layers={layers!r}: numbers of layers are needed, and a hidden_share "
                    "above 0 for them (--hidden-share)."
                )
        if self.whole_modules and self.train != "lora":
            raise HippError(
                f"whole_modules={self.whole_modules!r} goes with train='lora', not with "
                f"train={self.train!r}."
            )
        for name, hint in get_type_hints(type(self)).items():
            known = [value for part in (hint, *get_args(hint)) for value in get_args(part)]
            known = [value for value in known if isinstance(value, str)]
            if known and getattr(self, name) not in (*known, None):
                raise HippError(
                    f"{name}={getattr(self, name)!r}: one of {', '.join(known)} is needed."
                )
        outer = finite_option("outer_lr", self.outer_lr, HippError)
        object.__setattr__(self, "outer_lr", outer)
        momentum = self.outer_momentum
        momentum = finite_option("outer_momentum", momentum, HippError, zero=True, below=1)
        object.__setattr__(self, "outer_momentum", momentum)
        if self.local_steps and self.sharding == "fsdp":
            raise HippError(
                f"local_steps={self.local_steps} needs the whole model in every process, and "
                "sharding='fsdp' spreads it: choose one of them."
            )

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return self.warmup or min(30, max(1, self.steps // 10))

    @property
    def evaluation_steps(self) -> int:
        """Steps between evaluations: whole rounds of local steps."""
        return self._whole_rounds(self.evaluate_every or max(1, self.steps // 10))

    @property
    def checkpoint_steps(self) -> int:
        """Steps between checkpoints: whole rounds of local steps."""
        return self._whole_rounds(self.save_every)

    def ends_round(self, step: int) -> bool:
        """Whether the processes average after `step` local steps."""
        return step == self.steps or step % (self.local_steps or 1) == 0

    def _whole_rounds(self, steps: int) -> int:
        length = self.local_steps or 1
        return -(-steps // length) * length


@dataclass(frozen=True, kw_only=True)
class RecoverResult:
    """The result of a run.

    Attributes:
        losses: loss of every step, mean over the processes [nats, summed over a step's batches;
            where the data are rows of a file, the mean over what is learnt of them].
        stats: `LQSGDState.stats()` but for the last step, or `OuterLoop.stats()` after local steps;
            None if nothing was compressed.
        evaluations: what was measured of the held-out rows, by name, with the "step" after which.
        step: the step whose weights the model has.
        skipped: row of the file that could not be used -> the reason.
        rows, tokens: rows and tokens that all steps and processes learnt from; repeated ones count
            again.
    """

    losses: list[float]
    stats: dict[str, Any] | None
    evaluations: list[dict[str, float]]
    step: int
    skipped: Mapping[int, str]
    rows: int
    tokens: int
