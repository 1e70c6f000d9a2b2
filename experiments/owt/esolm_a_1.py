"""Eso-LM (A), alpha_0 = 1, on OpenWebText (Table 10).

Data:      eso-jax data prepare openwebtext --data-dir data --tokenizer gpt2 --length 1024
Command:   eso-jax train experiments/owt/esolm_a_1.py --workdir runs/paper/owt/esolm_a_1
Hardware:  the paper's: 8 H200, about 27 hours for 250K steps of 512 x 1024 tokens.
Paper:     test perplexity 26.21 (NELBO).
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import owt

config = owt("esolm_a", alpha_0=1.0, loss_weight="low_var")
