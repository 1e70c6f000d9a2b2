"""MDLM, on OpenWebText (Tables 1, 5 and 14).

Data:      eso-jax data prepare openwebtext --data-dir data --tokenizer gpt2 --length 1024
Command:   eso-jax train experiments/owt/mdlm.py --workdir runs/paper/owt/mdlm
Hardware:  the paper's: 8 H200, about 27 hours (an Eso-LM of alpha_0 < 1 takes 1.37 times MDLM's).
Paper:     test perplexity 25.19 (NELBO).
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import owt

config = owt("mdlm")
