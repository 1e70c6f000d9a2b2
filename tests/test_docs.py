"""README, CONTRIBUTING and docs/: what they show is run, where they point is there, what they name exists."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import Run, renamed
from eso_jax import cli
from eso_jax.config import from_file
from eso_jax.decoding import plan
from eso_jax.model import attention

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"^# not run: \S", re.MULTILINE)
# In place of each program: what bash makes of the line, word by word.
NOTE = '#!/bin/sh\nprintf "%s\\0" "${0##*/}" "$@" >>"$CALLS"; printf "\\001" >>"$CALLS"\n'
PROGRAMS = ("eso-jax", "python", "pip", "bash", "sbatch")
SMALL = {"model.length": "32", "model.width": "16", "model.layers": "1", "model.heads": "2", "model.cond_dim": "8",
         "train.batch_size": "8", "train.warmup": "2", "train.eval_windows": "8"}


def blocks(page: str) -> list[tuple[str, str]]:
    """The (language, text) of the blocks of a page that are to be run."""
    return [(kind, text) for kind, text in FENCE.findall((ROOT / page).read_text("utf-8")) if not NOT_RUN.search(text)]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the texts `my_texts/` and the work directory `runs/quickstart`."""
    from eso_jax.run.train import train

    folder = tmp_path_factory.mktemp("learned")
    (folder / "my_texts").mkdir()
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:130]:
        (folder / "my_texts" / path.name).write_text(path.read_text("utf-8")[:4000], "utf-8")
    small = {**SMALL, "data.source": str(folder / "my_texts"), "train.steps": "4"}
    train(from_file("quickstart").override(*map("=".join, small.items())), folder / "runs" / "quickstart")
    return folder


@pytest.fixture
def scratch(learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clone in which the quickstart has run, entered."""
    shutil.copytree(learned, tmp_path, dirs_exist_ok=True)
    for name in ("experiments", "launch", "tests", "eso_jax", "setup.cfg"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in (".venv/bin/activate", "programs/calls"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for name in PROGRAMS:
        (tmp_path / "programs" / name).write_text(NOTE)
        (tmp_path / "programs" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attention, "BACKENDS", attention.BACKENDS)  # what a page adds is forgotten
    policies = dict(plan.POLICIES)
    with renamed(""):
        yield tmp_path
    plan.POLICIES.clear()
    plan.POLICIES.update(policies)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_block_runs(page: str, scratch: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, word for word, but for the sizes of training."""
    module = ModuleType("page")  # whose names its next block of Python knows
    monkeypatch.setitem(sys.modules, "page", module)
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, page, "exec"), module.__dict__)
            continue
        for name, *arguments in spoken(text, scratch):
            {"eso-jax": command, "python": script, "pip": install, "bash": launched,
             "sbatch": launched}[name](run, arguments)


