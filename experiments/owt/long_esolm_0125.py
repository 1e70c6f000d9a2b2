"""Eso-LM, alpha_0 = 0.125, trained on OpenWebText at L = 1024, goes on for 1K steps at L = 10,240 (Table 12).

Data:      eso-jax data prepare openwebtext --data-dir data --tokenizer gpt2 --length 10240 --out data/10240/openwebtext
Command:   eso-jax train experiments/owt/long_esolm_0125.py --workdir runs/paper/owt/long_esolm_0125
Hardware:  the paper's: 64 GPUs on 8 nodes; its time is not published.
Paper:     Gen PPL 23.40, entropy 6.3, 116.4 s for a sample of 10,240 tokens.
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import fine_tuned, owt

config = fine_tuned(owt("esolm", alpha_0=0.125), "runs/paper/owt/esolm_0125", length=10_240, steps=1000)
