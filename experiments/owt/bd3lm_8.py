"""BD3-LM, blocks of 8, on OpenWebText from scratch (Tables 1, 5 and 15).

Data:      eso-jax data prepare openwebtext --data-dir data --tokenizer gpt2 --length 1024
Command:   eso-jax train experiments/owt/bd3lm_8.py --workdir runs/paper/owt/bd3lm_8
Hardware:  the paper's: 8 H200; its time is not published.
Paper:     test perplexity 22.04 (NELBO).
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import owt

config = owt("bd3lm", block_size=8)
