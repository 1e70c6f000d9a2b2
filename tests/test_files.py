"""Files are written in one way, whole or not at all; paths, locales and a lost stderr. No model is trained here."""

from __future__ import annotations

import ast
import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import GOLDENS, Run
from eso_jax import cli, console, files
from eso_jax.cli import COMMANDS
from eso_jax.config import Config
from eso_jax.errors import EsoError, RunAgain

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "eso_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])

# ---------------------------------------------------------------------------------------------------- faults

STOPS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)  # exit code 2
PASSES = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # tried again, then 75
PLACES = ("open", "write", "fsync", "replace")

Fault = Callable[..., list[int]]


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fault]:
    """fault(place, number, after=0, times=inf) makes one of PLACES of the one writer fail, after so many good calls;
    the list it gives counts the calls."""
    with monkeypatch.context() as patch:

        def fail(place: str, number: int, after: int = 0, times: float = np.inf) -> list[int]:
            calls: list[int] = []

            def check() -> None:
                calls.append(1)
                if after < len(calls) <= after + times:
                    raise OSError(number, os.strerror(number))

            class File(io.BufferedWriter):
                def write(self, data: Any) -> int:
                    check()
                    return super().write(data)

            def opened(path: Any, mode: str) -> Any:
                if place == "open":
                    check()
                return File(io.FileIO(path, "w")) if place == "write" else open(path, mode)

            def around(function: Callable[..., Any]) -> Callable[..., Any]:
                return lambda *arguments: (check(), function(*arguments))[1]

            patch.undo()
            patch.setattr(files, "PAUSE", 0.0)
            patch.setattr(files, "open", opened, raising=False)
            if place in ("fsync", "replace"):
                patch.setattr(os, place, around(getattr(os, place)))
            return calls

        yield fail


