"""A tiny model, an evaluator of it, and settings of a fit of seconds."""

from models import batch

from hipp_ext import HiPPPlanner, Preference
from hipp_ext.answers import AnswerLogits
from hipp_ext.planner.settings import FitSettings

BATCHES = [batch("llava", size=3, labels=True), batch("llava", size=2, seed=1, labels=True)]
EVEN = Preference(1, 1, 1)
SETTINGS = FitSettings(
    steps=3, preferences=2, budgets=2, rollouts=2, updates=3, candidates=16, seed=3
)


class Closeness:
    """A real evaluator of a random model: how close answers stay to the dense ones, on two halves
    of the batches.
    """

    def __init__(self, model, batches=BATCHES):
        self.answers = AnswerLogits(model, batches)
        self.dense = self.answers(model).log_softmax(-1)
        self.calls = 0

    def __call__(self, model):
        self.calls += 1
        kl = (self.dense.exp() * (self.dense - self.answers(model).log_softmax(-1))).sum(-1)
        return {"utility": 1 - float(kl[:2].mean()), "robustness": 1 - float(kl[2:].mean())}


def fitted(model, signals, folder=None, settings=SETTINGS, evaluator=None, **options):
    """A planner after a fit without a progress bar."""
    planner = planner_with(signals, **options)
    evaluator = evaluator or Closeness(model)
    planner.fit(model, evaluator, settings, folder=folder, progress=False)
    return planner


def planner_with(signals, preference=EVEN, **options) -> HiPPPlanner:
    planner = HiPPPlanner(preference, **options)
    planner.signals = signals
    return planner
