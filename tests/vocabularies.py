"""Two library tokenizers small enough to count by hand, made as GPT-2's and BERT-uncased's are."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from eso_jax.data.tokenizers import LibraryTokenizer


def gpt2_like() -> LibraryTokenizer:
    """Byte-level BPE: the 256 bytes in the library's order, then "th", "the", " c", " ca", and <|endoftext|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "c"), ("Ġc", "a")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    return LibraryTokenizer("gpt2", library.to_str())


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "##ting", ".", ",", "'", "caf",
              "##e", "t", "[", "]", "mask"]


def bert_like() -> LibraryTokenizer:
    """WordPiece over BERT_WORDS, with all that BERT's file has: special tokens, truncation, a template with [CLS]."""
    words = {word: i for i, word in enumerate(BERT_WORDS)}
    library = Tokenizer(models.WordPiece(vocab=words, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    library.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    library.enable_truncation(4)
    library.enable_padding(length=6)
    return LibraryTokenizer("bert-base-uncased", library.to_str())
