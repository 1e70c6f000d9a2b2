"""How fast text becomes training batches.

Command:   python experiments/bench_data.py --out data.json      (any machine; 2 cores: about 10 minutes, 2 GB of disk)

On text like code and its documentation (Python files of this environment, repeated up to --megabytes), with a
byte-level BPE of GPT-2's size trained on a part of it:
  1. the tokenizers library's own encode_batch_fast on all cores, nothing kept: the ceiling,
  2. `eso-jax data prepare` from documents to packed, checksummed windows of 1,024 tokens,
  3. draining the training pipeline that reads these windows, batches of 512.
Rounds of 1 and 2 alternate, and medians are reported: of wall time, and of processor time, which a busy machine
disturbs less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from eso_jax import Config, DataConfig, ModelConfig
from eso_jax.cli import exit_code_of
from eso_jax.console import say
from eso_jax.data import windows_of
from eso_jax.data.pipeline import batches
from eso_jax.data.prepare import prepare
from eso_jax.data.tokenizers import train_tokenizer
from eso_jax.files import as_json, check_out, write_whole

Result = TypeVar("Result")
LENGTH, BATCH, BATCHES = 1024, 512, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="of text (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--out", required=True, help="JSON")
    arguments = parser.parse_args()
    check_out(arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        write_whole(arguments.out, as_json(measure(Path(folder), arguments.megabytes, arguments.rounds)))


def measure(folder: Path, megabytes: int, rounds: int) -> dict[str, object]:
    texts = make_texts(megabytes * 10**6)
    size = sum(len(text.encode()) for text in texts) / 1e6
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer, seconds, _ = timed(lambda: train_tokenizer(texts[:len(texts) // 4], 50258, "bpe"))
    say(f"{len(texts):,} documents, {size:.0f} MB; a vocabulary of {tokenizer.vocab_size:,} learned in {seconds:.0f} s")

    def raw() -> None:
        for start in range(0, len(texts), 1000):
            library.encode_batch_fast(texts[start:start + 1000])

    def ours() -> Path:
        shutil.rmtree(folder / "data" / "text", ignore_errors=True)
        return prepare("text", folder / "data", tokenizer, LENGTH, [str(folder / "texts.jsonl")], held_out=100)

    from tokenizers import Tokenizer

    assert tokenizer.json is not None
    library = Tokenizer.from_str(tokenizer.json)
    made, seconds, _ = timed(ours)
    say(f"the first time, documents written as well: {size / seconds:.1f} MB/s")
    speeds: dict[str, list[tuple[float, float]]] = {"raw": [], "prepare": []}
    for _ in range(rounds):
        for name, action in (("raw", raw), ("prepare", ours)):
            _, *seconds_of = timed(action)
            speeds[name].append((size / seconds_of[0], size / seconds_of[1]))
        say(", ".join(f"{name} {wall:.1f} MB/s, {busy:.1f} MB per second of processor"
                      for name, values in speeds.items() for wall, busy in values[-1:]))
    medians = {name: [statistics.median(column) for column in zip(*values, strict=True)]
               for name, values in speeds.items()}
    share = [ours / raw for ours, raw in zip(medians["prepare"], medians["raw"], strict=True)]
    say(f"medians: tokenizing and packing at {100 * share[0]:.0f}% of the library's raw encoding by wall time, "
        f"{100 * share[1]:.0f}% by processor time")

    drained = {}
    for length in (LENGTH, 128):
        if length != LENGTH:
            made = prepare("text", folder / "data", tokenizer, length, [str(folder / "texts.jsonl")], held_out=100,
                           out=folder / "data" / "short")
        config = Config(model=ModelConfig(length=length, vocab_size=tokenizer.vocab_size),
                        data=DataConfig(source=str(made), tokenizer=tokenizer.name))
        iterator = batches(windows_of(config, "train"), BATCH, seed=0)
        next(iterator)
        count = BATCHES * LENGTH // length
        _, seconds, _ = timed(lambda: [len(next(iterator)) for _ in range(count)])
        drained[str(length)] = count * BATCH * length / seconds
        say(f"draining the pipeline, batches of {BATCH} x {length}: {drained[str(length)] / 1e6:.2f} M tokens/s")
    return {"megabytes": size, "documents": len(texts), "cores": os.cpu_count(), "machine": platform.machine(),
            "megabytes_per_second_wall_and_processor": speeds, "medians": medians, "share_of_raw": share,
            "drained_tokens_per_second": drained}


def make_texts(size: int) -> list[str]:
    """Python files of this environment, repeated until they are `size` characters."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [text for folder in (root, Path(sysconfig.get_path("purelib"))) for path in sorted(folder.rglob("*.py"))
             if (text := path.read_text("utf-8", "ignore").strip())]
    totals = itertools.accumulate(map(len, itertools.cycle(found)))
    return [text for text, _ in zip(itertools.cycle(found), itertools.takewhile(lambda total: total < size, totals))]


def timed(action: Callable[[], Result]) -> tuple[Result, float, float]:
    """What an action gives, the seconds it takes, and those of processors in this process and its children."""
    started, busy = time.perf_counter(), sum(os.times()[:4])
    result = action()
    return result, time.perf_counter() - started, sum(os.times()[:4]) - busy


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
