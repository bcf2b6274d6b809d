"""What the pages and docstrings show is true: code runs, commands and fields exist, links lead somewhere.

Python blocks of a page run in turn, in a directory where `path/to/model` is the demo Llama and `text.txt` some text.
YAML blocks are zoo files, or parts of one.
"""

import ast
import configparser
import doctest
import itertools
import re
import shlex
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import typer
import yaml
from markdown_it import MarkdownIt

from jobs.cli import app
from lorc_core import compress, export_plain, export_variant
from lorc_core.methods import METHODS
from lorc_core.model.families import FAMILIES
from lorc_core.ranks.schedules import SCHEDULES
from pipeline.storage.tables import SCHEMAS
from pipeline.zoo.file import load_zoo, nested_model
from pipeline.zoo.schema import Zoo
from pipeline.zoo.sections import TEXT_FORMATS
from tests.paths import DEMO, REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.is_file()]
ABOUT_OTHER_CODE = ("quality.md", "serving.md")
SOURCES = [path for package in ("jobs", "lorc_core", "pipeline") for path in (REPOSITORY / package).rglob("*.py")]
REST_OF_A_ZOO = """
name: rest
models: [{name: tiny, source: ./tiny}]
variants: [{kept_fraction: 0.5}]
evaluation: {texts: [{name: other, source: other.txt}]}
gates: {max_perplexity_rise: 0.1}
"""
USAGE_ERROR = typer.BadParameter.__base__  # typer brings a click of its own, under a private name
FOLDERS = ("docs", "examples", "infra", "jobs", "lorc_core", "pipeline", "tests")
PROGRAMS = ("lorc", "make", "python")


@cache
def tokens_of(page):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(page, *languages):
    """(first line, content, language) of fenced blocks."""
    fences = [token for token in tokens_of(page) if token.type == "fence"]
    return [(token.map[0] + 1, token.content, token.info) for token in fences if token.info in languages]


def inline(page, kind):
    return [part for token in tokens_of(page) for part in token.children or () if part.type == kind]


def words(page):
    """What stands in code font within the text."""
    return [part.content for part in inline(page, "code_inline")]


