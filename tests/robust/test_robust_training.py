"""Losses against their formulas; training that repeats to the bit, survives kill -9, and leaves the
caller's state alone.
"""

import contextlib
import copy
import functools
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import stripes
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from hipp_ext.errors import (
    AttackError,
    BudgetError,
    CheckpointError,
    DataError,
    UnsupportedModelError,
)
from hipp_ext.robust import (
    AWP,
    MART,
    PGDAT,
    TRADES,
    Bounds,
    MRPFSettings,
    ScoreSettings,
    TrainSettings,
    build_model,
    evaluate,
    mrpf,
    train,
)
from hipp_ext.robust.checkpoint import ClassifierFile, load_classifier, save_classifier
from hipp_ext.robust.losses import attacked, backward
from hipp_ext.robust.training import augment, cycle, loss_identity, recalibrate

EPSILON = stripes.EPSILON
FAST = TrainSettings(epochs=2, batch_size=32, lr=0.1)


@pytest.fixture(scope="module")
def trained():
    model = stripes.network()
    train(
        model,
        stripes.data(),
        PGDAT(epsilon=EPSILON, steps=3),
        TrainSettings(epochs=8, batch_size=32, lr=0.2),
    )
    return model.eval()


@pytest.fixture(scope="module")
def young():
    """Trained so little that it is unsure."""
    model = stripes.network()
    train(
        model,
        stripes.data(),
        PGDAT(epsilon=EPSILON, steps=1),
        TrainSettings(epochs=1, batch_size=32, lr=0.02),
    )
    return model.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# Losses


def test_attacks_stay_in_the_ball_and_hurt(trained):
    x, y = stripes.data().test.rows(slice(None))
    moved = attacked(trained, x, y, 0.3, 10, 0)
    assert (
        float((moved - x).abs().max()) <= 0.3 + 1e-6
        and float(moved.min()) >= 0
        and float(moved.max()) <= 1
    )
    assert float(F.cross_entropy(trained(moved), y)) > float(F.cross_entropy(trained(x), y)) + 0.5
    assert torch.equal(moved, attacked(trained, x, y, 0.3, 10, 0)) and not torch.equal(
        moved, attacked(trained, x, y, 0.3, 10, 1)
    )


def test_losses_follow_their_formulas(young):
    model, (x, y) = copy.deepcopy(young), stripes.data().train.rows(slice(0, 16))
    moved = attacked(model, x, y, EPSILON, 3, 5)
    assert torch.allclose(
        PGDAT(epsilon=EPSILON, steps=3)(model, x, y, 5), F.cross_entropy(model(moved), y)
    )
    p, q = model(x).softmax(1), model(moved).softmax(1)
    rows = torch.arange(16)
    others = q.clone()
    others[rows, y] = 0
    boosted = -(q[rows, y].log() + (1 - others.max(1).values).log())
    mart = (boosted + 5 * (p * (p / q).log()).sum(1) * (1 - p[rows, y])).mean()
    assert torch.allclose(MART(epsilon=EPSILON, steps=3)(model, x, y, 5), mart, atol=1e-5)
    value = TRADES(epsilon=EPSILON, steps=3)(model, x, y, 5)
    clean, small = (
        F.cross_entropy(model(x), y),
        TRADES(epsilon=EPSILON, steps=3, beta=1e-9)(model, x, y, 5),
    )
    assert torch.allclose(small, clean, atol=1e-5) and value > clean + 1e-4


def test_the_divergence_that_trades_adds_is_what_its_attack_drives(young):
    """At radius 0 there is none; a wider ball has more."""
    x, y = stripes.data().train.rows(slice(0, 16))
    values = [float(TRADES(epsilon=e, steps=5)(young, x, y, 0)) for e in (1e-6, 0.05, 0.2)]
    assert values == sorted(values) and values[2] > values[0] + 1e-3


def test_awp_takes_the_gradient_at_moved_weights_and_puts_them_back(young):
    model, (x, y) = copy.deepcopy(young).train(), stripes.data().train.rows(slice(0, 16))
    before, base = copy.deepcopy(model.state_dict()), PGDAT(epsilon=EPSILON, steps=2)
    plain = float(base(copy.deepcopy(model), x, y, 0))
    value = backward(AWP(base=base, gamma=0.05), model, x, y, 0)
    weights = {n: p for n, p in model.named_parameters()}
    assert value > plain + 1e-3 and all(torch.equal(p, before[n]) for n, p in weights.items())
    assert all(p.grad is not None for p in weights.values())
    with pytest.raises(
        AttackError, match="AWP's gamma is a fraction of the weights' norm between 0 and 1, got 0"
    ):
        AWP(base=base, gamma=0.0)


