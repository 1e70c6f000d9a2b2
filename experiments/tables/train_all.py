"""Trains every run of the paper that is not trained yet: all of experiments/paper.py.

Command:   python experiments/tables/train_all.py --scale smoke
           at --scale paper one run after the other on all devices; on a pod, start each by its own command instead

On a CPU, at smoke scale, a run to each core at a time: models this small gain little from a second one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax

import summaries
from eso_jax.console import bar, say
from eso_jax.errors import EsoError
from eso_jax.files import write_whole
from lab import RUNS, Lab, main

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def run(lab: Lab) -> None:
    if lab.smoke:
        summaries.prepare_smoke(lab)
    todo = {lab.workdir(name): name for name in reversed(RUNS)}  # where two are one, the first name
    first = [name for name in todo.values() if not lab.config(name).train.start_from]
    then = [name for name in todo.values() if lab.config(name).train.start_from]
    for stage in (first[::-1], then[::-1]):
        waiting = [name for name in stage if not lab.is_trained(name)]
        if lab.smoke and jax.default_backend() == "cpu":
            side_by_side(lab, waiting)
        else:
            for name in waiting:
                lab.model(name)


def side_by_side(lab: Lab, runs: list[str]) -> None:
    """A process for each run, as many at a time as there are cores."""
    lab.runs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}"}

    def train(name: str) -> str:
        workdir = lab.workdir(name)
        config = workdir.with_suffix(".json")
        write_whole(config, lab.config(name).to_json(), "--runs")
        done = subprocess.run([sys.executable, "-m", "eso_jax", "train", config, "--workdir", workdir], env=environment,
                              encoding="utf-8", stderr=subprocess.PIPE)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise EsoError(f"{name}: {last}")
        return name

    with ThreadPoolExecutor(os.cpu_count()) as pool, bar(total=len(runs), unit="run") as progress:
        try:
            for future in as_completed([pool.submit(train, name) for name in runs]):
                say(f"{future.result()}: trained")
                progress.update()
        finally:  # after a failure or an interruption, none of those that wait
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
