"""Prepare corpora, check what was prepared, train tokenizers."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from eso_jax.console import say
from eso_jax.errors import require
from eso_jax.files import check_out, write_whole

if TYPE_CHECKING:
    from eso_jax.data.rows import Reading

FILES = "files, folders, globs or archives of text, JSON lines or arrays, Parquet, Arrow, .npz (docs/data.md)"
EXAMPLE = "eso-jax data prepare lm1b --data-dir data --tokenizer bert-base-uncased --length 128"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from eso_jax.data.catalog import CORPORA
    from eso_jax.data.packing import WRAPPINGS

    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")

    prepare = actions.add_parser(
        "prepare", help="tokenize and pack a corpus, into a folder that data.source and eval --source take",
        epilog=f"example: {EXAMPLE}")
    prepare.add_argument("name", metavar="NAME", choices=CORPORA, help=", ".join(CORPORA))
    prepare.add_argument("--data-dir", type=Path, default=Path("data"),
                         help="for documents, downloads and the result (%(default)s)")
    prepare.add_argument("--from", dest="files", nargs="+", default=[], metavar="FILE",
                         help=f"local {FILES} (a download)")
    _add_reading(prepare)
    prepare.add_argument("--tokenizer", required=True,
                         help="bytes, characters, gpt2, bert-base-uncased, a tokenizer.json, or NAME=a tokenizer.json")
    prepare.add_argument("--separator", metavar="TOKEN",
                         help="the tokenizer.json's token between documents (<|endoftext|>, [CLS] or </s>)")
    prepare.add_argument("--length", type=int, required=True, help="tokens in a window: model.length")
    prepare.add_argument("--wrapping", choices=WRAPPINGS, help="how documents become windows (the paper's)")
    prepare.add_argument("--held-out", type=int, metavar="N",
                         help="documents at the end for validation, where none is published")
    prepare.add_argument("--out", type=Path, help="the folder that is made (DATA_DIR/NAME)")
    prepare.add_argument("--processes", type=int, help="that tokenize (one per core)")

    check = actions.add_parser("check", help="compare the checksums of a prepared folder",
                               epilog="example: eso-jax data check data/lm1b")
    check.add_argument("folder", type=Path, metavar="FOLDER")

    train = actions.add_parser("train-tokenizer", help="learn a vocabulary from text",
                               epilog="example: eso-jax data train-tokenizer --from texts/ --vocab-size 32000 "
                               "--kind bpe --out tokenizer.json")
    train.add_argument("--from", dest="files", nargs="+", required=True, metavar="FILE", help=FILES)
    _add_reading(train)
    train.add_argument("--vocab-size", type=int, required=True, help="ids at most, the mask included")
    train.add_argument("--kind", choices=["bpe", "wordpiece"], default="bpe",
                       help="bpe: over bytes, as GPT-2; wordpiece: lower case, as BERT (%(default)s)")
    train.add_argument("--out", required=True, help="tokenizer.json")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--include", nargs="+", default=[], metavar="PATTERN",
                        help="of folders, globs and archives only files that match, such as '*.py' (all)")
    parser.add_argument("--field", help="of rows, or a.b for b in a (the first of text, sentence, article, "
                        "article_text, content)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out and count rows without a text")
    parser.add_argument("--skip-bad-files", action="store_true", help="leave out and count files that are no text, or "
                        "damaged")


def _reading_of(arguments: argparse.Namespace) -> Reading:
    from eso_jax.data.rows import Reading

    return Reading(arguments.field, arguments.include, arguments.skip_bad_rows, arguments.skip_bad_files)


def run(arguments: argparse.Namespace) -> None:
    {"prepare": _prepare, "check": _check, "train-tokenizer": _train_tokenizer}[arguments.action](arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    from eso_jax.data import prepared
    from eso_jax.data.prepare import prepare
    from eso_jax.data.tokenizers import get_tokenizer

    for name in ("length", "held_out", "processes"):
        value = getattr(arguments, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')}", value, "must be at least 1")
    tokenizer = get_tokenizer(arguments.tokenizer, arguments.separator)
    folder = prepare(arguments.name, arguments.data_dir, tokenizer, arguments.length, arguments.files,
                     arguments.wrapping, arguments.held_out, arguments.out, arguments.processes, _reading_of(arguments))
    _describe(folder, prepared.read_manifest(folder))
    say(f"train on it: eso-jax train quickstart --workdir W data.source={folder}")


def _check(arguments: argparse.Namespace) -> None:
    from eso_jax.data import prepared

    _describe(arguments.folder, prepared.check(arguments.folder))
    say("all checksums are right")


def _describe(folder: Path, manifest: dict) -> None:
    tokenizer = manifest["tokenizer"]
    say(f"{folder}: {manifest['corpus']}, windows of {manifest['length']} tokens, wrapping {manifest['wrapping']}, "
        f"tokenizer {tokenizer['name']} (model.vocab_size={tokenizer['vocab_size']} "
        f"model.mask_id={tokenizer['mask_id']})")
    for split, part in manifest["splits"].items():
        say(f"  {split:<10} {part['documents']:>12,} documents  {part['tokens']:>14,} tokens  "
            f"{part['windows']:>11,} windows  {len(part['shards'])} shards")


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    import tempfile

    from eso_jax.data import readers
    from eso_jax.data.catalog import CORPORA
    from eso_jax.data.tokenizers import train_tokenizer

    check_out(arguments.out)
    reading = _reading_of(arguments)
    with tempfile.TemporaryDirectory() as unpacked:
        files = readers.find_files(arguments.files, Path(unpacked), reading)
        documents = readers.documents(CORPORA["text"], "train", files, reading)
        first = next(documents, None)
        require(first is not None, "--from", arguments.files, "holds no text to learn from")
        tokenizer = train_tokenizer(itertools.chain([str(first)], documents), arguments.vocab_size, arguments.kind)
    reading.report()
    assert tokenizer.json is not None
    write_whole(arguments.out, tokenizer.json)
    say(f"wrote {arguments.out}: {tokenizer.vocab_size} ids, the mask {tokenizer.mask_id} included")
