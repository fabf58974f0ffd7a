"""Networks of many kinds: what is removed is what was masked, and counts are exact.

What cannot be done changes nothing.
"""

import copy

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn import functional as F

from hipp_ext.errors import PlanError, UnsupportedModelError
from hipp_ext.integrations.torch_pruning import (
    HippImportance,
    channel_mrs,
    channel_taylor,
    find_channel_groups,
    prune_channels,
)
from hipp_ext.robust.costs import channel_costs
from hipp_ext.robust.scoring import rank_channels
from hipp_ext.scorers.gates import gated

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
SHAPE = (1, 3, 12, 12)


class Net(nn.Module):
    """Layers by name, and what to do with them."""

    def __init__(self, run, **layers: nn.Module):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.run(self, *inputs)


class Standardised(nn.Conv2d):
    """Weights of mean zero, each channel scaled by a parameter of its own."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        return F.conv2d(
            x, (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * self.gain, self.bias
        )


def conv(*arguments, **options) -> nn.Module:
    return nn.Conv2d(*arguments, **options)


def stack(*middle: nn.Module, channels: int = 8) -> nn.Module:
    """A convolution of 8 channels, `middle`, which has `channels`, another one and a classifier."""
    tail = (
        nn.ReLU(),
        conv(channels, 6, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    return nn.Sequential(conv(3, 8, 3, padding=1), *middle, *tail)


def unet() -> nn.Module:
    def run(net, x):
        fine = F.relu(net.fine(x))
        return net.head(
            F.relu(net.out(torch.cat([fine, F.relu(net.up(F.relu(net.coarse(fine))))], 1)))
        )

    return Net(
        run,
        fine=conv(3, 8, 3, padding=1),
        coarse=conv(8, 12, 2, 2),
        up=nn.ConvTranspose2d(12, 10, 2, 2),
        out=conv(18, 6, 1),
        head=conv(6, 4, 1),
    )


def generator() -> nn.Module:
    """A linear layer whose outputs become the channels of a transposed convolution, four each."""

    def run(net, x):
        return net.head(
            F.relu(net.up(F.relu(net.start(x)).view(-1, net.up.in_channels, 2, 2))).flatten(1)
        )

    return Net(
        run, start=nn.Linear(8, 32), up=nn.ConvTranspose2d(8, 6, 2, 2), head=nn.Linear(96, 4)
    )


def split_and_joined() -> nn.Module:
    """One part of a split is concatenated, the other added behind."""

    def run(net, x):
        y, z = net.b(F.relu(net.a(x))), net.side(x)
        first = net.out.in_channels - net.side.out_channels
        one, two = y.split([first, y.shape[1] - first], 1)
        return net.head((net.out(torch.cat([one, z], 1)) + two).mean((2, 3)))

    return Net(
        run,
        a=conv(3, 8, 1),
        b=conv(8, 10, 1),
        side=conv(3, 4, 1),
        out=conv(9, 5, 1),
        head=nn.Linear(5, 4),
    )


def cascade() -> nn.Module:
    def run(net, x):
        joined = torch.cat([torch.cat([net.a(x), net.b(x)], 1), net.c(x)], 1)
        return net.head(net.norm(joined))

    return Net(
        run,
        a=conv(3, 4, 1),
        b=conv(3, 8, 1),
        c=conv(3, 12, 1),
        norm=nn.BatchNorm2d(24),
        head=conv(24, 5, 1),
    )


def along_rows() -> nn.Module:
    """Maps joined along their height: channels stay what they are."""

    def run(net, x):
        return net.head(F.relu(net.out(F.relu(torch.cat([net.a(x), net.b(x)], 2)))).mean((2, 3)))

    return Net(run, a=conv(3, 8, 1), b=conv(3, 8, 1), out=conv(8, 6, 1), head=nn.Linear(6, 4))


def shuffled(net, x):
    y = F.relu(net.a(x)).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
    return net.head(F.relu(net.b(y)).mean((2, 3)))


def attention(net, x):
    y = net.patch(x).flatten(2).transpose(1, 2)
    y = y + net.attention(y, y, y, need_weights=False)[0]
    return net.head(F.relu(net.hidden(y)).mean(1))


def dense_net() -> nn.Module:
    return torchvision.models.DenseNet(
        growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=4
    )


def conv_next() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=4)


SAME = {  # removed is masked
    "unet": (unet, SHAPE),
    "transposed, depthwise": (lambda: stack(nn.ConvTranspose2d(8, 8, 3, groups=8)), SHAPE),
    "transposed, one output": (
        lambda: stack(nn.ReLU(), nn.ConvTranspose2d(8, 1, 3), channels=1),
        SHAPE,
    ),
    "transposed, 1-d": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 1),
            nn.ReLU(),
            nn.ConvTranspose1d(8, 6, 3),
            nn.ReLU(),
            nn.Conv1d(6, 4, 1),
        ),
        (1, 3, 9),
    ),
    "generator": (generator, (1, 8)),
    "densenet": (dense_net, (1, 3, 32, 32)),
    "instance norm": (lambda: stack(nn.InstanceNorm2d(8, affine=True)), SHAPE),
    "prelu": (lambda: stack(nn.PReLU(8), nn.Dropout(), nn.PReLU()), SHAPE),
    "scale": (
        lambda: Net(
            lambda n, x: n.b(F.relu(n.a(x) * n.scale)),
            a=conv(3, 8, 1),
            b=conv(8, 4, 1),
            scale=nn.Parameter(torch.rand(8, 1, 1)),
        ),
        SHAPE,
    ),
    "split and joined": (split_and_joined, SHAPE),
    "cascade": (cascade, SHAPE),
    "along rows": (along_rows, SHAPE),
    "depthwise": (lambda: stack(conv(8, 8, 3, groups=8), nn.BatchNorm2d(8)), SHAPE),
}
MIXED = {  # norms and attention see all channels, so that masking is something else
    "group norm": (lambda: stack(nn.GroupNorm(2, 8)), SHAPE),
    "convnext": (conv_next, (1, 3, 32, 32)),
    "attention": (
        lambda: Net(
            attention,
            patch=conv(3, 16, 4, 4),
            attention=nn.MultiheadAttention(16, 2, batch_first=True),
            hidden=nn.Linear(16, 20),
            head=nn.Linear(20, 4),
        ),
        SHAPE,
    ),
}


def built(make) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, 0.2, 1)
    return model


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def held(model: nn.Module) -> tuple:
    """All that a model holds: tensors by identity and value, plain attributes, hooks."""
    tensors = {n: (t, t.clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    plain = {
        (n, k): v
        for n, m in model.named_modules()
        for k, v in vars(m).items()
        if isinstance(v, int | tuple | str)
    }
    return (
        tensors,
        plain,
        [len(m._forward_hooks) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )


def assert_untouched(model: nn.Module, before: tuple) -> None:
    now = held(model)
    assert now[1:] == before[1:] and list(now[0]) == list(before[0])
    for name, (tensor, value) in before[0].items():
        assert now[0][name][0] is tensor and torch.equal(tensor, value), name


@pytest.mark.parametrize("name", [*SAME, *MIXED])
def test_what_is_removed_is_what_was_masked_and_counted(name):
    make, shape = (SAME | MIXED)[name]
    model, x = built(make), torch.rand(shape)
    before = held(model)
    groups = find_channel_groups(model, x)
    assert_untouched(model, before)
    split = (
        name == "split and joined"
    )  # its units are read by different layers: they are removed, not counted
    if not split:
        _, count = channel_costs(model, x, groups)
        assert count([g.width for g in groups]) == size(model)
    kept = {g.name: tuple(range(0, g.width, 2)) for g in groups}
    masks = [torch.tensor([float(u in kept[g.name]) for u in range(g.width)]) for g in groups]
    with torch.no_grad(), gated(model, groups, masks):
        expected = model(x)
    prune_channels(model, x, kept)
    with torch.no_grad():
        got = model(x)
    assert got.shape == expected.shape and (
        name in MIXED or torch.allclose(got, expected, atol=1e-5)
    )
    if not split:
        assert (
            count([len(kept[g.name]) for g in groups])
            == size(model)
            < sum(t.numel() for t, _ in before[0].values())
        )


def test_macs_of_a_transposed_convolution():
    model, x = (
        nn.Sequential(conv(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 4, 1)),
        torch.rand(1, 3, 5, 5),
    )
    macs, _ = channel_costs(model, x, find_channel_groups(model, x))
    assert macs([8, 6]) == 25 * 3 * 8 + 25 * 4 * 8 * 6 + 100 * 6 * 4


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_norms_of_a_transposed_convolution_are_those_of_its_outputs(groups):
    model, x = (
        nn.Sequential(conv(3, 8, 1), nn.ConvTranspose2d(8, 8, 3, groups=groups), conv(8, 4, 1)),
        torch.rand(1, 3, 4, 4),
    )
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[1].weight.fill_(1)
        # The weight that leads to output channel 5: of 8 // groups channels in its group.
        model[1].weight[5 // (8 // groups) * (8 // groups), 5 % (8 // groups)] = 100
        model[1].bias.zero_()
        assert int(model[1](torch.ones(1, 8, 1, 1)).sum((0, 2, 3)).argmax()) == 5
    group = next(g for g in find_channel_groups(model, x) if "1" in g.producers)
    (scores,) = rank_channels(model, [group], [], "l1")
    assert scores.argmax() == 5 and len(scores[scores < scores[5]].unique()) == 1


GROUPED = stack(nn.ReLU(), conv(8, 16, 3, groups=4), channels=16)
REFUSED = {
    "inputs of a grouped convolution": (
        lambda: copy.deepcopy(GROUPED),
        {"0": (0, 1, 2, 4, 6)},
        PlanError,
        "2 has 4 groups of 2 input channels; the same ones must stay in each",
    ),
    "outputs of a grouped convolution": (
        lambda: copy.deepcopy(GROUPED),
        {"2": tuple(range(8))},
        PlanError,
        "2 has 4 groups of 4 output channels; as many must stay in each",
    ),
    "one group of a group norm": (
        lambda: stack(nn.GroupNorm(2, 8)),
        {"0": (0, 1, 2, 3)},
        PlanError,
        r"1 is a group norm of 2 groups of 4 channels; as many must stay in each, "
        r"not \[0, 1, 2, 3\]",
    ),
    "a group norm of single channels": (
        lambda: stack(nn.GroupNorm(8, 8)),
        {"0": (0, 1)},
        PlanError,
        "1 is a group norm of 8 groups of 1 channels",
    ),
    "a grouped transposed convolution": (
        lambda: stack(nn.ConvTranspose2d(8, 8, 3, groups=4)),
        {"0": (0, 2, 4, 6)},
        UnsupportedModelError,
        "1 is a transposed convolution with 4 groups",
    ),
    "two outputs for each input": (
        lambda: stack(conv(8, 16, 3, groups=8), channels=16),
        {"0": (0, 1)},
        UnsupportedModelError,
        "1 has 8 input and 16 output channels in 8 groups",
    ),
    "a standardised convolution": (
        lambda: nn.Sequential(Standardised(3, 8, 3), conv(8, 4, 1)),
        {"0": (0, 1)},
        UnsupportedModelError,
        "cannot be removed: torch-pruning leaves 0.gain as it is",
    ),
    "statistics of an instance norm": (
        lambda: stack(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        {"0": (0, 1)},
        UnsupportedModelError,
        "torch-pruning leaves 1.running_mean as it is",
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv(3, 8, 1)), conv(8, 4, 1)),
        {"0": (0, 1)},
        UnsupportedModelError,
        "the weight of 0 is computed from other tensors",
    ),
    "heads of attention": (
        MIXED["attention"][0],
        {"patch": tuple(range(7))},
        UnsupportedModelError,
        "ran before its channels were removed",
    ),
    "a parameter for each pixel": (
        lambda: Net(
            lambda n, x: n.b(n.a(x) + n.place),
            a=conv(3, 8, 1),
            b=conv(8, 4, 1),
            place=nn.Parameter(torch.rand(8, 12, 12)),
        ),
        {"a": (0, 1)},
        UnsupportedModelError,
        "model is as it was",
    ),
    "a weight in two layers": (
        lambda: tied(),
        {"a": (0, 1)},
        UnsupportedModelError,
        r"b shares a parameter with \['c'\]",
    ),
}


def tied() -> nn.Module:
    model = Net(
        lambda n, x: n.d(n.b(n.a(x)) + n.c(n.a(x))),
        a=conv(3, 8, 1),
        b=conv(8, 6, 1),
        c=conv(8, 6, 1),
        d=conv(6, 4, 1),
    )
    model.c.weight = model.b.weight
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_removed_is_refused_and_the_model_untouched(name):
    make, kept, error, message = REFUSED[name]
    model, x = make().eval(), torch.rand(SHAPE)
    next(model.parameters()).requires_grad_(False)
    before = held(model)
    with pytest.raises(error, match=message):
        prune_channels(model, x, kept)
    assert_untouched(model, before)


def test_grouped_convolutions_that_stay_even_are_pruned():
    model, x = copy.deepcopy(GROUPED).eval(), torch.rand(SHAPE)
    groups = find_channel_groups(model, x)
    kept = {"0": (1, 3, 5, 7), "2": (0, 1, 6, 7, 8, 11, 13, 14), "4": tuple(range(6))}
    masks = [torch.tensor([float(u in kept[g.name]) for u in range(g.width)]) for g in groups]
    with torch.no_grad(), gated(model, groups, masks):
        expected = model(x)
    prune_channels(model, x, kept)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-6)


def test_obstacles_stop_counts_and_scores_but_not_the_other_channels():
    model, x = REFUSED["a standardised convolution"][0](), torch.rand(SHAPE)
    wide = nn.Sequential(model[0], nn.ReLU(), model[1], nn.ReLU(), conv(4, 5, 1)).eval()
    groups = find_channel_groups(wide, x)
    for work in (
        lambda: channel_costs(wide, x, groups),
        lambda: channel_mrs(wide, [x], lambda m, b: m(b).square().mean(), groups),
    ):
        with pytest.raises(
            UnsupportedModelError,
            match="The channels of 0 cannot be removed: .*0.gain.* List 0 in ignored",
        ):
            work()
    prune_channels(wide, x, {"2": (0, 3)})
    assert wide[2].out_channels == 2 and wide(x).shape == (1, 5, 10, 10)


REARRANGED = {
    "pixel shuffle": (
        lambda: nn.Sequential(conv(3, 16, 1), nn.PixelShuffle(2), conv(4, 6, 1), conv(6, 3, 1)),
        "torch-pruning counts 16 channels of 0 where 2 has 4",
    ),
    "pixel unshuffle": (
        lambda: nn.Sequential(conv(3, 4, 1), nn.PixelUnshuffle(2), conv(16, 6, 1), conv(6, 3, 1)),
        "The channels of 0 are read by 2 in another order",
    ),
    "channel shuffle": (
        lambda: Net(shuffled, a=conv(3, 8, 1), b=conv(8, 6, 1), head=nn.Linear(6, 4)),
        "The channels of a are read by b in another order than torch-pruning takes them to be.* "
        "List a in ignored",
    ),
    "recurrent": (
        lambda: Net(
            lambda n, x: n.head(n.cell(n.a(x)[..., :3, 0].transpose(1, 2))[0].mean(1)),
            a=conv(3, 8, 1),
            cell=nn.GRU(8, 6, batch_first=True),
            head=nn.Linear(6, 4),
        ),
        "torch-pruning cannot group the channels of this Net",
    ),
}


@pytest.mark.parametrize("name", REARRANGED)
def test_channels_that_cannot_be_followed_are_named(name):
    make, message = REARRANGED[name]
    model, x = make().eval(), torch.rand(SHAPE)
    before = held(model)
    with pytest.raises(UnsupportedModelError, match=message):
        find_channel_groups(model, x)
    assert_untouched(model, before)


def test_a_forward_that_fails_leaves_no_hooks_behind():
    model = nn.Sequential(conv(3, 8, 1), conv(8, 4, 1))
    before = held(model)
    with pytest.raises(
        UnsupportedModelError, match="torch-pruning cannot trace this Sequential: RuntimeError"
    ):
        find_channel_groups(model, torch.rand(1, 5, 4, 4))
    assert_untouched(model, before)


# In torch-pruning's own pruners


def importance(kind: str, model: nn.Module, x: torch.Tensor) -> HippImportance:
    def loss(m, batch):
        return m(batch).square().mean()

    if kind == "taylor":
        return HippImportance(channel_taylor(model, [x], loss))
    return HippImportance(
        channel_mrs(model, [x], loss, find_channel_groups(model, x, outputs=True))
    )


@pytest.mark.parametrize("kind", ["taylor", "mrs"])
@pytest.mark.parametrize("name", ["cascade", "along rows", "split and joined", "unet", "generator"])
def test_the_stock_pruner_takes_our_scores_of_outputs_too(name, kind):
    make, shape = SAME[name]
    model, x = built(make), torch.rand(shape)
    before = size(model)
    options = dict(
        pruning_ratio=0.5, iterative_steps=2, in_channel_groups={}, out_channel_groups={}
    )
    pruner = tp.pruner.BasePruner(model, x, importance=importance(kind, model, x), **options)
    for _ in range(2):
        pruner.importance = importance(kind, model, x)
        pruner.step()
    assert size(model) < 0.7 * before and torch.isfinite(model(x)).all()


def test_outputs_without_scores_are_named_with_what_to_do():
    model, x = built(cascade), torch.rand(SHAPE)
    scores = channel_mrs(
        model, [x], lambda m, b: m(b).square().mean(), find_channel_groups(model, x)
    )
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=HippImportance(scores),
        pruning_ratio=0.5,
        in_channel_groups={},
        out_channel_groups={},
    )
    with pytest.raises(
        UnsupportedModelError,
        match=r"5 of 5 channels have no scores in the group of \['head.*outputs=True",
    ):
        pruner.step()


def test_scores_of_outputs_close_what_is_made():
    model, x = built(cascade), torch.rand(SHAPE)
    groups = find_channel_groups(model, x, outputs=True)
    head = next(g for g in groups if g.name == "head")
    assert not head.consumers and len(groups) == len(find_channel_groups(model, x)) + 1
    mask = torch.tensor([1.0, 0, 1, 0, 1])
    with torch.no_grad(), gated(model, [head], [mask]):
        assert torch.equal(model(x)[:, 1], torch.zeros(1, 12, 12)) and bool(model(x)[:, 0].any())
    with pytest.raises(PlanError, match="'head' is not a channel group"):
        prune_channels(model, x, {"head": (0, 1)})


@pytest.mark.parametrize(
    "pruner", [tp.pruner.GroupNormPruner, tp.pruner.BNScalePruner, tp.pruner.GrowingRegPruner]
)
def test_pruners_that_regularise_take_our_scores(pruner):
    model, x = built(dense_net), torch.rand(2, 3, 32, 32)
    scales = {
        n: m.weight.detach().abs()
        for n, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d)
    }
    convs = channel_taylor(model, [x], lambda m, b: m(b).square().mean())
    options = dict(
        global_pruning=True, pruning_ratio=0.3, in_channel_groups={}, out_channel_groups={}
    )
    for scores in (convs, convs | scales):
        small = copy.deepcopy(model)
        host = pruner(
            small,
            x,
            importance=HippImportance(scores),
            ignored_layers=[small.classifier],
            **options,
        )
        small(x).square().mean().backward()
        host.update_regularizer()
        host.regularize(small)
        host.step()
        assert size(small) < size(model) and small(x).shape == (2, 4)


def test_scores_may_be_those_of_batch_norms():
    """A norm over joined features speaks for the channels of every convolution that enters it."""
    model, x = built(cascade), torch.rand(SHAPE)
    dense, scores = copy.deepcopy(model), torch.randperm(24).float()
    tp.pruner.BasePruner(
        model,
        x,
        importance=HippImportance({"norm": scores}),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    kept = [sorted(part.topk(len(part) // 2).indices.tolist()) for part in scores.split([4, 8, 12])]
    assert torch.equal(model.b.weight, dense.b.weight[kept[1]])
    assert torch.equal(
        model.norm.weight,
        dense.norm.weight[kept[0] + [4 + i for i in kept[1]] + [12 + i for i in kept[2]]],
    )
