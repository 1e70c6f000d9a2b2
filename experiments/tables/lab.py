"""What the scripts for tables and figures share: runs at a scale, measurements kept beside them, and reports.

--scale paper is the paper's own setting. --scale smoke walks through the same on a laptop (see `smoke`); there the
corpora are replaced by one embedded text, so that an LM1B run and an OpenWebText run that differ in nothing else are
one and the same. A report names the text that ours were trained on, and shows such a run once.

Whatever takes long is kept in the run's work directory (W/measured/), with where and when it was measured, and not done
again: an interrupted script goes on where it was. It is kept under a hash of all that it depends on beside the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eso_jax import load
from eso_jax.cli import exit_code_of, keep_compilations
from eso_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from eso_jax.console import say
from eso_jax.data import evenly_spaced, windows_of
from eso_jax.engine.model import Model
from eso_jax.evaluation.diversity import Estimate
from eso_jax.evaluation.picture import picture
from eso_jax.evaluation.throughput import describe_machine
from eso_jax.files import as_json, write_whole
from eso_jax.run import checkpoint
from eso_jax.run.train import train

EXPERIMENTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXPERIMENTS))

import paper  # noqa: E402, beside the folder of this file

RUNS = paper.RUNS
PAPER_RUNS = Path("runs/paper")  # where the runs have their work directories
SMOKE_STEPS = 1000  # of the paper's 250K on OpenWebText and 1M on LM1B; half of it for the 500K of Table 4
AS_ABOVE = "as above"  # instead of a number: its run is the one of the table above
NOTE_AS_ABOVE = ("As above: on one text, a recipe of OpenWebText's that is LM1B's is one and the same run, and what is "
                 "said of it is said once.")
# What a run is trained on, by its data.source.
CORPORA = {"stdlib": "Python's own source text", "data/lm1b": "LM1B", "data/openwebtext": "OpenWebText",
           paper.LONG: "OpenWebText", paper.XSUM: "XSum"}
PAIRS = "Python's functions, their first lines and what is said of them"


def smoke(config: Config) -> Config:
    """The run in about a minute on two CPU cores: bytes of Python's own source text, 64 tokens, a model of 0.2 M
    parameters. It keeps its family and its loss. What differs between the paper's runs of one length and number of
    steps differs here as well.
    """
    full, long, pairs = config.train, config.data.source == paper.LONG, config.data.source == paper.XSUM
    steps = 100 if long else SMOKE_STEPS // 2 if full.steps == 500_000 or pairs else SMOKE_STEPS
    return Config(
        model=ModelConfig(length=640 if long else 128 if pairs else 64, width=64, layers=3, heads=2, dropout=0.0,
                          cond_dim=16 if config.model.cond_dim else 0),
        family=config.family,
        data=DataConfig(),
        train=TrainConfig(steps=steps, batch_size=8 if long else 32, learning_rate=4e-3, warmup=50, ema=0.995,
                          log_every=50, eval_every=steps, eval_windows=256, save_every=max(1, steps // 4),
                          compute_dtype="float32", seed=full.seed, start_from=full.start_from))


Cell = str | int | float | Estimate | None


class Table(NamedTuple):
    """Columns and rows; a cell without a value is None."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *([_show(cell) for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _show(cell: Cell) -> str:
    if isinstance(cell, Estimate):
        error = "" if math.isnan(cell.standard_error) else f" ± {cell.standard_error:.2g}"
        return f"{cell.value:.4g}{error}"
    return "–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _plain(cell: Cell) -> Any:
    return cell.to_json() if isinstance(cell, Estimate) else cell


