"""Bytes of text by token, and special tokens in texts, for every kind of library tokenizer."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from conftest import BASE
from eso_jax.data.tokenizers import LibraryTokenizer, train_tokenizer
from eso_jax.engine import perplexity
from eso_jax.engine.rows import Engine
from eso_jax.errors import EsoError
from eso_jax.interop import card
from eso_jax.run import metrics

WORDS = "the quick brown fox runs over green hills, it's there. " * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<mask>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
BLANK = "\u2581"
BLANKS_BACK = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(),
                                 decoders.Strip(" ", 1, 0)])


def bpe(normalizer: Any = None, pre_tokenizer: Any = None, decoder: Any = None, alphabet: tuple[str, ...] = (),
        fallback: bool = False, **model: Any) -> Tokenizer:
    library = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, **model))
    for part, value in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder)):
        if value is not None:
            setattr(library, part, value)
    library.train_from_iterator([WORDS] * 5, trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=list(alphabet),
        special_tokens=SPECIAL + BYTES * fallback, **{k: v for k, v in model.items() if k == "end_of_word_suffix"}))
    return library


def unigram(fallback: bool, scheme: str = "always") -> Tokenizer:
    pieces = [BLANK, *"abcdefghijklmnopqrstuvwxyz<>/,.'", BLANK + "the", "quick", BLANK + "b", "\u00e9"]
    vocabulary = [(token, 0.0) for token in SPECIAL] + [(piece, -3.0 - len(piece)) for piece in pieces]
    vocabulary += [(byte, -20.0) for byte in BYTES] if fallback else []
    library = Tokenizer(models.Unigram(vocabulary, 0, fallback))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    library.add_special_tokens(SPECIAL)
    return library


def byte_level(**options: Any) -> Tokenizer:
    return bpe(pre_tokenizer=pre_tokenizers.ByteLevel(**options), decoder=decoders.ByteLevel(),
               alphabet=tuple(pre_tokenizers.ByteLevel.alphabet()))


def llama_3() -> Tokenizer:
    parts = [pre_tokenizers.Split(Regex(r"\p{L}+| ?[^\s\p{L}]+|\s+"), "isolated"),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return bpe(pre_tokenizer=pre_tokenizers.Sequence(parts), decoder=decoders.ByteLevel(),
               alphabet=tuple(pre_tokenizers.ByteLevel.alphabet()), ignore_merges=True)


# Those that give each text back: all but the blank that some put in front.
EXACT = {
    "byte-level": lambda: byte_level(add_prefix_space=False),
    "byte-level, blank in front": lambda: byte_level(add_prefix_space=True),
    "Llama 3": llama_3,
    "Llama 2": lambda: bpe(normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]),
                           decoder=BLANKS_BACK, fallback=True),
    "Mistral": lambda: bpe(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"), decoder=BLANKS_BACK,
                           fallback=True),
    "Gemma": lambda: bpe(normalizers.Replace(" ", BLANK), pre_tokenizers.Split(" ", "merged_with_previous"),
                         decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]),
                         fallback=True),
    "Unigram, bytes": lambda: unigram(True),
}
# Those that change texts first.
NORMALIZED = {
    "Unigram": (lambda: unigram(False), str),
    "Unigram, never in front": (lambda: unigram(False, "never"), str),
    "byte-level, NFC": (lambda: bpe(normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False),
                                    decoders.ByteLevel(), tuple(pre_tokenizers.ByteLevel.alphabet())),
                        normalizers.NFC().normalize_str),
    "byte-level, lower case": (lambda: bpe(
        normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(),
        tuple(pre_tokenizers.ByteLevel.alphabet())), normalizers.Lowercase().normalize_str),
    "fallback, NFKC": (lambda: bpe(normalizers.NFKC(), pre_tokenizers.Metaspace(), BLANKS_BACK, fallback=True),
                       normalizers.NFKC().normalize_str),
}


def clean(library: Tokenizer) -> LibraryTokenizer:
    """As files of the hub are: only the special tokens are listed as added, not the bytes."""
    contents = json.loads(library.to_str())
    contents["added_tokens"] = [token for token in contents["added_tokens"] if token["content"] in SPECIAL]
    return LibraryTokenizer("mine", json.dumps(contents))


@functools.cache
def made(kind: str) -> LibraryTokenizer:
    return clean(EXACT[kind]() if kind in EXACT else NORMALIZED[kind][0]())


def takes_no_special(tokenizer: LibraryTokenizer, ids: np.ndarray) -> bool:
    return not np.isin(ids, [tokenizer.mask_id, tokenizer.separator_id]).any()


def blank_free(text: str) -> str:
    """Without U+2581, which such tokenizers do not tell from a blank."""
    return text.replace(BLANK, "")


TEXTS = ["the quick brown fox", "    return x", "\ud55c\uad6d\uc5b4", "\u65e5\u672c \U0001f415", "caf\u00e9\u0301 \r\n",
         "a <s>b</s> <mask> <unk>", "", " ", "\0\u2028\x85"]


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=25, deadline=None)
@given(text=st.text())
def test_of_any_text(kind: str, text: str) -> None:
    tokenizer = made(kind)
    for each in [blank_free(text), *TEXTS]:
        ids = tokenizer.encode(each)
        count = tokenizer.num_bytes(ids)
        assert count is not None and 0 <= count - len(each.encode()) <= 1, each
        assert tokenizer.decode(ids) in (each, " " + each, each[1:] if each[:1] == " " else each)
        assert takes_no_special(tokenizer, ids)
    assert tokenizer.bytes_of == "text"


@pytest.mark.parametrize("kind", NORMALIZED)
@settings(max_examples=25, deadline=None)
@given(text=st.text())
def test_of_normalized_text(kind: str, text: str) -> None:
    tokenizer, normalized = made(kind), NORMALIZED[kind][1]
    for each in [blank_free(normalized(blank_free(text))), *TEXTS]:
        ids = tokenizer.encode(each)
        count = tokenizer.num_bytes(ids)
        assert takes_no_special(tokenizer, ids)
        if count is None:
            assert kind.startswith("Unigram")  # a character that it does not know
        else:
            assert 0 <= count - len(normalized(each).encode()) <= 1, each
    assert tokenizer.bytes_of == ("text" if kind.startswith("Unigram") else "normalized text")


WORDPIECE = train_tokenizer([WORDS + "caf\u00e9 \ud55c \u65e5"] * 5, 300, "wordpiece")


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_wordpiece_counts_words_with_a_blank_each(text: str) -> None:
    for each in (text, "The caf\u00e9, the  FOX", "\u65e5\u65e5 [MASK] [CLS]"):
        ids = WORDPIECE.encode(each)
        words = normalizers.BertNormalizer(lowercase=True).normalize_str(each)
        pieces = [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(words)]
        expected = sum(len(piece.encode()) + 1 for piece in pieces)
        unknown = (ids == 1).any()
        assert WORDPIECE.num_bytes(ids) == (None if unknown else expected)
        assert takes_no_special(WORDPIECE, ids)
    assert WORDPIECE.bytes_of == "words"
    assert WORDPIECE.num_bytes(WORDPIECE.encode("The caf\u00e9, the  FOX")) == 4 + 5 + 2 + 4 + 4
    assert WORDPIECE.num_bytes(WORDPIECE.encode("\U0001f415")) is None


def words_alone(model: Any, **parts: Any) -> LibraryTokenizer:
    library = Tokenizer(model)
    library.pre_tokenizer = parts.get("pre_tokenizer", pre_tokenizers.Whitespace())
    library.add_special_tokens(["</s>", "<mask>"])
    return LibraryTokenizer("mine", library.to_str())


def test_other_words() -> None:
    level = words_alone(models.WordLevel({"<unk>": 0, "the": 1, "caf\u00e9": 2}, unk_token="<unk>"))
    assert level.num_bytes(level.encode("the  caf\u00e9")) == 4 + 6 and level.bytes_of == "words"
    assert level.num_bytes(level.encode("the x")) is None
    clip = clean(bpe(normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder("</w>"),
                     end_of_word_suffix="</w>"))
    assert clip.num_bytes(clip.encode("The quick  fox")) == 4 + 6 + 4 and clip.bytes_of == "words"


def test_where_it_cannot_be_known() -> None:
    """Blanks that leave no trace, and characters that do not."""
    run_together = clean(bpe(pre_tokenizer=pre_tokenizers.Whitespace()))
    assert run_together.num_bytes(run_together.encode("the fox")) is None
    assert run_together.num_bytes(np.array([run_together.separator_id, run_together.mask_id])) == 0
    dropping = words_alone(models.BPE({"a": 0, "b": 1, " ": 2, "x": 3, "y": 4}, []),
                           pre_tokenizer=pre_tokenizers.Split(" ", "isolated"))
    assert dropping.num_bytes(dropping.encode("a \u65e5 b")) is None
    taking_blanks = with_added("<X>", lstrip=True)
    assert taking_blanks.num_bytes(taking_blanks.encode("the fox")) == 7
    assert taking_blanks.num_bytes(taking_blanks.encode("the   <X> fox")) is None


# Added tokens


@functools.cache
def plain() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(str(train_tokenizer([WORDS], 300, "bpe").json))
    return found


def with_added(*contents: str, without: str = "", **settings: Any) -> LibraryTokenizer:
    found = copy.deepcopy(plain())
    if without:
        found["added_tokens"].clear()
        del found["model"]["vocab"][without]  # the first id
        found["model"]["vocab"] = {entry: i - 1 for entry, i in found["model"]["vocab"].items()}
    last = max(found["model"]["vocab"].values())
    found["added_tokens"] += [dict(id=last + 1 + i, content=content, single_word=False, lstrip=False, rstrip=False,
                                   normalized=False, special=False) | settings for i, content in enumerate(contents)]
    return LibraryTokenizer("mine", json.dumps(found))


@pytest.mark.parametrize("content", ["<\uff5cUser\uff5c>", "<user>", "\u0915\u094d\u0937", "\U0001f415" * 2, "   "])
@pytest.mark.parametrize("normalized", [False, True])
def test_added_tokens_of_any_script(content: str, normalized: bool) -> None:
    tokenizer = with_added(content, normalized=normalized)
    text = f"the{content}fox {content}{content}"
    ids = tokenizer.encode(text)
    assert tokenizer.num_bytes(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert (ids == tokenizer._library.token_to_id(content)).sum() == 3  # one id each, which is what they are for


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text, without", [
    ("fill the [MASK] here", ""), ("fill<mask>", ""), ("HTML <s>old</s> new", "<|endoftext|>"),
    ("[CLS] x [MASK]", "<|endoftext|>")])
def test_no_text_yields_mask_or_separator(text: str, without: str, special: bool) -> None:
    added = [token for token in ("[MASK]", "<mask>", "</s>", "[CLS]") if token in text]
    tokenizer = with_added(*added, without=without, special=special)
    ids = tokenizer.encode(text)
    assert takes_no_special(tokenizer, ids)
    assert tokenizer.num_bytes(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    joined = tokenizer.join([text, text], separate=True)
    assert (joined == tokenizer.separator_id).sum() == 2 and tokenizer.num_bytes(joined) == 2 * len(text.encode())


def test_pieces_of_a_model_that_are_special_are_not_found_in_text() -> None:
    """Unigram looks for all its pieces, WordLevel for all its words."""
    tokenizer = made("Unigram")
    after = tokenizer.encode("xs>b").tolist()[2:]
    assert tokenizer.encode("a</s>b").tolist() == tokenizer.encode("a</").tolist() + after
    words = {"[UNK]": 0, "[MASK]": 1, "</s>": 2, "fox": 3}
    level = words_alone(models.WordLevel(words, unk_token="[UNK]"), pre_tokenizer=pre_tokenizers.WhitespaceSplit())
    assert level.encode("fox [MASK] </s> fox").tolist() == [3, 0, 0, 3]


def test_what_merges_make_is_refused_as_separator() -> None:
    vocabulary = {"<": 0, "/": 1, "s": 2, ">": 3, "</": 4, "s>": 5, "</s>": 6}
    library = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")]))
    library.add_special_tokens(["</s>"])
    tokenizer = LibraryTokenizer("mine", library.to_str())
    assert tokenizer.encode("<s>").tolist() == [0, 5]
    with pytest.raises(EsoError, match="^data.tokenizer = 'mine': reads a part of the text 's</s>' as '</s>', which"):
        tokenizer.encode("s</s>")


# Evaluation


class Ones(Engine):
    """Gives a loss of one nat for every token, and computes nothing."""

    def __init__(self) -> None:
        object.__setattr__(self, "config", BASE)

    def rows(self, estimate: Any, count: int, read: Any, label: str) -> Any:
        return {"diffusion": np.full((count, 1), BASE.model.length)}, read(np.arange(count))[3]


def test_bits_per_byte_are_null_where_they_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    def found(text: str) -> perplexity.Perplexity:
        windows = np.resize(WORDPIECE.encode(text), (2, BASE.model.length))
        return perplexity.nelbo(Ones(), windows, WORDPIECE, 0.5, jax.random.key(0))

    known = found("the fox")
    assert known.bits_per_byte == pytest.approx(1 / 4 / np.log(2)) and known.bytes_of == "words"
    assert known.bits == f"{known.bits_per_byte:.4f} bits per byte of words" and not capsys.readouterr().err
    for _ in range(2):
        unknown = found("the \U0001f415")
        assert unknown.bits_per_byte is None and unknown.nats_per_token == 1 and unknown.bits == "unknown bits per byte"
        assert json.loads(json.dumps(unknown.to_json()))["bits_per_byte"] is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("bits_per_byte = null: ") and "'wordpiece'" in said


def test_a_run_without_bits_per_byte_is_drawn_and_described(tmp_path: Path) -> None:
    line = {"step": 4, "validation_nats_per_token": 2.5, "validation_bits_per_byte": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
    assert metrics.plot_loss(tmp_path).stat().st_size
    text = card.card(BASE, 4, 10, True, [line])
    assert "| validation (NELBO; for AR -log p), nats per token, at step 4 | 2.5 |" in text and "bits" not in text
