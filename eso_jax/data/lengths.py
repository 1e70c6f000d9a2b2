"""How many bytes of text each id of a library tokenizer stands for, from its vocabulary entry.

What a text becomes on its way to the vocabulary says how an entry is read:

  ByteLevel            each character of its alphabet is a byte
  Metaspace            the replacement (U+2581), or what a normalizer has put for blanks, is a blank
  byte fallback        <0xHH> is a byte
  words alone          WordPiece, WordLevel: a blank before each word; BPE with an end of words: one after it

The sum over a text's ids is then its UTF-8 length, or that of the normalized text. It is not known of an unknown
token, nor of an added one that takes in the blanks around it, nor where blanks or characters are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

UNKNOWN = -1
# Each normalizer in use changes one of them. All are encoded, to see whether the bytes of ids add up.
PROBES = ("the quick  brown fox, it's\n\tover 'there'. ", "    return x", "Caf\u00e9 \u0130\u2126 \ufb01 e\u0301",
          "\ud55c\uad6d\uc5b4 \u65e5\u672c\u8a9e", "\U0001f415 \u200b\u00a0x")


def _parts(section: Any) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, which may be sequences of sequences."""
    if section and section["type"] == "Sequence":
        for part in section.get("normalizers") or section.get("pretokenizers") or []:
            yield from _parts(part)
    elif section:
        yield section


class _Entries:
    """How many bytes vocabulary entries and pieces of text stand for, as the settings of a tokenizer.json say."""

    def __init__(self, settings: dict[str, Any], byte_alphabet: set[str]):
        model, parts = settings["model"], [*_parts(settings["normalizer"]), *_parts(settings["pre_tokenizer"])]
        blanks = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
        blanks += [part["content"] for part in parts if part["type"] == "Replace"
                   and part["pattern"] == {"String": " "} and len(part["content"]) == 1]
        self.blanks = dict.fromkeys(map(ord, blanks), " ")
        self.alphabet = byte_alphabet if any(part["type"] == "ByteLevel" for part in parts) else set()
        self.fallback = bool(model.get("byte_fallback"))
        self.prefix = model.get("continuing_subword_prefix") or ""
        self.suffix = model.get("end_of_word_suffix") or ""
        self.words = bool(self.suffix) or model["type"] in ("WordPiece", "WordLevel") and not (
            self.alphabet or self.blanks)

    def of_text(self, text: str) -> int:
        """Bytes of a piece of text as the pre-tokenizer gives it."""
        return len(text) if text and self.alphabet >= set(text) else len(text.translate(self.blanks).encode())

    def of_entry(self, entry: str) -> int:
        """Bytes of a vocabulary entry."""
        if self.fallback and re.fullmatch("<0x[0-9A-F]{2}>", entry):
            return 1
        begins = not (self.prefix and entry.startswith(self.prefix))
        ends = entry.endswith(self.suffix)
        text = entry[0 if begins else len(self.prefix):len(entry) - len(self.suffix) * ends]
        return self.of_text(text) + (self.words and (ends if self.suffix else begins))


def of_ids(library: Any, reader: Any, settings: dict[str, Any], size: int,
           textless: set[int]) -> tuple[np.ndarray, str]:
    """Bytes of each id, int64 [size] (UNKNOWN where they are not known), and what they are bytes of.

    Args:
      library: a tokenizers.Tokenizer.
      reader: the one that encodes by the same ids.
      settings: of its tokenizer.json, as the library writes it.
      textless: ids that stand for no text.
    """
    from tokenizers import pre_tokenizers

    entries = _Entries(settings, set(pre_tokenizers.ByteLevel.alphabet()))
    sizes = np.zeros(size, np.int64)
    model = library.get_vocab(with_added_tokens=False)
    for entry, i in model.items():
        sizes[i] = entries.of_entry(entry)
    for i, token in library.get_added_tokens_decoder().items():
        added = 0 if token.special else len(token.content.translate(entries.blanks).encode())
        ambiguous = token.content in model and not token.special and added != sizes[i]
        sizes[i] = UNKNOWN if token.lstrip or token.rstrip or ambiguous else added
    unknown = settings["model"].get("unk_token")
    unknown = settings["model"].get("unk_id") if unknown is None else library.token_to_id(unknown)
    if unknown is not None:
        sizes[unknown] = UNKNOWN
    sizes[list(textless)] = 0

    def normalize(text: str) -> str:
        return library.normalizer.normalize_str(text) if library.normalizer else text

    def pieces_bytes(text: str) -> int:
        """Bytes of the pieces that the pre-tokenizer makes of a text: what the sizes of its ids must add up to."""
        pieces = [normalize(text)]
        if library.pre_tokenizer:
            pieces = [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(*pieces)]
        return sum(entries.of_text(piece) + entries.words for piece in pieces)

    sums_hold = pieces_bytes("x y") > pieces_bytes("xy")
    exact = not entries.words
    for probe in PROBES:
        try:
            of_probe = sizes[reader.encode(probe, add_special_tokens=False).ids]
        except Exception:  # of the library: no ids for it, and none for unknown words
            of_probe = np.array([], np.int64)
        sums_hold &= bool((of_probe == UNKNOWN).any()) or int(of_probe.sum()) == pieces_bytes(probe)
        exact &= normalize(probe).translate(entries.blanks) in (probe, " " + probe)  # a blank in front may be added
        exact &= 0 <= pieces_bytes(probe) - len(probe.encode()) <= 1
    if not sums_hold:
        sizes[[i for i in range(size) if i not in textless]] = UNKNOWN
    return sizes, "words" if entries.words else "text" if exact else "normalized text"
