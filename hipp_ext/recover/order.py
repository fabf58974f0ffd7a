"""The order in which the rows of a file are taken: shuffled, rows of similar size together.

Everything follows from the numbers and sizes of the rows, the seed and the epoch, so that every
process knows what the others take, and a run can begin at any step.
"""

from collections.abc import Sequence

import numpy as np

WINDOW = 64  # groups among which rows of similar size are looked for


def epoch_groups(
    members: np.ndarray, sizes: np.ndarray, width: int, seed: int, epoch: int
) -> np.ndarray:
    """Groups of `width` members of similar size, in a random order.

    The members are shuffled, sorted by size within windows of WINDOW groups, cut into groups, and
    the groups are shuffled. What is left over is not taken in this epoch.

    Args:
        members: numbers.
        sizes: size of each member, at its place in `members`.
        width: members of a group; there are at least as many.
        seed: random seed, at least 0.
        epoch: number of the epoch, from 0.

    Returns:
        [groups, width].
    """
    random = np.random.default_rng([seed, epoch])
    places = random.permutation(len(members))[: len(members) // width * width]
    groups = [
        some[np.argsort(sizes[some], kind="stable")].reshape(-1, width)
        for some in np.split(places, range(WINDOW * width, len(places), WINDOW * width))
    ]
    return members[np.concatenate(groups)[random.permutation(len(places) // width)]]


def fill_bins(tokens: Sequence[int], length: int) -> list[int]:
    """Where bins begin: each holds members that follow each other and have at most `length` tokens.

    Args:
        tokens: tokens of each member; one that has more than `length` fills a bin.
        length: tokens of a bin.

    Returns:
        The first member of each bin.
    """
    begins, room = list[int](), 0
    for number, own in enumerate(tokens):
        if own > room:
            begins.append(number)
            room = length
        room -= min(own, room)
    return begins