def lone(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [*STOPS, *PASSES])
def test_a_fault_leaves_the_earlier_file(place: str, number: int, fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("precious")
    calls = fault(place, number)
    passes = number in PASSES
    with pytest.raises(RunAgain if passes else EsoError, match=f"--out = '{path}': cannot be written") as error:
        files.write_whole(path, "new")
    assert os.strerror(number) in str(error.value) and "\n" not in str(error.value)
    assert len(calls) == (files.TRIES if passes else 1)
    assert path.read_text() == "precious" and lone(tmp_path) == ["x"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", PASSES)
def test_what_passes_is_tried_again(place: str, number: int, fault: Fault, tmp_path: Path) -> None:
    fault(place, number, times=files.TRIES - 1)
    files.write_whole(tmp_path / "x", files.npz(a=np.arange(3)))
    assert np.load(tmp_path / "x")["a"].tolist() == [0, 1, 2] and lone(tmp_path) == ["x"]


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSE", 0.0)
    path, real, numbers = tmp_path / "x", Path.open, [errno.EIO, errno.ESTALE]

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            if numbers:
                super().write(data[:3])
                raise OSError(numbers.pop(0), "failed")
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda path, mode, **named: File(path, "a") if mode == "ab" else real(
        path, mode, **named))
    files.append(path, "first\n", "--workdir")
    numbers += [errno.ENOSPC]
    with pytest.raises(EsoError, match="make room"):
        files.append(path, "second\n", "--workdir")
    numbers += [errno.ETIMEDOUT] * files.TRIES
    with pytest.raises(RunAgain, match="tried 3 times"):
        files.append(path, "second\n", "--workdir")
    files.append(path, "zürich\n", "--workdir")
    assert path.read_text("utf-8") == "first\nzürich\n"


def text_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in "abcdef":
        (folder / f"{name}.txt").write_text("Größe 漢字, and more of it. " * 20, "utf-8")
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    path = tmp_path_factory.mktemp("samples") / "s.npz"
    assert not cli.main(["sample", "--workdir", str(trained), "--num-samples", "2", "--steps", "2", "--record", "--out",
                         str(path)])
    return path


# A command's arguments before --out OUT, and the suffix of OUT. {w}: a work directory, {s}: its samples, {t}: texts.
WRITERS = {
    "eval": ("eval --workdir {w} --num-windows 2", ".json"),
    "score": ("score --workdir {w} --tokens {s}", ".npz"),
    "score --plan": ("score --workdir {w} --tokens {s} --plan {s}", ".npz"),
    "sample": ("sample --workdir {w} --num-samples 2 --steps 2", ".npz"),
    "view": ("view {s}", ".html"),
    "quality": ("quality --samples {s} --judge none", ".json"),
    "plan": ("plan quickstart --topology v5e:2x4", ".json"),
    "bench": ("bench sampling --preset cpu", ".json"),
    "data train-tokenizer": ("data train-tokenizer --from {t} --vocab-size 300", ".json")}


def test_every_command_that_writes_is_here() -> None:
    """export, import, train and data prepare have tests of their own below and in test_faults.py."""
    written = {command.split()[0] for command in WRITERS} | {"export", "import", "train"}
    assert written | {"check-cache"} == set(COMMANDS)  # which writes nothing


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITERS)
def test_every_command_keeps_what_was_there(command: str, fault: Fault, tmp_path: Path, run: Run, trained: Path,
                                            samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import eso_jax.aot
    from eso_jax.evaluation import throughput

    monkeypatch.setattr(eso_jax.aot, "plan", lambda *arguments: {"fits": True})
    monkeypatch.setattr(throughput, "run", lambda preset, out, **_: [files.write_whole(out, "new")])
    texts, out = text_folder(tmp_path / "texts"), tmp_path / f"out{WRITERS[command][1]}"
    arguments = [*WRITERS[command][0].format(w=trained, s=samples, t=texts).split(), "--out", out]
    out.write_text("precious")
    for place, number, code in (("write", errno.ENOSPC, 2), ("replace", errno.EIO, 75)):
        fault(place, number)
        said = run(*arguments, code=code)
        assert f"--out = '{out}" in said and f"cannot be written ({os.strerror(number)})" in said
        assert out.read_text() == "precious"
        assert {path.name for path in tmp_path.iterdir()} <= {"texts", out.name, f"{out.name}.partial"}
    fault("write", errno.ENOSPC, after=10**9)
    run(*arguments)
    assert out.read_bytes() != b"precious" and out.stat().st_size > 2


@pytest.mark.slow
@pytest.mark.parametrize("place", ["write", "replace"])
@pytest.mark.parametrize("number, code", [(errno.ENOSPC, 2), (errno.EIO, 75)])
def test_an_export_is_all_or_nothing(place: str, number: int, code: int, fault: Fault, tmp_path: Path, run: Run,
                                     trained: Path) -> None:
    for after in range(2 if place == "write" else 3):  # the weights are written by their library
        fault(place, number, after)
        said = run("export", "--workdir", trained, "--out", tmp_path / "m.safetensors", code=code)
        assert os.strerror(number) in said
        assert lone(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(errno.ENOSPC, 2), (errno.EIO, 75)])
def test_preparing_goes_on(number: int, code: int, fault: Fault, tmp_path: Path) -> None:
    """Whichever of its renames fails, the same command goes on, to the same result."""
    texts = text_folder(tmp_path / "texts")

    def prepare(out: str) -> int:
        return cli.main(["data", "prepare", "text", "--from", str(texts), "--data-dir", str(tmp_path / "data"),
                         "--tokenizer", "bytes", "--length", "16", "--held-out", "2", "--out", str(tmp_path / out)])

    assert prepare("whole") == 0
    calls = fault("replace", 0, after=10**9)
    assert prepare("counted") == 0  # without making the documents
    count = len(calls)
    assert count >= 6  # a manifest before and after each shard and split
    for after in range(count):
        fault("replace", number, after)
        assert prepare(str(after)) == code
        fault("replace", number, after=10**9)
        assert prepare(str(after)) == 0
        for path in (tmp_path / "whole").iterdir():
            assert (tmp_path / str(after) / path.name).read_bytes() == path.read_bytes()
        assert lone(tmp_path / str(after)) == lone(tmp_path / "whole")


@pytest.mark.slow
def test_an_import_is_all_or_nothing(fault: Fault, tmp_path: Path, run: Run) -> None:
    source = ["import", GOLDENS / "eso_tiny.safetensors", "--config", GOLDENS / "config.json", "--out", tmp_path / "w"]
    for place, number, code in (("write", errno.ENOSPC, 2), ("replace", errno.EIO, 75)):
        fault(place, number)
        assert os.strerror(number) in run(*source, code=code)
        assert not (tmp_path / "w").exists()
    fault("write", errno.ENOSPC, after=10**9)
    run(*source)
    assert lone(tmp_path) == ["w"]


