"""AR without AdaLN, on OpenWebText (Table 1).

Data:      eso-jax data prepare openwebtext --data-dir data --tokenizer gpt2 --length 1024
Command:   eso-jax train experiments/owt/ar.py --workdir runs/paper/owt/ar
Hardware:  the paper's: 8 H200; its time is not published.
Paper:     test perplexity 17.90.
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import owt

config = owt("ar", adaln=False)
