"""Text to token ids and back."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from eso_jax.data import lengths
from eso_jax.errors import EsoError, reason_of, require

FILE = "tokenizer.json"  # what a library tokenizer is kept as
HUB = {"gpt2": "openai-community/gpt2", "bert-base-uncased": "google-bert/bert-base-uncased"}
_SEPARATORS = ("<|endoftext|>", "[CLS]", "</s>")
_MASKS = ("[MASK]", "<mask>")
SHOWN_SEPARATOR, _SHOWN_MASK = "\n\f\n", "▒"  # in decoded text


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of a tokenizer.

    Attributes:
      name: as in data.tokenizer.
      vocab_size: V, the mask included.
      separator_id: the token between documents, and at both ends of a window where a wrapping asks for that. It stands
        for no text.
      mask_id: never in data.
      json: the contents of its tokenizer.json; None where it is code alone.
      bytes_of: what `num_bytes` counts: "text", "normalized text", or "words" (each with one blank).
    """

    name: str
    vocab_size: int
    separator_id: int
    mask_id: int
    json: str | None
    bytes_of: str

    def encode(self, text: bytes | str) -> np.ndarray:
        """The ids of a text (bytes are read as UTF-8), `dtype_of(tokenizer)` [S]; never a separator or a mask."""

    def join(self, texts: Sequence[bytes | str], separate: bool) -> np.ndarray:
        """Texts end to end, `dtype_of(tokenizer)` [S]; if `separate`, a separator after each."""

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text to read; separators are shown as a form feed on its own line, masks as '▒'.

        Args:
          ids: integers [S].

        Raises:
          EsoError: an id is out of range.
        """

    def piece(self, id: int) -> bytes:
        """The text of one id within a text; empty for separators and masks."""

    def num_bytes(self, tokens: np.ndarray) -> int | None:
        """Bytes of text that `tokens`, integers of any shape, stand for: separators and masks count as none. None
        where it cannot be known, as of an unknown word."""


def dtype_of(tokenizer: Tokenizer) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that its ids are kept in."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def encode_shown(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of a text as `decode` shows it, separators included."""
    return tokenizer.join(text.split(SHOWN_SEPARATOR), separate=True)[:-1]


def token_ids(tokens: Any, tokenizer: Tokenizer | None, name: str) -> tuple[int, ...]:
    """The ids of tokens that somebody has given.

    Args:
      tokens: ids, or texts of one token each, as `decode` shows them; one or several.
      name: what they were given as.

    Raises:
      EsoError: one is neither, or its text is not one token; or there is no tokenizer for a text.
    """
    found = list[int]()
    for token in [tokens] if isinstance(tokens, str) or np.ndim(tokens) == 0 else tokens:
        if isinstance(token, str):
            require(tokenizer is not None, name, token, "the model has no tokenizer, so that text has no ids; give ids")
            assert tokenizer is not None
            ids = encode_shown(tokenizer, token)
            require(len(ids) == 1, name, token, f"is {len(ids)} tokens of tokenizer {tokenizer.name!r}, not one")
            found.append(int(ids[0]))
        else:
            require(isinstance(token, int | np.integer), name, token, "give ids, which are integers, or texts")
            found.append(int(token))
    return tuple(found)


def sha256(tokenizer: Tokenizer) -> str:
    """Equal for equal tokenizers, whatever they are called."""
    return hashlib.sha256((tokenizer.name if tokenizer.json is None else tokenizer.json).encode()).hexdigest()


class ByteTokenizer:
    """Ids 0 to 255 are bytes; two more ids stand for no text: the separator after each document, and the mask."""

    name = "bytes"
    alphabet = bytes(range(256))
    vocab_size = 258
    separator_id = 256
    mask_id = 257
    json: str | None = None
    bytes_of = "text"

    def encode(self, text: bytes | str) -> np.ndarray:
        """The bytes of `text` (UTF-8 if a str) as ids, uint16 [S]. Any byte is allowed, NUL included."""
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.uint16)

    def join(self, texts: Sequence[bytes | str], separate: bool) -> np.ndarray:
        end = np.array([self.separator_id] * separate, np.uint16)
        return np.concatenate([np.empty(0, np.uint16), *(part for text in texts for part in (self.encode(text), end))])

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        shown = [bytes([byte]) for byte in self.alphabet] + [SHOWN_SEPARATOR.encode(), _SHOWN_MASK.encode()]
        return b"".join(shown[i] for i in _in_vocabulary(ids, self)).decode("utf-8", errors="replace")

    def piece(self, id: int) -> bytes:
        return self.alphabet[id:id + 1]

    def num_bytes(self, tokens: np.ndarray) -> int:
        return int(np.count_nonzero(np.asarray(tokens) < self.separator_id))