@pytest.mark.slow
def test_libraries_that_meet_a_full_disk(tmp_path: Path) -> None:
    """ArrayRecord and safetensors write by themselves, and raise what they like."""
    texts = text_folder(tmp_path / "texts")
    code, said = shell(f"ulimit -f 2; {{e}} data prepare text --from {texts} --data-dir {tmp_path / 'data'} "
                       "--length 16 --tokenizer bytes --held-out 2")
    assert code == 2 and said.splitlines()[-1].endswith("cannot be written (File too large); make room and repeat the "
                                                        "command"), said
    for error in (RuntimeError("write() failed: No space left on device; writing x; at byte 4096"),
                  ValueError("RESOURCE_EXHAUSTED: Failed to write 3 bytes to file 7: [os_error_code='28']"),
                  ValueError("UNKNOWN: Error writing \"x/d/0\" [OS error 28: No space left on device]")):
        with pytest.raises(EsoError, match="make room"), files.writing("--out", "x"):
            raise error
    with pytest.raises(RuntimeError, match="another"), files.writing("--out", "x"):
        raise RuntimeError("another")


# ---------------------------------------------------------------------------------------------------- places


def test_links_are_followed_and_modes_kept(tmp_path: Path) -> None:
    real, link, chain = tmp_path / "real", tmp_path / "link", tmp_path / "chain"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to("real")
    chain.symlink_to(link)
    files.write_whole(chain, "new")
    assert real.read_text() == "new" and chain.is_symlink() and link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    (tmp_path / "dangling").symlink_to("later")
    files.write_whole(tmp_path / "dangling", "new")
    assert (tmp_path / "later").read_text() == "new"
    (tmp_path / "loop").symlink_to("loop")
    for act in (lambda: files.check_out(tmp_path / "loop"), lambda: files.write_whole(tmp_path / "loop", "new")):
        with pytest.raises(EsoError, match="cannot be written"):
            act()


