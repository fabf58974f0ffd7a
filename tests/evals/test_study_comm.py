"""The studies of gradient compression measure what they claim: small runs, effects asserted."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hipp_ext.errors import DataError
from hipp_ext.evals.studies import comm_baselines, comm_links, inversion
from hipp_ext.evals.studies.slow_links import __main__ as slow_links
from hipp_ext.evals.studies.slow_links.methods import Method

SHAPES = {"w": torch.Size((40, 60)), "b": torch.Size((60,))}


def gradients(workers: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(workers)
    ]


def test_dense_averages_are_means_and_every_method_counts_its_bytes():
    given = gradients(4)
    mean = {n: torch.stack([g[n] for g in given]).mean(0) for n in SHAPES}
    sent = {}
    for name, make in comm_baselines.methods(SHAPES, 4, 2).items():
        out, sent[name] = make(0)(given)
        assert out.keys() == SHAPES.keys() and all(out[n].shape == s for n, s in SHAPES.items())
        if name in ("fp32", "fp16", "QSGD 8 bits"):
            assert all(
                torch.allclose(out[n], mean[n], atol={"fp32": 1e-6, "fp16": 2e-3}.get(name, 0.05))
                for n in SHAPES
            )
    assert sent["fp32"] == 1.5 * 4 * 2460 and sent["fp16"] == sent["fp32"] / 2
    assert (
        sent["PowerSGD"] == 1.5 * 4 * (2 * 100 + 60)
        and sent["PowerSGD fp16"] == sent["PowerSGD"] / 2
    )
    assert sent["QSGD 8 bits"] == 3 * (2460 + 8)
    assert abs(sent["top-k"] - sent["LQ-SGD 8 bits"]) <= 3 * 8


@pytest.mark.parametrize("name", ["PowerSGD", "LQ-SGD 8 bits", "LQ-SGD 4 bits", "top-k"])
def test_methods_with_error_feedback_send_everything_in_the_end(name):
    given = gradients(2)
    average = comm_baselines.methods(SHAPES, 2, 2)[name](0)
    true = (given[0]["w"] + given[1]["w"]) / 2
    errors = []
    total = torch.zeros_like(true)
    for step in range(1, 121):
        total += average(given)[0]["w"]
        errors.append(float((total / step - true).norm() / true.norm()))
    assert errors[-1] < 0.35 < errors[0]


def test_an_observer_of_the_wire_decodes_what_was_sent():
    torch.manual_seed(0)
    model = inversion.cnn()
    found = comm_baselines.gradients_of(model, torch.rand(1, 1, 8, 8), torch.tensor([3]))
    exact, coarse = (
        inversion.observe(f"{m} naive", found).target for m in ("PowerSGD", "LQ-SGD 8 bits")
    )
    true = inversion._flat(found)
    assert (exact - coarse).norm() / exact.norm() < 0.02 and 0.001 < (
        true - exact
    ).norm() / true.norm() < 0.9
    seen = inversion.observe("LQ-SGD 8 bits adaptive", found)
    assert (
        seen.features(found) - seen.target
    ).norm() / seen.target.norm() < 0.01  # the true gradient would look like this


def test_an_adaptive_attack_rebuilds_what_a_naive_one_cannot():
    picture = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    error = {}
    for variant in ("raw", "LQ-SGD 8 bits naive", "LQ-SGD 8 bits adaptive"):
        torch.manual_seed(0)
        model = inversion.lenet()
        seen = inversion.observe(
            variant, comm_baselines.gradients_of(model, picture, torch.tensor([3]))
        )
        rebuilt = inversion.dlg(model, torch.tensor([3]), seen, 60)
        error[variant] = inversion.quality([rebuilt], [picture[0, 0]])["MSE"]["mean"]
    assert (
        error["raw"] < 1e-4
        and error["LQ-SGD 8 bits adaptive"] < 0.01 < error["LQ-SGD 8 bits naive"]
    )


def test_links_are_skipped_with_a_reason_where_they_cannot_be_made(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert comm_links.run() == {}
    assert "Skipped: emulated links need" in capsys.readouterr().out


def test_slow_links_are_skipped_with_a_reason_and_unknown_tasks_refused(
    monkeypatch, tmp_path, capsys
):
    with pytest.raises(DataError, match=r"No task is called \['mnist'\]; there are \['testbed'"):
        slow_links.run(tmp_path, ["mnist"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert slow_links.run(tmp_path, ["testbed"]) == {}
    assert "Skipped: emulated links need root" in capsys.readouterr().out


@given(
    every=st.sampled_from([None, 1, 8, 32]),
    limit=st.floats(0, 1e4),
    step=st.floats(0, 10),
    exchange=st.floats(0.01, 100),
)
def test_a_run_has_as_many_steps_as_its_limit_allows(every, limit, step, exchange):
    method = Method(sends="plain", local_steps=every)
    steps = method.steps_within(limit, 500, step, exchange)
    assert 0 <= steps <= 500 and method.cost(steps, step, exchange) <= limit
    assert steps == 500 or method.cost(steps + 1, step, exchange) > limit
    assert method.exchanges(steps) * (every or 1) - steps in range(every or 1)
