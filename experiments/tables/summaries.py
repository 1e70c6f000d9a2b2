"""Documents and their summaries: XSum's test split, as `eso-jax data prepare xsum` keeps it.

At --scale smoke a document is the first line of a function of Python's library, and its summary the first line of what
its author says of it. They go the same way as XSum does.
"""

from __future__ import annotations

import json
import re

import tensorflow_datasets as tfds

from eso_jax.data import SPLITS, documents, get_tokenizer
from eso_jax.data.prepare import prepare
from eso_jax.data.prepared import MANIFEST
from eso_jax.errors import require
from eso_jax.files import write_whole
from lab import Lab, paper

SIGNATURE = re.compile(r'^ *((?:class|def) [^\n]{8,56}:)\n *r?"""([^\n"]{8,47})(?:"""|\n)', re.M)


def pairs(lab: Lab, count: int) -> tuple[list[str], list[str]]:
    """At most so many documents of the test split, the first ones, and their summaries."""
    if lab.smoke:
        prepare_smoke(lab)
    folder = lab.data_dir / "documents" / "corpora" / "xsum" / "1.0.0"
    require(folder.is_dir(), "--scale", lab.scale, f"there is no {folder}; {paper.PREPARE['XSum']}")
    test = tfds.builder_from_directory(folder).as_data_source("test")
    texts = [test[number]["text"].decode() for number in range(min(2 * count, len(test)))]
    return texts[::2], texts[1::2]


def prepare_smoke(lab: Lab) -> None:
    """Prepares the corpus of the smoke scale, unless it is there."""
    if (lab.data_dir / "xsum" / MANIFEST).exists():
        return
    files = []
    for split in SPLITS:
        found = [match.groups() for _, content in documents("stdlib", split)
                 for match in SIGNATURE.finditer(content.decode("utf-8", "replace"))]
        files.append(lab.data_dir / "pairs" / f"{split}.jsonl")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        write_whole(files[-1], "".join(json.dumps({"document": document, "summary": summary}) + "\n"
                                       for document, summary in found), "--runs")
    prepare("xsum", lab.data_dir, get_tokenizer("bytes"), lab.config("xsum/mdlm").model.length, map(str, files),
            processes=1)
