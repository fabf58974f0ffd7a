"""`hipp robust` from training to evaluation, and the study in small."""

import functools
import re

import command
import pytest
import torch

from hipp_ext.errors import AttackError, BudgetError, CheckpointError, DataError, OutputExistsError
from hipp_ext.evals.studies.robust import (
    Job,
    Setting,
    _plan,
    conclude,
    dense_network,
    jobs,
    power,
    results,
    run,
    table,
)
from hipp_ext.integrations.torch_pruning import find_channel_groups
from hipp_ext.robust.allocation import uniform_counts
from hipp_ext.robust.checkpoint import load_classifier
from hipp_ext.robust.costs import channel_costs
from hipp_ext.robust.image_sets import load_data

hipp = functools.partial(command.hipp, "robust")
hipp_json = functools.partial(command.hipp_json, "robust")


def test_from_training_to_evaluation(tmp_path):
    dense, pruned, tuned, again = (str(tmp_path / n) for n in ("dense", "pruned", "tuned", "again"))
    hipp(
        "train",
        "--network",
        "small-vgg",
        "--epsilon",
        "0.1",
        "--steps",
        "1",
        "--epochs",
        "1",
        "--out",
        dense,
    )
    scores = hipp_json("score", dense, "--epsilon", "1/10", "--rows", "64")
    assert len(scores["sensitivity"]) == 8 and min(scores["sensitivity"].values()) > 0
    common = ("--epsilon", "0.1", "--rows", "64", "--steps", "1")
    output = hipp("prune", dense, "--pruning-ratio", "0.5", *common, "--out", pruned)
    share = float(re.search(r"([\d.]+)% of the MACs", output).group(1))
    assert 24 < share <= 27  # 3 input channels and the last layer stay
    removed = re.search(
        r"of the parameters of \S+ stay; ([\d.]+)% and [\d.]+% are removed",
        " ".join(output.split()),
    )
    assert float(removed.group(1)) == pytest.approx(100 - share, abs=0.06)
    assert "--pruning-ratio 0.5 counts channels" in output
    hipp(
        "finetune",
        pruned,
        "--epsilon",
        "0.1",
        "--steps",
        "1",
        "--epochs",
        "1",
        "--loss",
        "mart",
        "--awp",
        "--out",
        tuned,
    )
    hipp("prune", tuned, "--pruning-ratio", "0.3", *common, "--cost", "parameters", "--out", again)
    small, config = load_classifier(again)
    widths = {n: m.out_channels for n, m in small.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {n: len(k) for n, k in config.kept.items()} == widths and max(
        config.kept["features.17"]
    ) > widths["features.17"]
    options = ("--n", "20", "--attacks", "pgd,apgd-ce")
    table = hipp("evaluate", tuned, "--epsilon", "0.1", *options)
    assert all(f"class {digit}, worst case" in table for digit in range(10))
    report = hipp_json("evaluate", tuned, "--epsilon", "0.1", *options)
    assert (
        report["n"] == 20
        and report["worst"] <= report["clean"]
        and set(report["under"]) == {"pgd", "apgd-ce"}
    )
    with pytest.raises(OutputExistsError, match="exists"):
        hipp("finetune", pruned, "--out", tuned)
    with pytest.raises(
        AttackError, match=r"epsilon must be a number such as 8/255 or 0.1, got 'eight'"
    ):
        hipp("score", dense, "--epsilon", "eight")
    with pytest.raises(AttackError, match="epsilon must be above zero and finite, got 0"):
        hipp("evaluate", dense, "--epsilon", "0")
    with pytest.raises(AttackError, match="Known losses are pgd-at, trades, mart; got 'fgsm'"):
        hipp("finetune", dense, "--loss", "fgsm", "--out", str(tmp_path / "x"))
    hipp("prune", dense, "--budget", "0.2", *common, "--out", str(tmp_path / "fifth"))
    assert sum(p.numel() for p in load_classifier(tmp_path / "fifth")[0].parameters()) < sum(
        p.numel() for p in load_classifier(pruned)[0].parameters()
    )
    for both in ((), ("--budget", "0.2", "--pruning-ratio", "0.5")):
        with pytest.raises(BudgetError, match="Give either --pruning-ratio or --budget"):
            hipp("prune", dense, *both, "--out", str(tmp_path / "x"))
    with pytest.raises(BudgetError, match="A budget counts macs or parameters, not 'watts'"):
        hipp(
            "prune",
            dense,
            "--pruning-ratio",
            "0.5",
            "--cost",
            "watts",
            "--out",
            str(tmp_path / "x"),
        )
    with pytest.raises(CheckpointError, match="holds no classifier that `hipp robust` can read"):
        hipp("score", str(tmp_path))


def test_a_checkpoint_serves_its_own_run_only(tmp_path):
    """Another loss, or another model to fine-tune, with the same output folder is another run."""
    common = ("--epsilon", "0.1", "--steps", "1", "--epochs", "1", "--out", str(tmp_path / "a"))
    hipp("train", "--network", "small-vgg", *common)
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    for different in (("--loss", "trades"), ("--steps", "2"), ("--awp",), ("--epsilon", "0.2")):
        with pytest.raises(CheckpointError, match="holds another run: loss is PGDAT"):
            hipp("train", "--network", "small-vgg", *common, *different, "--overwrite")
    with pytest.raises(CheckpointError, match="holds another run: model is"):
        hipp("train", "--network", "small-resnet", *common, "--overwrite")
    with pytest.raises(CheckpointError, match="holds another run: settings.seed is 0"):
        hipp("train", "--network", "small-vgg", *common, "--seed", "1", "--overwrite")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == weights
    hipp("train", "--network", "small-vgg", *common[:-1], str(tmp_path / "b"), "--seed", "1")
    tune = ("--epsilon", "0.1", "--steps", "1", "--epochs", "1", "--out", str(tmp_path / "tuned"))
    hipp("finetune", str(tmp_path / "a"), *tune)
    with pytest.raises(CheckpointError, match="holds another run: model is"):
        hipp("finetune", str(tmp_path / "b"), *tune, "--overwrite")


def test_no_image_of_the_training_is_tested_on(tmp_path):
    """The split goes with the model, whatever the seed of the command."""
    from hipp_ext.cli.robust import _load

    hipp(
        "train",
        "--network",
        "small-vgg",
        "--epochs",
        "0",
        "--seed",
        "3",
        "--out",
        str(tmp_path / "a"),
    )
    hipp(
        "finetune",
        str(tmp_path / "a"),
        "--epochs",
        "0",
        "--seed",
        "4",
        "--out",
        str(tmp_path / "b"),
    )
    for folder in ("a", "b"):
        images = _load(tmp_path / folder, None, None)[2]
        assert torch.equal(images.test.images, load_data("digits", seed=3).test.images)
    assert not torch.equal(images.test.images, load_data("digits").test.images)


def test_ninety_percent_can_be_asked_for(tmp_path):
    hipp("train", "--network", "small-resnet", "--epochs", "0", "--out", str(tmp_path / "a"))
    hipp(
        "prune",
        str(tmp_path / "a"),
        "--pruning-ratio",
        "0.9",
        "--rows",
        "32",
        "--out",
        str(tmp_path / "b"),
    )
    small, config = load_classifier(tmp_path / "b")
    assert (
        min(len(k) for k in config.kept.values()) >= 1
        and sum(p.numel() for p in small.parameters()) > 0
    )


def test_a_study_goes_on_where_it_stopped(tmp_path):
    setting = Setting(dense=0, tune=0, test=20, attacks=("pgd",), steps=1, rows=32)
    arms = ("uniform", "mrs-removal", "shuffled", "global-l1")
    lines = []
    run(
        tmp_path,
        setting,
        ["small-vgg"],
        [0.75],
        ["trades"],
        1,
        ["uniform"],
        save=False,
        log=lines.append,
    )
    report = run(
        tmp_path, setting, ["small-vgg"], [0.75], ["trades"], 1, arms, save=False, log=lines.append
    )
    assert len(lines) == len(arms) and lines[0].startswith("small-vgg-75-trades-0 uniform: clean")
    cell = report["cells"]["small-vgg 0.75 trades"]
    uniform = next(r for r in results(tmp_path) if r["arm"] == "uniform")
    for arm in arms:
        assert (
            cell[arm]["macs"]["mean"] <= uniform["macs"]
            and cell[arm]["macs"]["mean"] > 0.97 * uniform["macs"]
        )
    assert conclude(tmp_path, setting, save=False)["cells"] == report["cells"]
    assert (tmp_path / "robust.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(
        CheckpointError, match="holds another run: (dense|tune|test|steps|rows|attacks) is"
    ):
        run(tmp_path, Setting(), ["small-vgg"], [0.75], ["trades"], 1, ["uniform"], save=False)
    with pytest.raises(DataError, match=r"Known arms are uniform, .*; got \['best'\]"):
        run(tmp_path, setting, ["small-vgg"], [0.75], ["trades"], 1, ["best"], save=False)
    with pytest.raises(DataError, match=r"Known losses are trades, pgd-at; got \['mart'\]"):
        run(tmp_path, setting, ["small-vgg"], [0.75], ["mart"], 1, ["uniform"], save=False)
    with pytest.raises(
        DataError, match=r"Ratios are fractions of the channels, above 0 and below 1; got \[75.0\]"
    ):
        run(tmp_path, setting, ["small-vgg"], [75.0], ["trades"], 1, ["uniform"], save=False)


def test_controls_differ_from_the_default_in_one_thing():
    """They rank channels as it does, by BN scale, and share them out by its scores shuffled, or by
    clean ones.
    """
    job, setting = (
        Job(network="small-vgg", ratio=0.75, loss="trades", seed=0),
        Setting(dense=2, steps=1, rows=128),
    )
    data = load_data("digits")
    dense = dense_network("small-vgg", 0, setting, data)
    groups = find_channel_groups(dense, data.train.rows(slice(0, 1))[0])
    macs, _ = channel_costs(dense, data.train.rows(slice(0, 1))[0], groups)
    uniform = uniform_counts([g.width for g in groups], 0.75)
    plans = {
        arm: _plan(arm, job, setting, dense, data, groups, macs, uniform)
        for arm in ("mrs-bn", "shuffled-bn", "clean-bn", "mrs-removal", "shuffled")
    }
    assert plans["mrs-bn"][0] not in (plans["shuffled-bn"][0], plans["clean-bn"][0])
    scales = [
        m.weight.abs().double() for m in dense.modules() if isinstance(m, torch.nn.BatchNorm2d)
    ]
    for arm in ("mrs-bn", "shuffled-bn", "clean-bn"):
        assert all(torch.equal(r, s) for r, s in zip(plans[arm][1], scales, strict=True))
    assert not torch.equal(plans["shuffled"][1][0], scales[0])


def test_differences_are_paired_by_seed():
    def row(arm, seed, worst):
        values = {"clean": 90.0, "pgd": worst, "worst": worst, "macs": 0.1, "parameters": 0.1}
        return values | {
            "network": "n",
            "ratio": 0.5,
            "loss": "l",
            "seed": seed,
            "arm": arm,
            "scoring": {"seconds": 1.0, "peak_mb": 0.0},
        }

    rows = [row("uniform", s, 40.0 + 10 * s) for s in range(3)] + [
        row("mrs-removal", s, 43.0 + 10 * s + s % 2) for s in range(3)
    ]
    difference = table(rows)["n 0.5 l"]["mrs-removal"]["difference"]["uniform"]["worst"]
    assert (
        difference["mean"] == pytest.approx(10 / 3)
        and difference["se"] == pytest.approx(1 / 3)
        and difference["n"] == 3
    )
    assert power(3.1) == 19 and power(1.0) == 2
    assert [j.name for j in jobs(["a"], [0.5, 0.9], ["l"], 2)] == [
        "a-50-l-0",
        "a-90-l-0",
        "a-50-l-1",
        "a-90-l-1",
    ]
    assert Job(network="a", ratio=0.75, loss="l", seed=3).name == "a-75-l-3"
