"""Published test sets come split into words, blanks around punctuation; these rules put the text together again.

They are those of MDLM's evaluation, which for WikiText and PTB go back to Megatron-LM's. Perplexities compare only
under the same rules, so theirs are kept with their quirks: in order, each over the whole text. One WikiText rule of
theirs, meant for blanks before years, matches nothing in practice and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Detokenizer = Callable[[str], str]


def _rules(*rules: tuple[str, str]) -> Detokenizer:
    """Substitutions (pattern, replacement), one after the other."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def apply(text: str) -> str:
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return text

    return apply


wikitext = _rules(
    (r"s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in ("-", ",")), (r" @\.@ ", "."),  # within numbers
    *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    *((rf"{left}\s*([^{right}]*?)\s*{right}", rf"{literal[0]}\1{literal[1]}")
      for left, right, literal in ((r"\(", r"\)", "()"), (r"\[", r"\]", "[]"), ("{", "}", "{}"), ('"', '"', '""'),
                                   ("'", "'", "''"))),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="),  # headings
    (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))

ptb = _rules(
    (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), (r"\\/", "/"),
    *[(" N ", " 1 ")] * 10,  # numbers in a row share their blanks
    (r"\$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"))

lm1b = _rules(
    ("http : / / ", "http://"), ("https : / / ", "https://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "), (r" \?$", "?"), (" ! ", "! "), (" !$", "!"),
    (" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"), (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"\$ ", "$"), ("£ ", "£"))


def lambada(text: str) -> str:
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def scientific_papers(text: str) -> str:
    return lm1b(wikitext(text))


DETOKENIZERS: dict[str, Detokenizer] = {
    "wikitext": wikitext, "ptb": ptb, "lm1b": lm1b, "lambada": lambada, "scientific_papers": scientific_papers}
