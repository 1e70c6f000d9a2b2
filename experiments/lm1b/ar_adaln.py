"""AR with AdaLN, inputs shifted by one, on LM1B: to be held against Eso-LM's alpha_0 = 0, the paper's "AR + AdaLN".

Data:      eso-jax data prepare lm1b --data-dir data --tokenizer bert-base-uncased --length 128
Command:   eso-jax train experiments/lm1b/ar_adaln.py --workdir runs/paper/lm1b/ar_adaln
Hardware:  the paper's: 8 H200, 1M steps of 512 x 128 tokens; its time is not published.
Paper:     none of this form; alpha_0 = 0 has 21.86.
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import lm1b

config = lm1b("ar")
