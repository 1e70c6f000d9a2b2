"""A generation in a terminal as it happens: drawn over itself there, one line after the other elsewhere."""

from __future__ import annotations

import contextlib
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from eso_jax.console import is_terminal, is_writer, say

if TYPE_CHECKING:
    from eso_jax.data.tokenizers import Tokenizer


@contextlib.contextmanager
def watching(tokenizer: Tokenizer | None, show: int, wanted: bool) -> Iterator[Callable[..., None] | None]:
    """The argument `watch` of `model.sample` that shows the first `show` samples in the block; None unless `wanted`."""
    if not wanted or tokenizer is None:
        yield None
        return
    drawn = 0

    def watch(rows: np.ndarray, tokens: np.ndarray) -> None:
        nonlocal drawn
        lines = []
        for row, own in sorted(dict(zip(rows.tolist(), tokens, strict=True)).items()):  # the padding repeats rows
            if row < show:
                done = int((own != tokenizer.mask_id).sum())
                lines.append((f"sample {row}: {done} of {len(own)} tokens", plain(tokenizer.decode(own))))
        if not is_terminal():
            for head, text in lines:
                say(f"{head} | " + text.replace("\n", "\\n"))
        elif is_writer():
            columns, height = shutil.get_terminal_size()
            frame = [line for head, text in lines for line in [head, *folded(text, columns)]][:height - 1]
            _put(erased(drawn) + "".join(f"{line}\n" for line in frame))
            drawn = len(frame)

    try:
        yield watch
    finally:
        _put(erased(drawn))


def plain(text: str) -> str:
    """The text without what would command a terminal: tabs as blanks, other controls as \\xNN or \\uNNNN."""
    def one(c: str) -> str:
        if c == "\n" or unicodedata.category(c)[0] not in "CZ" or c == " ":
            return c
        return "    " if c == "\t" else f"\\x{ord(c):02X}" if ord(c) < 256 else f"\\u{ord(c):04X}"

    return "".join(map(one, text.replace("\n\f\n", "\n\n")))


def folded(text: str, columns: int) -> list[str]:
    """The lines of a text, cut where the terminal would wrap them."""
    lines = []
    for line in text.split("\n"):
        start = width = 0
        for at, c in enumerate(line):
            own = 0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
            if width + own > columns:
                lines.append(line[start:at])
                start, width = at, 0
            width += own
        lines.append(line[start:])
    return lines


def erased(lines: int) -> str:
    """The control characters that erase the last lines of a terminal."""
    return f"\x1b[{lines}F\x1b[J" if lines else ""


def _put(text: str) -> None:
    if text:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()
