"""The command line: `eso-jax COMMAND`, the same as `python -m eso_jax COMMAND`.

People read stderr; machines read the file named by --out. A mistake in the input is one line and exit code 2.
"""

# A command is a module of this package: its docstring is its summary, EXAMPLE an example, `add_arguments` declares its
# options and `run` does it; with a USAGE of its own it takes config overrides as well.

from __future__ import annotations

import argparse
import difflib
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import jax

from eso_jax import __version__
from eso_jax.cli import bench, check_cache, data, evaluate, export, import_, plan, quality, sample, score, train, view
from eso_jax.cli.files import read_plan
from eso_jax.config import fields
from eso_jax.console import ending, streams, tell
from eso_jax.errors import EsoError, RunAgain
from eso_jax.files import local

__all__ = ["exit_code_of", "keep_compilations", "main", "read_plan"]

GOES_ON = ("interrupted; by the same command, training goes on from its last checkpoint, scoring from its last orders "
           "and preparing from its last shard")
# What makes a work directory and a prepared folder, and the files in it that no command may write over.
KEPT = {"checkpoints": ("config.json", "tokenizer.json", "data.json", "metrics.jsonl", "run.lock"),
        "manifest.json": ("manifest.json", "tokenizer.json")}
COMMANDS: dict[str, ModuleType] = {
    "train": train, "eval": evaluate, "score": score, "sample": sample, "view": view, "quality": quality,
    "check-cache": check_cache, "bench": bench, "plan": plan, "data": data, "import": import_, "export": export}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    with streams():
        parser = _parser()
        arguments, rest = parser.parse_known_args(argv)
        # argparse cannot mix options with an open list of arguments, so overrides are what is left over.
        takes_overrides = hasattr(arguments.command, "USAGE")
        if unknown := [argument for argument in rest if not takes_overrides or argument.startswith("-")]:
            hint = "; write overrides as section.field=value, without --" if takes_overrides else ""
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        arguments.overrides = rest
        keep_compilations()
        return exit_code_of(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    """Runs the command. An error about a field whose value an option gave names the option."""
    try:
        _check_out(arguments)
        arguments.command.run(arguments)
    except EsoError as error:
        field, _, rest = str(error).partition(" = ")
        section, _, name = field.rpartition(".")
        value = getattr(arguments, name, None) if section in ("", "data", "model", "family") else None
        if value is None or not rest.startswith(f"{value!r}:"):
            raise
        raise EsoError(f"--{name.replace('_', '-')} = {rest}") from error


def _check_out(arguments: argparse.Namespace) -> None:
    """Raises an EsoError if --out is also the file of another option, one that is read or written; or if it or --html
    is a file that a work directory or a prepared folder needs."""
    for option in ("out", "html"):
        if isinstance(path := getattr(arguments, option, None), str):
            _check_kept(f"--{option}", path)
    out = getattr(arguments, "out", None)
    if not isinstance(out, str):
        return
    for name, value in vars(arguments).items():
        paths = value if isinstance(value, list) else [value]
        if name != "out" and (name == "html" or os.path.isfile(out)) and any(
                isinstance(path, str) and os.path.realpath(path) == os.path.realpath(out) for path in paths):
            raise EsoError(f"--out = {out!r}: is given for {name} too, and would be overwritten; give another name")


def _check_kept(option: str, path: str) -> None:
    folder, name = os.path.split(os.path.realpath(path))
    for sign, kept in KEPT.items():
        if name in kept and os.path.exists(os.path.join(folder, sign)):
            raise EsoError(f"{option} = {path!r}: is a file that {folder!r} needs, and would be overwritten; give "
                           "another name")


def exit_code_of(action: Callable[[], None]) -> int:
    """Runs an action and returns the exit code. A user's mistake, an interruption or a storage error is printed in one
    line."""
    with streams():
        try:
            action()
        except (EsoError, RunAgain, OSError, KeyboardInterrupt) as error:
            code, words = ending(error)
            if code == 1:
                raise
            if code == 130:
                words = str(error) or GOES_ON
            tell(f"eso-jax: {'error: ' if code == 2 else ''}{words}")
            return code
        return 0


def keep_compilations() -> None:
    """Keeps compiled programs on disk for the next run, unless the user has set JAX's own JAX_COMPILATION_CACHE_DIR or
    JAX_ENABLE_COMPILATION_CACHE."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "eso-jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line. Options without a type are paths: ~ is expanded, addresses are refused."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        kind = options.get("type", str)
        name = names[-1] if names[-1].startswith("-") else options.get("metavar", names[-1])

        def read(text: str) -> Any:
            try:
                return kind(local(text, name))
            except EsoError as error:  # argparse would print another message
                self.exit(2, f"eso-jax: error: {error}\n")

        if kind in (str, Path) and not {"action", "choices"} & options.keys():
            options["type"] = read
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        wrong, _, choices = message.partition("' (choose from ")  # argparse's words for a value that is no choice
        close = difflib.get_close_matches(wrong.rpartition("'")[2], re.findall(r"[\w-]+", choices), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: error: {message}{hint} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="eso-jax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version",
                        version=f"eso-jax {__version__} (jax {jax.__version__}, Python {platform.python_version()})")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        usage, epilog = getattr(module, "USAGE", None), f"example: {module.EXAMPLE}"
        command = commands.add_parser(name, help=module.__doc__, description=module.__doc__, usage=usage,
                                      epilog=f"{epilog}\n\n{fields()}" if usage else epilog,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(command)
        command.set_defaults(command=module)
    return parser
