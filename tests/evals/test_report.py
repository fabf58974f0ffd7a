"""`hipp report`: one page that needs nothing else, made of what `vlmeval`, `hipp fit` and others
left; drawn by Chromium.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from report_folders import latency, served

from hipp_ext import HiPPPlanner, Preference, __version__, prune, save_pruned, testbed
from hipp_ext.cli import main
from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.evals.captions import measure_chair, scenes_task
from hipp_ext.evals.evaluator import search_evaluator
from hipp_ext.evals.report import table_rows, write_report
from hipp_ext.evals.report.disagreements import disagreements
from hipp_ext.evals.report.entries import main_yes_no
from hipp_ext.evals.report.page import SECTIONS
from hipp_ext.evals.report.page import page as page_of
from hipp_ext.evals.report.sources import read_sources
from hipp_ext.evals.runs import read_runs
from hipp_ext.integrations.vlmevalkit import evaluate
from hipp_ext.planner.settings import FitSettings

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """models/, outputs/ and planner/ of a tiny run on the testbed."""
    place = tmp_path_factory.mktemp("report")
    model, processor = testbed.load()
    planner = HiPPPlanner(Preference(1, 1, 1))
    planner.fit(
        model,
        search_evaluator(model, processor, 12),
        FitSettings(steps=1, preferences=1, budgets=2, updates=2),
        folder=place / "fit",
        processor=processor,
        rows=8,
        progress=False,
    )
    planner.save(place / "planner")
    plan = planner.plan(model, preference=Preference(0.2, 0.2, 0.6))
    save_pruned(model, place / "models/dense", processor)
    save_pruned(prune(model, plan), place / "models/small<b>", processor)
    testbed.export(place / "data", splits=("test",))
    evaluate(
        [place / "models/small<b>", place / "models/dense"],
        ["POPE", "ScienceQA"],
        lmu_data=place / "data/test",
        work_dir=place / "outputs",
        limit=40,
        batch_size=40,
        device="cpu",
        progress=False,
    )
    (place / "latency.json").write_text(json.dumps(latency("dense", "small<b>")))
    (place / "served.json").write_text(json.dumps(served("dense", "small<b>")))
    for name in ("dense", "small<b>"):
        measure_chair(
            place / "models" / name, scenes_task(8), work_dir=place / "outputs", device="cpu"
        )
    return place


@pytest.fixture(scope="module")
def page(made) -> str:
    return write_report(made).read_text()


# --------------------------------------------------------------------------------------------------
# - the page itself


def test_the_page_needs_no_network_and_no_file_beside_it(page):
    bare = re.sub(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=\n]+", "DATA", page)
    assert not re.search(r"https?:|//|@import|url\((?!#)|<script|<link", bare)
    sources = set(re.findall(r'(?:src|srcset|href)="([^"]*)"', bare))
    ids = re.findall(r' id="([^"]*)"', bare)
    assert sources <= {"DATA", *(f"#{name}" for name in ids)} and len(ids) == len(set(ids))
    assert '<meta name="viewport" content="width=device-width' in page


def test_the_first_screen_answers_and_the_rest_is_folded(page):
    top, first, rest = page.partition('<section id="results">')
    assert first and top.count('<section class="answer">') == 3 and "<details" not in top
    for question in ("How much smaller and faster?", "How much worse?", "Where does it hurt?"):
        assert f"<h2>{question}</h2>" in top
    (line,) = re.findall(r'<ul class="verdicts"><li>(.*?)</li>', top)
    assert "small&lt;b&gt;" in line and "fewer parameters, first token 1.50 times as fast;" in line
    assert all(data in line for data in ("POPE", "ScienceQA", "captions (testbed): invented"))
    assert rest.count("<details>") == len(re.findall("<h2>", first + rest)) == len(SECTIONS) - 1


def test_it_has_every_section_and_picture(page, made):
    # Everything was measured, so there is no section about what was not.
    assert re.findall(r'<section id="(\w+)">', page) == [s for s in SECTIONS if s != "missing"]
    for name in ("changes", "front", "keep_counts", "pope", "cost", "cost-2"):
        picture = Image.open(made / f"{name}.png")
        assert picture.format == "PNG" and picture.width > 800
    assert len(re.findall(r"<figure>.*?<svg.*?</figure>", page, re.DOTALL)) == 6


def test_one_colour_per_model(page):
    """The front page, the stars of the search and all figures show the pruned model in --model-1;
    the colour of the dense one is that of nothing else.
    """
    figures = dict(re.findall(r'aria-label="([\w -]+)">(<svg.*?</svg>)', page, re.DOTALL))
    for name in ("changes", "pope", "keep counts", "cost", "cost-2", "front"):
        assert "var(--model-1)" in figures[name] and "var(--model-2)" not in figures[name], name
        assert ("var(--model-0)" in figures[name]) == (name not in ("changes", "keep counts"))
    assert '<i class="dot m1"></i><b>small&lt;b&gt;</b>' in page
    assert '<i class="dot m0"></i><b>dense</b>' in page


def test_served_speed_and_captions_are_there(page, made):
    small = read_sources([made]).entries[1]
    (scores,) = small.chair
    assert f"{scores['chair_i']:.1f} ± {scores['chair_i_se']:.1f}" in page
    assert scores["counts"]["image"] and len(scores["counts"]["named"]) == 8
    for text in ("10.00 (9.00 to 14.00)", "1.25x, 1.10x", "llama.cpp, weights q8_0", "9.8.7"):
        assert text in page
    assert "2026-05-04 03:02 UTC; a machine; 2 threads; hipp-ext 9.8.7" in page


def test_what_users_wrote_is_escaped(page):
    assert "small&lt;b&gt;" in page and "small<b>" not in page


def test_numbers_commands_and_seeds_are_there(page, made):
    sources = read_sources([made])
    assert [e.name for e in sources.entries] == [
        "dense",
        "small<b>",
    ]  # the dense model first, whatever the order
    small = sources.entries[1]
    assert (
        small.plan and f"{100 * small.plan.pruning_ratio:.1f}%" in page and small.preference in page
    )
    accuracy = small.records["POPE"]["metrics"]["vlmeval"]["overall"]
    assert f"{accuracy['accuracy']:.1f} ± {accuracy['accuracy_se']:.1f}" in page
    assert (
        f"{small.parameters / 1e6:.2f}M" in page
        and small.parameters < sources.entries[0].parameters
    )
    about = small.records["POPE"]["made"]
    assert about["versions"]["hipp-ext"] == __version__ and about["device"] in page
    assert f"hipp-ext {__version__} · " in page
    for text in (
        "hipp latency dense small",
        "latency: seed 3",
        "bootstrap of the error bars: seed 0",
        "budgets 2",
        small.records["POPE"]["model_hash"][:12],
        "1.50x, 1.50x",
        "10.00 (9.00 to 12.00)",
        "a CPU",
    ):
        assert text in page


def test_disagreements_are_counted_and_drawn_by_the_seed(page, made):
    dense, small = (e.records for e in read_sources([made]).entries)
    for own in (found := disagreements(dense, small, [made], n=4)):
        runs = [next(iter(read_runs(r[own.data]["predictions"]).values())) for r in (dense, small)]
        differing = [
            q.index
            for q, a, b in zip(runs[0].questions, *(r.answers for r in runs), strict=True)
            if a != b
        ]
        assert own.only_a + own.only_b <= len(differing)
        assert {e.question.index for e in own.examples} <= set(differing) and len(own.examples) <= 5
        for example in own.examples:
            assert example.picture.startswith("data:image/png") and example.small
        assert f"only dense is correct on {own.only_a}" in page
    assert [own.data for own in found] == ["POPE", "ScienceQA_TEST"] and any(
        own.examples for own in found
    )
    assert (
        found == disagreements(dense, small, [made], n=4)
        and page.count('<article class="card">') >= 2
    )


def test_a_moved_folder_still_has_its_answers(made, tmp_path):
    moved = shutil.copytree(made / "outputs", tmp_path / "elsewhere")
    for file in moved.glob("*/*/results.json"):
        record = json.loads(file.read_text())
        record["predictions"] = record["predictions"].replace(str(made), "/gone")
        file.write_text(json.dumps(record))
    text = write_report([moved, made / "models"], tmp_path / "out").read_text()
    assert '<article class="card">' in text and "image not found" not in text
    assert not (moved / "report.html").exists() and "not compared" not in text
    shutil.rmtree(moved / "images")
    (dense, small), near = read_sources([moved, made / "models"]).entries, [moved]
    assert {
        e.picture for own in disagreements(dense.records, small.records, near) for e in own.examples
    } == {None}


def test_what_is_missing_is_said_with_its_command(made, tmp_path):
    alone = page_of(sources := read_sources([made / "outputs"]), [], {})
    assert "size not known, speed not measured; captions (testbed)" in alone
    assert "; POPE, ScienceQA_TEST not compared" in alone
    absent = alone.partition('<section id="missing">')[2]
    for text in (
        "nothing tells it, so dense, the first one, was taken",
        "Size of dense, small&lt;b&gt;: the folder was not given.",
        "<code>hipp report DIR... ./dense &#39;./small&lt;b&gt;&#39;</code>",
        "<code>hipp latency ./dense &#39;./small&lt;b&gt;&#39; -o latency.json</code>",
        "--runtime llama.cpp -o served.json",
        "small&lt;b&gt; beside dense on POPE, ScienceQA_TEST, question by question",
    ):
        assert text in absent, text
    assert "hipp chair" not in absent and ">not known<" in alone and ">-<" not in alone
    bare = [replace(e, chair=()) for e in sources.entries]
    bare[1].records.pop("POPE")
    absent = page_of(replace(sources, entries=tuple(bare)), [], {})
    assert "<code>hipp chair ./dense, and the others</code>" in absent
    assert "<code>vlmeval --data POPE --model &#39;./small&lt;b&gt;&#39;</code>" in absent


def test_several_folders_with_one_name_and_other_content(made, tmp_path):
    outputs = shutil.copytree(made / "outputs", tmp_path / "outputs")
    for file in outputs.glob("small*/*/results.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"model_hash": "f" * 64}))
    names = [e.name for e in read_sources([made, outputs]).entries]
    assert names[0] == "dense" and len(names) == 3 and f"small<b> ({'f' * 8})" in names
    entries = read_sources([outputs, made / "models"]).entries
    other = next(e for e in entries if "ffffffff" in e.name)
    assert other.records and other.plan is None  # another content: not this folder's plan


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (390, 0)])
def test_chromium_draws_it_without_overflow(page, made, tmp_path, width, scheme):
    """At a desk in light, on a phone in dark: nothing is wider than the screen, and the background
    is the scheme's.
    """
    frame = tmp_path / "frame.html"  # a window cannot be as narrow as a phone; a frame can
    (opened := tmp_path / "open.html").write_text(page.replace("<details>", "<details open>"))
    frame.write_text(
        f"<body style='margin:0'><iframe id=f width={width} height=900 style='border:0' "
        f"src='file://{opened}'></iframe><script>onload = () => "
        "{ const d = f.contentDocument, style = f.contentWindow.getComputedStyle; "
        "document.title = [d.documentElement.scrollWidth, d.images.length, "
        "[...d.images].every(i => i.naturalWidth), style(d.body).backgroundColor, "
        "style(d.querySelector('figure text')).fill, "
        "d.querySelector('figure svg').getBoundingClientRect().width, "
        "d.querySelector('figure text').getBoundingClientRect().height].join(' | ') }</script>"
    )
    shot = tmp_path / "shot.png"
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=8000",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,900",
    ]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", f"file://{frame}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    wide, images, drawn, background, ink, figure, letters = title[1].split(" | ")
    assert int(wide) <= width and int(images) >= 1 and drawn == "true"
    assert background == ("rgb(246, 247, 249)" if scheme else "rgb(20, 22, 25)")
    assert ink == ("rgb(34, 38, 43)" if scheme else "rgb(228, 230, 234)")  # of a figure's text
    assert float(figure) == 540 if width > 760 else 300 < float(figure) < width
    assert float(letters) > 12  # [px] of a line of text in a figure; the letters have 11
    subprocess.run(
        [CHROMIUM, *options, f"--screenshot={shot}", f"file://{frame}"],
        capture_output=True,
        timeout=120,
    )
    assert len(set(Image.open(shot).convert("RGB").resize((64, 64)).getdata())) > 50


# --------------------------------------------------------------------------------------------------
# ----------- refusals


def test_what_cannot_be_reported_is_refused(made, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        read_sources([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="holds nothing to report"):
        read_sources([tmp_path])
    with pytest.raises(DataError, match="no evaluated model"):
        read_sources([made / "models", made / "planner"])
    wrong = tmp_path / "latency.json"
    for text, message in (
        ("{}", "is not a result of `hipp latency`"),
        ("[]", "an object is needed"),
        ("{", "is damaged"),
    ):
        wrong.write_text(text)
        with pytest.raises(DataError, match=message):
            read_sources([made, wrong])
    one = latency("dense")
    del one["models"]["dense"]["peak_mib"]
    wrong.write_text(json.dumps(one))
    with pytest.raises(DataError, match="peak_mib"):
        read_sources([wrong])


def test_other_data_sets_have_columns_of_their_own(made):
    dense, small = read_sources([made]).entries
    records = {"exam": dense.records["ScienceQA_TEST"], "mine": dense.records["POPE"]}
    header, rows = table_rows([replace(dense, records=records), small])
    assert header[3:] == ["exam", "mine", "ScienceQA", "POPE", "rnd", "pop", "adv", "F1", "yes"]
    assert (
        main_yes_no([replace(dense, records=records)]) == "mine"
        and main_yes_no([dense, small]) == "POPE"
    )
    assert rows[0][3] and not rows[0][5] and rows[1][5] and not rows[1][3]


def test_damaged_parts_are_named(made, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/results.json").write_text('{"model": "x"}')
    with pytest.raises(DataError, match="results.json is damaged: .*model_hash"):
        read_sources([tmp_path])
    record = next(iter(read_sources([made]).entries[0].records.values()))
    (tmp_path / "a/results.json").write_text(json.dumps(record | {"metrics": {}}))
    with pytest.raises(DataError, match="results.json is damaged: .*accuracy"):
        read_sources([tmp_path])
    planner = shutil.copytree(made / "planner", tmp_path / "planner")
    (planner / "planner.json").write_text("{}")
    with pytest.raises(CheckpointError):
        read_sources([planner])
    for text in (
        '{"entries": [{}]}',
        "[]",
        '{"entries": [], "planner": null, "commands": 3, "seeds": []}',
    ):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(DataError, match="is damaged"):
            read_sources([tmp_path])


def test_the_command(made, tmp_path, monkeypatch, capsys):
    arguments = [
        "hipp",
        "report",
        str(made / "outputs"),
        str(made / "models"),
        str(made / "latency.json"),
        "-o",
        str(tmp_path / "r"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0 and str(tmp_path / "r/report.html") in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["hipp", "report", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "is not a folder" in capsys.readouterr().err
