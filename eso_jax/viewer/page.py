"""One HTML file that plays generations: all in it, no request, no library.

Text is put into the page as JSON without a `<`, and becomes text nodes alone; a Content-Security-Policy allows the
page's own script and style, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from eso_jax.decoding.record import Record
from eso_jax.errors import EsoError, reason_of, require
from eso_jax.viewer.caption import Caption

TITLE = "A generation, pass by pass"
GIVEN, DIFFUSION, SEQUENTIAL, LEFT, DECIDED = range(5)
HEIGHT = 760  # of the frame in a notebook, in pixels
NEEDED = ("tokens", "order", "tokens_per_step", "diffusion", "seconds", *Record._fields,
          *(name for name in Caption._fields if name != "decoder"))
LATER = ("given", "tokens_per_pass", "decoder")  # older files have none

Generation = Mapping[str, np.ndarray]


class Page(str):
    """The page as a string; a notebook shows it."""

    def __repr__(self) -> str:
        return f"Page of {len(self)} characters of HTML"

    def _repr_html_(self) -> str:
        return (f'<iframe srcdoc="{html.escape(self)}" sandbox="allow-scripts" title="{TITLE}" width="100%" '
                f'height="{HEIGHT}" style="border: 0"></iframe>')


def read(path: str) -> dict[str, np.ndarray]:
    """The generation in a .npz of `eso-jax sample --record`.

    Raises:
      EsoError: it is none.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if name in (*NEEDED, *LATER)}
    except FileNotFoundError as error:
        raise EsoError(f"NPZ = {path!r}: no such file") from error
    except Exception as error:  # NumPy raises what its parts raise; an array that is no .npz has no `files`
        raise EsoError(f"NPZ = {path!r}: not a .npz of eso-jax sample") from error
    missing = [name for name in NEEDED if name not in arrays]
    require(not missing, "NPZ", path, f"holds no record of its generation (no {', '.join(missing[:3])}); make it by "
            "eso-jax sample --record")
    return arrays


def page(generations: Mapping[str, Generation]) -> Page:
    """The page that plays generations side by side, by their names."""
    parts = {name: resources.files(__package__).joinpath(f"page.{name}").read_text("utf-8")
             for name in ("html", "css", "js")}
    runs = []
    for name, generation in generations.items():
        try:
            runs.append(_run(name, generation))
        except (ValueError, IndexError, TypeError) as error:  # what NumPy makes of shapes that do not fit
            raise EsoError(f"generation = {name!r}: its arrays do not fit each other ({reason_of(error)}); take it as "
                           "eso-jax sample --record has written it") from error
    # `<` would be able to end the script, or to begin a comment in it. What is not ASCII is escaped as well.
    data = json.dumps(runs, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = (f"default-src 'none'; style-src '{_hash(parts['css'])}'; script-src '{_hash(parts['js'])}'; "
              "base-uri 'none'; form-action 'none'")
    values = {"policy": policy, "title": TITLE, "style": parts["css"], "data": data, "script": parts["js"]}
    return Page(re.sub(r"\{(\w+)\}", lambda found: values[found[1]], parts["html"]))


def named(paths: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """The generations of files, by names that tell them apart."""
    stems = [Path(path).stem for path in paths]
    return {stem if stems.count(stem) == 1 else f"{stem} ({number})": read(path)
            for number, (stem, path) in enumerate(zip(stems, paths, strict=True), 1)}


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _run(name: str, arrays: Generation) -> dict[str, Any]:
    """A generation as the script reads it."""
    record = Record(*(arrays[field] for field in Record._fields))
    order, window = arrays["order"], arrays["window"]
    counts = arrays.get("tokens_per_pass", arrays["tokens_per_step"])
    passes, (rows, length) = counts.shape[-1], order.shape
    counts = np.broadcast_to(counts, (rows, passes))
    windows = np.broadcast_to(window, (rows, passes, 2))
    left = arrays["tokens"] == arrays["mask"]  # no pass has decoded it, or it lies after a stop
    given = arrays["given"] if "given" in arrays else np.zeros(rows, int)  # those that a stop has cut count as well
    diffused = given + arrays["diffusion"]
    slot = np.argsort(order, axis=1)
    phase = np.where(record.step < 0, GIVEN, np.where(slot < diffused[:, None], DIFFUSION, SEQUENTIAL))
    decoder = str(arrays.get("decoder", ""))
    if decoder:
        phase = np.where(record.step < 0, GIVEN, DECIDED)
    phase = np.where(left, LEFT, phase)
    first = given[:, None] + np.cumsum(counts, axis=1) - counts
    phases = np.where(first < diffused[:, None], DIFFUSION, SEQUENTIAL) if not decoder else np.full_like(first, DECIDED)
    samples = [{"tokens": arrays["tokens"][row].tolist(), "phase": phase[row].tolist(), "counts": counts[row].tolist(),
                "phases": phases[row].tolist(), "window": windows[row].tolist(),
                **{field: _plain(value[row]) for field, value in record._asdict().items()}} for row in range(rows)]
    ends = arrays["piece_ends"].tolist()
    text = arrays["piece_bytes"].tobytes()
    pieces = {int(i): None if i == arrays["separator"] else text[low:high].decode("utf-8", "surrogateescape")
              for i, low, high in zip(arrays["piece_ids"], [0, *ends], ends, strict=False)}
    return {"name": name, "label": str(arrays["label"]), "decoder": decoder, "length": length, "passes": passes,
            "seconds": float(arrays["seconds"]), "cached": bool((window[..., 0] > 0).any()), "pieces": pieces,
            "samples": samples}


def _plain(x: np.ndarray) -> list[Any]:
    """Numbers for the page, rounded to four decimals; null for those that are not finite."""
    if np.issubdtype(x.dtype, np.integer):
        return x.tolist()
    return [_plain(row) for row in x] if x.ndim > 1 else [
        round(value, 4) if np.isfinite(value) else None for value in x.astype(float).tolist()]
