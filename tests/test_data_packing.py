"""Packing, token for token, and the rules that put published texts together again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eso_jax.data import ByteTokenizer, pack
from eso_jax.data.catalog import CORPORA
from eso_jax.data.detokenizers import DETOKENIZERS
from eso_jax.data.packing import WRAPPINGS, cut
from eso_jax.errors import EsoError
from vocabularies import bert_like, gpt2_like

BYTES = ByteTokenizer()
GPT2, BERT = gpt2_like(), bert_like()
T = int(GPT2.encode("t")[0])


def named(*texts: str) -> list[tuple[str, bytes]]:
    return [(str(i), text.encode()) for i, text in enumerate(texts)]


def test_pack_token_for_token() -> None:
    windows = pack([("x", b"abcd"), ("y", b"e"), ("z", b"fghi")], BYTES, 3)
    assert windows.dtype == np.uint16
    assert windows.tolist() == [[97, 98, 99], [100, 256, 101], [256, 102, 103], [104, 105, 256]]


def test_lm1b_wrapping() -> None:
    """[CLS] first, last and after each sentence; a sentence runs on into the next window."""
    found = pack(named("the cat sat.", "cats", "the cat"), BERT, 5, WRAPPINGS["lm1b"])
    cls, the, cat, sat, s, dot = 2, 5, 6, 7, 8, 10
    assert found.tolist() == [[cls, the, cat, sat, cls], [cls, dot, cls, cat, cls], [cls, s, cls, the, cls]]
    # Left over: cat, [CLS].


def test_openwebtext_wrapping() -> None:
    """End-of-text between documents, nothing special at the ends of windows."""
    found = pack(named("the cat", "the", "thethe cat"), GPT2, 4, WRAPPINGS["openwebtext"])
    the, ca, end = 257, 259, 260
    assert found.tolist() == [[the, ca, T, end], [the, end, the, the]]  # left over: " ca" "t", end


@pytest.mark.parametrize("tokenizer, expected", [
    (GPT2, [[260, 257, 259, 260], [260, T, 257, 260], [260, 259, T, 260]]), (BERT, [[2, 5, 6, 2], [2, 5, 6, 2]])],
    ids=["gpt2", "bert"])
def test_zero_shot_wrapping(tokenizer: object, expected: list[list[int]]) -> None:
    """Special first and last tokens, nothing between documents."""
    assert pack(named("the cat", "the cat"), tokenizer, 4, WRAPPINGS["zero-shot"]).tolist() == expected  # type: ignore


def test_plain_wrapping() -> None:
    assert pack(named("abc", "de"), BYTES, 2, WRAPPINGS["plain"]).tolist() == [[97, 98], [99, 100]]


def test_wrappings_of_the_corpora() -> None:
    used = {name: corpus.wrapping for name, corpus in CORPORA.items()}
    assert used.pop("lm1b") == "lm1b"
    assert {used.pop(name) for name in ("openwebtext", "text", "xsum")} == {"openwebtext"}
    assert used.pop("text8") == "plain" and set(used.values()) == {"zero-shot"}
    assert CORPORA["openwebtext"].held_out == 100_000


@given(st.lists(st.binary(), max_size=5), st.integers(3, 7), st.sampled_from(list(WRAPPINGS.values())))
def test_every_token_is_in_a_window_or_left_over(contents: list[bytes], length: int, wrapping: object) -> None:
    stream = [token for content in contents for token in [*content, *[256] * wrapping.separator]]  # type: ignore
    windows, rest = cut(np.array(stream, np.uint16), length, wrapping, 256)  # type: ignore[arg-type]
    inside = windows[:, 1:-1] if wrapping.ends else windows  # type: ignore[attr-defined]
    assert inside.ravel().tolist() + rest.tolist() == stream
    assert rest.size < inside.shape[1] and windows.shape[1] == length
    if wrapping.ends:  # type: ignore[attr-defined]
        assert (windows[:, [0, -1]] == 256).all()
    documents = [(str(i), content) for i, content in enumerate(contents)]
    if len(windows):
        assert (pack(documents, BYTES, length, wrapping) == windows).all()  # type: ignore[arg-type]
    else:
        with pytest.raises(EsoError, match=f"holds {len(stream)} tokens"):
            pack(documents, BYTES, length, wrapping)  # type: ignore[arg-type]


def test_pack_error() -> None:
    with pytest.raises(EsoError, match="^data.source: holds 6 tokens in this split, fewer than one window of "
                                       "model.length = 7; give more text, or a smaller model.length$"):
        pack([("x", b"abc"), ("y", b"d")], BYTES, 7)
    with pytest.raises(EsoError, match="^data.source = 'a.txt': holds 6 tokens"):
        pack([("x", b"abc"), ("y", b"d")], BYTES, 7, where="data.source = 'a.txt'")
    assert pack([("x", b"abc"), ("y", b"d")], BYTES, 6).shape == (1, 6)


# Detokenizers: what the authors' rules make of each, by hand


@pytest.mark.parametrize("name, text, expected", [
    ("wikitext", " = Robert <unk> = \n", " = Robert <unk> =\n"),
    ("wikitext", " = = = Career = = = \n", " === Career ===\n"),
    ("wikitext", " The 1 @,@ 234 @.@ 5 km ( 3 mi ) long , well @-@ known \" Bridge \" ; the boys ' own . \n",
     " The 1,234.5 km (3 mi) long, well-known \"Bridge\"; the boys' own.\n"),
    ("wikitext", "it 's [ sic ] { x } : 5 ° C ! N ? ", "it's [sic] {x}: 5°C! N? "),
    ("ptb", "the company 's u.s. unit did n't say N N N of $ N and # N <unk>",
     "the company's u.s. unit didn't say 1 1 1 of $1 and #1 ?"),
    ("ptb", "the firms ' and\\/or", "the firms' and/or"),
    ("lm1b", 'The U.S. said it \'s " fine , " ( see http : / / x.org ) ; right ? Yes ! It costs $ 5 / £ 4 .',
     'The U.S. said it\'s "fine," (see http://x.org); right? Yes! It costs $5/£4.'),
    ("lm1b", "He left . Why ?", "He left. Why?"),
    ("lm1b", "A list [ of two ] : here , now !", "A list [of two]: here, now!"),
    ("lambada", " “ No , ” she said . ", "\n\" No , \" she said ."),
    ("scientific_papers", "we show ( see fig . 1 ) that x @xmath0 , is fine .",
     "we show (see fig. 1) that x @xmath0, is fine."),
])
def test_detokenizers(name: str, text: str, expected: str) -> None:
    assert DETOKENIZERS[name](text) == expected


def test_every_corpus_names_rules_that_exist() -> None:
    assert {corpus.detokenizer for corpus in CORPORA.values()} == {None, *DETOKENIZERS}
