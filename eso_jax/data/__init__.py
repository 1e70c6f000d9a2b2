"""Text to batches of tokens.

corpora        where raw text comes from, and which split each document belongs to; folders: the files below one
tokenizers     text to token ids and back; lengths: how many bytes of text each id stands for
packing        documents to windows of equal length
catalog        the published corpora; readers, rows, streams (archives), detokenizers, builder (TFDS): their documents
prepare        published corpora to prepared folders, which `prepared` reads
prompts        what is given of a sample; stops: where its text ends
pipeline       windows to shuffled, resumable training batches (the only file that needs grain, so not imported here)
bigram         the baseline that every language model should beat
"""

from pathlib import Path

from eso_jax.config import Config
from eso_jax.data import prepared
from eso_jax.data.bigram import Bigram
from eso_jax.data.corpora import SPLITS, documents, require_source
from eso_jax.data.packing import pack
from eso_jax.data.prepared import Windows, evenly_spaced, is_prepared, prepared_tokenizer, prepared_windows
from eso_jax.data.tokenizers import ByteTokenizer, Tokenizer, get_tokenizer
from eso_jax.errors import require

__all__ = ["SPLITS", "Bigram", "ByteTokenizer", "Tokenizer", "Windows", "documents", "evenly_spaced", "get_tokenizer",
           "is_prepared", "override", "pack", "prepared_windows", "tokenizer_of", "windows_of"]


def override(config: Config, *assignments: str) -> Config:
    """`config.override(*assignments)`, with what a prepared folder brings: its tokenizer, vocabulary, mask and length.

    The folder decides what no assignment says: all of it where one names the folder, else the fields that are at their
    defaults. What is said otherwise stays, and is checked when the windows are read.
    """
    said = {path.strip(): value.strip() for path, _, value in (each.partition("=") for each in assignments)}
    source = said.get("data.source", config.data.source)
    if not (Path(source) / prepared.MANIFEST).is_file():
        return config.override(*assignments)
    manifest = prepared.read_manifest(source)
    made, defaults = manifest["tokenizer"], Config()
    brought = {"data.tokenizer": made["name"], "model.length": manifest["length"],
               "model.vocab_size": made["vocab_size"], "model.mask_id": made["mask_id"]}
    if config.model.mask_id is None and made["mask_id"] == made["vocab_size"] - 1:
        del brought["model.mask_id"]  # it is the last id by default
    for path, value in list(brought.items()):
        section, name = path.split(".")
        there = getattr(getattr(config, section), name)
        own = "data.source" not in said and there != getattr(getattr(defaults, section), name)
        if path in said or own or there == value:
            del brought[path]
    return config.override(*assignments, *(f"{path}={value}" for path, value in brought.items()))


def tokenizer_of(config: Config) -> Tokenizer:
    """The tokenizer of a config's data: a prepared folder's own, else the one that data.tokenizer names.

    Raises:
      EsoError: there is none, or the prepared folder has another.
    """
    source, name = config.data.source, config.data.tokenizer
    if not is_prepared(source, config):
        return get_tokenizer(name)
    found = prepared_tokenizer(source)
    # A name that differs may still be of the same tokenizer, such as a path to a copy of the file.
    return found if found.name == name else get_tokenizer(name)


def windows_of(config: Config, split: str, source: str | None = None, tokenizer: Tokenizer | None = None) -> Windows:
    """The packed windows of one split of a config's data, or of another source: integers [windows, model.length].

    Raw text is read and packed at once, a separator after each document; a prepared folder is read when windows are
    asked for, by number, slice or integers.

    Args:
      source: raw text or a prepared folder; None: data.source.
      tokenizer: the model's; None: the config's.

    Raises:
      EsoError: the source cannot be read or is too short, or the tokenizer does not fit the model.
    """
    source = config.data.source if source is None else source
    made = is_prepared(source, config)
    if not made:
        require_source(source)  # what is missing is said before what does not fit
    tokenizer = tokenizer_of(config) if tokenizer is None else tokenizer
    require(tokenizer.vocab_size == config.model.vocab_size and tokenizer.mask_id == config.model.mask,
            "model.vocab_size", config.model.vocab_size, f"data.tokenizer = {tokenizer.name!r} needs "
            f"{tokenizer.vocab_size}, with mask {tokenizer.mask_id}")
    if made:
        return prepared_windows(config, source, split, tokenizer)
    return pack(documents(source, split), tokenizer, config.model.length)
