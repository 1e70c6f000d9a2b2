"""BD3-LM, blocks of 16, on LM1B (Table 1).

Data:      eso-jax data prepare lm1b --data-dir data --tokenizer bert-base-uncased --length 128
Command:   eso-jax train experiments/lm1b/bd3lm_16.py --workdir runs/paper/lm1b/bd3lm_16
Hardware:  the paper's: 8 H200, 1M steps of 512 x 128 tokens; its time is not published.
Paper:     test perplexity 30.60 (NELBO), from BD3-LM's paper, fine-tuned from MDLM.
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import lm1b

config = lm1b("bd3lm", block_size=16)
