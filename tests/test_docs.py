"""The pages say what there is: commands with their options, links, kinds of data, recipes and their keys."""

import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from triage.cli import app
from triage.training import recipe as recipes
from triage.training.datasets import DATASETS
from triage.training.evaluation import FIGURES
from triage.training.recipe import Recipe
from triage.training.trainer import Schedule

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "deploy").glob("*.md")), *(ROOT / "triage").rglob("card.md")]
TRAINING = ROOT / "deploy" / "training.md"
BLOCK = re.compile(r"(?:^    .*\n|^\n(?=    ))+", re.M)
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
"""Files to copy, in no language of ours."""
SPAN = re.compile(r"`([^`]+)`")
COMMAND = re.compile(
    r"^(?:\$ )?(?:sudo -u triage \S+ |docker compose exec triage )?(?:\S*/)?triage "
    r"((?:-c |--)?[a-z]+\b.*)"
)
PLACEHOLDERS = str.maketrans("", "", "[]…")


def name_of(page):
    return str(page.relative_to(ROOT))


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(text):
    """Indented blocks, in order, without their indent."""
    return [re.sub(r"^    ", "", block, flags=re.M).strip() for block in BLOCK.findall(text)]


def code(text):
    """Every line that a person may type, or that a program printed."""
    text = FENCED.sub("", text)
    for block in blocks(text):
        yield from block.replace("\\\n", " ").splitlines()
    for span in SPAN.findall(BLOCK.sub("", text)):
        yield " ".join(span.split())


def commands(text):
    """The arguments of every `triage …` in a page; comments and what follows | or && are left out."""
    for line in code(text):
        if found := COMMAND.search(line):
            yield re.split(r" #| \||&&|\)", found[1].translate(PLACEHOLDERS))[0].split()


def wrong(arguments):
    """What the program would not know of these arguments; empty where all is well."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    while arguments and arguments[0] in ("-c", "--config"):
        arguments = arguments[2:]
    if arguments and arguments[0] in options(group):
        return []
    if not arguments or arguments[0] not in group.commands:
        return arguments[:1]
    command = group.commands[arguments[0]]
    if isinstance(command, TyperGroup):  # such as `triage user add`
        arguments = arguments[1:]
        if not arguments or arguments[0] not in command.commands:
            return ["no such command"]
        command = command.commands[arguments[0]]
    known = options(command)
    return [a for a in arguments[1:] if a.startswith("-") and a.split("=")[0] not in known]


def options(command):
    return {"--help", *(name for parameter in command.params for name in parameter.opts)}


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_exists_with_its_options(page):
    assert [" ".join(a) for a in commands(read(page)) if wrong(a)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_kind_and_recipe_in_a_command_exists(page):
    for command in commands(read(page)):
        kinds = {after.partition("=")[0] for flag, after in pairwise(command) if flag == "--data"}
        assert kinds <= {*DATASETS, "KIND"}
        if command[0] == "train" and len(command) > 1:
            assert command[1] in {*recipes.names(), "RECIPE"} or command[1].endswith(".yaml")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r'(?:\]\(|src=")([^)"]+)[)"]', BLOCK.sub("", read(page))):
        if not target.startswith(("http:", "https:")):
            path, _, anchor = target.partition("#")
            to = (page.parent / path).resolve() if path else page
            assert to.exists(), target
            assert not anchor or anchor in anchors(to), target


def test_commands_are_found_and_wrong_ones_told():
    text = "See `triage models [--json]`.\n\n    .venv/bin/triage -c a.yaml predict DIR --fast # so\n"
    assert list(commands(text)) == [["-c", "a.yaml", "predict", "DIR", "--fast"], ["models", "--json"]]
    assert [wrong(arguments) for arguments in commands(text)] == [["--fast"], []]
    assert wrong(["fly"]) == ["fly"]


def test_every_command_is_in_the_readme():
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    assert {a[0] for a in commands(read(ROOT / "README.md"))} >= set(group.commands)


def test_extras_that_are_installed_exist():
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    told = {extra for page in PAGES for extra in re.findall(r"deploy/install ([a-z]+)", read(page))}
    assert "training" in told
    assert told <= set(extras)


class TestTraining:
    """``deploy/training.md`` knows every kind of data and every recipe."""

    def test_it_names_every_kind_of_data(self):
        rows = re.findall(r"^\| `(\w+)` \|", read(TRAINING).partition("## Train\n")[0], re.M)
        assert sorted(rows) == sorted(DATASETS)

    def test_it_names_every_recipe_and_what_it_learns_from(self):
        table = read(TRAINING).partition("## Recipes")[2].partition("## Measure")[0]
        rows = {row[0]: row[1] for row in re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", table, re.M)}
        told = {name: tuple(re.findall(r"`(\w+)`", rows.get(name, ""))) for name in recipes.names()}
        every = {name: recipes.load(name) for name in recipes.names()}
        assert told == {name: (*r.data, *r.also) for name, r in every.items()}

    def test_it_names_every_key_of_a_recipe(self):
        told = read(TRAINING).partition("## Recipes")[2].partition("## Measure")[0]
        keys = [*Recipe.model_fields, *Schedule.__dataclass_fields__]
        assert [key for key in keys if f"`{key}`" not in told] == []

    def test_its_recipes_can_be_read(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "ours").mkdir()
        lungs, multitask = (b for b in blocks(read(TRAINING)) if b.startswith("summary: "))
        Path("ours/lungs.yaml").write_text(lungs)
        Path("ours/multitask.yaml").write_text(multitask)
        recipe = recipes.load("ours/multitask.yaml")
        assert (recipe.name, recipe.task) == ("multitask", recipes.load("multitask").task)
        assert recipe.lungs is not None
        assert recipes.load(recipe.lungs).name == "lungs"

    def test_its_sample_of_json_has_figures_that_there_are(self):
        (sample,) = (b for b in blocks(read(TRAINING)) if b.startswith("{"))
        shown = re.findall(r'"(\w+)": \{"name": "([^"]+)"', sample)
        assert shown
        assert all(FIGURES[key] == name for key, name in shown)
