"""Tables 13 to 15 and Figures 4, 17, 22 and 23: quality of samples against time, by sampler and setting (OpenWebText).

Command:   python experiments/tables/tables_13_to_15_quality.py --scale smoke

An Eso-LM is sampled at other alpha_0 than it was trained with; NFE and time depend on the sampling alone. The paper's
time is that of forward passes for 512 samples on an H200, without drawing tokens; ours includes the draws.
"""

from __future__ import annotations

import sys

import samples
from lab import Cell, Lab, Table, main
from samples import Found, Setting

TRAINED = {"1": "owt/esolm_1", "0.5": "owt/esolm_05", "0.25": "owt/esolm_025", "0.125": "owt/esolm_0125"}
# (sampling alpha_0, T): NFE, seconds, then Gen PPL, entropy and MAUVE by training alpha_0.
ESO_LM = {
    (0.0625, 16): (976, 36.75, (25.36, 5.1, .7048), (27.52, 5.3, .7905), (24.20, 5.4, .7908), (23.16, 5.4, .8245)),
    (0.0625, 128): (1010, 37.32, (24.74, 5.1, .6753), (27.84, 5.3, .8227), (25.48, 5.4, .8344), (23.83, 5.4, .8253)),
    (0.0625, 1024): (1022, 36.99, (24.23, 5.1, .6925), (27.90, 5.3, .8160), (25.97, 5.4, .8312), (23.89, 5.4, .8318)),
    (0.25, 16): (784, 33.89, (51.11, 5.4, .4996), (45.81, 5.4, .5998), (45.48, 5.4, .6151), (50.32, 5.5, .4867)),
    (0.25, 128): (879, 35.11, (43.31, 5.3, .5875), (39.22, 5.4, .7066), (40.08, 5.4, .6955), (45.24, 5.4, .5590)),
    (0.25, 1024): (994, 36.69, (43.36, 5.3, .5748), (40.50, 5.4, .7330), (42.56, 5.4, .7000), (47.24, 5.4, .5954)),
    (0.5, 16): (529, 26.93, (72.16, 5.5, .2885), (70.78, 5.5, .3651), (79.84, 5.5, .1846), (100.22, 5.5, .0551)),
    (0.5, 128): (639, 29.03, (48.80, 5.3, .5333), (48.41, 5.4, .5870), (56.05, 5.4, .4125), (72.93, 5.4, .1461)),
    (0.5, 1024): (913, 34.83, (47.72, 5.3, .5549), (48.81, 5.4, .6563), (58.20, 5.4, .4558), (75.42, 5.4, .1834)),
    (1.0, 16): (16, 2.97, (119.89, 5.5, .0796), (125.21, 5.5, .0701), (154.93, 5.5, .0289), (227.34, 5.5, .0104)),
    (1.0, 32): (32, 3.40, (77.55, 5.5, .2468), (81.37, 5.5, .2118), (103.39, 5.5, .0798), (160.01, 5.4, .0174)),
    (1.0, 64): (64, 4.39, (61.43, 5.4, .4166), (64.04, 5.4, .3534), (82.31, 5.4, .1412), (131.22, 5.4, .0259)),
    (1.0, 128): (128, 6.40, (53.28, 5.4, .4467), (56.64, 5.4, .4232), (73.17, 5.4, .1801), (118.04, 5.4, .0299)),
    (1.0, 256): (251, 10.51, (50.76, 5.3, .4766), (53.53, 5.4, .4564), (69.82, 5.4, .1967), (113.92, 5.4, .0337)),
    (1.0, 1024): (646, 24.19, (49.05, 5.3, .4939), (53.24, 5.4, .5110), (71.42, 5.4, .2491), (115.17, 5.4, .0353)),
    (1.0, 4096): (906, 33.33, (48.86, 5.3, .5425), (54.11, 5.4, .5315), (74.39, 5.4, .2410), (118.44, 5.4, .0348))}
# T: NFE, seconds, (Gen PPL, entropy, MAUVE).
MDLM = {8: (8, 7.19, (246.70, 5.6, .0134)), 16: (16, 13.81, (109.70, 5.5, .1353)), 32: (32, 27.10, (67.44, 5.5, .4195)),
        48: (48, 39.42, (55.96, 5.5, .5062)), 64: (64, 53.48, (51.11, 5.4, .6123)),
        128: (128, 106.96, (43.58, 5.4, .6477)), 256: (251, 213.92, (40.44, 5.4, .6924)),
        1024: (657, 566.19, (37.15, 5.3, .7267)), 4096: (907, 752.06, (36.48, 5.3, .7026))}