@dataclass(frozen=True)
class Lab:
    """Where and at which scale the paper is reproduced.

    Attributes:
      scale: "smoke" or "paper".
      runs: the folder of the work directories.
      results: the folder of the reports.
      sources: machine, date and commit of every measurement that was used.
      corpora: what the runs that were measured are trained on.
    """

    scale: str
    runs: Path
    results: Path
    sources: set[tuple[str, ...]] = dataclasses.field(default_factory=set, compare=False)
    corpora: set[str] = dataclasses.field(default_factory=set, compare=False)

    @property
    def smoke(self) -> bool:
        return self.scale == "smoke"

    def config(self, run: str) -> Config:
        """The config of a run of experiments/paper.py, such as "owt/esolm_025", at this scale."""
        config = RUNS[run].config
        source = self._source(run)
        if source is not None:
            train_fields = dataclasses.replace(config.train, start_from=str(self.workdir(source)))
            config = dataclasses.replace(config, train=train_fields)
        if not self.smoke:
            return config
        small = smoke(config)
        data = DataConfig(str(self.data_dir / "xsum")) if config.data.source == paper.XSUM else small.data
        return dataclasses.replace(small, data=data)

    @property
    def data_dir(self) -> Path:
        """Where prepared corpora are, and their documents."""
        return self.runs / "data" if self.smoke else Path("data")

    def workdir(self, run: str) -> Path:
        if not self.smoke:
            return self.runs / run
        config = self.config(run)
        digest = hashlib.sha256(config.to_json().encode()).hexdigest()[:8]
        return self.runs / f"{config.family.name}-{digest}"

    def model(self, run: str) -> Model:
        """The trained model of a run; trained now, or further, where it is not."""
        if not self.is_trained(run):
            source = self._source(run)
            if source is not None:
                self.model(source)
            say(f"{run}: training in {self.workdir(run)}")
            train(self.config(run), self.workdir(run))
        return _load(self.workdir(run))

    def is_trained(self, run: str) -> bool:
        return checkpoint.steps(self.workdir(run))[-1:] == [self.config(run).train.steps]

    def _source(self, run: str) -> str | None:
        """The run that this one goes on from."""
        start_from = RUNS[run].config.train.start_from
        return start_from and Path(start_from).relative_to(PAPER_RUNS).as_posix()

    def corpus(self, run: str) -> str:
        """The name of the text that a run is trained on at this scale."""
        source = self.config(run).data.source
        return PAIRS if self.smoke and RUNS[run].config.data.source == paper.XSUM else CORPORA.get(source, source)

    def heading(self, corpus: str) -> str:
        """Of a table of one of the paper's corpora ("lm1b" or "owt"): its name, and ours where it is another."""
        theirs, ours = CORPORA[RUNS[f"{corpus}/mdlm"].config.data.source], self.corpus(f"{corpus}/mdlm")
        return theirs if ours == theirs else f"{theirs} (paper), {ours} (ours)"

    def is_as_above(self, run: str) -> bool:
        """Whether a run on OpenWebText is at this scale the run of the same name on LM1B, whose table comes first."""
        other = run.replace("owt/", "lm1b/")
        return other != run and other in RUNS and self.workdir(other) == self.workdir(run)

    def measure(self, run: str, name: str, settings: dict[str, Any], compute: Callable[[Model], Any]) -> Any:
        """compute(model) of a run, as JSON values, or what was kept of it; made by the run and `settings` alone."""
        def compute_with_model() -> Any:
            model = self.model(run)
            say(f"{run}: {name} {settings}")
            return compute(model)

        self.corpora.add(self.corpus(run))
        return self.once(self.path_of(run, name, settings, ".json"), compute_with_model)

    def path_of(self, run: str, name: str, settings: dict[str, Any], suffix: str) -> Path:
        """Where a measurement of a run, or what belongs to it, is kept."""
        return self.workdir(run) / "measured" / _file_name(name, settings, suffix)

    def measure_all(self, name: str, settings: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """compute(), kept like a measurement, of what belongs to no single run."""
        return self.once(self.runs / "measured" / _file_name(name, settings, ".json"), compute)

    def once(self, path: Path, compute: Callable[[], Any]) -> Any:
        """The value in a file; if there is no such file, compute() is written to it first."""
        if not path.exists():
            value = compute()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({**provenance(), "value": value}), "--runs")
        kept = json.loads(path.read_text("utf-8"))
        value = kept.pop("value")
        self.sources.add(tuple(kept.values()))
        return value

    def test_windows(self, run: str, most: int) -> np.ndarray:
        """At most `most` windows of the run's test split, evenly spaced, int32 [M, L]."""
        windows = windows_of(self.config(run), "test")
        return evenly_spaced(windows, most)[:].astype(np.int32)

    def report(self, name: str, doc: str, tables: dict[str, Table], notes: Sequence[str] = (),
               draw: Callable[[Any], None] | None = None) -> None:
        """Writes NAME.md, NAME.json and, by draw(figure), NAME.png; prints the tables."""
        self.results.mkdir(parents=True, exist_ok=True)
        header = {"title": doc.strip().splitlines()[0],
                  "command": f"python experiments/tables/{Path(sys.argv[0]).name} --scale {self.scale}",
                  "measured": [", ".join(source) for source in sorted(self.sources)],
                  "trained_on": sorted(self.corpora)}
        lines = [f"# {header['title']}", "", f"`{header['command']}`; measured on {'; '.join(header['measured'])}."]
        if self.corpora:
            lines += ["", f"Our runs are trained on {' and '.join(header['trained_on'])}."]
        for title, table in tables.items():
            lines += ["", *([f"## {title}", ""] if title else []), table.markdown()]
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
        if draw is not None:
            lines += ["", f"![{name}]({name}.png)"]
            with picture(self.results / f"{name}.png", option="--results") as figure:
                draw(figure)
        text = "\n".join(lines) + "\n"
        values = {title or name: {"columns": table.columns, "rows": [[_plain(cell) for cell in row]
                                                                     for row in table.rows]}
                  for title, table in tables.items()}
        write_whole(self.results / f"{name}.json", as_json({**header, "tables": values, "notes": notes}), "--results")
        write_whole(self.results / f"{name}.md", text, "--results")
        say(f"{text}wrote {self.results / name}.md")


@functools.lru_cache(maxsize=4)
def _load(workdir: Path) -> Model:
    return load(workdir)


def _file_name(name: str, settings: dict[str, Any], suffix: str) -> str:
    return f"{name}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}{suffix}"


def provenance() -> dict[str, str]:
    """Where and when something is measured, and on which commit of this checkout, with a + where files differ from it
    (other than reports)."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=EXPERIMENTS, encoding="utf-8", capture_output=True,
                              check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
        commit = git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"machine": describe_machine(), "date": datetime.date.today().isoformat(), "commit": f"commit {commit}"}


def main(doc: str | None, run: Callable[[Lab], None]) -> int:
    """The command line of a script: run(lab) at the scale asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["smoke", "paper"], required=True,
                        help="a laptop's hour, or the paper's own setting")
    parser.add_argument("--runs", type=Path, help="folder of the work directories (runs/SCALE)")
    parser.add_argument("--results", type=Path, help="folder of the reports (experiments/results/SCALE)")
    arguments = parser.parse_args()
    runs = arguments.runs or Path("runs") / arguments.scale
    results = arguments.results or EXPERIMENTS / "results" / arguments.scale
    keep_compilations()
    return exit_code_of(lambda: run(Lab(arguments.scale, runs, results)))
