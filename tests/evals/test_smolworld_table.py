"""The table of the small world: its rates without a model, its cells on a tiny one."""

import random

import numpy as np
import pytest

from hipp_ext.evals.chair import ObjectWords, chair_scores, default_synonyms
from hipp_ext.evals.pope import SPLITS, pope_scores
from hipp_ext.evals.studies.smolworld.table.asked import Asked
from hipp_ext.evals.studies.smolworld.table.rates import Rates

NAMES = ("dog", "cat", "owl", "cup of coffee")


def some_asked(pictures: int = 40) -> Asked:
    rng = random.Random(0)
    pope, choice, captions = [], [], []
    for number in range(pictures):
        shown = tuple(rng.sample(NAMES, 2))
        captions.append((shown, f"picture {number}"))
        for _ in range(4):
            yes = rng.random() < 0.5
            kinds = ",".join(SPLITS) if yes else ",".join(rng.sample(SPLITS, rng.randint(1, 3)))
            pope.append(("Yes" if yes else "No", kinds, f"picture {number}"))
        relation = rng.choice(("class", "picture, name"))
        choice.append((rng.choice("ABCD"), relation, f"picture {number}"))
    return Asked(names=NAMES, pope=tuple(pope), choice=tuple(choice), captions=tuple(captions))


def some_values(asked: Asked, right: float, seed: int) -> dict:
    """Answers that are right with a probability, else random."""
    rng = random.Random(seed)
    said = [a[0] if rng.random() < right else rng.choice("YN") for a, _, _ in asked.pope]
    chosen = [a if rng.random() < right else rng.choice("ABCD") for a, _, _ in asked.choice]
    named = [
        [name if rng.random() < right else rng.choice(NAMES) for name in shown]
        for shown, _ in asked.captions
    ]
    return {
        "pope": "".join(said),
        "choice": "".join(chosen),
        "captions": [f"The image shows {' and '.join(own)}." if own else "" for own in named],
        "loss": [rng.random() for _ in named],
    }


# --------------------------------------------------------------------------------------- the rates


def test_rates_are_those_of_pope_and_chair():
    asked = some_asked()
    values = some_values(asked, 0.7, 1)
    found = Rates(asked).contrast([(1.0, values)])
    answers = [{"Y": "Yes", "N": "No"}[a] for a in values["pope"]]
    truth, kinds, pictures = zip(*asked.pope, strict=True)
    scores = pope_scores(answers, truth, kinds, pictures)["vlmeval"]
    for split, own in scores.items():
        named = {"accuracy": own.accuracy, "F1": own.f1, "yes": own.yes_rate}
        for rate, value in named.items():
            assert found[f"POPE {rate} {split}"].value == pytest.approx(value)
        assert found[f"POPE F1 {split}"].se == pytest.approx(own.f1_se, rel=1e-6)
    words = ObjectWords(default_synonyms(NAMES))
    objects, pictures = zip(*asked.captions, strict=True)
    chair = chair_scores(values["captions"], objects, pictures, words)
    for name, value in (("CHAIR_i", chair.chair_i), ("recall", chair.recall)):
        assert found[name].value == pytest.approx(value)
    assert found["CHAIR_i"].se == pytest.approx(chair.chair_i_se, rel=1e-6)
    assert found["loss"].value == pytest.approx(np.mean(values["loss"]))
    hits = np.array(list(values["choice"])) == [a for a, _, _ in asked.choice]
    assert found["choice"].value == pytest.approx(100 * hits.mean())
