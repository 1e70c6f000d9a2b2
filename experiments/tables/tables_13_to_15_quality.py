"""Tables 13 to 15 and Figures 4, 17, 22 and 23: quality of samples against time, by sampler and setting (OpenWebText).

Command:   python experiments/tables/tables_13_to_15_quality.py --scale smoke

An Eso-LM is sampled at other alpha_0 than it was trained with; NFE and time depend on the sampling alone. The paper's
time is that of forward passes for 512 samples on an H200, without drawing tokens; ours includes the draws.
"""

from __future__ import annotations

import sys

import samples
from lab import RUNS, Cell, Lab, Table, main, paper
from paper import Sampled
from samples import Measures, Setting

TRAINED = {"1": "owt/esolm_1", "0.5": "owt/esolm_05", "0.25": "owt/esolm_025", "0.125": "owt/esolm_0125"}
ESO_LM = list(paper.SETTINGS)  # (alpha_0 when sampling, T)
MDLM = [8, 16, 32, 48, 64, 128, 256, 1024, 4096]  # T
BD3LM, BD3LM_STEPS = [4, 8, 16], [256, 512, 1024, 2048, 4096]  # blocks, T
COLUMNS = ["T, ours", "NFE, paper", "NFE, ours", "s, paper", "s, ours", "Gen PPL, paper", "Gen PPL, ours",
           "entropy, paper", "entropy, ours", "MAUVE, paper", "MAUVE, ours", "repeated 4-grams, ours"]


def run(lab: Lab) -> None:
    tables, points = {}, {}
    for trained, name in TRAINED.items():
        measured = [samples.measure(lab, name, Setting(steps, alpha_0)) for alpha_0, steps in ESO_LM]
        tables[f"Table 13: Eso-LM trained at alpha_0 = {trained}"] = Table(
            ["alpha_0", "T", *COLUMNS], [[*setting, *cells(RUNS[name].samples[setting], measures)]
                                         for setting, measures in zip(ESO_LM, measured, strict=True)])
        points[f"Eso-LM, trained at {trained}"] = measured
    measured = [samples.measure(lab, "owt/mdlm", Setting(steps)) for steps in MDLM]
    tables["Table 14: MDLM"] = Table(["T", *COLUMNS], [[steps, *cells(RUNS["owt/mdlm"].samples[steps], measures)]
                                                       for steps, measures in zip(MDLM, measured, strict=True)])
    points["MDLM"] = measured
    rows: list[list[Cell]] = []
    for block in BD3LM:
        name = f"owt/bd3lm_{block}"
        measured = [samples.measure(lab, name, Setting(steps)) for steps in BD3LM_STEPS]
        rows += [[block, steps, *cells(RUNS[name].samples[steps], measures)]
                 for steps, measures in zip(BD3LM_STEPS, measured, strict=True)]
        points[f"BD3-LM, {block}"] = measured
    tables["Table 15: BD3-LM"] = Table(["L'", "T", *COLUMNS], rows)
    ar = samples.measure(lab, "owt/ar", Setting(None))
    points["AR"] = [ar]
    tables["AR (Figure 4)"] = Table(COLUMNS, [cells(RUNS["owt/ar"].samples[None], ar)])
    lab.report("tables_13_to_15_quality", __doc__ or "", tables, notes(lab), samples.picture_of(points))


def cells(papers: Sampled, ours: Measures) -> list[Cell]:
    return [ours.steps, papers.nfe, ours.nfe, papers.seconds, ours.seconds, papers.gen_ppl, ours.gen_ppl,
            papers.entropy, ours.entropy, papers.mauve, ours.mauve, ours.repetition]


def notes(lab: Lab) -> list[str]:
    count, batch = samples.COUNT[lab.scale], samples.BATCH[lab.scale]
    lines = [f"{count} samples in each setting, nucleus {samples.TOP_P}; seconds of a batch of {batch}, draws included,"
             f" compilation not, median of {samples.REPEATS}. Nothing is redrawn."]
    if lab.smoke:
        lines.append("Our T is the paper's in proportion to the length, at least 1; two of the paper's may come to the "
                     "same. Gen PPL and MAUVE are of our own AR model (its likelihood and its features): not the "
                     "paper's quantities. The AR model that samples last is that judge.")
    return lines


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
