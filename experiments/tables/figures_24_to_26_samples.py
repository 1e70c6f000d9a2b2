"""Figures 24 to 26: samples, to be read.

Command:   python experiments/tables/figures_24_to_26_samples.py --scale smoke
"""

from __future__ import annotations

import sys

import numpy as np

import samples
from eso_jax.run import workdir
from lab import Lab, Table, main
from samples import Setting

SETTINGS = {"Eso-LM trained and sampled at alpha_0 = 1, T = 1024": ("owt/esolm_1", Setting(1024, 1.0)),
            "Eso-LM trained and sampled at alpha_0 = 0.25, T = 1024": ("owt/esolm_025", Setting(1024, 0.25)),
            "Eso-LM trained at alpha_0 = 0.125, sampled at 0.0625, T = 1024": ("owt/esolm_0125", Setting(1024, 0.0625)),
            "MDLM, T = 1024": ("owt/mdlm", Setting(1024)), "AR": ("owt/ar", Setting(None))}
SHOWN = 3


def run(lab: Lab) -> None:
    tables = {}
    for title, (name, setting) in SETTINGS.items():
        samples.measure(lab, name, setting)
        with np.load(samples.path_of(lab, name, setting)) as arrays:
            tokens = arrays["tokens"][:SHOWN]
        tokenizer = workdir.kept_tokenizer(lab.workdir(name), lab.config(name))
        assert tokenizer is not None
        shown = [tokenizer.decode(row) for row in tokens]
        tables[title] = Table(["", "text"], [[number, repr(text).replace("|", "\\|")]
                                             for number, text in enumerate(shown)])
    lab.report("figures_24_to_26_samples", __doc__ or "", tables, ["The first of each, not chosen."])


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
