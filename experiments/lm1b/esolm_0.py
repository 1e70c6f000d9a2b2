"""Eso-LM, alpha_0 = 0, on LM1B: the paper's "AR + AdaLN" (Table 1).

Data:      eso-jax data prepare lm1b --data-dir data --tokenizer bert-base-uncased --length 128
Command:   eso-jax train experiments/lm1b/esolm_0.py --workdir runs/paper/lm1b/esolm_0
Hardware:  the paper's: 8 H200, 1M steps of 512 x 128 tokens; its time is not published.
Paper:     test perplexity 21.86, exact.
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import lm1b

config = lm1b("esolm", alpha_0=0.0)