def having(find):
    return [pytest.param(page, id=page.name) for page in PAGES if find(page)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with all that examples may name."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(DEMO / "stdlib-llama")
    (tmp_path / "text.txt").write_text((REPOSITORY / "lorc_core" / "methods.py").read_text())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", having(lambda page: blocks(page, "python")))
def test_python_blocks_run(page, place):
    names = {}
    for line, content, language in blocks(page, "python", ""):
        if language == "python":
            exec(compile("\n" * line + content, str(page), "exec"), names)
        elif content.startswith("lorc export VARIANT DIR"):
            names["DIR"] = exported(place / f"exported-{line}", plain="--plain" in content)


def test_model_card_block_runs(place):
    compress("path/to/model", "lorc", 0.5, "uniform").save("this directory")
    ((_, content, _),) = blocks(place / "this directory" / "README.md", "python")
    exec(content, {})


def exported(directory, *, plain):
    """What blocks after a `lorc export VARIANT DIR` call DIR."""
    method = "k_svd" if plain else "lorc_q"
    tokens = torch.arange(512).view(2, 256)
    variant = compress("path/to/model", method, 0.5, "uniform", calibration=tokens if plain else None)
    variant.save(directory.with_suffix(".variant"))
    (export_plain if plain else export_variant)(directory.with_suffix(".variant"), directory)
    return directory


def docstrings():
    """Those of the core that show how something is used."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())) if path.is_relative_to(REPOSITORY / "lorc_core") else ():
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                shown = ast.get_docstring(node) or ""
                if ">>>" in shown:
                    name = f"{path.relative_to(REPOSITORY)}:{getattr(node, 'name', 'module')}"
                    yield pytest.param(shown, path, id=name)


@pytest.mark.parametrize(("shown", "path"), list(docstrings()))
def test_docstring_examples_run(shown, path, place):
    example = doctest.DocTestParser().get_doctest(shown, {}, path.name, str(path), 0)
    failures = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(example, out=failures.append)
    assert not failures, "".join(failures)


def test_docstrings_have_examples():
    names = [parameter.id for parameter in docstrings()]
    assert "lorc_core/__init__.py:module" in names
    assert "lorc_core/compression.py:compress" in names


@pytest.mark.parametrize("page", having(lambda page: blocks(page, "yaml")))
def test_yaml_blocks_are_zoo_files(page, tmp_path):
    for line, content, _ in blocks(page, "yaml"):
        zoo = yaml.safe_load(REST_OF_A_ZOO) | yaml.safe_load(content)
        for text in [*zoo["evaluation"]["texts"], *zoo.get("calibration", {}).get("texts", [])]:
            if Path(text["source"]).suffix in TEXT_FORMATS:
                (tmp_path / text["source"]).touch()
        (tmp_path / f"{page.name}-line-{line}.yaml").write_text(yaml.safe_dump(zoo))
        load_zoo(tmp_path / f"{page.name}-line-{line}.yaml")


def test_yaml_with_an_unknown_field_is_refused(tmp_path):
    """The control."""
    (tmp_path / "other.txt").touch()
    (tmp_path / "zoo.yaml").write_text(REST_OF_A_ZOO + "gate: {}\n")
    with pytest.raises(ValueError, match="unknown field"):
        load_zoo(tmp_path / "zoo.yaml")


def commands(page):
    """(words, whether they are all that is typed)."""
    lines = [(line, True) for _, content, _ in blocks(page, "") for line in content.splitlines()]
    for line, whole in lines + [(content, False) for content in words(page)]:
        typed = line.removeprefix("$ ").removeprefix(".venv/bin/")
        if typed.split(" ")[0] in PROGRAMS:
            yield shlex.split(typed, comments=True), whole


def check_command(typed, *, whole):
    program, *arguments = typed
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), f"no such target of make: {arguments}"
    elif program == "lorc":
        check_lorc(arguments, whole=whole)
    elif arguments[:1] == ["-m"] and arguments[1].startswith("jobs"):
        assert (REPOSITORY / f"{arguments[1].replace('.', '/')}.py").is_file(), f"no such module: {arguments[1]}"


def check_lorc(arguments, *, whole):
    command = typer.main.get_command(app)
    options = [option for parameter in command.params for option in parameter.opts]
    while hasattr(command, "commands") and arguments:
        name, *arguments = arguments
        if name in options:
            continue
        assert name in command.commands, f"no such command: {name}"
        command = command.commands[name]
    if hasattr(command, "commands"):
        return
    try:
        command.make_context("lorc", list(arguments))
    except typer.BadParameter:  # an argument is missing, as where a command is only named
        if whole:
            raise


@pytest.mark.parametrize("page", having(lambda page: list(commands(page))))
def test_commands_exist(page):
    for typed, whole in commands(page):
        check_command(typed, whole=whole)


@pytest.mark.parametrize("typed", ["lorc runs ZOO", "lorc run ZOO --workdirs x", "lorc run", "lorc bench decoding"])
def test_commands_that_do_not_exist_are_seen(typed):
    """The control."""
    with pytest.raises((AssertionError, USAGE_ERROR)):
        check_command(shlex.split(typed), whole=True)


def anchors(page):
    """Of headings, as GitHub makes them."""
    tokens, seen = tokens_of(page), Counter()
    for heading, content in itertools.pairwise(tokens):
        if heading.type == "heading_open":
            text = "".join(part.content for part in content.children)
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            yield f"{slug}-{seen[slug]}" if seen[slug] else slug
            seen[slug] += 1


@pytest.mark.parametrize("page", having(lambda page: True))
def test_links_lead_somewhere(page):
    for link in inline(page, "link_open"):
        path, _, anchor = link.attrs["href"].partition("#")
        if "://" in path:
            continue
        target = page if not path else page.parent / path
        assert target.exists(), f"{page.name}: {link.attrs['href']}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link.attrs['href']}"


@pytest.mark.parametrize("page", having(lambda page: page.name not in ABOUT_OTHER_CODE))
def test_names_in_code_font_are_in_the_code(page):
    tests = [path for path in (REPOSITORY / "tests").rglob("*.py") if path != Path(__file__)]
    settings = [path for path in (REPOSITORY / "infra").rglob("*") if path.is_file()]
    code = set(re.findall(r"\w+", " ".join(path.read_text() for path in [*SOURCES, *tests, *settings])))
    code |= set(
        re.findall(r"[\w-]+", "".join((REPOSITORY / name).read_text() for name in ("Makefile", "pyproject.toml")))
    )
    names = [word for word in words(page) if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", word)]
    assert not [name for name in names if not set(name.split(".")) <= code]
    paths = [word for word in words(page) if re.match(rf"({'|'.join(FOLDERS)})/[\w./]*$", word)]
    assert not [path for path in paths if not (REPOSITORY / path).exists()]


def fields_of(section):
    """Of a zoo file, at any depth."""
    for name, field in section.model_fields.items():
        yield name
        if inner := nested_model(field.annotation):
            yield from fields_of(inner)


def test_pages_name_all_that_can_be_chosen():
    def missing(page, names):
        return sorted(set(names) - set(words(REPOSITORY / "docs" / page)))

    assert not missing("zoo.md", [*SCHEMAS, *fields_of(Zoo)])
    assert not missing("methods.md", [*METHODS, *SCHEDULES])
    assert not missing("models.md", FAMILIES)


def test_architecture_pictures_the_layers_that_the_linter_holds():
    (_, picture, _), *_ = blocks(REPOSITORY / "docs" / "architecture.md", "")
    cells = [re.split(r"  +", row.strip(" │"))[0] for row in picture.splitlines()]
    row_of = {name.rstrip("/"): row for row, cell in enumerate(cells) for name in cell.split()}
    linter = configparser.ConfigParser()
    linter.read(REPOSITORY / ".importlinter")
    for contract in ("packages", "core", "pipeline"):
        layers = linter[f"importlinter:contract:{contract}"]["layers"].split("\n")
        rows = [{row_of[name.strip()] for name in layer.split("|")} for layer in layers if layer]
        for above, below in itertools.pairwise(rows):
            assert max(above) < min(below)


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150
