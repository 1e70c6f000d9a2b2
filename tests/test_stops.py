"""Where samples end: at the first stop behind what was given."""

from __future__ import annotations

import numpy as np
import pytest

from eso_jax.data import ByteTokenizer
from eso_jax.data.stops import Stops
from eso_jax.errors import EsoError
from vocabularies import gpt2_like

MASK, BYTES = 257, ByteTokenizer()


def cut(text: str, given: int, *stops: str) -> tuple[str, str]:
    """What is left of tokens, decoded, and of the text; "▒" is a mask."""
    tokens = np.array([MASK if character == "▒" else ord(character) for character in text])
    said = Stops(stops, BYTES).cut(tokens, np.arange(len(tokens)) < given)
    return BYTES.decode(tokens), said


def test_text_is_cut_at_the_first_stop_behind_what_was_given() -> None:
    assert cut("a.b.c.", 2, ".") == ("a.b▒▒▒", "a.b")
    assert cut("a.b.c.", 2, "z", "c", ".c", "b.c") == ("a.▒▒▒▒", "a.")  # the earliest, of those the first to begin
    assert cut("abcdef", 0, "ab") == ("▒" * 6, "")
    assert cut("abcdef", 6, "ab") == ("abcdef", "abcdef")  # all of it was given
    assert cut("abcdef", 2, "bc") == ("abcdef", "abcdef")  # begins in what was given
    assert cut("abcdef", 2, "x") == cut("abcdef", 2) == ("abcdef", "abcdef")
    assert cut("ab▒d.f", 2, ".") == ("ab▒d.f", "ab▒d.f")  # behind a mask, nobody knows yet
    assert cut("abc▒▒▒", 2, "c") == ("ab▒▒▒▒", "ab")
    assert cut("abc▒▒▒", 2, "d") == ("abc▒▒▒", "abc")
    assert cut("▒▒▒▒▒▒", 0, "d") == ("▒" * 6, "")


def test_what_is_decoded_behind_a_stop_changes_nothing() -> None:
    """Another stop may begin before it; at the time of the first one that was not known."""
    for text in ("abc▒▒", "abcd▒", "abcde"):
        assert cut(text, 0, "c", "bcde")[1] == "ab"


def test_rows_are_done_each_by_its_own() -> None:
    rows = [[ord(c) if c != "▒" else MASK for c in text] for text in ("a.b▒", "a.b.", "ab▒.", "▒a.b")]
    known = np.arange(4) < np.array([[2], [2], [1], [0]])
    assert Stops((".",), BYTES).done(np.array(rows), known).tolist() == [False, True, False, False]
    assert not Stops((), BYTES).done(np.array(rows), known).any()


def test_a_separator_and_a_character_of_several_bytes() -> None:
    tokens = np.array([*"né".encode(), 256, *"xy".encode(), 256])
    known = np.arange(7) < 1
    assert Stops(("\n\f\n",), BYTES).cut(tokens, known) == "né"
    assert tokens.tolist() == [110, 195, 169, MASK, MASK, MASK, MASK]
    assert Stops(("é",), BYTES).cut(tokens, known) == "n"


def test_a_stop_within_a_token_cuts_the_text_there() -> None:
    tokenizer = gpt2_like()
    tokens = tokenizer.encode("a the cat").astype(int)
    assert len(tokens) == 5  # a, blank, the, " ca", t
    assert Stops(("he",), tokenizer).cut(tokens, np.arange(len(tokens)) < 1) == "a t"
    assert tokenizer.decode(tokens[tokens != tokenizer.mask_id]) == "a "


def test_mistakes() -> None:
    assert Stops.of((), None) is None and Stops.of(("a",), BYTES) == Stops(("a",), BYTES)
    with pytest.raises(EsoError, match="stop = '': must not be empty"):
        Stops.of(("a", ""), BYTES)
    with pytest.raises(EsoError, match="stop = 'a': the model has no tokenizer"):
        Stops.of(("a",), None)
