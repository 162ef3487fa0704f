"""What the documents say can be typed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from havoc_core.adapt.tasks.task import load_task
from havoc_core.bench.judge.gate import EXIT_CODES
from havoc_core.bench.judge.targets import read_targets
from havoc_core.cli import VERBS, main, parse
from havoc_core.config import Recipe
from havoc_core.errors import HavocError

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(page: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def commands() -> list[tuple[str, str]]:
    lines = [(page, line) for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return [(str(page.relative_to(ROOT)), line) for page, line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(("page", "line"), commands(), ids=[f"{page}: {line}" for page, line in commands()])
def test_every_command_is_right(page: str, line: str) -> None:
    """Commands of `havoc` parse, words of `make` and options of our scripts and pytest plugin exist;
    beside them few programs.
    """
    for command in line.split(" && "):
        check_command(page, command)


def check_command(page: str, command: str) -> None:
    program, *words = shlex.split(command, comments=True)
    if program == "havoc":
        assert parse(words).verb == words[0]
    elif program == "make":
        assert {word for word in words if not re.fullmatch(r"[A-Z]+=\S+", word)} <= TARGETS
    elif program == "pytest":
        options = (ROOT / "bench" / "pytest_plugin.py").read_text()
        assert all(f'"{word}"' in options for word in words if word.startswith("-"))
    elif words[0].endswith(".py"):
        assert Path(program).name in {"python", "python3"}
        help_text = subprocess.check_output([sys.executable, ROOT / words[0], "--help"], text=True)
        assert [word for word in words if word.startswith("--") and word not in help_text] == []
    else:
        allowed = {("pip", "install"), ("pip", "download"), ("python", "-m")}
        allowed |= {("dask", "scheduler"), ("openssl", "req"), ("openssl", "x509")}
        assert program == "lm_eval" or (program, words[0]) in allowed, page


def test_the_readme_shows_every_verb() -> None:
    """The README is a complete tour."""
    shown = {shlex.split(line)[1] for page, line in commands() if page == "README.md" and line.startswith("havoc")}
    assert shown == {verb.name for verb in VERBS}


def test_the_readme_shows_the_tree() -> None:
    """Everything the tree names exists."""
    (tree,) = [block for block in blocks(ROOT / "README.md", "") if "model/" in block]
    assert [name for name in re.findall(r"^(\S+)", tree, re.MULTILINE) if not (ROOT / name).exists()] == []


def test_the_readme_tells_every_exit_code() -> None:
    """Those of the verdicts and of the errors, no other."""
    rows = re.findall(r"^\| (\d) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    kinds = (HavocError, *HavocError.__subclasses__())
    assert [int(code) for code in rows] == sorted([*EXIT_CODES.values(), *(kind.exit_code for kind in kinds)])


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    """Links between our own pages and files are not broken."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


MARKS = re.compile(r"^(<<<<<<< .*|=======|>>>>>>> .*)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_no_page_holds_two_texts_of_a_merge(page: Path) -> None:
    """The marks that a merge leaves around what it could not join do not reach a reader."""
    assert MARKS.findall("<<<<<<< HEAD\none\n=======\nother\n>>>>>>> branch\n") == [
        "<<<<<<< HEAD",
        "=======",
        ">>>>>>> branch",
    ]
    assert MARKS.findall(page.read_text()) == []


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{place}")
        for page in PAGES
        for place, block in enumerate(blocks(page, "toml"))
    ],
)
def test_every_recipe_is_valid(block: str, tmp_path: Path) -> None:
    """A recipe that is shown can be run, and a task or targets file that is shown can be read."""
    if ".limits]]" in block:
        (tmp_path / "own.toml").write_text(block)
        assert read_targets(tmp_path / "own.toml")
    elif block.startswith("kind = "):
        (tmp_path / "own-task.toml").write_text(block)
        assert load_task(tmp_path / "own-task.toml", few_shot=0).name == "own-task"
    else:
        assert Recipe.model_validate(tomllib.loads(block)).experts.tasks


def test_the_example_task_is_scored_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The rows and the task of docs/tasks.md, saved under the names it gives, and the command below them."""
    page = ROOT / "docs" / "tasks.md"
    rows, task = blocks(page, "jsonl")[0], blocks(page, "toml")[0]
    (tmp_path / "capitals.jsonl").write_text(rows)
    (tmp_path / "capitals.toml").write_text(task)
    monkeypatch.chdir(tmp_path)
    (line,) = blocks(page, "sh")[0].splitlines()
    assert main([*shlex.split(line)[1:], "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)["accuracy"]["capitals"]
    assert found["num_rows"] == len(rows.splitlines())
    assert set(found["metrics"]) == {"acc", "acc_norm"}


def test_the_python_of_the_readme_runs() -> None:
    """What a reader copies first works, and prints what it says it prints."""
    (code,) = blocks(ROOT / "README.md", "python")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.splitlines() == re.findall(r"print\(.*# (.*)$", code, re.MULTILINE)


def test_every_decision_is_in_the_index() -> None:
    """No page is lost, and the numbers have no gap."""
    index = (ROOT / "docs" / "README.md").read_text()
    pages = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert [name for name in pages if name not in index] == []
    assert [int(name[:4]) for name in pages] == list(range(1, len(pages) + 1))