# Block: T: the same.
BD3LM = {
    4: {256: (512, 26.26, (184.86, 4.00, .0048)), 512: (740, 37.44, (216.73, 4.81, .0081)),
        1024: (968, 49.20, (110.22, 5.14, .0533)), 2048: (1124, 56.77, (51.92, 5.22, .3515)),
        4096: (1180, 60.32, (34.93, 5.24, .6726))},
    8: {256: (383, 20.58, (267.26, 4.69, .0061)), 512: (584, 31.44, (170.50, 5.04, .0168)),
        1024: (812, 42.14, (80.31, 5.20, .1479)), 2048: (951, 50.01, (47.16, 5.22, .5723)),
        4096: (1051, 55.53, (36.34, 5.25, .6807))},
    16: {256: (316, 19.36, (240.20, 5.10, .0114)), 512: (515, 31.17, (112.56, 5.28, .0971)),
         1024: (703, 43.76, (61.82, 5.30, .4067)), 2048: (881, 53.79, (44.06, 5.29, .6383)),
         4096: (984, 58.82, (37.61, 5.29, .7248))}}
AR_SECONDS, AR_MAUVE = 31.7, 0.88  # read off Figure 4
COLUMNS = ["T, ours", "NFE, paper", "NFE, ours", "s, paper", "s, ours", "Gen PPL, paper", "Gen PPL, ours",
           "entropy, paper", "entropy, ours", "MAUVE, paper", "MAUVE, ours", "repeated 4-grams, ours"]


def run(lab: Lab) -> None:
    tables, points = {}, {}
    for index, (trained, name) in enumerate(TRAINED.items()):
        rows, found = [], []
        for (alpha_0, steps), (nfe, seconds, *qualities) in ESO_LM.items():
            one = samples.measure(lab, name, Setting(steps, alpha_0))
            found.append(one)
            rows.append([alpha_0, steps, *cells((nfe, seconds, qualities[index]), one)])
        tables[f"Table 13: Eso-LM trained at alpha_0 = {trained}"] = Table(["alpha_0", "T", *COLUMNS], rows)
        points[f"Eso-LM, trained at {trained}"] = found
    found = [samples.measure(lab, "owt/mdlm", Setting(steps)) for steps in MDLM]
    tables["Table 14: MDLM"] = Table(["T", *COLUMNS], [[steps, *cells(MDLM[steps], one)]
                                                       for steps, one in zip(MDLM, found, strict=True)])
    points["MDLM"] = found
    rows = []
    for block, settings in BD3LM.items():
        found = [samples.measure(lab, f"owt/bd3lm_{block}", Setting(steps)) for steps in settings]
        rows += [[block, steps, *cells(settings[steps], one)] for steps, one in zip(settings, found, strict=True)]
        points[f"BD3-LM, {block}"] = found
    tables["Table 15: BD3-LM"] = Table(["L'", "T", *COLUMNS], rows)
    ar = samples.measure(lab, "owt/ar", Setting(None))
    points["AR"] = [ar]
    tables["AR (Figure 4)"] = Table(COLUMNS, [cells((1024, AR_SECONDS, (None, None, AR_MAUVE)), ar)])
    lab.report("tables_13_to_15_quality", __doc__ or "", tables, notes(lab), samples.picture_of(points))


def cells(paper: tuple[int, float, tuple[float | None, ...]], ours: Found) -> list[Cell]:
    nfe, seconds, (gen_ppl, entropy, mauve) = paper
    return [ours.steps, nfe, ours.nfe, seconds, ours.seconds, gen_ppl, ours.gen_ppl, entropy, ours.entropy, mauve,
            ours.mauve, ours.repetition]


def notes(lab: Lab) -> list[str]:
    count, batch = samples.COUNT[lab.scale], samples.BATCH[lab.scale]
    found = [f"{count} samples in each setting, nucleus {samples.TOP_P}; seconds of a batch of {batch}, draws included,"
             f" compilation not, median of {samples.REPEATS}. Nothing is redrawn."]
    if lab.smoke:
        found.append("Our T is the paper's in proportion to the length, at least 1; two of the paper's may come to the "
                     "same. Gen PPL and MAUVE are of our own AR model (its likelihood and its features): not the "
                     "paper's quantities. The AR model that samples last is that judge.")
    return found


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
