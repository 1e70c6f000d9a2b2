"""Table 2: the variance of two estimators of the NELBO, of one test sequence (Eso-LM, alpha_0 = 1, OpenWebText).

Command:   python experiments/tables/table_02_estimators.py --scale smoke

The MDM estimator draws a time and a corrupted sequence, ten of each to a trial; the any-order (AO) estimator draws one
order and takes one pass for all of its tokens. Their means differ a little, since in the first a masked token sees the
masked ones before it (see eso_jax/likelihood.py).
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np

from eso_jax.decoding.order import likelihood_orders
from eso_jax.engine import perplexity
from eso_jax.engine.model import Model
from eso_jax.evaluation.diversity import Estimate
from lab import RUNS, Lab, Table, main

RUN, TRIALS, DRAWS = "owt/esolm_1", 100, 10


def run(lab: Lab) -> None:
    settings = {"trials": TRIALS, "draws": DRAWS}
    mdm = np.array(lab.measure(RUN, "estimator-mdm", settings, lambda model: mdm_trials(lab, model)))
    ao = np.array(lab.measure(RUN, "estimator-ao", settings, lambda model: ao_trials(lab, model)))
    table = Table(["estimator", "passes per trial", "paper, mean", "paper, s.d.", "ours, mean (nats per token)",
                   "ours, s.d."],
                  [["MDM", DRAWS, *RUNS[RUN].estimators["MDM"], mean(mdm), spread(mdm)],
                   ["AO", 1, *RUNS[RUN].estimators["AO"], mean(ao), spread(ao)]])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.hist([mdm, ao], bins=30, label=[f"MDM, {DRAWS} passes", "AO, 1 pass"])
        axes.set(xlabel="estimate, nats per token", ylabel=f"of {TRIALS} trials")
        axes.legend()

    lab.report("table_02_estimators", __doc__ or "", {"": table}, draw=draw)


def mdm_trials(lab: Lab, model: Model) -> list[float]:
    """A trial is a mean over DRAWS independent draws of (t, z_t)."""
    window, keys = lab.test_windows(RUN, 1), jax.random.split(jax.random.key(2), TRIALS * DRAWS)
    # An evaluation of one draw each, so that times are independent: within one they are spread evenly.
    draws = [perplexity.nelbo_per_window(model, window, 1.0, key)["diffusion"] for key in keys]
    return np.reshape(draws, (TRIALS, DRAWS)).mean(axis=1).tolist()


def ao_trials(lab: Lab, model: Model) -> list[float]:
    window = lab.test_windows(RUN, 1)
    orders = np.asarray(likelihood_orders(jax.random.key(3), TRIALS, 1, window.shape[1], 1.0))
    return (-model.log_likelihood(window, orders)[:, 0] / window.shape[1]).tolist()


def mean(trials: np.ndarray) -> Estimate:
    return Estimate(float(trials.mean()), spread(trials).value / len(trials) ** 0.5)


def spread(trials: np.ndarray) -> Estimate:
    """The standard deviation, its own error that of normal trials."""
    deviation = float(trials.std(ddof=1))
    return Estimate(deviation, deviation / (2 * len(trials) - 2) ** 0.5)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
