"""What is given of a sample: how prompts, templates, rows of a file and arrays become rows of a model's length."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from conftest import tiny_config
from eso_jax.data import ByteTokenizer, prompts
from eso_jax.data.tokenizers import CharacterTokenizer
from eso_jax.errors import EsoError
from vocabularies import gpt2_like

MODEL = tiny_config(length=8, vocab_size=258).model
BYTES, MASK = ByteTokenizer(), 257


def row(*ids: int) -> list[int]:
    return [*ids, *[MASK] * (8 - len(ids))]


def test_a_prompt_is_the_beginning_of_a_row() -> None:
    """Of any length up to the model's; a separator is written as decoded text shows it."""
    for length in range(9):
        given = prompts.of_prompt("abcdefgh"[:length], BYTES, MODEL)
        assert given.tokens.tolist() == [row(*b"abcdefgh"[:length])] and given.end.tolist() == [8]
    assert prompts.of_prompt("a\n\f\nb", BYTES, MODEL).tokens.tolist() == [row(97, 256, 98)]
    assert prompts.of_prompt("[MASK] \\n"[:6], BYTES, MODEL).tokens.tolist() == [row(*b"[MASK]")]
    with pytest.raises(EsoError, match="prompt = 'é.*é': is 10 tokens, and the model has length 8; shorten it"):
        prompts.of_prompt("é" * 5, BYTES, MODEL)
    with pytest.raises(EsoError, match="half a character"):
        prompts.of_prompt("\udcff", BYTES, MODEL)
    with pytest.raises(EsoError, match="holds b'A', and only a to z"):
        prompts.of_prompt("A", CharacterTokenizer(), MODEL)
    with pytest.raises(EsoError, match="no tokenizer, so that text has no ids; give ids by --given"):
        prompts.of_prompt("a", None, MODEL)


def test_a_template_has_blanks_and_an_end() -> None:
    """Its pieces are encoded one by one: "t" and "he" are no "the"."""
    given = prompts.of_template("a[MASK:3]b[MASK]", BYTES, MODEL)
    assert given.tokens.tolist() == [row(97, MASK, MASK, MASK, 98)] and given.end.tolist() == [6]
    assert prompts.of_template("[MASK][MASK:007]", BYTES, MODEL).end.tolist() == [8]
    tokenizer = gpt2_like()
    model = tiny_config(length=8, vocab_size=tokenizer.vocab_size).model
    mask = tokenizer.mask_id
    found = prompts.of_template("t[MASK]he the", tokenizer, model)
    pieces = [*tokenizer.encode("t"), mask, *tokenizer.encode("he the")]
    assert found.tokens[0].tolist() == [*pieces, *[mask] * (8 - len(pieces))] and found.end.tolist() == [len(pieces)]
    for text, message in (("a[MASK:8]", "is 9 tokens"), (f"a[MASK:{'9' * 30}]", "tokens, and the model has length"),
                          ("abc", "has no blank"), ("[mask]", "has no blank"), ("a[MASK:0]b", "of no token"),
                          (f"[MASK:{'9' * 5000}]", "is 9999999 tokens"),
                          ("[MASK: 3]", r"has '\[MASK: 3\]', which is no blank"), ("[MASK:-1]a[MASK]", "is no blank"),
                          ("[MASK a][MASK]", "is 9 tokens")):
        with pytest.raises(EsoError, match=message):
            prompts.of_template(text, BYTES, MODEL)


def test_rows_of_a_file(tmp_path: Path) -> None:
    """Prompts, texts and templates; each mistake says where it is."""
    path = tmp_path / "p.jsonl"

    def read(*found: object) -> prompts.Given:
        path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in found))
        return prompts.of_rows(str(path), BYTES, MODEL, "--prompts")

    given = read({"prompt": "ab"}, {"text": "c"}, {"template": "d[MASK]e", "text": "not this"}, {"prompt": ""}, '"f"')
    assert given.tokens.tolist() == [row(*b"ab"), row(*b"c"), row(100, MASK, 101), row(), row(*b"f")]
    assert given.end.tolist() == [8, 8, 3, 8, 8]
    for rows, message in (([{"prompt": "a"}, {"prompt": "a" * 9}], "line 2 is 9 tokens"),
                          ([{"other": "a"}], "line 1 has no field prompt"), ([{"prompt": 3}], "a number, not text"),
                          (["{"], "line 1 is no JSON"), ([{"template": "a"}], "line 1 has no blank"), ([], "no rows")):
        with pytest.raises(EsoError, match=f"--prompts = '{path}': .*{message}"):
            read(*rows)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n')[:-9])
    for name, message in (("none.jsonl", "no such file"), ("", "Is a directory"), ("cut.gz", "cannot be read .*EOF")):
        with pytest.raises(EsoError, match=message):
            prompts.of_rows(str(tmp_path / name), BYTES, MODEL)


def test_rows_of_a_table(tmp_path: Path) -> None:
    """A column is taken as a field of JSON lines is."""
    path = tmp_path / "p.csv"
    for table in ("prompt\nab\n", "text,prompt\nc,ab\n", "prompt,text\nab,c\n"):
        path.write_text(table)
        assert prompts.of_rows(str(path), BYTES, MODEL).tokens.tolist() == [row(*b"ab")]
    path.write_text("template\nd[MASK]e\n")
    given = prompts.of_rows(str(path), BYTES, MODEL)
    assert given.tokens.tolist() == [row(100, MASK, 101)] and given.end.tolist() == [3]
    parquet.write_table(pyarrow.table({"text": ["c"], "prompt": ["ab"]}), tmp_path / "p.parquet")
    assert prompts.of_rows(str(tmp_path / "p.parquet"), BYTES, MODEL).tokens.tolist() == [row(*b"ab")]
    path.write_text("other\nab\n")
    with pytest.raises(EsoError, match=r"has no column prompt, template, .* \(its columns: 'other'; rename one\)"):
        prompts.of_rows(str(path), BYTES, MODEL)


def test_rows_of_a_pipe(tmp_path: Path) -> None:
    """Which can be read but once."""
    os.mkfifo(tmp_path / "p")
    writer = threading.Thread(target=(tmp_path / "p").write_text, args=('{"prompt": "ab"}\n',), daemon=True)
    writer.start()
    assert prompts.of_rows(str(tmp_path / "p"), BYTES, MODEL).tokens.tolist() == [row(*b"ab")]
    writer.join()


def test_arrays_of_ids() -> None:
    given = prompts.of_array(np.array([[1, MASK, 2], [MASK, MASK, MASK]], np.uint16), MODEL)
    assert given.tokens.tolist() == [row(1, MASK, 2), row()] and given.end.tolist() == [8, 8]
    assert given.tokens.dtype == np.int32
    for array, message in ((np.zeros((1, 9), int), "the model has length 8"), (np.zeros(8, int), "must be integers"),
                           (np.zeros((1, 8)), "must be integers"), (np.zeros((0, 8), int), "N >= 1"),
                           (np.full((1, 2), 258), r"given\[0, 0\] = 258: ids must be in \[0, 258\)"),
                           (np.array([[0, -1]]), r"given\[0, 1\] = -1")):
        with pytest.raises(EsoError, match=message):
            prompts.of_array(array, MODEL)
