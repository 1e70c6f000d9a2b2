"""Eso-LM, alpha_0 = 0, on OpenWebText: the paper's "AR + AdaLN" (Table 1).

Data:      eso-jax data prepare openwebtext --data-dir data --tokenizer gpt2 --length 1024
Command:   eso-jax train experiments/owt/esolm_0.py --workdir runs/paper/owt/esolm_0
Hardware:  the paper's: 8 H200, about 37 hours for 250K steps of 512 x 1024 tokens.
Paper:     test perplexity 17.78, exact.
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import owt

config = owt("esolm", alpha_0=0.0)
