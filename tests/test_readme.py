"""What README and docs tell people to type parses, and the files they name are there."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from twofold.cli import app
from twofold.config.recipe import read_content, read_recipe
from twofold.config.targets import TargetsRecipe
from twofold.posttrain.stages import STAGES, read_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            found += [line for line in block.splitlines() if line.startswith("twofold ")]
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    words = shlex.split(line, comments=True)[1:]
    group = typer.main.get_command(app)
    with group.make_context("twofold", list(words), resilient_parsing=True) as context:
        _, command, rest = group.resolve_command(context, words)
    command.make_context(words[0], rest)  # raises where an option or argument is wrong


@pytest.mark.parametrize("line", [line for line in commands() if re.match(r"twofold (train|plan) ", line)])
def test_recipes_of_commands_are_valid(line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TWOFOLD_DATA", str(tmp_path))
    words = shlex.split(line, comments=True)[2:]
    if words[0] == "RECIPE":
        return
    overrides = [word for word in words[1:] if re.match(r"[a-z_.]+=", word)]
    if "-gkd" in words[0] and "gkd" not in STAGES:
        pytest.skip("stage gkd is not there yet")
    if read_content(words[0], overrides)["stage"] == "distill-targets":
        read_recipe(TargetsRecipe, words[0], overrides)
    else:
        read_run(words[0], overrides)


def test_there_are_commands_for_every_verb():
    assert {line.split()[1] for line in commands()} == {
        "adapt",
        "inspect",
        "generate",
        "train",
        "plan",
        "average",
        "merge",
        "export",
        "bench",
        "eval",
        "frontier",
        "serve",
        "batch",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    text = page.read_text()
    named = re.findall(r"\]\(([\w/.-]+)\)", text)
    named += re.findall(
        r"`((?:src|recipes|benchmarks|docs|examples|data|config|deploy|tests)/[\w/.-]+\.\w+)`", text
    )
    for name in named:
        places = [ROOT / name, page.parent / name, ROOT / "src" / "twofold" / name]
        assert any(place.exists() for place in places), f"{page.name} names {name}"


def test_the_file_tree_names_six_files_in_order():
    text = (ROOT / "README.md").read_text()
    listed = re.findall(r"^  ([\w/]+\.py) +(\d) ", text, re.M)
    assert [int(number) for _, number in listed] == [1, 2, 3, 4, 5, 6]
    assert all((ROOT / "src" / "twofold" / name).is_file() for name, _ in listed)


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.search(r"@[A-Z_]+@", page.read_text()), page.name
