"""docs/ and the README: code runs, commands exist, links lead somewhere, the site builds.

Steps of training are fewer here. A block of Python that is not run says why in a comment before it:
<!-- not run: REASON -->.
"""

import re
import shlex
import shutil
from importlib import metadata
from pathlib import Path
from urllib.request import urlopen

import pytest
from command import hipp
from models import save_chats
from plans import random_plan

from hipp_ext import prune, save_pruned, testbed
from hipp_ext.cli import app
from hipp_ext.cli.recover_group import DEFAULT, DefaultGroup

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"(<!-- (?:not run|run by): [^\n]* -->\n)?```python\n(.*?)```", re.S)
COMMANDS = re.compile(r"^    +(hipp .*?[^\\])$|`(hipp [^`\n]+)`", re.M | re.S)
RUN = [page for page in PAGES if any(not mark for mark, _ in PYTHON.findall(page.read_text()))]
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the pages speak of: a model, a smaller one, a plan and conversations."""
    folder = tmp_path_factory.mktemp("reader")
    model, processor = testbed.load()
    save_pruned(model, folder / "my-llava", processor)
    plan = random_plan(model, 0.3)
    plan.save(folder / "plan.json")
    save_pruned(prune(model, plan), folder / "pruned", processor)
    save_chats(folder)
    hipp("export", "gguf", folder / "pruned", "-o", folder / "pruned.gguf")
    return folder


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_as_written(page, folder, tmp_path, monkeypatch):
    text = page.read_text()
    made = shutil.ignore_patterns("pruned") if 'save_pruned(small, "./pruned"' in text else None
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "reader", ignore=made))
    names: dict = {}
    for mark, block in PYTHON.findall(text):
        if not mark:
            exec(compile(block.replace("steps=1000", "steps=2"), str(page), "exec"), names)
    if "server" in names:  # deleted before it has answered once, llama.cpp's never ends
        assert urlopen(f"{names['server'].listening_address}/health").status == 200


def commands(page: Path) -> list[str]:
    """Command lines of `hipp` in a page, with lines that a backslash continues joined."""
    found = [a or b for a, b in COMMANDS.findall(page.read_text().replace("\\\n", " "))]
    return [re.split(r" #|\||&&", line)[0] for line in found]


@named
def test_commands_and_options_of_a_page_exist(page):
    from typer.main import get_command

    for line in commands(page):
        words = [w for w in shlex.split(line)[1:] if w != "..."]
        command = get_command(app)
        while words and (inner := getattr(command, "commands", {}).get(words[0])):
            command, words = inner, words[1:]
        if isinstance(command, DefaultGroup):
            command = command.commands[DEFAULT]
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        if command.context_settings.get("ignore_unknown_options"):
            continue  # the rest is another program's
        asked = [w.split("=")[0] for w in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", w)]
        unknown = [w for w in asked if w not in known | {"--help", "-h"}]
        assert not unknown, f"{page.name}: {line}: {unknown}"


def test_every_extra_is_explained():
    page = (ROOT / "docs/install.md").read_text()
    explained = re.findall(r"^\| `([\w-]+)` \|.*\| (yes|no) \|$", page, re.M)
    extras = metadata.metadata("hipp-ext").get_all("Provides-Extra") or []
    assert sorted(name for name, _ in explained) == sorted({*extras} - {"all"})
    (everything,) = (r for r in metadata.requires("hipp-ext") or () if "hipp-ext[" in r)
    inside = set(re.split(r"[\[\],]", everything.partition(";")[0])[1:-1])
    assert {name for name, answer in explained if answer == "yes"} == inside


@named
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


def test_the_site_builds_without_a_warning(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    build(config)  # strict: a warning is an error
    page = (tmp_path / "site" / "reference" / "planning.html").read_text()
    assert "Preference" in page and "class Group" not in page
