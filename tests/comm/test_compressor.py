"""Laws of the compressor on simulated workers: conservation, equal ranks, residual, bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipp_ext.comm import Compressor, Options, run_together
from hipp_ext.comm.averaging import choose_transport
from hipp_ext.comm.saving import Counts, pack_state, parse_state, unpack_state
from hipp_ext.errors import CompressionError

SHAPES = {
    "conv": (13, 3, 3, 3),
    "dense": (37, 53),
    "bias": (53,),
    "scalar": (),
    "small": (2, 3),
    "nothing": (0, 4),
}


def workers(n: int, shapes=SHAPES, **options) -> list[Compressor]:
    return [Compressor(shapes, Options(**options), workers=n, position=i) for i in range(n)]


def random_gradients(shapes, generator) -> dict[str, torch.Tensor]:
    return {
        n: torch.randn(s, generator=generator) * 10.0 ** (i - 2)
        for i, (n, s) in enumerate(shapes.items())
    }


def step(compressors, gradients):
    return run_together([c.step(g) for c, g in zip(compressors, gradients, strict=True)])


@given(
    st.integers(1, 4),
    st.sampled_from(["all_gather", "all_to_all"]),
    st.sampled_from([4, 8]),
    st.integers(1, 5),
    st.integers(0, 9999),
)
@settings(max_examples=40, deadline=None)
def test_gradients_are_sent_or_remembered_and_all_ranks_agree_to_the_bit(
    n, transport, bits, rank, seed
):
    generator = torch.Generator().manual_seed(seed)
    group = workers(n, rank=rank, bits=bits, transport=transport, seed=seed)
    for _ in range(3):
        gradients = [random_gradients(SHAPES, generator) for _ in group]
        before = [{k: v.clone() for k, v in c.residual.items()} for c in group]
        means, _ = step(group, gradients)
        for name in group[0].shapes:
            assert all(torch.equal(m[name], means[0][name]) for m in means)  # 0.0, not nearly
            there = sum(
                g[name].flatten() + b[name].flatten()
                for g, b in zip(gradients, before, strict=True)
            ).double()
            sent = n * means[0][name].flatten().double()
            left = sum(c.residual[name].flatten().double() for c in group)
            size = sum(
                g[name].norm() + b[name].norm() for g, b in zip(gradients, before, strict=True)
            )
            assert (there - sent - left).norm() <= 1e-6 * size


def test_one_worker_sends_nothing_and_keeps_gradient_equal_to_sent_plus_residual():
    (alone,) = workers(1, rank=2, bits=4)
    gradients = random_gradients(SHAPES, torch.Generator().manual_seed(0))
    (mean,), sent = step([alone], [gradients])
    assert sent == 0 and mean.keys() == alone.shapes.keys()
    assert torch.allclose(mean["dense"] + alone.residual["dense"], gradients["dense"], atol=1e-6)
    assert torch.linalg.matrix_rank(mean["dense"]) == 2 and mean["dense"].norm() > 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("transport", ["all_gather", "all_to_all"])
def test_residual_stays_bounded_over_a_thousand_steps_of_workers_that_disagree(bits, transport):
    shapes = {"w": (24, 40), "b": (24,)}
    group = workers(2, shapes, rank=1, bits=bits, transport=transport)
    generator = torch.Generator().manual_seed(1)
    own = [
        random_gradients(shapes, generator) for _ in group
    ]  # never the same direction: the case in which torch's residual drifts
    norms = []
    for _ in range(1000):
        gradients = [
            {
                n: g[n] + 0.3 * g[n].std() * torch.randn(s, generator=generator)
                for n, s in shapes.items()
            }
            for g in own
        ]
        step(group, gradients)
        norms.append(
            max(
                float(c.residual["w"].norm() / g["w"].norm())
                for c, g in zip(group, own, strict=True)
            )
        )
    assert max(norms[500:]) < 1.5 * max(norms[50:150]) and max(norms) < 60


def test_the_sum_of_what_is_handed_out_approaches_the_sum_of_the_gradients():
    group = workers(2, rank=1, bits=4)
    gradients = [random_gradients(SHAPES, torch.Generator().manual_seed(i)) for i in range(2)]
    total = 0.0
    for _ in range(120):
        (mean, _), _ = step(group, gradients)
        total = total + mean["dense"]
    true = (gradients[0]["dense"] + gradients[1]["dense"]) / 2
    assert (
        (total / 120 - true).norm() / true.norm()
        < 0.2
        < (mean["dense"] - true).norm() / true.norm()
    )


def test_what_is_not_finite_on_one_worker_changes_nothing_anywhere():
    for transport in ("all_gather", "all_to_all"):
        group, twin = (
            workers(3, rank=2, transport=transport),
            workers(3, rank=2, transport=transport),
        )
        generator = torch.Generator().manual_seed(0)
        rounds = [[random_gradients(SHAPES, generator) for _ in group] for _ in range(2)]
        step(group, rounds[0]), step(twin, rounds[0])
        for name, bad in (
            ("bias", torch.nan),
            ("dense", torch.inf),
            ("dense", 3e38),
            ("scalar", -torch.inf),
        ):
            gradients = [
                {n: g.clone() for n, g in random_gradients(SHAPES, generator).items()}
                for _ in group
            ]
            gradients[1][name].fill_(bad)
            assert step(group, gradients)[0] == [None] * 3
        after, expected = step(group, rounds[1])[0], step(twin, rounds[1])[0]
        assert all(torch.equal(a[n], e[n]) for a, e in zip(after, expected, strict=True) for n in a)


def test_all_zero_gradients_hand_out_zero_and_keep_the_residual():
    group = workers(2, rank=2)
    generator = torch.Generator().manual_seed(0)
    zeros = {n: torch.zeros(s) for n, s in SHAPES.items()}
    assert all((m == 0).all() for m in step(group, [zeros, zeros])[0][0].values())
    step(group, [random_gradients(SHAPES, generator) for _ in group])
    residual = group[0].residual["dense"].clone()
    assert all((m == 0).all() for m in step(group, [zeros, zeros])[0][0].values())
    assert residual.any() and torch.equal(
        group[0].residual["dense"], residual
    )  # an unused parameter's turn comes later


@pytest.mark.parametrize(("bits", "least"), [(8, 3.9), (4, 7.5)])
def test_payload_against_powersgd_at_equal_rank(bits, least):
    from torchvision.models import resnet18

    shapes = {n: p.shape for n, p in resnet18().named_parameters()}
    compressor = Compressor(shapes, Options(rank=2, bits=bits), workers=2)
    powersgd = sum(4 * (n + m) * r for n, m, r in compressor.matrices.values()) + 4 * sum(
        compressor.vectors.values()
    )
    assert powersgd / compressor.message_bytes >= least
    assert (
        powersgd / 2 / compressor.message_bytes >= least / 2.05
    )  # the same with half-precision factors


def test_bytes_of_all_to_all_grow_like_a_ring_all_reduce_and_those_of_all_gather_with_the_workers():
    shapes = {"w": (512, 768), "b": (768,)}
    gradients = random_gradients(shapes, torch.Generator().manual_seed(0))
    sent = {}
    for transport in ("all_gather", "all_to_all"):
        for n in (3, 8):
            group = workers(n, shapes, rank=4, transport=transport)
            sent[transport, n] = step(group, [gradients] * n)[1]
            copies = n - 1 if transport == "all_gather" else 2 * (n - 1) / n
            assert sent[transport, n] == pytest.approx(copies * group[0].message_bytes, rel=0.09)
    ring = (2 * 7 / 8) / (2 * 2 / 3)
    assert sent["all_to_all", 8] / sent["all_to_all", 3] <= 1.1 * ring
    assert sent["all_gather", 8] / sent["all_gather", 3] == 3.5


def test_transport_is_chosen_by_workers_and_bytes():
    assert [choose_transport("auto", n, 10**6) for n in (1, 2, 3, 8)] == ["all_gather"] * 2 + [
        "all_to_all"
    ] * 2
    assert choose_transport("auto", 4, 10_000) == "all_gather"
    assert choose_transport("all_to_all", 2, 0) == "all_to_all"


def test_states_go_on_to_the_bit_and_say_what_they_drop():
    generator = torch.Generator().manual_seed(0)
    group, fresh = workers(2, rank=2), workers(2, rank=2)
    rounds = [[random_gradients(SHAPES, generator) for _ in group] for _ in range(3)]
    step(group, rounds[0]), step(group, rounds[1])
    states = [pack_state(c, Counts(steps=2)) for c in group]
    for c, s in zip(fresh, states, strict=True):
        assert unpack_state(c, parse_state(s)) == []
    a, b = step(group, rounds[2])[0], step(fresh, rounds[2])[0]
    assert all(torch.equal(a[0][n], b[0][n]) for n in a[0])
    more = workers(3, rank=2)
    (line,) = unpack_state(more[1], parse_state(states[1]))
    assert "saved with 2 workers and goes on with 3" in line and "is dropped" in line
    assert (
        torch.equal(more[1].factors["dense"], states[1]["factors"]["dense"])
        and not more[1].residual["dense"].any()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": 1}, "saved by rank 1, this is rank 0"),
        ({"format": 2}, "not a state of LQSGDState: format"),
        ({"counts": {"steps": -1}}, "counts.steps"),
        ({"surprise": 1}, "surprise"),
        ({"residual": None}, "'residual' must be a dict of tensors, got NoneType"),
        ({"residual": {}}, "saved residual belongs to other parameters"),
        (
            {"factors": {"dense": torch.zeros(5, 53)}},
            "saved factors belongs to other parameters or factors of another rank",
        ),
        ({"factors": {"dense": torch.full((2, 53), torch.nan)}}, r"not finite for \['dense'\]"),
    ],
)
def test_states_that_do_not_fit(change, message):
    shapes = {"dense": (37, 53)}
    group = workers(2, shapes, rank=2)
    state = pack_state(group[0], Counts()) | change
    with pytest.raises(CompressionError, match=message):
        unpack_state(group[0], parse_state(state))
    assert not group[0].residual["dense"].any()


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"w": torch.zeros(4, 5)}, "not those the compressor was made for.*w"),
        ({"v": torch.zeros(5, 4)}, "not those the compressor was made for"),
        ({"w": torch.zeros(5, 4).to_sparse()}, "gradient of w is torch.sparse_coo.*sparse=False"),
        (
            {"w": torch.zeros(5, 4, dtype=torch.complex64)},
            "gradient of w is .*complex64: dense real",
        ),
    ],
)
def test_gradients_that_do_not_fit(gradients, message):
    with pytest.raises(CompressionError, match=message):
        next(Compressor({"w": (5, 4)}, Options()).step(gradients))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0: a whole number of at least 1"),
        ({"bits": 12}, "bits=12"),
        ({"bits": 6}, "bits=6: a whole number \\(4 or 8\\) is needed"),
        ({"min_compression_rate": -1.0}, "min_compression_rate=-1.0: a finite number above 0"),
        ({"transport": "pigeon"}, "transport='pigeon': one of auto, all_gather, all_to_all"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(CompressionError, match=message):
        Options(**options)


def test_workers_in_different_steps_are_told_so():
    group = [
        Compressor({"w": (40, 40)}, Options(rank=r), workers=2, position=i)
        for i, r in enumerate((1, 2))
    ]
    with pytest.raises(CompressionError, match="different steps"):
        step(group, [{"w": torch.randn(40, 40)}] * 2)
