"""The policy: what its heads may and may not do, whatever they learned."""

import dataclasses

import torch

from hipp_ext.planner.grpo import draw_preferences
from hipp_ext.planner.policy import MAX_RATIO, MIN_COMPRESSION_WEIGHT, new_policy, ratio_of
from hipp_ext.sensitivity.curves import LEVELS


def test_an_untrained_budget_is_the_wish_for_compression(signals):
    weights = torch.linspace(MIN_COMPRESSION_WEIGHT, 1 - MIN_COMPRESSION_WEIGHT, 23)
    preferences = torch.stack([(1 - weights) * 0.3, (1 - weights) * 0.7, weights], 1)
    ratios = MAX_RATIO * new_policy().budget(signals, preferences).sigmoid()
    assert torch.allclose(ratios, MAX_RATIO * weights, atol=1e-5)


def test_every_logit_is_a_ratio():
    """Also those that no training gives, and a file may."""
    ratios = [ratio_of(logit) for logit in (-torch.inf, -1e30, -1.0, 0.0, 1.0, 1e30, torch.inf)]
    assert (
        ratios == sorted(ratios)
        and 0 <= ratios[0] < 1e-30
        and ratios[3] == MAX_RATIO / 2
        and ratios[-1] == MAX_RATIO
    )


def test_whoever_wants_more_compression_gets_more(signals):
    """Whatever the head learned: here, nothing but noise."""
    policy, generator = new_policy(), torch.Generator().manual_seed(0)
    weights = torch.linspace(0, 0.99, 200)
    for leaning in (0.0, 0.25, 1.0):
        tasks = (1 - weights)[:, None] * torch.tensor([1 - leaning, leaning])
        preferences = torch.cat([tasks, weights[:, None]], 1)
        before = policy.budget(signals, preferences)
        with torch.no_grad():
            policy.budget_head.weight.normal_(std=0.3, generator=generator)
            policy.budget_head.bias.normal_(generator=generator)
        after = policy.budget(signals, preferences)
        inside = (weights > MIN_COMPRESSION_WEIGHT) & (weights < 1 - MIN_COMPRESSION_WEIGHT)
        assert (after - before).std() > 0.3
        assert (after.diff() > -1e-4).all() and (after[inside].diff() > 0).all()


def test_logits_cannot_drift_together(signals):
    """No plan changes when all logits move by the same, so nothing but the policy itself can hold
    them.
    """
    policy, preferences, ratios = (
        new_policy(),
        draw_preferences(5, torch.Generator().manual_seed(0)),
        torch.full((5,), 0.3),
    )
    prior = policy.allocation(signals, preferences, ratios)
    with torch.no_grad():
        policy.allocation_head.weight.normal_(std=30.0)
        policy.allocation_head.bias.fill_(1e4)
    logits = policy.allocation(signals, preferences, ratios)
    assert (logits - prior).abs().mean() > 1
    assert torch.allclose(logits.mean(1), prior.mean(1), atol=1e-2)


def test_who_wants_one_task_keeps_what_that_task_depends_on(signals):
    """Utility hangs on the first group alone, robustness on the second."""
    levels = torch.tensor(LEVELS)[: signals.sensitivity.shape[2]]
    sensitivity = torch.full_like(signals.sensitivity, 1e-3) * levels
    sensitivity[0, 0], sensitivity[1, 1] = levels, levels
    columns = {**signals.columns, "visual": torch.zeros_like(signals.visual)}
    apart = dataclasses.replace(signals, sensitivity=sensitivity, columns=columns)
    leans = torch.linspace(0, 1, 11)
    preferences = torch.stack([1 - leans, leans, torch.zeros(11)], 1)
    logits = new_policy().allocation(apart, preferences, torch.full((11,), 0.5))
    assert logits[0, 0] > logits[0, 1] + 3 and logits[-1, 1] > logits[-1, 0] + 3
    assert (logits[:, 0].diff() <= 1e-6).all() and (logits[:, 1].diff() >= -1e-6).all()


def test_a_policy_that_learns_leaves_from_the_soft_prior(signals):
    policy, preferences = new_policy(), torch.tensor([[0.5, 0.5, 0.0]]).expand(2, 3)
    sharp = policy.allocation(signals, preferences, torch.tensor([0.2, 0.5]))
    policy.start_learning()
    soft = policy.allocation(signals, preferences, torch.tensor([0.2, 0.5]))
    assert torch.equal(soft[0], soft[1]) and not torch.equal(sharp[0], sharp[1])
    loaded = new_policy()
    loaded.load_state_dict(policy.state_dict())
    assert torch.equal(loaded.allocation(signals, preferences, torch.tensor([0.2, 0.5])), soft)
