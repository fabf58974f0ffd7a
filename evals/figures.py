"""Pictures for reports and README: the front, keep counts per layer, POPE by split. matplotlib, no global state."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hipp_ext.plan import PruningPlan
from hipp_ext.planner.reward import Reward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
SPLITS = ("random", "popular", "adversarial")


def front_figure(evaluated: Sequence[Reward], front: Sequence[Reward], chosen: Mapping[str, Reward]) -> "Figure":
    """Utility against robustness of every evaluated plan, coloured by what was removed; the front ringed, with
    standard errors where there are some; choices named.

    Args:
        evaluated: all plans of a fit.
        front: the non-dominated ones among them.
        chosen: name -> reward of the plans that were taken.
    """
    figure = _figure(6.4, 4.4)
    axes = figure.add_subplot()
    points = axes.scatter(
        [r.utility for r in evaluated], [r.robustness for r in evaluated], c=[100 * r.compression for r in evaluated],
        s=18, cmap="viridis", alpha=0.75, label="evaluated", linewidths=0,
    )  # fmt: skip
    axes.scatter([r.utility for r in front], [r.robustness for r in front], s=52, facecolors="none", edgecolors="#333",
                 linewidths=0.8, label="front")  # fmt: skip
    axes.errorbar([r.utility for r in front], [r.robustness for r in front], xerr=[r.utility_se for r in front],
                  yerr=[r.robustness_se for r in front], fmt="none", ecolor="#333", elinewidth=0.6, alpha=0.6)  # fmt: skip
    for colour, (name, reward) in zip(COLOURS, chosen.items(), strict=False):
        axes.scatter(reward.utility, reward.robustness, marker="*", s=190, color=colour, edgecolors="white", label=name)
    figure.colorbar(points, label="parameters removed [%]")
    axes.set_xlabel("utility (ScienceQA margin over guessing)")
    axes.set_ylabel("robustness (POPE margin over guessing)")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def keeps_figure(plans: Mapping[str, PruningPlan]) -> "Figure":
    """Share of units kept per layer, attention and FFN side by side, one row per plan; the counts stand in the cells."""
    kinds = ("attention", "ffn")
    figure = _figure(7.6, 0.9 + 0.75 * len(plans))
    for column, kind in enumerate(kinds):
        axes = figure.add_subplot(1, 2, column + 1)
        rows = [[g for g in plan.groups if g.kind == kind and g.tower == "language"] for plan in plans.values()]
        shares = [[g.keep / g.width for g in row] for row in rows]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for y, row in enumerate(rows):
            for x, g in enumerate(row if len(row) <= 16 else ()):
                axes.text(x, y, str(g.keep), ha="center", va="center", fontsize=8,
                          color="white" if g.keep / g.width > 0.6 else "#222")  # fmt: skip
        axes.set_title(f"{kind}, of {rows[0][0].width} {'KV groups' if kind == 'attention' else 'channels'}", fontsize=10)
        axes.set_xlabel("layer")
        axes.set_xticks(range(0, len(rows[0]), max(1, len(rows[0]) // 12)))
        axes.set_yticks(range(len(plans)), list(plans) if column == 0 else [""] * len(plans))
    figure.colorbar(image, ax=figure.axes, label="share kept", fraction=0.03)
    return figure


def pope_figure(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> "Figure":
    """POPE accuracy by split with standard errors, and the yes-rate; one colour per model.

    Args:
        scores: model name -> split -> fields of `POPEScores` (accuracy, accuracy_se, yes_rate, ...), in percent.
    """
    figure = _figure(7.6, 3.6)
    panels = (("accuracy", "accuracy [%]"), ("yes_rate", 'answers "yes" [%]'))
    for column, (metric, title) in enumerate(panels):
        axes = figure.add_subplot(1, 2, column + 1)
        width = 0.8 / max(len(scores), 1)
        for i, (colour, (name, splits)) in enumerate(zip(COLOURS, scores.items(), strict=False)):
            x = [s + (i - (len(scores) - 1) / 2) * width for s in range(len(SPLITS))]
            axes.bar(x, [splits[s][metric] for s in SPLITS], width, color=colour, label=name,
                     yerr=[splits[s][f"{metric}_se"] or 0 for s in SPLITS], capsize=2, error_kw={"lw": 0.8})  # fmt: skip
        axes.axhline(50, color="#666", lw=0.8, ls=":")
        axes.set_xticks(range(len(SPLITS)), SPLITS)
        axes.set_ylabel(title)
        axes.set_ylim(0, 105)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def png(figure: "Figure", dpi: int = 144) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")
