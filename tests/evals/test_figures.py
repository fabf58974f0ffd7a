"""Figures of reports: one SVG element each, in the colours of the page that holds it."""

import re
import warnings
from xml.etree import ElementTree

import pytest
from report_folders import split

from hipp_ext.evals.figures import (
    changes_figure,
    cost_figure,
    front_figure,
    keeps_figure,
    label,
    marks,
    png,
    splits_figure,
    svg,
)
from hipp_ext.evals.figures.style import COLOURS, INK
from hipp_ext.plan import PlanGroup, PruningPlan
from hipp_ext.planner.reward import Reward

TRAP = "\"'></text><script>alert(1)</script><img src=//evil>]]>&{{7*7}}\ud800"


def plan(keep: int = 2, layers: int = 2) -> PruningPlan:
    return PruningPlan(
        groups=tuple(
            PlanGroup(
                tower="language",
                layer=n,
                kind="ffn",
                width=8,
                kept=tuple(range(keep)),
                unit_parameters=3,
            )
            for n in range(layers)
        )
    )


def figures(name: str = "small") -> dict:
    """Every figure, about a dense model and a pruned one of this name."""
    models = ["dense", name]
    rewards = [
        Reward(utility=0.9 - 0.1 * n, robustness=0.8, compression=0.1 * n, utility_se=0.02)
        for n in range(5)
    ]
    known = {"random": split(), "popular": split(accuracy_se=None)}
    shares = {"x": {"dense": (100.0, 90.0, 110.0), name: (80.0, 70.0, 85.0)}}
    return {
        "front": front_figure(rewards, rewards[2:], {name: rewards[1]}, models=models),
        "keeps": keeps_figure({name: plan()}, {"ffn": [0.1, 0.2]}, models=models),
        "splits": splits_figure({m: known for m in models}, ["random", "popular"], models=models),
        "changes": changes_figure({"POPE": {name: (-3.0, -5.0, -1.0)}}, "dense", models=models),
        "cost": cost_figure(shares, models=models),
    }


def _no_default_black(element, styled=False) -> None:
    """Whatever is drawn says in which colour, or what holds it does: the default is black."""
    styled = styled or bool(re.search("fill|stroke", element.get("style", "")))
    assert styled or element.tag not in ("text", "path", "use", "rect"), element.attrib
    for child in element if element.tag not in ("clipPath", "defs") else ():
        _no_default_black(child, styled)


@pytest.mark.parametrize("name", figures())
def test_an_svg_takes_its_colours_from_the_page(name):
    drawn = svg(figures()[name], name)
    root = ElementTree.fromstring(drawn)  # well-formed, and with no namespace to fetch
    assert root.tag == "svg" and "http" not in drawn and "<style" not in drawn
    view = [float(v) for v in root.get("viewBox", "").split()]
    assert view[2] == 288 and root.get("width") is None  # as wide as a phone; the page scales it
    styles = ";".join(e.get("style", "") for e in root.iter())
    colours = {c.strip() for c in re.findall(r"(?:fill|stroke): *([^;]+)", styles)}
    assert {"currentColor", "var(--model-1)"} <= colours
    allowed = {"none", "currentColor", "var(--card)", "var(--line)"}
    assert colours - allowed <= {f"var(--model-{n})" for n in range(len(COLOURS))}
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b|\b(white|black)\b|rgb\(", styles)
    _no_default_black(root)
    for text in root.iter("text"):
        size = float(re.search(r"font(?:-size)?: ([\d.]+)px", text.get("style", ""))[1])
        assert size * 340 / 288 >= 11, text.text  # [px] on a phone


def test_two_figures_on_a_page_share_no_id():
    first, second = (svg(cost_figure({"x": {"a": (1.0, 1.0, 1.0)}}), n) for n in ("one", "two"))
    ids = [re.findall(r' id="([^"]*)"', text) for text in (first, second)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    for text, own in zip((first, second), ids, strict=True):
        used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
        assert used == set(own)


def test_colours_tell_models_apart():
    names = [f"m{n}" for n in range(2 * len(COLOURS) + 1)]
    known = marks(names)
    assert len({(m.colour, m.shape) for m in known.values()}) == len(names)
    assert known["m0"].colour == COLOURS[0] and marks([*names[:2], *names])["m5"] == known["m5"]
    assert INK not in COLOURS
    # A model that is alone in a figure keeps the colour that it has beside others.
    drawn = svg(keeps_figure({"m3": plan()}, models=names))
    assert "var(--model-3)" in drawn and "var(--model-1)" not in drawn


@pytest.mark.parametrize("name", [r"$\frac{1$", "_hidden", "a\nb" * 99, TRAP])
def test_figures_show_any_name(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without some character
        for drawn in figures(name).values():
            root = ElementTree.fromstring(svg(drawn))
            assert not {"script", "img"} & {element.tag for element in root.iter()}
            assert png(drawn, dpi=30)[:4] == b"\x89PNG"
        legend = figures(name)["splits"].legends[0].get_texts()
    assert [text.get_text() for text in legend] == ["dense", label(name)]


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (["a", "b", "c"], 1),
        (["evaluated", "front ± SE", "best evaluated"], 1),
        (["best evaluated", "second evaluated", "third evaluated"], 2),
        (["llava-1.5-7b-pruned-30-recovered-lora-r16", "dense"], 2),
    ],
)
def test_the_legend_has_room(names, lines):
    figure = cost_figure({"x": dict.fromkeys(names, (1.0, 1.0, 1.0))})
    png(figure, dpi=72)  # lays it out
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    texts = figure.legends[0].get_texts()
    assert len({round(text.get_window_extent().y0) for text in texts}) == lines


def test_a_plan_of_many_layers_is_drawn_without_numbers():
    few, many = (svg(keeps_figure({"only": plan(layers=n)})) for n in (4, 40))
    assert few.count(">2</text>") >= 4 and many.count(">2</text>") == 0


def test_plans_without_attention_are_drawn():
    groups = tuple(
        PlanGroup(tower="language", layer=n, kind="ffn", width=8, kept=(0, 1), unit_parameters=3)
        for n in (0, 1)
    )
    plan = PruningPlan(groups=groups)
    figure = keeps_figure({"only": plan}, {"attention": [], "ffn": [0.1, 0.2]})
    assert png(figure, dpi=30)[:4] == b"\x89PNG" and "ffn, of 8 channels" in svg(figure)


def test_plans_of_both_units_of_attention_are_drawn_apart():
    plans = {}
    for kind, sections in (("attention", 1), ("query_heads", 2)):
        group = PlanGroup(
            tower="language",
            layer=0,
            kind=kind,
            width=4 * sections,
            kept=tuple(range(0, 4 * sections, 4)),
            unit_parameters=3,
            sections=sections,
        )
        plans[kind] = PruningPlan(groups=(group,))
    drawn = svg(keeps_figure(plans, {"query_heads": [0.3]}))
    assert "attention, of 4 KV groups" in drawn and "query_heads, of 8 query heads" in drawn
    assert drawn.count("visual flow") == 1
