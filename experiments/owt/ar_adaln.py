"""AR with AdaLN, inputs shifted by one, on OpenWebText: to be held against Eso-LM's alpha_0 = 0 ("AR + AdaLN").

Data:      eso-jax data prepare openwebtext --data-dir data --tokenizer gpt2 --length 1024
Command:   eso-jax train experiments/owt/ar_adaln.py --workdir runs/paper/owt/ar_adaln
Hardware:  the paper's: 8 H200; its time is not published.
Paper:     none of this form; alpha_0 = 0 has 17.78.
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import owt

config = owt("ar")
