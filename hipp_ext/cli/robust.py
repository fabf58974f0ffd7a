"""`hipp robust`: train, score, prune, fine-tune and evaluate image classifiers under attack."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.cli import output
from hipp_ext.cli.console import Device, Overwrite
from hipp_ext.errors import AttackError, BudgetError
from hipp_ext.files import require_new

robust_app = typer.Typer(
    no_args_is_help=True,
    help="Prune image classifiers so that they stay robust to adversarial attacks.",
)

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A folder that `hipp robust` wrote.")
]
Data = Annotated[
    str, typer.Option("--data", help="digits, svhn, cifar10, cifar100 or tiny-imagenet.")
]
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Folder with the set's published files; digits needs none."),
]
Epsilon = Annotated[
    str, typer.Option("--epsilon", help="L-inf radius for images in [0, 1], such as 8/255 or 0.1.")
]
Loss = Annotated[str, typer.Option("--loss", help="Adversarial loss: pgd-at, trades or mart.")]
Awp = Annotated[
    bool,
    typer.Option("--awp", help="Adversarial weight perturbation: gradients at perturbed weights."),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Gradient steps of the loss's attack.")]
Epochs = Annotated[int, typer.Option("--epochs", min=0, help="Epochs of training.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Images per batch.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Largest learning rate of the cycle.")]
Form = Annotated[str, typer.Option("--form", help="Form of MRS: removal, worst or grad.")]
Ranking = Annotated[
    str,
    typer.Option(
        "--ranking",
        help="Ranking of the channels of a group: bn, taylor, l1, or auto (bn if possible).",
    ),
]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Number of training images to score.")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the model.")]


@robust_app.command("train")
def robust_train(
    out: Out,
    network: Annotated[
        str,
        typer.Option(help="resnet18, resnet34, vgg16_bn, mobilevit_s, small-resnet or small-vgg."),
    ],
    data: Data = "digits",
    root: Root = None,
    epsilon: Epsilon = "8/255",
    loss: Loss = "pgd-at",
    awp: Awp = False,
    steps: Steps = 10,
    epochs: Epochs = 30,
    batch_size: Batch = 128,
    lr: LearningRate = 0.1,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a network from scratch, adversarially. If interrupted, run the same command to resume.

    Example: `hipp robust train --network small-resnet --data digits --epsilon 0.1 --out dense`
    """
    import torch

    from hipp_ext.robust.checkpoint import ClassifierFile
    from hipp_ext.robust.image_sets import load_data
    from hipp_ext.robust.models import build_model
    from hipp_ext.robust.training import TrainSettings
    from hipp_ext.surgery.checkpoint import resolve_device

    require_new(out, overwrite)
    images, objective = load_data(data, root, seed=seed), _loss(loss, awp, epsilon, steps)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(network, len(images.classes), images.shape).to(resolve_device(device))
    settings = TrainSettings(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    config = ClassifierFile(
        network=network, classes=images.classes, shape=images.shape, data=data, split=seed
    )
    _train(model, images, objective, settings, config, out, overwrite)
    running = _running(out)
    output.say(f"{out}: {network} on {data}, {epochs} epochs; checkpoints are kept in {running}")


@robust_app.command("score")
def robust_score(
    model: ModelArgument,
    root: Root = None,
    epsilon: Epsilon = "8/255",
    form: Form = "removal",
    ranking: Ranking = "auto",
    rows: Rows = 512,
    clean: Annotated[bool, typer.Option("--clean", help="Score clean images, to compare.")] = False,
    seed: Seed = 0,
    device: Device = None,
    as_json: output.Json = False,
) -> None:
    """Show how far the loss under attack rises for every group of channels (MRS).

    Example: `hipp robust score dense --epsilon 0.1`
    """
    from rich.console import Console
    from rich.table import Table

    from hipp_ext.integrations.torch_pruning import find_channel_groups
    from hipp_ext.robust.models import fixed_layers
    from hipp_ext.robust.scoring import score

    network, config, images = _load(model, root, device)
    settings = _scores(form, ranking, epsilon, rows, seed, clean)
    example = images.train.rows(slice(0, 1))[0].to(next(network.parameters()).device)
    groups = find_channel_groups(network, example, ignored=fixed_layers(network))
    found = score(network, images.train, groups, settings)
    if as_json:
        values = {g.name: s for g, s in zip(groups, found.sensitivity, strict=True)}
        output.print_json(
            {"form": form, "clean": clean, "epsilon": _number(epsilon), "sensitivity": values}
        )
        return
    table = Table("group", "channels", f"MRS {form}{' (clean)' * clean} [nats]")
    for group, value in zip(groups, found.sensitivity, strict=True):
        table.add_row(group.name, str(group.width), f"{value:.4f}")
    Console(markup=False).print(table)


@robust_app.command("prune")
def robust_prune(
    model: ModelArgument,
    out: Out,
    pruning_ratio: Annotated[
        float | None,
        typer.Option(
            help="Fraction of channels to remove; the budget is the cost of the uniform plan."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Instead: fraction of the cost that may stay.")
    ] = None,
    cost: Annotated[str, typer.Option(help="What the budget counts: macs or parameters.")] = "macs",
    root: Root = None,
    epsilon: Epsilon = "8/255",
    form: Form = "removal",
    ranking: Ranking = "auto",
    rows: Rows = 512,
    alpha: Annotated[
        float,
        typer.Option(min=0, help="How closely the allocation follows the sensitivity; 0: uniform."),
    ] = 0.25,
    min_keep: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Least fraction of a group's channels to keep; default: 0.125, or less.",
        ),
    ] = None,
    loss: Loss = "trades",
    awp: Awp = False,
    steps: Steps = 10,
    epochs: Epochs = 0,
    batch_size: Batch = 128,
    lr: LearningRate = 0.05,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Score, allocate, prune, and measure batch norms again; with --epochs also fine-tune.

    If interrupted, run the same command to resume.

    Examples:

    `hipp robust prune dense --pruning-ratio 0.75 --epsilon 0.1 --epochs 15 --out pruned`

    `hipp robust prune dense --budget 0.25 --cost parameters --epsilon 0.1 --out quarter`
    """
    from hipp_ext.budget import Bounds
    from hipp_ext.robust.checkpoint import save_classifier
    from hipp_ext.robust.pipeline import MRPFSettings, mrpf
    from hipp_ext.robust.training import TrainSettings

    require_new(out, overwrite)
    if (pruning_ratio is None) == (budget is None):
        raise BudgetError("Give either --pruning-ratio or --budget.")
    chosen: Any = {"cost": cost, "budget": budget} | (
        {} if pruning_ratio is None else {"pruning_ratio": pruning_ratio}
    )
    settings = MRPFSettings(
        **chosen,
        scores=_scores(form, ranking, epsilon, rows, seed, False),
        alpha=alpha,
        bounds=None if min_keep is None else Bounds(min_keep=min_keep),
        train=TrainSettings(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed),
    )
    network, config, images = _load(model, root, device)
    with _progress(epochs) as on_epoch:
        result = mrpf(
            network,
            images,
            settings,
            loss=_loss(loss, awp, epsilon, steps),
            folder=_running(out),
            on_epoch=on_epoch,
        )
    before = config.kept or {}
    kept = {
        name: tuple(before[name][c] for c in channels) if name in before else channels
        for name, channels in result.kept.items()
    }
    save_classifier(
        result.model, config.model_copy(update={"kept": kept}), out, overwrite=overwrite
    )
    output.say(
        f"{out}: {100 * result.macs:.1f}% of the MACs and {100 * result.parameters:.1f}% of the "
        f"parameters of {model} stay; {100 * (1 - result.macs):.1f}% and "
        f"{100 * (1 - result.parameters):.1f}% are removed"
    )
    if pruning_ratio is not None:
        output.say(
            f"--pruning-ratio {pruning_ratio:g} counts channels. A layer costs its input times its "
            "output channels, so a larger fraction of the cost is removed than of the channels."
        )


@robust_app.command("finetune")
def robust_finetune(
    model: ModelArgument,
    out: Out,
    root: Root = None,
    epsilon: Epsilon = "8/255",
    loss: Loss = "trades",
    awp: Awp = False,
    steps: Steps = 10,
    epochs: Epochs = 15,
    batch_size: Batch = 128,
    lr: LearningRate = 0.05,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a model adversarially. If interrupted, run the same command to resume.

    Example: `hipp robust finetune pruned --epsilon 0.1 --epochs 15 --out tuned`
    """
    from hipp_ext.robust.training import TrainSettings

    require_new(out, overwrite)
    network, config, images = _load(model, root, device)
    settings = TrainSettings(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    _train(network, images, _loss(loss, awp, epsilon, steps), settings, config, out, overwrite)
    output.say(f"{out}: fine-tuned by {loss} for {epochs} epochs")


@robust_app.command("evaluate")
def robust_evaluate(
    model: ModelArgument,
    root: Root = None,
    epsilon: Epsilon = "8/255",
    attacks: Annotated[
        str,
        typer.Option(
            help="Attacks: pgd, apgd, apgd-ce, apgd-t, fab-t, square. The last four are AutoAttack."
        ),
    ] = "pgd,apgd-ce,apgd-t,fab-t,square",
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, help="Number of test images, the first ones; default: all."),
    ] = None,
    batch_size: Batch = 256,
    seed: Seed = 0,
    device: Device = None,
    as_json: output.Json = False,
) -> None:
    """Measure accuracy on the test images, clean and under attack, and look for gradient masking.

    Example: `hipp robust evaluate tuned --epsilon 0.1 --n 200 --json > robust.json`
    """
    from rich.console import Console
    from rich.table import Table

    from hipp_ext.files.untrusted import shown
    from hipp_ext.robust.evaluation import evaluate

    network, config, images = _load(model, root, device)
    test = images.test.first(n or len(images.test))
    found = evaluate(
        network,
        test,
        len(images.classes),
        epsilon=_number(epsilon),
        attacks=attacks.split(","),
        batch_size=batch_size,
        seed=seed,
        log=output.note,
    )
    if as_json:
        output.print_json(found.as_dict())
        return
    table = Table("", f"accuracy [%] of {found.n} images")
    table.add_row("clean", f"{found.clean:.1f}")
    for name, value in found.under.items():
        table.add_row(name, f"{value:.1f}")
    table.add_row("worst case", f"{found.worst:.1f} ± {found.worst_se:.1f}")
    for name, value in zip(images.classes, found.per_class, strict=True):
        table.add_row(
            shown(f"  class {name}, worst case"), "-" if value is None else f"{value:.1f}"
        )
    Console(markup=False).print(table)
    for sign in found.signs:
        output.warn(f"suspicious: {sign}. The model may be less robust than these figures.")


