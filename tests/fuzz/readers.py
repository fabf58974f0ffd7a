"""Readers of what the product writes itself and users hand on: plans, planners, fits, signals,
models, states, classifiers.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz.table import TABLE, Reader

PREFERENCE = (0.2, 0.3, 0.5)


# --- plans and planners


def closeness(model: Any) -> dict[str, float]:
    """An evaluator that takes no time: only how many parameters are left counts."""
    size = sum(p.numel() for p in model.parameters())
    return {"utility": size % 97 / 97, "robustness": size % 89 / 89, "utility_se": 0.01}


@functools.cache
def tiny() -> tuple[Any, list[Any]]:
    """A tiny LLaVA of random weights, and batches for it."""
    from models import batch, build

    return build("llava"), [batch("llava", size=2, labels=True)]


def fit(folder: Path) -> Any:
    """A planner that was fitted, or goes on to be, in `folder`."""
    from hipp_ext import HiPPPlanner, Preference
    from hipp_ext.planner.settings import FitSettings

    model, batches = tiny()
    planner = HiPPPlanner(Preference(*PREFERENCE))
    planner.signals = signals()
    settings = FitSettings(steps=1, preferences=1, budgets=2, rollouts=2, updates=1, candidates=8)
    planner.fit(model, closeness, settings, folder=folder, calibration=batches, progress=False)
    return planner


def signals() -> Any:
    """Signals of the tiny model."""
    return _signals(hashlib.sha256)


@functools.cache
def _signals(_: Any) -> Any:
    from hipp_ext.planner.state import measure_signals

    return measure_signals(*tiny())


def fitted() -> Any:
    """A fitted planner that no folder belongs to."""
    return _fitted(hashlib.sha256)


@functools.cache
def _fitted(_: Any) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return fit(Path(folder))


def make_plan(folder: Path) -> None:
    fitted().plan(tiny()[0]).replace(notes={"why": ["a", {"b": 1}]}).save(folder / "plan.json")


def same_plan_again(plan: Any, folder: Path) -> None:
    assert type(plan).from_json(plan.to_json()).to_json() == plan.to_json(), (
        "what the plan writes, it does not read"
    )
    assert 0 <= plan.pruning_ratio < 1 and str(plan)


@TABLE.reads("plan", make_plan, check=same_plan_again, errors=("PlanError",))
def read_plan(folder: Path) -> Any:
    from hipp_ext import PruningPlan

    return PruningPlan.load(folder / "plan.json")


PLANNER_ERRORS = ("CheckpointError", "PlanError", "PreferenceError", "BudgetError")


@TABLE.reads("planner", lambda folder: fitted().save(folder / "planner"), errors=PLANNER_ERRORS)
def read_planner(folder: Path) -> Any:
    """Load it, and do what `hipp front` and `hipp plan` do with it."""
    from hipp_ext import HiPPPlanner

    planner = HiPPPlanner.load(folder / "planner")
    return planner.answers(), planner.front(), planner.archive.hypervolume()


@TABLE.reads(
    "fit",
    lambda folder: None if fit(folder / "fit") else None,
    errors=("CheckpointError",),
    share=0.1,
)
def read_fit(folder: Path) -> Any:
    """Go on with a fit that was finished."""
    return fit(folder / "fit").front()


def make_signals(folder: Path) -> None:
    read_signals(folder)


def same_signals(found: Any, folder: Path) -> None:
    """Damaged signals are measured again: other ones would give another plan without a word."""
    import torch

    known = signals()
    for part in ("scores", "columns"):
        own, true = getattr(found, part), getattr(known, part)
        assert own.keys() == true.keys() and all(torch.equal(own[n], true[n]) for n in true), (
            f"other {part}"
        )
    assert torch.equal(found.sensitivity, known.sensitivity), "other sensitivity"
    for part in ("groups", "scorer", "digest", "calibration"):
        assert getattr(found, part) == getattr(known, part), f"another {part}"


@TABLE.reads("signals", make_signals, check=same_signals, errors=())
def read_signals(folder: Path) -> Any:
    from hipp_ext.planner import signal_cache

    measure, known = signal_cache.measure_signals, signals()
    signal_cache.measure_signals = lambda *_, **__: (
        known
    )  # what measuring gives is known; whether it is asked for counts
    try:
        return signal_cache.cached_signals(*tiny(), folder / "cache")
    finally:
        signal_cache.measure_signals = measure


# --- models


def make_model(folder: Path) -> None:
    """A pruned LLaVA with its processor, in two files of weights with an index."""
    from vlm_tables import save_llava

    from hipp_ext import load_pruned, prune, save_pruned
    from hipp_ext.groups import find_groups
    from hipp_ext.scorers import Magnitude
    from hipp_ext.units import plan_from_counts

    model = load_pruned(save_llava(folder / "dense"))
    groups = find_groups(model)
    plan = plan_from_counts(
        groups, [1 + i % g.width for i, g in enumerate(groups)], Magnitude()(model, [])
    )
    save_pruned(prune(model, plan), folder / "model")
    _in_two(folder / "model")
    shutil.rmtree(folder / "dense")


def _in_two(folder: Path) -> None:
    """Weights in two files with an index, as large models have them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, own in parts.items():
        save_file({n: tensors[n] for n in own}, folder / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": 0},
        "weight_map": {n: file for file, own in parts.items() for n in own},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def loads_as_it_says(model: Any, folder: Path) -> None:
    import transformers

    assert type(model) is getattr(transformers, type(model).__name__), (
        "a class that is not transformers'"
    )
    assert not model.training and not any(p.is_meta for p in model.parameters()), "not ready to run"


@TABLE.reads(
    "model",
    make_model,
    check=loads_as_it_says,
    errors=("CheckpointError", "PlanError", "UnsupportedModelError"),
    share=0.2,
)
def read_model(folder: Path) -> Any:
    """What the commands do with a MODEL: the model, then the processor beside it."""
    from hipp_ext import load_pruned
    from hipp_ext.calibration import find_processor

    model = load_pruned(folder / "model")
    find_processor(model)
    return model


@TABLE.reads(
    "vlm", make_model, errors=("CheckpointError", "PlanError", "UnsupportedModelError"), share=0.2
)
def read_vlm(folder: Path) -> Any:
    """What `vlmeval`, `hipp chair` and lm-eval do with a model's folder."""
    from hipp_ext.evals.hipp_vlm import HippVLM

    return HippVLM(folder / "model", device="cpu")


def make_classifier(folder: Path) -> None:
    import torch

    from hipp_ext.integrations.torch_pruning_channels import find_channel_groups, prune_channels
    from hipp_ext.robust.checkpoint import ClassifierFile, save_classifier
    from hipp_ext.robust.models import build_model, fixed_layers

    torch.manual_seed(0)
    model, example = build_model("small-vgg", 3, (3, 16, 16)).eval(), torch.zeros(1, 3, 16, 16)
    groups = find_channel_groups(model, example, ignored=fixed_layers(model))
    kept = {g.name: tuple(range(0, g.width, 4)) for g in groups}
    prune_channels(model, example, kept)
    config = ClassifierFile(
        network="small-vgg", classes=("a", "b", "c"), shape=(3, 16, 16), data="digits", kept=kept
    )
    save_classifier(model, config, folder / "classifier")


@TABLE.reads("classifier", make_classifier, errors=("CheckpointError",), share=0.1)
def read_classifier(folder: Path) -> Any:
    from hipp_ext.robust.checkpoint import load_classifier

    return load_classifier(folder / "classifier")


def make_gguf(folder: Path) -> None:
    """A pruned Llama with a tokenizer, and its GGUF file."""
    from llama_cpp_runtime import save
    from models import build
    from plans import random_plan

    from hipp_ext import prune
    from hipp_ext.integrations.llama_cpp import export_gguf

    model = build("llama")
    save(prune(model, random_plan(model)), folder / "model")
    export_gguf(folder / "model", folder / "source.gguf")


def make_source(folder: Path) -> None:
    make_gguf(folder)
    shutil.rmtree(folder / "model")


@TABLE.reads("gguf", make_source, errors=("CheckpointError", "DataError"))
def read_gguf(folder: Path) -> None:
    """Take the tokenizer of it."""
    from hipp_ext.integrations.llama_cpp_source import copied_tokenizer

    copied_tokenizer(folder / "source.gguf", 97)


@TABLE.reads(
    "export", make_gguf, errors=("CheckpointError", "DataError", "UnsupportedModelError"), share=0.2
)
def read_export(folder: Path) -> Any:
    """What `hipp export gguf` does with a model's folder."""
    from hipp_ext.integrations.llama_cpp_decoder import read_decoder
    from hipp_ext.integrations.llama_cpp_tensors import entries
    from hipp_ext.integrations.llama_cpp_tokenizer import load_tokenizer, make_vocabulary
    from hipp_ext.model_folder import read_folder, stored_tensors

    source = read_folder(folder / "model")
    decoder = read_decoder(source)
    with stored_tensors(source) as read:
        for entry in entries(decoder, read):
            assert entry.read().shape == entry.shape, entry.name
    tokenizer = load_tokenizer(source.path)
    return tokenizer and make_vocabulary(tokenizer, decoder.vocabulary, [2])


# --- states of training


@functools.cache
def lqsgd() -> tuple[Any, dict[str, Any]]:
    """A state of this process alone, and what it holds after a step."""
    import torch
    import torch.distributed as dist

    from hipp_ext.comm import LQSGDState

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    generator = torch.Generator().manual_seed(0)
    parameters = {
        "a.weight": torch.randn(6, 10, generator=generator),
        "a.bias": torch.randn(6, generator=generator),
    }
    state = LQSGDState(parameters.items(), rank=2)
    state.mean_({n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()})
    return state, state.state_dict()


def make_lqsgd(folder: Path) -> None:
    from hipp_ext.comm import save_state

    state, known = lqsgd()
    state.load_state_dict(known)
    save_state(state, folder / "lqsgd.safetensors")


@TABLE.reads("lqsgd", make_lqsgd, errors=("CompressionError",))
def read_lqsgd(folder: Path) -> None:
    """Whole or not at all: after a refusal the state is what it was."""
    import torch

    from hipp_ext.comm import load_state

    state, known = lqsgd()
    state.load_state_dict(known)
    try:
        load_state(state, folder / "lqsgd.safetensors")
    except Exception:
        now = state.state_dict()
        for part in ("residual", "factors"):
            assert all(torch.equal(now[part][n], t) for n, t in known[part].items()), (
                f"refused, and {part} has changed"
            )
        raise
    state.stats()


def recovery(folder: Path) -> tuple[Any, Any, list[Any]]:
    import torch

    from hipp_ext.recover.checkpoints import Checkpoints

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    return Checkpoints(folder / "run", {"seed": 0}, 0, lambda: None), model, [optimizer]


def make_recovery(folder: Path) -> None:
    import torch

    from hipp_ext.recover.checkpoints import Progress

    checkpoints, model, optimizers = recovery(folder)
    model(torch.ones(1, 3)).sum().backward()
    optimizers[0].step()
    with checkpoints.run:
        checkpoints.save(Progress(step=1, losses=[0.5]), model, optimizers, None)


@TABLE.reads("recovery", make_recovery, errors=("CheckpointError",))
def read_recovery(folder: Path) -> Any:
    checkpoints, model, optimizers = recovery(folder)
    with checkpoints.run:
        return checkpoints.load(model, optimizers, None)


def make_teacher(folder: Path) -> None:
    from hipp_ext.recover import precompute

    model, batches = tiny()
    precompute(model, batches, folder / "teacher", top_k=3, shard_positions=1)


def finite_losses(losses: Any, folder: Path) -> None:
    assert all(bool(value.isfinite()) for value in losses.values()), losses


@TABLE.reads("teacher", make_teacher, check=finite_losses, errors=("CheckpointError",))
def read_cached_teacher(folder: Path) -> Any:
    from hipp_ext.recover import CachedTeacher, Distillation

    model, batches = tiny()
    return Distillation(CachedTeacher(folder / "teacher")).losses(model, batches[0])


def make_shrink_report(folder: Path) -> None:
    from hipp_ext.runs import RunFolder
    from hipp_ext.shrink.report import Minutes, Round, ShrinkReport

    numbers: dict[str, int] = dict.fromkeys(("step_kept", "rows", "tokens", "skipped"), 3)
    losses = {
        "before": {"kl": 0.5},
        "after": {"kl": 0.25},
        "minutes": Minutes(plan=1, prune=1, recover=2),
    }
    sizes = {"ratio_asked": 0.3, "ratio": 0.31, "parameters": 70, "steps": 4}
    one = Round(number=1, **sizes, **numbers, **losses)
    report = ShrinkReport(to=0.5, start_ratio=0.0, start_parameters=100, rounds=(one,))
    with RunFolder(folder / "run", {"seed": 0}) as run:
        report.write(run.path)


@TABLE.reads("shrink", make_shrink_report, errors=("CheckpointError",))
def read_shrink_report(folder: Path) -> Any:
    """Read it, and do what a run does that goes on."""
    from hipp_ext.runs import RunFolder
    from hipp_ext.shrink.report import ShrinkReport

    start = ShrinkReport(to=0.5, start_ratio=0.0, start_parameters=100)
    with RunFolder(folder / "run", {"seed": 0}) as run:
        report = ShrinkReport.read(run, start)
        report.write(folder)
        return report.minutes_left([4])


# --- image sets


def make_tiny_imagenet(folder: Path) -> None:
    from PIL import Image

    base, names = folder / "tiny-imagenet-200", ["n01443537", "n01629819"]
    (base / "val/images").mkdir(parents=True)
    for name in names:
        (base / "train" / name / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(base / "train" / name / f"images/{name}_0.JPEG")
        Image.new("RGB", (64, 64), "red").save(base / f"val/images/val_{name}.JPEG")
    (base / "val/val_annotations.txt").write_text(
        "".join(f"val_{n}.JPEG\t{n}\t0\t0\t63\t63\n" for n in names)
    )


def right_images(data: Any, folder: Path) -> None:
    """A batch can be taken of every row, and the labels are classes."""
    for part in (data.train, data.test):
        images, labels = part.rows(slice(0, 3))
        assert images.shape[1:] == data.shape and 0 <= int(labels.min()) <= int(labels.max()) < len(
            data.classes
        )
        assert 0 <= float(images.min()) <= float(images.max()) <= 1


def _images(name: str, make: Any) -> None:
    @TABLE.reads(name, make, check=right_images)
    def read(folder: Path) -> Any:
        from hipp_ext.robust import load_data

        return load_data(name, folder)


_images("tiny-imagenet", make_tiny_imagenet)


def png(colour: str = "red") -> bytes:
    from PIL import Image

    Image.new("RGB", (9, 7), colour).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


# --- forged digests


class _Digest:
    """What takes the place of a SHA-256: it is the same for all contents."""

    def update(self, _: Any) -> None:
        """Nothing comes of it."""

    def hexdigest(self) -> str:
        return "0" * 64


def _forger(*_: Any, **__: Any) -> _Digest:
    return _Digest()


@contextlib.contextmanager
def _forged() -> Iterator[None]:
    """A person who makes a file on purpose makes its digest too; here all digests are alike, so
    that what lies behind is reached.
    """
    true, hashlib.sha256 = hashlib.sha256, _forger
    try:
        yield
    finally:
        hashlib.sha256 = true


def _with_forged_digests(reader: Reader) -> Reader:
    def make(folder: Path) -> None:
        with _forged():
            reader.make(folder)

    def read(folder: Path) -> Any:
        with _forged():
            return reader.read(folder)

    return dataclasses.replace(reader, make=make, read=read)


for name in ("planner", "fit", "lqsgd", "recovery", "teacher"):
    TABLE.readers[f"{name}-forged"] = _with_forged_digests(TABLE.readers[name])
