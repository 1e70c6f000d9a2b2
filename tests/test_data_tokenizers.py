"""Tokenizers: round trips, ids, bytes, files, the hub, training, and the copy in the work directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eso_jax
from conftest import BASE
from eso_jax.cli import main
from eso_jax.data import ByteTokenizer, get_tokenizer
from eso_jax.data.tokenizers import CharacterTokenizer, LibraryTokenizer, Tokenizer
from eso_jax.data.tokenizers import dtype_of, sha256, token_ids, train_tokenizer
from eso_jax.errors import EsoError
from eso_jax.run import train as training
from vocabularies import BERT_WORDS, bert_like, gpt2_like

BYTES = ByteTokenizer()
GPT2, BERT = gpt2_like(), bert_like()
TEXTS = ["the cat sat. the cats, sitting", "the the the", "can't the cat? the dog's caf\u00e9 cat"] * 40


@given(st.binary())
def test_bytes_round_trip(content: bytes) -> None:
    tokens = BYTES.encode(content)
    assert tokens.dtype == np.uint16 and tokens.shape == (len(content),)
    assert bytes(tokens.tolist()) == content
    assert BYTES.decode(tokens) == content.decode("utf-8", errors="replace")
    assert BYTES.num_bytes(tokens) == len(content)


@given(st.text())
def test_text_round_trip(text: str) -> None:
    for tokenizer in (BYTES, GPT2):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.num_bytes(tokens) == len(text.encode())
        assert not np.isin(tokens, [tokenizer.separator_id, tokenizer.mask_id]).any()


@given(st.text("abcdefghijklmnopqrstuvwxyz "))
def test_characters_round_trip(text: str) -> None:
    tokenizer = CharacterTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text and tokenizer.num_bytes(tokens) == len(text)
    assert tokens.tolist() == ["abcdefghijklmnopqrstuvwxyz ".index(character) for character in text]


@given(st.lists(st.sampled_from([word for word in BERT_WORDS[5:] if not word.startswith("##")])))
def test_words_round_trip(words: list[str]) -> None:
    tokens = BERT.encode(" ".join(words))
    assert tokens.tolist() == [BERT_WORDS.index(word) for word in words]
    assert BERT.encode(BERT.decode(tokens)).tolist() == tokens.tolist()
    assert BERT.num_bytes(tokens) == sum(len(word) + 1 for word in words)


def test_special_tokens() -> None:
    assert (BYTES.vocab_size, BYTES.separator_id, BYTES.mask_id) == (258, 256, 257)
    tokens = np.array([104, 257, 195, 169, 256, 195, 257])  # the last two: half of an é, and a mask
    assert BYTES.decode(tokens) == "h▒é\n\f\n\ufffd▒"
    assert BYTES.num_bytes(tokens) == BYTES.num_bytes(tokens[None]) == 4
    assert BYTES.decode([]) == ""
    characters = CharacterTokenizer()
    assert (characters.vocab_size, characters.separator_id, characters.mask_id) == (29, 27, 28)
    assert characters.decode([0, 28, 26, 27, 25]) == "a▒ \n\f\nz"


def test_tokens_by_id_or_as_text() -> None:
    assert token_ids("e", BYTES, "banned") == token_ids(["e"], BYTES, "banned") == (101,)
    assert token_ids(range(2), None, "banned") == (0, 1) and token_ids(np.int64(3), None, "banned") == (3,)
    assert token_ids(["\n\f\n", 5], BYTES, "banned") == (256, 5) and token_ids((), None, "banned") == ()
    for tokens, tokenizer, message in (
            ("the", BYTES, "banned = 'the': is 3 tokens of tokenizer 'bytes'"), ("", BYTES, "is 0 tokens"),
            ("e", None, "banned = 'e': the model has no tokenizer, so that text has no ids; give ids"),
            ([1.0], BYTES, "banned = 1.0: give ids, which are integers, or texts")):
        with pytest.raises(EsoError, match=message):
            token_ids(tokens, tokenizer, "banned")


def test_gpt2_has_a_mask_after_its_last_id() -> None:
    assert (GPT2.vocab_size, GPT2.separator_id, GPT2.mask_id) == (262, 260, 261)
    a, t, space = (int(GPT2.encode(character)[0]) for character in "at ")
    assert GPT2.encode("the cat").tolist() == [257, 259, t]
    assert GPT2.join(["the cat", "", " a"], separate=True).tolist() == [257, 259, t, 260, 260, space, a, 260]
    assert GPT2.decode([257, 261, 259, t, 260, 257]) == "the▒ cat\n\f\nthe"
    assert GPT2.num_bytes(np.array([[257, 261, 259], [260, t, t]])) == 3 + 3 + 2


def test_bert_has_its_own_mask_and_separates_by_cls() -> None:
    assert (BERT.vocab_size, BERT.separator_id, BERT.mask_id) == (len(BERT_WORDS), 2, 4)
    # Nothing is cut, padded or put around, whatever the file says.
    assert BERT.encode("The CAFÉ cats, sitting. the dog").tolist() == [5, 13, 14, 6, 8, 11, 1, 10, 5, 1]
    assert BERT.join(["the cat", "sat."], separate=True).tolist() == [5, 6, 2, 7, 10, 2]
    assert BERT.decode([2, 5, 6, 8, 4, 10]) == "\n\f\nthe cats▒."
    # " the" " caf" "e" " cat" "s" " ,"; nothing for the last two. Of an unknown word nothing is known.
    assert BERT.num_bytes(np.array([5, 13, 14, 6, 8, 11, 2, 4])) == 4 + 4 + 1 + 4 + 1 + 2
    assert BERT.num_bytes(np.array([5, 1])) is None


@pytest.mark.parametrize("tokenizer, text", [(GPT2, "the<|endoftext|>cat"), (BERT, "the [MASK] [CLS] cat")])
def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert not np.isin(tokens, [tokenizer.separator_id, tokenizer.mask_id]).any()
    if tokenizer is GPT2:
        assert tokenizer.decode(tokens) == text
    else:
        assert tokens.tolist()[:4] == [5, 16, 18, 17]


@pytest.mark.parametrize("tokenizer", [BYTES, CharacterTokenizer(), GPT2, BERT], ids=lambda t: t.name)
def test_tokenizers_keep_the_protocol(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer) and dtype_of(tokenizer) == np.uint16
    joined = tokenizer.join(["the cat", b"sat"], separate=True)
    parts = [tokenizer.encode("the cat"), [tokenizer.separator_id], tokenizer.encode(b"sat"), [tokenizer.separator_id]]
    assert joined.dtype == np.uint16 and joined.tolist() == np.concatenate(parts).tolist()
    assert tokenizer.join([], separate=True).shape == (0,)
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(EsoError, match=rf"^token id = {token}: must be in \[0, {tokenizer.vocab_size}\) for "
                                           f"tokenizer '{tokenizer.name}'$"):
            tokenizer.decode([0, token])


def test_other_characters_are_refused() -> None:
    with pytest.raises(EsoError, match="^data.tokenizer = 'characters': the text holds b'A', and only a to z"):
        CharacterTokenizer().encode("abcABC")


def test_hashes_tell_tokenizers_apart() -> None:
    assert GPT2.json is not None
    found = {sha256(tokenizer) for tokenizer in (BYTES, CharacterTokenizer(), GPT2, BERT)}
    assert len(found) == 4 and sha256(LibraryTokenizer("another name", GPT2.json)) in found


def test_large_vocabularies_take_four_bytes() -> None:
    class Large(ByteTokenizer):
        vocab_size = 2**16 + 1

    assert dtype_of(Large()) == np.uint32


# Where they come from


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(str(BERT.json))
    found = get_tokenizer(str(path))
    assert isinstance(found, LibraryTokenizer) and found.name == str(path) and found.json == BERT.json
    named = get_tokenizer(f"bert-base-uncased={path}")
    assert named.name == "bert-base-uncased" and named.json == BERT.json
    assert isinstance(get_tokenizer("bytes"), ByteTokenizer)
    assert isinstance(get_tokenizer("characters"), CharacterTokenizer)


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text(str(GPT2.json))

    def download(repository: str, file: str) -> str:
        assert (repository, file) == ("openai-community/gpt2", "tokenizer.json")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert get_tokenizer("gpt2").name == "gpt2" and get_tokenizer("gpt2").json == GPT2.json

    def fail(repository: str, file: str) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(EsoError) as error:
        get_tokenizer("bert-base-uncased")
    assert str(error.value) == (
        "data.tokenizer = 'bert-base-uncased': tokenizer.json of google-bert/bert-base-uncased could not be had from "
        "the hub (LocalEntryNotFoundError: offline); without a network, give a copy of that file: "
        "bert-base-uncased=path/to/tokenizer.json")


def test_unusable_ones(tmp_path: Path) -> None:
    def message(name: str) -> str:
        with pytest.raises(EsoError) as error:
            get_tokenizer(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message("gpt3") == ("data.tokenizer = 'gpt3': choose bytes, characters, gpt2, bert-base-uncased, or the "
                               "path of a tokenizer.json")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    assert message(str(path)).startswith(f"data.tokenizer = '{path}': not a tokenizer.json (")
    path.write_bytes(b"\xff\xfe")
    assert message(f"gpt2={path}").startswith(f"data.tokenizer = 'gpt2={path}': cannot be read (")
    path.write_text(str(GPT2.json).replace("<|endoftext|>", "<none>"))
    assert message(str(path)) == (f"data.tokenizer = '{path}': has none of <|endoftext|>, [CLS], </s> to separate "
                                  "documents; say which token does by --separator, of eso-jax data prepare and "
                                  "eso-jax import")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_training_one(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    out = tmp_path / "tokenizer.json"
    assert main(["data", "train-tokenizer", "--from", str(tmp_path / "text.txt"), "--vocab-size", "300", "--kind", kind,
                 "--out", str(out)]) == 0
    found = get_tokenizer(str(out))
    assert 29 < found.vocab_size <= 300
    tokens = found.encode(TEXTS[2])
    if kind == "bpe":
        assert found.mask_id == found.vocab_size - 1 > 257 and found.decode(tokens) == TEXTS[2]
        assert len(tokens) < len(BYTES.encode(TEXTS[2]))
    else:
        assert found.mask_id == 4 and found.separator_id == 2
        assert found.decode(tokens) == TEXTS[2].replace("é", "e").replace("n't", "n ' t").replace("dog's", "dog ' s") \
            or found.encode(found.decode(tokens)).tolist() == tokens.tolist()


def test_training_errors() -> None:
    with pytest.raises(EsoError, match="--vocab-size = 100: must be at least 300"):
        train_tokenizer(TEXTS, 100, "bpe")
    with pytest.raises(EsoError, match="--kind = 'unigram': choose bpe or wordpiece"):
        train_tokenizer(TEXTS, 300, "unigram")


# The work directory


@pytest.mark.slow
def test_it_travels_with_the_checkpoint(tmp_path: Path) -> None:
    text, original, workdir = tmp_path / "text.txt", tmp_path / "tokenizer.json", tmp_path / "w"
    text.write_text("\n".join(TEXTS * 5))
    original.write_text(str(GPT2.json))
    config = BASE.override(f"data.source={text}", f"data.tokenizer={original}", "train.steps=1", "model.vocab_size=262")
    training.train(config, workdir)
    original.unlink()
    model = eso_jax.load(workdir)
    assert isinstance(model.tokenizer, LibraryTokenizer) and model.tokenizer.json == GPT2.json
    for command in (["eval", "--num-windows", "4"], ["eval", "--source", str(text), "--num-windows", "4"],
                    ["sample", "--num-samples", "1", "--steps", "2"]):
        assert main([*command, "--workdir", str(workdir), "--out", str(tmp_path / "out")]) == 0
    training.train(config.override("train.steps=2"), workdir)  # goes on without the file
    assert eso_jax.load(workdir).step == 2


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(str(BERT.json))
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    config = BASE.override(f"data.source={tmp_path / 'text.txt'}", f"data.tokenizer={tmp_path / 'tokenizer.json'}",
                           f"model.vocab_size={len(BERT_WORDS)}")
    with pytest.raises(EsoError, match=r"^model.mask_id = 18: .* needs 4$"):  # the config's mask is the last id
        training.train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_the_package_needs_no_library() -> None:
    code = "import sys, eso_jax, eso_jax.data; assert not {'tokenizers', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def without_known_separator(kind: str) -> str:
    """A tokenizer.json whose end of text is <eos>, special or (Unigram) an entry alone."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if kind == "unigram":
        library = Library(models.Unigram([("<unk>", 0.0), ("<eos>", 0.0), *((c, -2.0) for c in "ab c")], 0, False))
        return library.to_str()
    library = Library(models.BPE() if kind == "bpe" else models.WordLevel(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.ByteLevel() if kind == "bpe" else pre_tokenizers.Whitespace()
    library.decoder = decoders.ByteLevel() if kind == "bpe" else None
    trainer = trainers.BpeTrainer if kind == "bpe" else trainers.WordLevelTrainer
    library.train_from_iterator(["ab ab abc"] * 9, trainer(special_tokens=["<unk>", "<eos>"], show_progress=False))
    return library.to_str()


@pytest.mark.parametrize("kind", ["bpe", "words", "unigram"])
def test_a_separator_of_another_name(kind: str, tmp_path: Path) -> None:
    """Named once, it is kept in the contents; ids are as before."""
    path = tmp_path / "t.json"
    path.write_text(without_known_separator(kind))
    with pytest.raises(EsoError, match="none of .* to separate documents; say which token does by --separator"):
        get_tokenizer(str(path))
    found = get_tokenizer(str(path), "<eos>")
    assert found.json is not None and found.separator_id == 1
    again = LibraryTokenizer("t", found.json)
    assert (again.separator_id, again.mask_id, again.vocab_size) == (1, found.mask_id, found.vocab_size)
    from tokenizers import Tokenizer as Library

    text = "ab abc"
    assert found.encode(text).tolist() == Library.from_str(path.read_text()).encode(text).ids
    assert found.join([text, text], separate=True).tolist().count(1) == 2
    assert kind == "unigram" or 1 not in found.encode("<eos> <|endoftext|>").tolist()
    with pytest.raises(EsoError, match="^--separator = '<end>': the tokenizer has no such token; it has <eos>, <unk>"):
        get_tokenizer(str(path), "<end>")
    if kind == "bpe":
        with pytest.raises(EsoError, match="^--separator = 'ab': text may become this token"):
            get_tokenizer(str(path), "ab")
    with pytest.raises(EsoError, match="bytes has one of its own"):
        get_tokenizer("bytes", "<eos>")


def test_a_separator_beside_one_of_a_known_name(tmp_path: Path) -> None:
    """The one that was asked for is taken, the other keeps its id, and neither is read from a text."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(without_known_separator("bpe"))
    library.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    library.save(str(tmp_path / "t.json"))
    usual, asked = (get_tokenizer(str(tmp_path / "t.json"), separator) for separator in (None, "<|im_end|>"))
    assert (usual.separator_id + 1, usual.vocab_size, usual.mask_id) == (
        asked.separator_id, asked.vocab_size, asked.mask_id) and usual.mask_id == asked.separator_id + 1
    for text in ("<|im_end|>", "<|endoftext|>", "ab <|im_end|> abc"):
        assert asked.encode(text).tolist() == usual.encode(text).tolist()
        assert asked.encode(text).max() < usual.separator_id


@pytest.mark.parametrize("kind", ["words", "wordpiece", "bpe"])
def test_an_unknown_word_does_not_become_the_separator(kind: str, tmp_path: Path) -> None:
    """Where the token of unknown words has the name that the separator gets."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    vocabulary, unknown = {"<|endoftext|>": 0, "<eos>": 1, "a": 2, "b": 3}, "<|endoftext|>"
    model = {"words": lambda: models.WordLevel(vocabulary, unk_token=unknown),
             "wordpiece": lambda: models.WordPiece(vocabulary, unk_token=unknown),
             "bpe": lambda: models.BPE(vocabulary, [], unk_token=unknown)}[kind]
    library = Library(model())
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "t.json"))
    found = get_tokenizer(str(tmp_path / "t.json"), "<eos>")
    assert found.separator_id == 1 and found.encode("a c b").tolist() == [2, 0, 3]


@pytest.mark.parametrize("kind", ["words", "unigram"])
def test_texts_without_ids_are_refused(kind: str) -> None:
    """By a tokenizer that has no token for what it does not know. What it knows it reads."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.WordLevel({"ab": 0, "</s>": 1}) if kind == "words" else
                      models.Unigram([("</s>", 0.0), ("a", -1.0), ("b", -1.0)]))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = LibraryTokenizer("t", library.to_str())
    assert tokenizer.num_bytes(tokenizer.encode("ab ab")) is None
    with pytest.raises(EsoError, match="^data.tokenizer = 't': has no ids for a part of the text .*; give it"):
        tokenizer.encode("ab xyz")


def test_a_sentencepiece_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03\xe2\x96\x81\x15\x00\xc0\xc0")
    with pytest.raises(EsoError, match="of a SentencePiece tokenizer.model the extra eval makes a tokenizer.json: .*"):
        get_tokenizer(str(path))
    with pytest.raises(EsoError, match="SentencePiece"):
        get_tokenizer(f"llama={path}")