@pytest.mark.parametrize("loss", [PGDAT, TRADES, MART])
def test_bad_radii(loss):
    for epsilon in (0.0, -0.1, float("nan")):
        with pytest.raises(AttackError, match="epsilon must be above zero and finite"):
            loss(epsilon=epsilon)
    with pytest.raises(AttackError, match="at least one step, got steps=0"):
        loss(steps=0)
    with pytest.raises(AttackError, match="steps='3': a whole number is needed"):
        loss(steps="3")


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: TrainSettings(epochs="3"), DataError, "epochs='3': a whole number"),
        (lambda: TrainSettings(batch_size=1.5), DataError, "batch_size=1.5: a whole number"),
        (lambda: TrainSettings(lr=float("inf")), DataError, "lr=inf: a finite number"),
        (
            lambda: MRPFSettings(pruning_ratio=True),
            BudgetError,
            "pruning_ratio=True: a finite number",
        ),
        (lambda: MRPFSettings(budget="0.5"), BudgetError, "budget='0.5': a finite number"),
        (lambda: Bounds(min_keep="0"), BudgetError, "min_keep='0': a fraction between 0 and 1"),
        (lambda: ScoreSettings(rows="8"), AttackError, "rows='8': a whole number"),
        (lambda: AWP(base=PGDAT(), gamma=None), AttackError, "gamma=None: a finite number"),
    ],
)
def test_settings_are_numbers(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Training


def test_same_seed_same_weights_and_nothing_else_changes():
    data, start = stripes.data(), stripes.network()
    start.features[0].weight.requires_grad_(False)
    start.features[1].eval()
    models = [copy.deepcopy(start) for _ in range(3)]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        train(
            model,
            data,
            TRADES(epsilon=EPSILON, steps=2),
            TrainSettings(epochs=2, batch_size=32, seed=seed),
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert (
            model.training
            and not model.features[1].training
            and not model.features[0].weight.requires_grad
        )
        assert torch.equal(model.features[0].weight, start.features[0].weight)
    assert (
        same(models[0], models[1]) and not same(models[0], models[2]) and not same(models[0], start)
    )


def test_training_makes_robust(trained):
    data, naive = stripes.data(), stripes.network()
    plain = lambda m, x, y, seed: F.cross_entropy(m(x), y)  # noqa: E731  a user's own loss
    train(naive, data, plain, TrainSettings(epochs=8, batch_size=32, lr=0.2))
    worst = [
        evaluate(m, data.test, 4, epsilon=0.25, attacks=("pgd",), checks=False).worst
        for m in (trained, naive)
    ]
    assert worst[0] > worst[1] + 10


def test_going_on_from_a_checkpoint_ends_with_the_same_weights(tmp_path):
    data, loss = stripes.data(), PGDAT(epsilon=EPSILON, steps=2)
    settings = TrainSettings(epochs=3, batch_size=32, lr=0.1)
    whole, stopped = stripes.network(), stripes.network()
    history = train(whole, data, loss, settings)

    class Stop(Exception):
        pass

    def stop(done, _):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        train(stopped, data, loss, settings, folder=tmp_path, on_epoch=stop)
    fresh = stripes.network()
    assert train(fresh, data, loss, settings, folder=tmp_path) == history
    assert same(fresh, whole)
    with pytest.raises(CheckpointError, match="holds another run: settings.epochs is 3"):
        train(stripes.network(), data, loss, FAST, folder=tmp_path)
    with pytest.raises(CheckpointError, match="holds another run: loss is PGDAT"):
        train(stripes.network(), data, PGDAT(epsilon=EPSILON, steps=3), settings, folder=tmp_path)
    with pytest.raises(CheckpointError, match="holds another run: data.digest is"):
        moved = replace(data, train=replace(data.train, labels=data.train.labels.roll(1)))
        train(stripes.network(), moved, loss, settings, folder=tmp_path)
    with pytest.raises(CheckpointError, match="holds another run: model is"):
        train(fresh, data, loss, settings, folder=tmp_path)
    with pytest.raises(CheckpointError, match="holds another run: model is"):
        train(build_model("small-vgg", 4, (1, 8, 8)), data, loss, settings, folder=tmp_path)
    (tmp_path / "train.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="damaged: .*train.safetensors is damaged"):
        train(stripes.network(), data, loss, settings, folder=tmp_path)


def test_what_cannot_be_trained():
    data, loss = stripes.data(), PGDAT(epsilon=EPSILON, steps=1)
    with pytest.raises(
        UnsupportedModelError, match=r"has weights in torch.bfloat16: gradients of attacks vanish"
    ):
        train(stripes.network().bfloat16(), data, loss, FAST)
    half, rows = stripes.network().bfloat16(), data.train.rows(slice(0, 4))
    for unfit in (PGDAT(), TRADES(), MART()):
        with pytest.raises(UnsupportedModelError, match=r"has weights in torch.bfloat16"):
            unfit(half, *rows, 0)
    with pytest.raises(UnsupportedModelError, match="No weight of this Flat requires gradients"):
        train(stripes.network().requires_grad_(False), data, loss, FAST)
    with pytest.raises(DataError, match="Training needs epochs >= 0, batch_size >= 1 and lr > 0"):
        TrainSettings(lr=0.0)
    bad = lambda m, x, y, seed: m(x).sum() * float("inf")  # noqa: E731
    with pytest.raises(
        AttackError, match=r"The training loss is .* in epoch 1; lower the learning rate \(0.1\)"
    ):
        train(stripes.network(), data, bad, FAST)


def test_shifts_mirrors_and_the_cycle():
    from dataclasses import replace

    data = replace(stripes.data(), pad=1, mirror=True)
    images = torch.rand(64, 1, 8, 8)
    moved = augment(images, data, torch.Generator().manual_seed(0))
    padded = F.pad(images, (1,) * 4)
    options = [padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    options += [o.flip(3) for o in options]
    found = torch.stack([(moved == o).flatten(1).all(1) for o in options])
    assert bool((found.sum(0) == 1).all()) and int(found.any(1).sum()) > 12
    rates = [cycle(0.1, i, 100) for i in range(100)]
    assert (
        rates[0] == pytest.approx(0.004) and max(rates) == pytest.approx(0.1) and rates[-1] < 1e-4
    )
    assert rates.index(max(rates)) == 30


def test_recalibration_measures_the_statistics_of_attacked_images(trained):
    model, data = copy.deepcopy(trained), stripes.data()
    norm = model.features[1]
    momentum, weights = norm.momentum, [p.clone() for p in model.parameters()]
    with torch.no_grad():
        norm.running_mean.fill_(9.0)
    recalibrate(model, data.train, EPSILON, passes=2)
    x, y = data.train.rows(slice(None))
    first = model.features[0]
    expected = first(x).mean((0, 2, 3))
    assert float((norm.running_mean - expected).abs().max()) < 0.2 and not torch.allclose(
        norm.running_mean, expected, atol=1e-6
    )
    assert norm.momentum == momentum and not model.training
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


# The pipeline

SETTINGS = MRPFSettings(
    pruning_ratio=0.5, scores=ScoreSettings(epsilon=EPSILON, rows=64, attack_steps=3), train=FAST
)
LOSS = TRADES(epsilon=EPSILON, steps=2)


def test_mrpf_meets_the_budget_and_leaves_the_model_alone(trained, tmp_path):
    data, before = stripes.data(), copy.deepcopy(trained)
    trained.features[0].weight.requires_grad_(False)
    torch.manual_seed(7)
    state, lines = torch.get_rng_state(), []
    result = mrpf(trained, data, SETTINGS, loss=LOSS, folder=tmp_path / "run", log=lines.append)
    assert (
        torch.equal(torch.get_rng_state(), state) and same(trained, before) and not trained.training
    )
    assert not trained.features[0].weight.requires_grad and trained.features[3].weight.requires_grad
    again = mrpf(trained, data, SETTINGS, loss=LOSS)
    trained.requires_grad_(True)
    assert {n: len(k) for n, k in result.kept.items()} == {
        n: result.model.get_submodule(n).out_channels
        for n in ("features.0", "features.3", "features.7")
    }
    assert 0.2 < result.macs <= 0.32 and len(result.history) == 2
    assert result.sensitivity.keys() == result.kept.keys()
    events = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert [e["stage"] for e in events] == ["plan", "train"] and len(lines) == 3
    assert same(again.model, result.model) and again.kept == result.kept
    shuffled = replace(data, train=replace(data.train, labels=data.train.labels.roll(1)))
    first = [trained.features[0]]
    for others in (
        lambda folder: mrpf(trained, data, MRPFSettings(), loss=LOSS, folder=folder),
        lambda folder: mrpf(trained, data, SETTINGS, loss=replace(LOSS, beta=3.0), folder=folder),
        lambda folder: mrpf(trained, shuffled, SETTINGS, loss=LOSS, folder=folder),
        lambda folder: mrpf(trained, data, SETTINGS, loss=LOSS, folder=folder, ignored=first),
        lambda folder: mrpf(stripes.network(), data, SETTINGS, loss=LOSS, folder=folder),
    ):
        with pytest.raises(
            CheckpointError,
            match="holds another run: (model|data.digest|loss|ignored|settings.pruning_ratio|"
            "settings.scores.epsilon) is",
        ):
            others(tmp_path / "run")


def test_losses_are_known_again_by_their_repr():
    def plain(model, x, y, seed):
        return F.cross_entropy(model(x), y)

    def other(model, x, y, seed):
        return F.nll_loss(model(x), y)

    different = [
        PGDAT(epsilon=0.1),
        PGDAT(epsilon=0.2),
        TRADES(epsilon=0.1),
        AWP(base=PGDAT(epsilon=0.1)),
        AWP(base=plain),
        plain,
        other,
        functools.partial(plain, seed=0),
        functools.partial(plain, seed=1),
        F.cross_entropy,
    ]
    texts = [loss_identity(loss) for loss in different]
    assert len(set(texts)) == len(texts) and not any(" at 0x" in text for text in texts)
    assert loss_identity(AWP(base=plain)) == loss_identity(AWP(base=plain))


def test_channels_of_the_dense_model_stay(trained):
    """Without training or recalibration, what is left are slices of the dense weights."""
    settings = replace(
        SETTINGS,
        train=replace(FAST, epochs=0),
        recalibrate=False,
        cost="parameters",
        budget=0.3,
        alpha=1.0,
    )
    result = mrpf(trained, stripes.data(), settings, loss=LOSS)
    a, b = (list(result.kept[n]) for n in ("features.0", "features.3"))
    assert (
        torch.equal(result.model.features[3].weight, trained.features[3].weight[b][:, a])
        and result.parameters <= 0.3
    )


def test_mrpf_killed_and_resumed_ends_with_the_same_weights(trained, tmp_path):
    fork = multiprocessing.get_context("fork")  # which imports nothing
    trains = fork.Event()

    def run():
        def wait(done, loss):
            trains.set()
            time.sleep(60)

        folder = tmp_path / "run"
        mrpf(trained, stripes.data(), SETTINGS, loss=LOSS, folder=folder, on_epoch=wait)

    process = fork.Process(target=run)
    process.start()
    assert trains.wait(60)
    time.sleep(0.1)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = mrpf(trained, stripes.data(), SETTINGS, loss=LOSS, folder=tmp_path / "run")
    whole = mrpf(trained, stripes.data(), SETTINGS, loss=LOSS)
    assert same(resumed.model, whole.model) and resumed.history == whole.history


def test_mrpf_bad_input(trained, tmp_path):
    data = stripes.data()
    with pytest.raises(BudgetError, match=r"A budget of \d+ MACs cannot be met"):
        mrpf(trained, data, MRPFSettings(budget=0.001), loss=LOSS, folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()  # so that another budget can be asked for
    for settings in ({"budget": 0.0}, {"pruning_ratio": 1.0}, {"alpha": -1.0}, {"cost": "watts"}):
        with pytest.raises(
            BudgetError, match="watts" if "cost" in settings else next(iter(settings))
        ):
            MRPFSettings(**settings)
    for settings in (
        {"rows": 0},
        {"steps": 0},
        {"attack_steps": -1},
        {"batch_size": 0},
        {"ratio": 7.0},
        {"rho": 0.0},
    ):
        with pytest.raises(AttackError, match=rf"{next(iter(settings))}"):
            ScoreSettings(**settings)
    with pytest.raises(AttackError, match="epsilon must be above zero"):
        MRPFSettings(scores=ScoreSettings(epsilon=-1.0))
    with pytest.raises(UnsupportedModelError, match=r"has weights in torch.float16"):
        mrpf(copy.deepcopy(trained).half(), data, SETTINGS, loss=LOSS)
    with pytest.raises(UnsupportedModelError, match="torch-pruning cannot trace this Detached"):
        mrpf(Detached(), data, SETTINGS, loss=LOSS)
    for name, message in (
        ("plan.safetensors", "damaged: .*plan.safetensors is no file"),
        ("log.jsonl", "log.jsonl is not a regular file"),
    ):
        for make in (Path.mkdir, os.mkfifo):
            make(tmp_path / name)
            with pytest.raises(CheckpointError, match=message):
                mrpf(trained, data, SETTINGS, loss=LOSS, folder=tmp_path)
            (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
    (tmp_path / "plan.safetensors").write_text("{")
    with pytest.raises(CheckpointError, match="plan.safetensors is damaged"):
        mrpf(trained, data, SETTINGS, loss=LOSS, folder=tmp_path)


def test_a_changed_bit_in_a_run_is_never_gone_on_from(trained, tmp_path):
    """Scores and weights that are no longer what was written would make another model without a
    word.
    """
    data, generator = stripes.data(), torch.Generator().manual_seed(0)
    mrpf(trained, data, SETTINGS, loss=LOSS, folder=tmp_path)
    for name in ("plan.safetensors", "train.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for place in torch.randint(len(whole), (5,), generator=generator).tolist():
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(CheckpointError, match=f"{name}.*damaged"):
                mrpf(trained, data, SETTINGS, loss=LOSS, folder=tmp_path)
        (tmp_path / name).write_bytes(whole)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.b(self.a(x)).mean((2, 3)).detach().numpy()


# Classifiers on disk


def test_classifiers_come_back_to_the_bit(tmp_path):
    from hipp_ext.integrations.torch_pruning import prune_channels

    torch.manual_seed(3)
    model, x = build_model("small-resnet", 10, (1, 16, 16)).eval(), torch.rand(2, 1, 16, 16)
    kept = {"stem.0": (1, 5, 6), "blocks.3.conv1": (0, 30)}
    prune_channels(model, x[:1], kept)
    config = ClassifierFile(
        network="small-resnet",
        classes=tuple("0123456789"),
        shape=(1, 16, 16),
        data="digits",
        kept=kept,
    )
    save_classifier(model, config, tmp_path / "m")
    state = torch.get_rng_state()
    loaded, read = load_classifier(tmp_path / "m")
    assert (
        torch.equal(loaded(x), model(x))
        and read == config
        and torch.equal(torch.get_rng_state(), state)
    )
    for file, content in (("config.json", "{}"), ("model.safetensors", "xx")):
        whole = (tmp_path / "m" / file).read_bytes()
        (tmp_path / "m" / file).write_text(content)
        with pytest.raises(CheckpointError, match=r"holds no classifier|is damaged or truncated"):
            load_classifier(tmp_path / "m")
        (tmp_path / "m" / file).write_bytes(whole)
    with pytest.raises(UnsupportedModelError, match="Known networks are resnet18"):
        build_model("alexnet", 10)


def test_a_classifiers_folder_from_anywhere(tmp_path):
    """Only what `save_classifier` writes is read, and nothing of a size that the file chooses is
    built before it is checked.
    """
    model = build_model("small-vgg", 10, (1, 16, 16))
    config = ClassifierFile(
        network="small-vgg", classes=tuple("0123456789"), shape=(1, 16, 16), data="digits"
    )
    save_classifier(model, config, tmp_path / "m")
    text, weights = tmp_path / "m" / "config.json", tmp_path / "m" / "model.safetensors"
    good = text.read_text()
    for old, new, message in (
        ('"shape":[1,16,16]', '"shape":[1,99999999,16]', "shape.1"),
        ('"shape":[1,16,16]', '"shape":[0,16,16]', "shape.0"),
        ('"network":"small-vgg"', '"network":"alexnet"', "Known networks are"),
        ('"kept":null', '"kept":{"features.0":[0,99]}', "features.0 has channels 0 to 15"),
        ('"kept":null', '"kept":{"features.0":[0,1]}', "size mismatch|Error"),
    ):
        compact = good.replace("\n", "").replace(" ", "")
        assert old in compact
        text.write_text(compact.replace(old, new))
        with pytest.raises(
            CheckpointError, match=f"holds no classifier.*({message}|validation error)"
        ):
            load_classifier(tmp_path / "m")
    text.write_text(good)
    whole = weights.read_bytes()
    state = model.state_dict()
    state["fc.weight"][0, 0] = float("nan")
    save_file(state, weights)
    with pytest.raises(CheckpointError, match="fc.weight holds NaN or infinity"):
        load_classifier(tmp_path / "m")
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        load_classifier(tmp_path / "m")
    weights.unlink()
    weights.write_bytes(whole)
    generator, read = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        file = text if torch.rand(1, generator=generator) < 0.5 else weights
        content = file.read_bytes()
        changed = bytearray(content)
        limit = min(len(changed), 3000)  # the header of the weights
        for place in torch.randint(limit, (2,), generator=generator).tolist():
            changed[place] = int(torch.randint(256, (1,), generator=generator))
        file.write_bytes(changed)
        with contextlib.suppress(CheckpointError):
            load_classifier(tmp_path / "m")
            read += 1
        file.write_bytes(content)
    assert read < 60
