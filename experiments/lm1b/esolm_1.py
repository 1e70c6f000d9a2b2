"""Eso-LM, alpha_0 = 1, on LM1B (Tables 1, 6, 7 and 9).

Data:      eso-jax data prepare lm1b --data-dir data --tokenizer bert-base-uncased --length 128
Command:   eso-jax train experiments/lm1b/esolm_1.py --workdir runs/paper/lm1b/esolm_1
Hardware:  the paper's: 8 H200, 1M steps of 512 x 128 tokens; its time is not published.
Paper:     test perplexity 36.12 (NELBO), 31.65 (importance-weighted, K = 5000).
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import lm1b

config = lm1b("esolm", alpha_0=1.0)
