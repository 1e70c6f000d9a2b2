"""Eso-LM, alpha_0 = 0.25, at 1.0 B parameters: six times the paper's model.

Data:      eso-jax data prepare openwebtext --data-dir data/2048 --tokenizer gpt2 --length 2048
Command:   eso-jax train experiments/scale/esolm_1b.py --workdir runs/scale/esolm_1b --multi-host
Hardware:  v5p:8x8x8 (512 chips) or v6e:16x16 (256); eso-jax plan says what each can do, see docs/plan.md.
Paper:     has no model of this size.
Ours:      not run; planned, and compiled for both slices.
"""

from eso_jax.config import Config, DataConfig, FamilyConfig, MeshConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(length=2048, vocab_size=50258, width=2048, layers=16, heads=16),
    family=FamilyConfig(name="esolm", alpha_0=0.25),
    data=DataConfig("data/2048/openwebtext", "gpt2"),
    train=TrainConfig(steps=100_000, batch_size=1024, remat="full"),
    mesh=MeshConfig(fsdp=16),
)
