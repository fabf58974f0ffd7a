"""The surrogate: agrees with what was measured, knows what it does not know, and learns which
groups matter.
"""

import pytest
import torch

from hipp_ext.planner.surrogate import Surrogate


def history(n, groups=6, seed=0):
    """Plans and two smooth rewards: the first hangs on group 0, the second on groups 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(n, groups, generator=generator)
    removed = 1 - shares
    return shares, torch.stack([1 - removed[:, 0] ** 2, 1 - removed[:, 1] * removed[:, 2]], 1)


@pytest.fixture(scope="module")
def fitted():
    model = Surrogate(torch.ones(6))
    shares, rewards = history(120)
    model.fit(shares, rewards)
    return model, shares, rewards


def test_it_predicts_unseen_plans(fitted):
    model, _, _ = fitted
    shares, rewards = history(200, seed=1)
    mean, deviation = model.predict(shares)
    assert (mean - rewards).square().mean().sqrt() < 0.05 * rewards.std(0).min()
    assert torch.allclose(model.mean(shares), mean, atol=1e-5)
    assert (deviation > 0).all()


def test_it_is_sure_of_what_was_measured_and_unsure_elsewhere(fitted):
    model, shares, rewards = fitted
    mean, at_data = model.predict(shares)
    assert torch.allclose(mean, rewards, atol=0.02)
    _, far = model.predict(torch.full((1, 6), -1.0))
    assert (far > 5 * at_data.mean(0)).all()


def test_draws_agree_with_the_posterior(fitted):
    model, _, _ = fitted
    shares, _ = history(5, seed=2)
    mean, deviation = model.predict(shares)
    drawn = model.sample(shares, 4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 5, 2)
    # A little noise is added so that the draws exist; in units of the rewards' spread it is a
    # hundredth.
    assert torch.allclose(drawn.mean(0), mean, atol=0.01) and torch.allclose(
        drawn.std(0), deviation, atol=0.01
    )


def test_the_same_history_gives_the_same_model_however_it_grew(fitted):
    _, shares, rewards = fitted
    other = Surrogate(torch.ones(6))
    for n in (3, 30, 90, 120):
        other.fit(shares[:n], rewards[:n])
    query, _ = history(7, seed=3)
    assert torch.equal(other.mean(query), fitted[0].mean(query))


@pytest.mark.parametrize("rewards", [torch.zeros(3, 2), torch.tensor([[0.1, 0.2]])])
def test_constant_and_single_rewards_are_no_trouble(rewards):
    model = Surrogate(torch.tensor([0.0, 1.0]))
    model.fit(torch.rand(len(rewards), 2), rewards)
    mean, deviation = model.predict(torch.rand(4, 2))
    assert mean.isfinite().all() and deviation.isfinite().all()