@pytest.mark.parametrize("content", ["new", files.npz(a=np.arange(3))])
def test_what_is_no_regular_file_is_written_directly(content: Any, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.check_out(pipe)
    files.write_whole(pipe, content)
    assert os.read(end, 10**6).startswith(b"new" if content == "new" else b"PK")
    os.close(end)
    assert lone(tmp_path) == ["pipe"]
    files.write_whole("/dev/null", content)
    with pytest.raises(EsoError, match="No space left"):
        files.write_whole("/dev/full", content)


def test_a_file_that_is_open_as_stdout_is_written_directly(tmp_path: Path) -> None:
    code = "from eso_jax import files; files.check_out('/dev/stdout'); files.write_whole('/dev/stdout', 'new')"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "new" and lone(tmp_path) == ["out"]


@pytest.mark.parametrize("length", [246, 247, 255])
def test_a_name_as_long_as_may_be(length: int, tmp_path: Path) -> None:
    files.write_whole(tmp_path / ("x" * length), "new")
    assert lone(tmp_path) == ["x" * length]


def test_out_is_checked_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, message in ((tmp_path / "no" / "x", "does not exist"), (tmp_path / "folder", "is a folder"),
                          (tmp_path / ("y" * 300), "File name too long")):
        with pytest.raises(EsoError, match=message):
            files.check_out(path)


@pytest.mark.parametrize("value, message", [
    ("gs://bucket/run", "no folder; mount the bucket .gcsfuse. and give the folder"), ("s3://b/x", "mount-s3"),
    ("gs:/bucket/run", "no folder"),  # as a Path has it
    ("hdfs://host/x", "no folder"), ("https://x.org/a", "no folder"), ("NAME=gs://b/t.json", "no folder"),
    ("a\udcff", "is not UTF-8"), ("a/" + "x" * 300, "more than 255 bytes"), ("é" * 128, "more than 255 bytes")])
def test_paths_that_nothing_could_open(value: str, message: str) -> None:
    with pytest.raises(EsoError, match=message):
        files.local(value, "--workdir")
    if value.startswith("gs://"):
        for field in ("data.source", "data.tokenizer", "train.start_from"):
            with pytest.raises(EsoError, match=f"^{field} = '{value}': no folder"):
                Config().override(f"{field}={value}")


def test_paths_that_are_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for value, expected in (("~/w", "/home/me/w"), ("gpt2=~/t.json", "gpt2=/home/me/t.json"), ("~", "/home/me")):
        assert files.local(value, "x") == expected
    for value in ("a~b", "paper.py:owt/esolm_1", "new\nline", "C:/x", "openai-community/gpt2"):
        assert files.local(value, "x") == value
    assert Config().override("data.source=~/text").data.source == "/home/me/text"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gs:").mkdir()
    assert files.local("gs:/", "x") == "gs:/"  # it is there


@pytest.mark.parametrize("command", [
    "train gs://b/e.py --workdir w", "train quickstart --workdir gs://b/w", "train quickstart --workdir w "
    "data.source=gs://b/t", "eval --workdir=gs://b/w", "eval --workdir w --source gs://b/t", "sample --workdir w --out "
    "gs://b/s.npz", "score --workdir w --out x --tokens gs://b/t.npy", "quality --out x --samples gs://b/s.npz",
    "import gs://b/m.ckpt --out w", "import m.ckpt --out w --tokenizer gpt2=gs://b/t.json", "export --workdir w --out "
    "gs://b/m.safetensors", "plan quickstart --topology v5e:2x4 --out gs://b/p.json", "check-cache --workdir gs://b/w",
    "data prepare text --tokenizer bytes --length 8 --from a gs://b/t", "data prepare text --length 8 --tokenizer b "
    "--data-dir gs://b/t", "data check gs://b/d", "data train-tokenizer --from gs://b/t --vocab-size 300 --out t",
    "bench sampling --preset cpu --out gs://b/x.json"])
def test_an_address_is_refused_before_any_work(command: str, run: Run, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "gs://b/" in (said := run(*command.split(), code=2)) and "no folder; mount the bucket (gcsfuse)" in said
    assert lone(tmp_path) == []


# ------------------------------------------------------------------------------------------ the locale, the one way

# Files that are opened for writing elsewhere: they are locks, marks, or lead nowhere.
OPENED = {("eso_jax/run/workdir.py", "ab"), ("eso_jax/data/builder.py", "w"), ("eso_jax/console.py", "w"),
          ("experiments/bench_data.py", "w")}  # a temporary file
WRITE = {"write_text", "write_bytes", "savez", "savez_compressed", "tofile"}


def test_text_is_utf_8_and_files_are_written_in_one_way() -> None:
    """No `open`, `read_text` or `write_text` without an encoding; and nothing but files.py writes."""
    found = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            named = {keyword.arg for keyword in node.keywords}
            module = getattr(getattr(node.func, "value", None), "id", "")
            where = f"{name}:{node.lineno} {function}"
            if function == "open" and module not in ("os", "tarfile", "zipfile", "gzip", "bz2", "lzma"):
                modes = [word.value for one in [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
                         for word in ast.walk(one) if isinstance(word, ast.Constant) and isinstance(word.value, str)
                         and 0 < len(word.value) <= 3 and set(word.value) <= set("rwabxt+")]
                if not any("b" in mode for mode in modes) and "encoding" not in named:
                    found.append(f"{where}: no encoding")
                writes = [mode for mode in modes if set(mode) & set("wax+")]
                if name != "eso_jax/files.py" and any((name, mode) not in OPENED for mode in writes):
                    found.append(f"{where}: writes")
            if function in ("read_text", "write_text") and "encoding" not in named and not node.args:
                found.append(f"{where}: no encoding")
            if "text" in named and module == "subprocess" and "encoding" not in named:
                found.append(f"{where}: no encoding")
            direct = function in WRITE or function == "savefig" and not (
                node.args and isinstance(node.args[0], ast.Name) and node.args[0].id == "file")
            if direct and name != "eso_jax/files.py":
                found.append(f"{where}: writes")
    assert not found, "\n".join(found)


STRICT = """
import shlex, sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="eso_jax")
from eso_jax.cli import main
for command in sys.argv[1:]:
    assert main(shlex.split(command)) == 0, command
"""


@pytest.mark.slow
def test_the_locale_does_not_matter(tmp_path: Path) -> None:
    """In a locale of ASCII, with Python's warnings of an encoding that is the locale's: text is UTF-8 all the way."""
    text_folder(tmp_path / "texts")
    (tmp_path / "e.py").write_text(
        "from eso_jax import Config  # Größe\nconfig = Config().override(*'model.width=8 model.layers=1 model.heads=2 "
        "model.cond_dim=0 family.name=ar model.length=8 train.steps=1 train.batch_size=2 train.warmup=0 "
        "train.eval_windows=2 model.dropout=0 data.source=data/text data.tokenizer=t.json model.vocab_size=282'"
        ".split())\n", "utf-8")
    commands = ["data train-tokenizer --from texts --vocab-size 300 --out t.json",
                "data prepare text --from texts --data-dir data --tokenizer t.json --length 8 --held-out 2",
                "train e.py --workdir w", "sample --workdir w --out s.npz", "export --workdir w --out m.safetensors"]
    ascii_alone = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONWARNDEFAULTENCODING": "1"}
    done = subprocess.run([sys.executable, "-c", STRICT, *commands], capture_output=True, encoding="utf-8",
                          cwd=tmp_path, env={**os.environ, **ascii_alone})
    assert done.returncode == 0, done.stderr
    learned = (tmp_path / "t.json").read_text("utf-8")
    assert "ÃŁ" in learned  # the two bytes of ß, as a byte-level vocabulary writes them
    for name in ("w/tokenizer.json", "m.tokenizer.json", "data/text/tokenizer.json"):
        assert (tmp_path / name).read_text("utf-8") == learned


# ---------------------------------------------------------------------------------------------------- the console


def shell(command: str, **variables: str) -> tuple[int, str]:
    """The exit code of a command in bash, of the first of a pipe, and all that came out of it."""
    eso_jax = f"{sys.executable} -m eso_jax"
    done = subprocess.run(["bash", "-c", f"{command.format(e=eso_jax)}; exit ${{PIPESTATUS[0]}}"], encoding="utf-8",
                          env={**os.environ, "PYTHONUNBUFFERED": "", **variables}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command, code, said", [
    ("{e} --version | head -1", 0, "eso-jax "), ("{e} train nowhere.py --workdir w 2>/dev/full", 2, ""),
    ("{e} --version >/dev/full", 2, "eso-jax: error: stdout: cannot be written (No space left on device)"),
    ("{e} train nowhere.py --workdir w 0<&- >&- 2>&-", 2, "")])
def test_where_nobody_listens(command: str, code: int, said: str) -> None:
    found, output = shell(command)
    assert (found, "Traceback" in output) == (code, False), output
    assert output.startswith(said) and len(output.splitlines()) == bool(said), output


class Deaf(io.StringIO):
    """A stream whose other end is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [None, Deaf()])
def test_speaking_never_fails(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    console.say("x")
    console.tell("x")
    assert console.is_terminal() == (stream is not None)
    if stream is None:
        assert list(console.bar(range(3), desc="x")) == [0, 1, 2]
        with console.streams():
            print("x", file=sys.stderr)
        sys.stderr.close()


def test_a_crash_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where stdout is lost, which by itself is exit code 2, and nothing if a reader had enough."""
    class Full(io.StringIO):
        number = errno.ENOSPC

        def flush(self) -> None:
            raise OSError(self.number, "lost")

        def fileno(self) -> int:
            return sink.fileno()

    with open(os.devnull, "w", encoding="utf-8") as sink:
        monkeypatch.setattr(sys, "stdout", Full())
        with pytest.raises(SystemExit, match="2"), console.streams():
            pass
        with pytest.raises(ZeroDivisionError), console.streams():
            1 / 0
        monkeypatch.setattr(Full, "number", errno.EPIPE)
        with console.streams():
            pass


def test_an_error_of_the_file_system_is_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Wherever it comes from; one that says nothing of a file is a mistake of ours, and is shown whole."""
    def fail(number: int) -> Callable[[], None]:
        def action() -> None:
            raise OSError(number, os.strerror(number), "some/file")
        return action

    for number, code in ((errno.EACCES, 2), (errno.EROFS, 2), (errno.ENAMETOOLONG, 2), (errno.EIO, 75),
                         (errno.ESTALE, 75), (errno.ETIMEDOUT, 75)):
        assert cli.exit_code_of(fail(number)) == code
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and f"'some/file': {os.strerror(number)}" in said
    with pytest.raises(OSError):
        cli.exit_code_of(lambda: (_ for _ in ()).throw(OSError("no number")))