def _load(folder: Path, root: Path | None, device: str | None) -> tuple[Any, Any, Any]:
    """(model, its config, the image set that it was trained on, with the same split)."""
    from hipp_ext.robust.checkpoint import load_classifier
    from hipp_ext.robust.image_sets import load_data
    from hipp_ext.surgery.checkpoint import resolve_device

    model, config = load_classifier(folder)
    images = load_data(config.data, root, seed=config.split)
    if images.classes != config.classes or images.shape != config.shape:
        raise AttackError(
            f"{folder} was trained on images of other classes or another shape than {config.data} "
            f"in {root} has."
        )
    return model.to(resolve_device(device)), config, images


def _train(
    model: Any, images: Any, loss: Any, settings: Any, config: Any, out: Path, overwrite: bool
) -> None:
    """Train with a progress bar, and save."""
    from hipp_ext.robust.checkpoint import save_classifier
    from hipp_ext.robust.training import train

    with _progress(settings.epochs) as on_epoch:
        train(model, images, loss, settings, folder=_running(out), on_epoch=on_epoch)
    save_classifier(model, config, out, overwrite=overwrite)


def _scores(form: str, ranking: str, epsilon: str, rows: int, seed: int, clean: bool) -> Any:
    from hipp_ext.robust.scoring import ScoreSettings

    chosen: Any = {"form": form, "ranking": ranking}
    return ScoreSettings(
        **chosen, epsilon=_number(epsilon), rows=rows, seed=seed, attack_steps=0 if clean else 10
    )


def _loss(name: str, awp: bool, epsilon: str, steps: int) -> Any:
    from hipp_ext.robust.losses import AWP, MART, PGDAT, TRADES

    kinds: dict[str, Any] = {"pgd-at": PGDAT, "trades": TRADES, "mart": MART}
    if name not in kinds:
        raise AttackError(f"Known losses are {', '.join(kinds)}; got {name!r}.")
    loss = kinds[name](epsilon=_number(epsilon), steps=steps)
    return AWP(base=loss) if awp else loss


def _number(text: str) -> float:
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        raise AttackError(f"epsilon must be a number such as 8/255 or 0.1, got {text!r}.") from None


def _running(out: Path) -> Path:
    return out.with_name(out.name + ".run")


@contextlib.contextmanager
def _progress(epochs: int) -> Iterator[Any]:
    """A progress bar over epochs; yields the callback for each."""
    from hipp_ext.progress import progress_bar

    with progress_bar(output.shows_progress(), "epochs", max(epochs, 1)) as show:
        yield lambda done, loss: show(done, f"loss {loss:.3f}")
