"""Eso-LM, alpha_0 = 1, on OpenWebText (Tables 1, 5, 8, 10 and 13).

Data:      eso-jax data prepare openwebtext --data-dir data --tokenizer gpt2 --length 1024
Command:   eso-jax train experiments/owt/esolm_1.py --workdir runs/paper/owt/esolm_1
Hardware:  the paper's: 8 H200, about 27 hours for 250K steps of 512 x 1024 tokens.
Paper:     test perplexity 30.06 (NELBO), 29.31 (importance-weighted, K = 1000).
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import owt

config = owt("esolm", alpha_0=1.0, loss_weight="low_var")
