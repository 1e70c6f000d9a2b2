"""Text to batches of tokens.

corpora        where raw text comes from, and which split each document belongs to; folders: the files below one
tokenizers     text to token ids and back; lengths: how many bytes of text each id stands for
packing        documents to windows of equal length
catalog        the published corpora; readers, rows, streams (archives), detokenizers, builder (TFDS): their documents
prepare        published corpora to prepared folders, which `prepared` reads
prompts        the given tokens of samples; stops: where a sample's text ends
pipeline       windows to shuffled, resumable training batches (the only file that needs grain, so not imported here)
bigram         the baseline that every language model should beat
"""

from pathlib import Path

from eso_jax import files
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

    If an assignment names the folder, the folder sets these fields, except those that other assignments set. If the
    config names it, the folder sets only those that are at their defaults. Other values stay, and are checked when the
    windows are read.
    """
    assigned = {path.strip(): value.strip() for path, _, value in (each.partition("=") for each in assignments)}
    source = assigned.get("data.source", config.data.source)
    if not (Path(source) / prepared.MANIFEST).is_file():
        return config.override(*assignments)
    manifest = prepared.read_manifest(source)
    tokenizer, defaults = manifest["tokenizer"], Config()
    of_folder = {"data.tokenizer": tokenizer["name"], "model.length": manifest["length"],
                 "model.vocab_size": tokenizer["vocab_size"], "model.mask_id": tokenizer["mask_id"]}
    if config.model.mask_id is None and tokenizer["mask_id"] == tokenizer["vocab_size"] - 1:
        del of_folder["model.mask_id"]  # it is the last id by default
    for path, value in list(of_folder.items()):
        section, name = path.split(".")
        current, default = (getattr(getattr(settings, section), name) for settings in (config, defaults))
        kept = "data.source" not in assigned and current != default
        if path in assigned or kept or current == value:
            del of_folder[path]
    return config.override(*assignments, *(f"{path}={value}" for path, value in of_folder.items()))


def tokenizer_of(config: Config) -> Tokenizer:
    """The tokenizer of a config's data: a prepared folder's own, else the one that data.tokenizer names.

    Raises:
      EsoError: there is none, or the prepared folder has another.
      RunAgain: storage did not answer, three times.
    """
    source, name = config.data.source, config.data.tokenizer

    def read() -> Tokenizer:
        tokenizer = prepared_tokenizer(source) if is_prepared(source, config) else None
        # A name that differs may still be of the same tokenizer, such as a path to a copy of the file.
        return get_tokenizer(name) if tokenizer is None or tokenizer.name != name else tokenizer

    return files.reading("data.tokenizer", name, read)


def windows_of(config: Config, split: str, source: str | None = None, tokenizer: Tokenizer | None = None) -> Windows:
    """The packed windows of one split of a config's data, or of another source: integers [windows, model.length].

    Raw text is read and packed at once, a separator after each document; a prepared folder is read when windows are
    asked for, by number, slice or integers.

    Args:
      source: raw text or a prepared folder; None: data.source.
      tokenizer: the model's; None: the config's.

    Raises:
      EsoError: the source cannot be read or is too short, or the tokenizer does not fit the model.
      RunAgain: storage did not answer, three times.
    """
    source = config.data.source if source is None else source
    return files.reading("data.source", source, lambda: _windows_of(config, split, source, tokenizer))


def _windows_of(config: Config, split: str, source: str, tokenizer: Tokenizer | None) -> Windows:
    packed = is_prepared(source, config)
    if not packed:
        require_source(source)  # a missing source is reported before a tokenizer that does not fit
    tokenizer = tokenizer_of(config) if tokenizer is None else tokenizer
    require(tokenizer.vocab_size == config.model.vocab_size, "model.vocab_size", config.model.vocab_size,
            f"data.tokenizer = {tokenizer.name!r} needs {tokenizer.vocab_size}, with mask {tokenizer.mask_id}")
    require(tokenizer.mask_id == config.model.mask, "model.mask_id", config.model.mask,
            f"data.tokenizer = {tokenizer.name!r} needs {tokenizer.mask_id}")
    if packed:
        return prepared_windows(config, source, split, tokenizer)
    return pack(documents(source, split), tokenizer, config.model.length, where=f"data.source = {source!r}")
