"""Eso-LM (A), alpha_0 = 0.25, on OpenWebText (Table 10).

Data:      eso-jax data prepare openwebtext --data-dir data --tokenizer gpt2 --length 1024
Command:   eso-jax train experiments/owt/esolm_a_025.py --workdir runs/paper/owt/esolm_a_025
Hardware:  the paper's: 8 H200, about 37 hours for 250K steps of 512 x 1024 tokens.
Paper:     test perplexity 23.78 (NELBO).
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import owt

config = owt("esolm_a", alpha_0=0.25)
