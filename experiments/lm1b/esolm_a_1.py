"""Eso-LM (A), alpha_0 = 1, on LM1B (Table 9).

Data:      eso-jax data prepare lm1b --data-dir data --tokenizer bert-base-uncased --length 128
Command:   eso-jax train experiments/lm1b/esolm_a_1.py --workdir runs/paper/lm1b/esolm_a_1
Hardware:  the paper's: 8 H200, 1M steps of 512 x 128 tokens; its time is not published.
Paper:     test perplexity 30.96 (NELBO).
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import lm1b

config = lm1b("esolm_a", alpha_0=1.0)
