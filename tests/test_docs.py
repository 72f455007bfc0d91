"""The documentation says what is true: links, paths, code and commands of the README and `docs/`.

A comment before a block says what to do with it: `runnable` (all such blocks of a page are run in
order, in one process and one temporary folder), `file: NAME` (a file of an example project) and
`uses: NAME` (commands that need the project that NAME belongs to). Blocks of `jsonl` are files for
the commands of all pages.
"""

import ast
import json
import re
import shlex
import shutil
import textwrap
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.warm import python

from kvbench.cli.app import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FOLDERS = ("kvbench", "methods", "tasks", "tests", "benchmarks", "results", "docs")
MADE = ("results/runs", "results/data", "results/report", "results/training")  # made by commands

BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>[^>]+) -->\n *)?```(?P<language>\w+)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, without its indentation."""

    language: str
    mark: str  # the comment before it
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that name a language."""
    content = page.read_text()
    return [
        Block(
            found["language"],
            found["mark"] or "",
            textwrap.dedent(found["text"]),
            content.count("\n", 0, found.start("text")),
        )
        for found in BLOCK.finditer(content)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def name(page: Path) -> str:
    """A page's path in the repository, to name a test."""
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_of_the_repository_exist(page: Path) -> None:
    quoted = re.findall(r"`([\w./+-]+)`", prose(page))
    paths = [
        text
        for text in quoted
        if text.partition("/")[0] in FOLDERS and "/" in text and not text.startswith(MADE)
    ]
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.mark == "runnable" for b in blocks(page))], ids=name
)
def test_runnable_blocks_run(page: Path, tmp_path: Path) -> None:
    script = "\n".join(
        f"exec(compile({block.text!r}, 'line {block.line} of {name(page)}', 'exec'))"
        for block in blocks(page)
        if block.mark == "runnable"
    )
    done = python("-c", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_of_data_and_code_parse(page: Path) -> None:
    parse: dict[str, Callable[[str], Any]] = {
        "python": ast.parse,
        "json": json.loads,
        "toml": tomllib.loads,
    }
    for block in blocks(page):
        if block.language in parse:
            parse[block.language](block.text)


def example_commands(page: Path, uses: bool = False) -> list[list[str]]:
    """The arguments of kvbench in a page's bash blocks; `uses`: only with an example project."""
    return [
        shlex.split(line, comments=True)[1:]
        for block in blocks(page)
        if block.language == "bash" and block.mark.startswith("uses:") == uses
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.split()[:1] == ["kvbench"]
    ]


def without(command: list[str], options: list[str]) -> list[str]:
    """A command without some options, which may be given once only, and their values."""
    left = list(command)
    for option in (each for each in options if each in command):
        at = left.index(option)
        del left[at : at + (1 if option == "--dry-run" else 2)]
    return left


COMMANDS = [
    pytest.param(command, id=f"{name(page)}: {' '.join(command)}")
    for page in PAGES
    for command in example_commands(page)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if command == ["--install-completion"]:
        assert main(["--help"]) == 0
        assert "--install-completion" in capfd.readouterr().out
        return
    (config,) = [b.text for b in blocks(ROOT / "docs/command-line.md") if b.language == "yaml"]
    Path("experiment.yaml").write_text(config)
    for block in (each for page in PAGES for each in blocks(page) if each.language == "jsonl"):
        path = Path(block.mark.removeprefix("file: "))
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text)
    needs_more = any(word == "--model" or "scores=" in word for word in command)
    if command[:1] == ["run"] and not needs_more:
        small = ["--samples", "1", "--budgets", "0.5", "--dry-run"]
        assert main([*without(command, small), *small]) == 0
    else:
        end = command.index("--") if "--" in command else len(command)
        # unknown options are refused before the help
        assert main([*command[:end], "--help", *command[end:]]) == 0


def install(project: Path, site: Path) -> None:
    """Lay a project of single modules out as pip does; a build tool may be missing offline."""
    settings = tomllib.loads((project / "pyproject.toml").read_text())
    meta = settings["project"]
    assert meta["dependencies"] == ["kvbench"]
    info = site / f"{meta['name'].replace('-', '_')}-{meta['version']}.dist-info"
    info.mkdir(parents=True)
    for module in settings["tool"]["setuptools"]["py-modules"]:
        shutil.copy(project / f"{module}.py", site)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {meta['name']}\nVersion: {meta['version']}\n"
    )
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
            for group, entries in meta["entry-points"].items()
        )
    )


PROJECTS = [
    (page, file)
    for page in PAGES
    for file in {b.mark.removeprefix("uses: ") for b in blocks(page) if b.mark.startswith("uses:")}
]


@pytest.mark.parametrize(
    ("page", "file"), PROJECTS, ids=lambda value: str(value).rpartition("/")[2]
)
def test_example_projects_work_as_installed(page: Path, file: str, tmp_path: Path) -> None:
    project, site = tmp_path / "project", tmp_path / "site"
    project.mkdir()
    for each in blocks(page):
        if each.mark.startswith("file: "):
            (project / each.mark.removeprefix("file: ")).write_text(each.text)
    install(project, site)
    assert (site / file).is_file()
    measure = [command for command in example_commands(page, uses=True) if command[0] == "run"]
    assert measure
    for command in measure:
        shorter = ["--samples", "1", "--budgets", "0.5"]
        code = (
            f"import sys; sys.path.insert(0, {str(site)!r}); from kvbench.cli.app import main; "
            f"sys.exit(main({[*without(command, shorter), *shorter]!r}))"
        )
        done = python("-c", code, folder=tmp_path)
        assert done.returncode == 0, done.stderr
