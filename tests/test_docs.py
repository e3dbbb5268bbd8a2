"""README and docs name only what there is: links, files, modules, presets, flags, make targets; and their code runs."""

from __future__ import annotations

import ast
import functools
import importlib
import io
import re
import runpy
import shlex
from contextlib import redirect_stdout
from functools import reduce
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from pcl_fast.config import PRESETS
from pcl_fast.evaluation.tasks import Task

ROOT = Path(__file__).parents[1]
README, METHODS = ROOT / "README.md", ROOT / "docs" / "methods.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("bench", "docs", "examples", "kernels", "pcl_fast", "requirements", "tests")  # with files of the repository
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
FLAG = re.compile(r"--[a-z][a-z0-9.-]*")
MODULE = re.compile(r"-m (pcl_fast[\w.]*)")

# Another test may have imported the module that a command is.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^ {4}.*\n", "", FENCE.sub("", page.read_text()), flags=re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[str]:
    """Lines of blocks of code in no language, and what stands in backticks."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    return lines + SPAN.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def flags_of(module: str, *positional: str) -> frozenset[str]:
    """What `python -m module positional --help` lists."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with (
        mock.patch("sys.argv", [module, *positional, "--help"]),
        mock.patch.dict("os.environ", {"COLUMNS": "80"}),  # narrow, so that boxes of options do not stand side by side
        redirect_stdout(printed),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not ended.value.code
    printed.seek(0)
    text = printed.read()
    # Given a subcommand that there is not, tyro lists those that there are.
    assert all(word in PRESETS or word in text for word in positional), f"{module} does not take {positional}"
    return frozenset(flag for line in re.findall(r"^│ -.*$", text, re.MULTILINE) for flag in FLAG.findall(line))


def flags_of_tasks() -> frozenset[str]:
    return frozenset().union(*(flags_of("pcl_fast.evaluate", name) for name in Task.named))


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_the_readme_links_to_every_page():
    text = README.read_text()
    assert all(f"(docs/{page.name})" in text for page in PAGES[1:])


@each_page
def test_files_exist(page):
    for span in SPAN.findall(prose(page)):
        is_ours = span.startswith(tuple(f"{folder}/" for folder in FOLDERS)) or span.endswith((".py", ".sh", ".md"))
        if is_ours and re.fullmatch(r"[\w./*-]+", span):
            assert any(ROOT.glob(span.rstrip("/"))), f"{page.name} names {span}"


@each_page
def test_commands_are_ours(page):
    """Module, preset or subcommand, and flags. What stands before the last `-m pcl_fast`, a launcher's, is not looked
    at.
    """
    for command in commands(page):
        for module in list(MODULE.finditer(command))[-1:]:
            arguments = shlex.split(command[module.end() :])
            first = [argument for argument in arguments[:1] if not argument.startswith("-")]
            # A word in capitals stands for others, and a path is none of the command's words.
            words = [argument for argument in first if not argument.isupper() and "/" not in argument]
            known = flags_of(module[1], *words)
            if "TASK" in first:
                known |= flags_of_tasks()
            assert set(FLAG.findall(" ".join(arguments))) <= known, f"{page.name}: {command}"


@each_page
def test_flags_are_ours(page):
    """Those that stand by themselves, in backticks."""
    known = flags_of("pcl_fast.train", "pcl_v2") | flags_of("pcl_fast.plan", "pcl_v2") | flags_of_tasks()
    known |= flags_of("pcl_fast.export") | flags_of("pcl_fast.embed") | flags_of("pcl_fast.explore")
    for span in SPAN.findall(prose(page)):
        if span.startswith("--"):
            assert FLAG.match(span)[0] in known, f"{page.name} names {span}"
    assert not FLAG.findall(SPAN.sub("", prose(page)).replace("<!--", "")), "a flag without backticks"


@each_page
def test_make_has_the_targets(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for command in commands(page) for target in re.findall(r"\bmake ([a-z][\w-]*)", command)}
    assert named <= targets, f"{page.name} names {named - targets}"


@pytest.mark.parametrize("page", [README, METHODS], ids=lambda page: page.name)
def test_every_preset_is_in_the_tables(page):
    named = set(SPAN.findall("".join(re.findall(r"^\|.*\n", page.read_text(), re.MULTILINE))))
    assert set(PRESETS) <= named


def test_recipes_are_those_of_the_presets():
    """The table of methods.md, value by value; "-" is a value that the preset does not use."""
    table = METHODS.read_text().partition("\n| flag ")[2].partition("\n\n")[0]
    presets, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines())
    for flag, *values in rows:
        field = flag.removeprefix("--").replace("-", "_").split(".")
        found = [as_text(reduce(getattr, field, PRESETS[preset][1])) for preset in presets]
        assert values == [text if value != "-" else "-" for value, text in zip(values, found, strict=True)], flag


def as_text(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


@each_page
def test_what_code_imports_exists(page):
    for node in (node for code in blocks(page, "python") for node in ast.walk(ast.parse(code))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), f"{page.name}: {ast.unparse(node)}"


def test_the_readme_s_code_runs():
    query = torch.randn(8, 16, requires_grad=True)
    given = {
        "features": F.normalize(torch.randn(2500, 16), dim=1),
        "query": F.normalize(query, dim=1),
        "key": F.normalize(torch.randn(8, 16), dim=1),
        "queue": F.normalize(torch.randn(64, 16), dim=1),
        "index": torch.randint(2500, (8,)),
        "step": 3,
    }
    exec(blocks(README, "python")[0], given)
    assert [len(granularity.centroids) for granularity in given["prototypes"]] == [1000, 2000]
    assert query.grad.abs().sum() > 0