class CharacterTokenizer(ByteTokenizer):
    """The 27 characters of text8, a to z and the blank; then the separator and the mask."""

    name = "characters"
    alphabet = b"abcdefghijklmnopqrstuvwxyz "
    vocab_size = 29
    separator_id = 27
    mask_id = 28

    def encode(self, text: bytes | str) -> np.ndarray:
        """Ids of characters, uint16 [S].

        Raises:
          EsoError: a character is another.
        """
        content = super().encode(text)
        id_of_byte = np.full(256, self.mask_id, np.uint16)
        id_of_byte[list(self.alphabet)] = np.arange(len(self.alphabet))
        ids = id_of_byte[content]
        wrong = content[ids == self.mask_id]
        if wrong.size:
            raise EsoError(f"data.tokenizer = {self.name!r}: the text holds {bytes([wrong[0]])!r}, and only a to z and "
                           "blanks have ids; choose another tokenizer")
        return ids


CODE: dict[str, type[ByteTokenizer]] = {kind.name: kind for kind in (ByteTokenizer, CharacterTokenizer)}


class LibraryTokenizer:
    """A tokenizer.json of the `tokenizers` library: GPT-2's, BERT's, or one of your own.

    The mask is its [MASK] (or <mask>), else one more id after the last: BERT-uncased has V = 30,522 and GPT-2 V =
    50,258. The separator is its end-of-text token, else [CLS], which is what the authors' code puts between and around
    LM1B's sentences. These and all special tokens spelt out in a text are read as text, unlike in the authors' code, so
    that no document can smuggle in a mask.

    Byte-level ones (GPT-2) give back each text exactly. WordPiece (BERT) does not: it lowers case, strips accents, and
    drops the difference between "a." and "a .". `num_bytes` is then the UTF-8 length of the pieces with one blank
    before each word or mark: the bytes of the text as the model sees it, not as it was. See lengths.py.
    """

    def __init__(self, name: str, contents: str):
        from tokenizers import Tokenizer as Library

        self.name = name
        self.json: str | None = contents
        try:
            self._library = Library.from_str(contents)
        except Exception as error:  # the library raises Exception itself
            raise EsoError(f"data.tokenizer = {name!r}: not a tokenizer.json ({error})") from error
        vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values()) + 1
        masks = [vocabulary[token] for token in _MASKS if token in vocabulary]
        separators = [vocabulary[token] for token in _SEPARATORS if token in vocabulary]
        require(bool(separators), "data.tokenizer", name, f"has none of {', '.join(_SEPARATORS)} to "
                "separate documents; say which token does by --separator, of eso-jax data prepare and eso-jax import")
        self.mask_id = masks[0] if masks else size
        self.vocab_size = max(size, self.mask_id + 1)
        self.separator_id = separators[0]
        settings = json.loads(self._library.to_str())
        self._reader = _reader(settings, {self.mask_id, self.separator_id})
        self._bytes_of_characters = _byte_level() if "ByteLevel" in json.dumps(settings["decoder"]) else {}
        self._bytes, self.bytes_of = lengths.of_ids(self._library, self._reader, settings, self.vocab_size,
                                                    {self.mask_id, self.separator_id})

    def encode(self, text: bytes | str) -> np.ndarray:
        return self.join([text], separate=False)

    def join(self, texts: Sequence[bytes | str], separate: bool) -> np.ndarray:
        strings = [text if isinstance(text, str) else text.decode("utf-8", errors="replace") for text in texts]
        try:
            encodings = self._reader.encode_batch_fast(strings, add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise EsoError(f"data.tokenizer = {self.name!r}: has no ids for a part of the text ({error}); give it a "
                           "token for unknown words, or choose another tokenizer") from error
        end = np.array([self.separator_id] * separate, dtype_of(self))
        parts: list[np.ndarray] = [np.empty(0, dtype_of(self))]
        for text, encoding in zip(strings, encodings, strict=True):
            ids = np.array(encoding.ids, dtype_of(self))
            reserved = ids[(ids == self.separator_id) | (ids == self.mask_id)]
            if reserved.size:
                raise EsoError(f"data.tokenizer = {self.name!r}: reads a part of the text {text[:40]!r} as "
                               f"{self._library.id_to_token(int(reserved[0]))!r}, which is kept for the separator or "
                               "the mask; choose another tokenizer")
            parts += [ids, end]
        return np.concatenate(parts)

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        shown = {self.separator_id: SHOWN_SEPARATOR, self.mask_id: _SHOWN_MASK}
        runs = itertools.groupby(_in_vocabulary(ids, self), shown.__contains__)
        return "".join("".join(map(shown.__getitem__, run)) if are_shown
                       else self._library.decode(list(run), skip_special_tokens=False) for are_shown, run in runs)

    def piece(self, id: int) -> bytes:
        if id in (self.separator_id, self.mask_id):
            return b""
        entry = self._library.id_to_token(id) or ""
        if self._bytes_of_characters and set(entry) <= self._bytes_of_characters.keys():
            return bytes(self._bytes_of_characters[character] for character in entry)
        if found := re.fullmatch("<0x([0-9A-F]{2})>", entry):
            return bytes.fromhex(found[1])
        # A decoder may treat the first id of a text differently, so the second is used.
        once, twice = (self._library.decode([id] * times, skip_special_tokens=False) for times in (1, 2))
        return str(twice.removeprefix(once)).encode()

    def num_bytes(self, tokens: np.ndarray) -> int | None:
        sizes = self._bytes[np.asarray(tokens)]
        return None if (sizes == lengths.UNKNOWN).any() else int(sizes.sum())


def _byte_level() -> dict[str, int]:
    """The bytes that a byte-level vocabulary spells by characters: their own, or where that cannot be seen the next
    free one from 256 on."""
    from tokenizers import pre_tokenizers

    seen = set(pre_tokenizers.ByteLevel.alphabet())
    unseen = [byte for byte in range(256) if chr(byte) not in seen]
    return ({chr(byte): byte for byte in range(256) if chr(byte) in seen}
            | {chr(256 + number): byte for number, byte in enumerate(unseen)})


def _reader(settings: dict[str, Any], kept: set[int]) -> Any:
    """The library's tokenizer of these settings, by which no text becomes a special token or one of the ids `kept`:
    their entries get names that no text holds. (The library's own encode_special_tokens is not enough: it leaves those
    that the model finds by itself, as Unigram does, and those that a file does not call special.)"""
    from tokenizers import Tokenizer as Library

    changed = settings | {"truncation": None, "padding": None, "post_processor": None}  # BERT's file cuts at 512 tokens
    added = [token | {"special": token["special"] or token["id"] in kept} for token in settings["added_tokens"]]
    model = dict(settings["model"])
    vocabulary = model["vocab"]
    pairs = (list(vocabulary.items()) if isinstance(vocabulary, dict)
             else [(entry, i) for i, (entry, _) in enumerate(vocabulary)])
    hidden = {token["content"] for token in added if token["special"]} | {e for e, i in pairs if i in kept}
    names = {entry: f"\U0010ffff{entry}\U0010ffff" for entry in hidden}
    model["vocab"] = ({names.get(e, e): i for e, i in pairs} if isinstance(vocabulary, dict)
                      else [[names.get(e, e), score] for e, score in vocabulary])
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    renamed = [token | {"content": names.get(token["content"], token["content"])} for token in added]
    try:
        reader = Library.from_str(json.dumps(changed | {"added_tokens": renamed, "model": model}))
    except Exception:  # a merge makes one of them: `join` will see it
        reader = Library.from_str(json.dumps(changed | {"added_tokens": added}))
    reader.encode_special_tokens = True
    return reader


def _in_vocabulary(ids: np.ndarray | Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The same ids; an EsoError unless the tokenizer has all of them."""
    ids = np.asarray(ids)
    wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if wrong.size:
        raise EsoError(f"token id = {wrong[0]}: must be in [0, {tokenizer.vocab_size}) for tokenizer "
                       f"{tokenizer.name!r}")
    return ids.astype(int).tolist()


def get_tokenizer(name: str, separator: str | None = None) -> Tokenizer:
    """The tokenizer called `name`: "bytes", "characters", "gpt2" or "bert-base-uncased" from the Hugging Face hub, the
    path of a tokenizer.json, or NAME=PATH, a file that goes by a name (gpt2=my/tokenizer.json, without a network).

    Args:
      separator: the token of a tokenizer.json that stands between documents, where that is not the one with a name
        known for it; it has such a name from then on.

    Raises:
      EsoError: there is none, or the hub cannot be reached.
    """
    if name in CODE:
        require(separator is None, "--separator", separator, f"{name} has one of its own; leave it out")
        return CODE[name]()
    if name in HUB:
        return LibraryTokenizer(name, _from_hub(name).read_text("utf-8"))
    called, path = name.split("=", 1) if "=" in name and not Path(name).is_file() else (name, name)
    is_path = path != name or path.endswith(".json") or os.sep in path
    missing = ("is a folder; give the tokenizer.json in it; " if Path(path).is_dir() else
               "no such file; " if is_path else "")
    require(Path(path).is_file(), "data.tokenizer", name,
            f"{missing}choose bytes, characters, {', '.join(HUB)}, or the path of a tokenizer.json")
    try:
        contents = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "" if isinstance(error, OSError) else (
            "; of a SentencePiece tokenizer.model the extra eval makes a tokenizer.json: transformers.AutoTokenizer"
            ".from_pretrained(FOLDER).backend_tokenizer.save('tokenizer.json')")
        raise EsoError(f"data.tokenizer = {name!r}: cannot be read ({error}){remedy}") from error
    return LibraryTokenizer(called, contents if separator is None else _with_separator(contents, separator))


def _with_separator(contents: str, separator: str) -> str:
    """A tokenizer.json whose token `separator` has the usual name of one, so that every reader of it finds the same.

    Raises:
      EsoError: it has no such token, or the token is made by merges, so that text may become it.
    """
    try:
        settings = json.loads(contents)
        added, model = settings["added_tokens"], settings["model"]
        entries = model["vocab"]  # {token: id}, or of Unigram [[token, score], ...]
        tokens = {token["content"] for token in added} | {
            entry if isinstance(entry, str) else entry[0] for entry in entries}
    except (ValueError, TypeError, KeyError, IndexError):  # the library says what is wrong
        return contents
    special = [token for token in sorted(tokens) if token[:1] in "<[" and token[-1:] in ">]"][:8]
    require(separator in tokens, "--separator", separator,
            f"the tokenizer has no such token; it has {', '.join(special) or 'none of the kind'}")
    merges = (pair if isinstance(pair, list) else pair.split(" ") for pair in model.get("merges", ()))
    require(all("".join(pair) != separator for pair in merges), "--separator", separator,
            "text may become this token; choose one that stands for no text")
    name = _SEPARATORS[0]
    renamed = {name: separator, separator: name}  # another token that has the name takes that of this one
    for token in added:
        token["content"] = renamed.get(token["content"], token["content"])
    if isinstance(entries, dict):
        model["vocab"] = {renamed.get(entry, entry): i for entry, i in entries.items()}
    else:
        model["vocab"] = [[renamed.get(entry, entry), score] for entry, score in entries]
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    if not any(token["content"] == name for token in added):
        number = entries[separator] if isinstance(entries, dict) else [entry for entry, _ in entries].index(separator)
        added.append({"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": True})
        added.sort(key=lambda token: token["id"])
    settings["post_processor"] = None  # it may name the token, and nothing here asks for it
    return json.dumps(settings, ensure_ascii=False)


def _from_hub(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(HUB[name], FILE))
    except Exception as error:  # of the hub, of its HTTP client, or of the file system
        raise EsoError(f"data.tokenizer = {name!r}: {FILE} of {HUB[name]} could not be had from the hub "
                       f"({reason_of(error)}); without a network, give a copy of that file: {name}=path/to/{FILE}"
                       ) from error


def train_tokenizer(texts: Any, vocab_size: int, kind: str) -> LibraryTokenizer:
    """A tokenizer of at most `vocab_size` ids, the mask included, learned from an iterable of str.

    Args:
      kind: "bpe", over bytes as GPT-2's; or "wordpiece", of lower-case words as BERT-uncased's.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    require(kind in ("bpe", "wordpiece"), "--kind", kind, "choose bpe or wordpiece")
    require(vocab_size >= 300, "--vocab-size", vocab_size, "must be at least 300: the bytes alone are 256")
    if kind == "bpe":
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=["<|endoftext|>"],
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    else:
        library = Library(models.WordPiece(unk_token="[UNK]"))
        library.normalizer = normalizers.BertNormalizer(lowercase=True)
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, show_progress=False,
                                            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    library.train_from_iterator(texts, trainer)
    return LibraryTokenizer(kind, library.to_str())
