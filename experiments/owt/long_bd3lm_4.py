"""BD3-LM, blocks of 4, trained on OpenWebText at L = 1024, goes on for 1K steps at L = 10,240 (Table 12).

Data:      eso-jax data prepare openwebtext --data-dir data --tokenizer gpt2 --length 10240 --out data/10240/openwebtext
Command:   eso-jax train experiments/owt/long_bd3lm_4.py --workdir runs/paper/owt/long_bd3lm_4
Hardware:  the paper's: 64 GPUs on 8 nodes; its time is not published.
Paper:     Gen PPL 29.50, entropy 6.5, 588.6 s for a sample of 10,240 tokens.
Ours:      not run at this scale; at --scale smoke see experiments/results.
"""

from eso_jax.recipes import fine_tuned, owt

config = fine_tuned(owt("bd3lm", block_size=4), "runs/paper/owt/bd3lm_4", length=10_240, steps=1000)
