"""The parts of GRPO."""

import torch

from hipp_ext.planner.grpo import Learner, allocation_advantages, draw_preferences
from hipp_ext.planner.policy import new_policy


def test_advantages_ignore_what_is_constant_and_weigh_the_rest():
    rewards = torch.zeros(2, 1, 3, 3)
    rewards[..., 0] = torch.tensor([0.2, 0.4, 0.6])  # utility
    rewards[..., 1] = 0.5 + 1e-6 * torch.tensor(
        [1.0, -1.0, 0.0]
    )  # robustness: below the noise floor
    rewards[..., 2] = 0.3  # compression: fixed by the budget
    advantages = allocation_advantages(rewards, torch.tensor([[1.0, 0, 0], [0.0, 1, 0]]))
    # z-scores of utility, times its share in the preference, which is never all nor nothing;
    # robustness adds nothing.
    scores = torch.tensor([-1.2247, 0, 1.2247])
    assert torch.allclose(advantages[:, 0], scores * torch.tensor([[1.2], [0.2]]) / 1.4, atol=1e-3)


def test_preferences_cover_the_simplex():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_preferences(8, generator) for _ in range(100)])
    assert torch.allclose(drawn.sum(1), torch.ones(len(drawn))) and (drawn >= 0).all()
    assert (drawn.mean(0) - 1 / 3).abs().max() < 0.05 and (drawn.max(0).values > 0.9).all()


def test_what_is_common_to_a_rollouts_logits_teaches_nothing(signals):
    learned = []
    for shifted in (False, True):
        learner = Learner(new_policy(), signals, 1e-2)
        generator = torch.Generator().manual_seed(1)
        rollouts = learner.draw(
            draw_preferences(4, generator),
            2,
            6,
            noise=0.5,
            budget_noise=0.5,
            ratio=0.3,
            limit=0.6,
            generator=generator,
        )
        objectives = torch.rand(4, 2, 6, 3, generator=generator)
        if shifted:
            rollouts.allocations.add_(20 * torch.randn(4, 2, 6, 1, generator=generator))
        learner.learn(rollouts, objectives)
        learned.append(learner.policy.allocation_head.weight.detach().clone())
    assert learned[0].abs().max() > 1e-3
    assert torch.allclose(*learned, rtol=1e-2, atol=1e-5)


def test_logits_that_no_plan_depends_on_come_back(signals):
    """Logits so far apart that rollouts differ by noise alone: nothing is learned there, and
    nothing but the KL holds them.
    """
    learner, generator = (Learner(new_policy(), signals, 3e-3), torch.Generator().manual_seed(2))
    preferences, ratios = draw_preferences(4, generator), torch.full((4, 1), 0.3)
    prior = learner.allocation_means(preferences, ratios)

    def apart() -> float:
        return (learner.allocation_means(preferences, ratios) - prior).abs().mean().item()

    with torch.no_grad():
        learner.policy.allocation_head.weight.normal_(std=3.0, generator=generator)
    before = apart()
    for _ in range(200):
        rollouts = learner.draw(
            preferences,
            1,
            6,
            noise=0.3,
            budget_noise=0.5,
            ratio=0.3,
            limit=0.6,
            generator=generator,
        )
        learner.learn(rollouts, torch.rand(4, 1, 6, 3, generator=generator))
    assert before > 3 and apart() < before
