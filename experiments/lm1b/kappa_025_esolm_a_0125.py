"""Eso-LM (A), alpha_0 = 0.125, a share kappa = 0.25 of each batch on the diffusion loss, on LM1B (Table 4).

Data:      eso-jax data prepare lm1b --data-dir data --tokenizer bert-base-uncased --length 128
Command:   eso-jax train experiments/lm1b/kappa_025_esolm_a_0125.py --workdir runs/paper/lm1b/kappa_025_esolm_a_0125
Hardware:  the paper's: 8 H200, 500K steps of 512 x 128 tokens; its time is not published.
Paper:     diverged.
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import lm1b

config = lm1b("esolm_a", steps=500_000, alpha_0=0.125, kappa=0.25)