@pytest.mark.slow
def test_the_notebook_runs(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell, with a small model that is trained for two steps."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    small = [f"{name}={value}" for name, value in {**SMALL, "data.source": "my_texts"}.items()]
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in notebook_cells():
        exec("".join(cell["source"]).replace("STEPS = 900", "STEPS = 2").replace(
            '"train.log_every=50")', f'"train.log_every=50", *{small})'), names)
    assert names["config"].model.width == int(SMALL["model.width"])


def notebook_cells() -> list[dict[str, Any]]:
    """Those of code."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_shows_one_whole_run() -> None:
    """Of all cells in their order, with pictures; no error, no warning, no path or time of the machine that ran it."""
    cells = notebook_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, 1 + len(cells)))
    assert not any(cell["metadata"] for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data", "execute_result"}
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    for output in outputs:
        shown = "".join(output["text"] if "text" in output else output["data"]["text/plain"])
        assert not re.search(r"warning|traceback|\r|\x1b|(?<![\w/])/\w+/\w", shown, re.IGNORECASE), shown
        assert len(shown.splitlines()) < 50, shown
    assert (ROOT / "docs" / "tour.ipynb").stat().st_size < 300_000


def spoken(text: str, folder: Path) -> list[list[str]]:
    """The programs that a block calls, with their arguments."""
    calls = folder / "programs" / "calls"
    calls.write_text("")
    path = f"{folder / 'programs'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["/bin/bash", "-euo", "pipefail", "-c", text], env={**os.environ, "PATH": path,
                          "CALLS": str(calls)}, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return [call.split("\0")[:-1] for call in calls.read_text("utf-8").split("\1")[:-1]]


def command(run: Run, arguments: list[str]) -> None:
    """A command of ours, in this process; a training for two steps more, of a small model, where the page does not say
    otherwise."""
    if arguments[0] == "train":
        said = dict(a.split("=", 1) for a in arguments if "=" in a and a.split("=")[0] != "train.steps")
        small = {"data.source": "my_texts", **SMALL, **said}
        if "data/" in small["data.source"]:  # prepared: it says
            del small["model.length"]
        goes_on = arguments[1].endswith("config.json")
        arguments = [a for a in arguments if "=" not in a] + ([] if goes_on else [*map("=".join, small.items())])
        arguments.append(f"train.steps={4 if goes_on else 2}")
    run(*arguments)


def script(run: Run, arguments: list[str]) -> None:
    """One of our scripts, or a line of Python, in this process."""
    if arguments[0] == "-c":
        return exec(compile(arguments[1], "-c", "exec"), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        patch.syspath_prepend(str(Path(arguments[0]).resolve().parent))
        with contextlib.suppress(SystemExit):
            runpy.run_path(arguments[0], run_name="__main__")


def install(run: Run, arguments: list[str]) -> None:
    """An installation: there is such an extra."""
    wanted = re.fullmatch(r"\.\[(.+)\]", arguments[-1])
    assert wanted, arguments
    assert set(wanted[1].split(",")) <= extras()


def launched(run: Run, arguments: list[str]) -> None:
    """A launch script says what it would do. (sbatch's own options come first.)"""
    while arguments[0].startswith("-"):
        del arguments[0]
    assert arguments[0].startswith("launch/"), arguments
    if arguments[0] == "launch/install.sh":
        return install(run, [f".[{arguments[1]}]"])
    done = subprocess.run(["bash", arguments[0], "--dry-run", *arguments[1:]], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0 and done.stdout, done.stderr


def extras() -> set[str]:
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return set(setup["options.extras_require"])


def test_blocks_that_are_not_run_say_why_and_are_few() -> None:
    texts = [text for page in PAGES for _, text in FENCE.findall((ROOT / page).read_text("utf-8"))]
    left_out = [text for text in texts if NOT_RUN.search(text)]
    assert len(left_out) < len(texts) / 3


@pytest.mark.parametrize("page", PAGES)
def test_no_dead_link(page: str) -> None:
    """Every relative link leads to a file, and its anchor to a heading there."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page}: {target}; there are {sorted(anchors(there))}"


def anchors(page: Path) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_names_every_command() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 130
    named = {name for line in lines if line.startswith("| `") for name in re.findall(r"`([\w-]+)`", line.split("|")[1])}
    assert set(cli.COMMANDS) <= named, set(cli.COMMANDS) - named


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text("utf-8")))
    assert {page for page in PAGES if page != "README.md"} <= linked


def test_names_of_code_exist() -> None:
    """`path:name` in a page is a name of that file."""
    found = 0
    for page in PAGES:
        for path, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / page).read_text("utf-8")):
            file = next((f for f in (ROOT / path, ROOT / "eso_jax" / path) if f.is_file()), None)
            if file is None or (name.islower() and "/" in name):
                assert path.startswith("FILE"), f"{page}: {path}"
                continue
            found += 1
            assert defines(file, name), f"{page}: {path}:{name}"
    assert found >= 30


READING = (ROOT / "docs" / "reading.md").read_text("utf-8")


def test_the_guide_to_the_code_names_every_file() -> None:
    """Each module stands in the table of its package."""
    named = set()
    for package, table in re.findall(r"^### [^`\n]*`(\w+)/`.*?\n(.*?)(?=^##)", READING, re.MULTILINE | re.DOTALL):
        folder = ROOT / "eso_jax" / ("" if package == "eso_jax" else package)
        named |= {folder / name for name in re.findall(r"`(\w+\.py)`", table)}
    modules = {path for path in (ROOT / "eso_jax").rglob("*.py") if path.name != "__init__.py"}
    assert modules <= named, sorted(str(path.relative_to(ROOT)) for path in modules - named)
    assert all(path.is_file() for path in named), sorted(str(path) for path in named if not path.is_file())


def test_the_walks_visit_functions_that_exist() -> None:
    """A line of a drawing: a number, a file, its functions, then what they do."""
    visits = re.findall(r"^ {1,2}\d+\*? +([\w/]+\.py) +([\w, ]+?)(?: \.\.\.)?(?: {2,}.*)?$", READING, re.MULTILINE)
    assert len(visits) > 50
    for path, names in visits:
        for name in names.split(", "):
            assert defines(ROOT / "eso_jax" / path, name) or defines(ROOT / "eso_jax" / path, f"*.{name}"), (path, name)


def defines(file: Path, name: str) -> bool:
    """Whether a file defines the function or class `name`, or `Class.name`; `*.name`: of any class."""
    import ast

    body = ast.parse(file.read_text("utf-8")).body
    for part in name.split("."):
        inside = [node for node in body if getattr(node, "name", None) == part
                  or part == "*" and isinstance(node, ast.ClassDef)]
        if not inside:
            return False
        body = [node for each in inside for node in getattr(each, "body", [])]
    return True


def test_the_interface_says_shapes_and_errors() -> None:
    """Every public function from Python, of a model and of a family: a docstring; shapes in it or in
    the types of its arrays; no argument in it that there is not."""
    import inspect

    import eso_jax
    from eso_jax import families, likelihood
    from eso_jax.families.base import Family

    public = {name: getattr(eso_jax, name) for name in eso_jax.__all__}
    for owner in (eso_jax.Model, Family, likelihood, families):
        public |= {f"{owner.__name__}.{name}": member for name, member in vars(owner).items()
                   if not name.startswith("_") and inspect.isfunction(inspect.unwrap(member))
                   and member.__module__ == getattr(owner, "__module__", owner.__name__)}
    assert len(public) > 35
    for name, member in public.items():
        text = inspect.getdoc(member) or ""
        assert text, name
        if inspect.isclass(member):
            continue
        signature = inspect.signature(inspect.unwrap(member))
        plain = [p for p in (*signature.parameters.values(), signature.return_annotation) if p is not None
                 and str(getattr(p, "annotation", p)) in ("np.ndarray", "Array")]
        assert not plain or re.search(r"\[[A-Z]+(, [A-Z]+)*\]", text), f"{name}: arrays without shapes"
        listed = re.search(r"^Args:\n((?:  .*\n?|\n)*)", text, re.MULTILINE)
        named = re.findall(r"^  ((?:\w+, )*\w+): ", listed[1] if listed else "", re.MULTILINE)
        assert {each for found in named for each in found.split(", ")} <= set(signature.parameters), name
    for name in ("Model.sample", "eso_jax.likelihood.log_prob", "eso_jax.likelihood.conditionals", "load"):
        assert "Raises:" in inspect.getdoc(public[name]), name
