"""The paper's training recipes (its appendix C.3 and the authors' configs), and what becomes of one on a laptop.

The files in experiments/ are each one call of `lm1b`, `owt` or `fine_tuned`. `smoke` keeps a run's family and loss and
shrinks everything else, so that the whole paper can be walked through in an hour.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from eso_jax.config import Config, DataConfig, FamilyConfig, ModelConfig, TrainConfig

# Clipped ranges of t for BD3-LM by block size. Its authors' code searches for them while training, which this project
# does not, and what the Eso-LM paper's runs ended up with is not published.
BD3LM_RANGES = {4: (0.45, 0.95), 8: (0.3, 0.8), 16: (0.3, 0.8)}


def lm1b(family: str, steps: int = 1_000_000, adaln: bool = True, **fields: Any) -> Config:
    """A run on LM1B (One Billion Words): 128 tokens, BERT's vocabulary, 1M steps of 512 sequences.

    Args:
      family: its name, see eso_jax/families.
      adaln: False leaves AdaLN out, as the plain AR baseline does.
      fields: of FamilyConfig, the family's own.
    """
    model = ModelConfig.of_size("small", length=128, vocab_size=30522, mask_id=103, cond_dim=128 if adaln else 0)
    return _run(family, model, DataConfig("data/lm1b", "bert-base-uncased"), TrainConfig(steps=steps), fields)


def owt(family: str, steps: int = 250_000, adaln: bool = True, **fields: Any) -> Config:
    """A run on OpenWebText: 1024 tokens, GPT-2's vocabulary, 250K steps of 512 sequences."""
    model = ModelConfig.of_size("small", length=1024, vocab_size=50258, cond_dim=128 if adaln else 0)
    return _run(family, model, DataConfig("data/openwebtext", "gpt2"), TrainConfig(steps=steps), fields)


def fine_tuned(config: Config, start_from: str, length: int, steps: int) -> Config:
    """A run that goes on from another's weights at another length, with the same warm-up (2500 steps)."""
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, length=length),
        data=dataclasses.replace(config.data, source=config.data.source.replace("data/", f"data/{length}/")),
        train=dataclasses.replace(config.train, steps=steps, start_from=start_from))


def _run(family: str, model: ModelConfig, data: DataConfig, train: TrainConfig, fields: dict[str, Any]) -> Config:
    if "block_size" in fields:
        fields = {"t_range": BD3LM_RANGES[fields["block_size"]], **fields}
    return Config(model, FamilyConfig(name=family, **fields), data, train)


SMOKE_STEPS = 1000  # of the paper's 250K on OpenWebText and 1M on LM1B; half of it for the 500K of Table 4


def smoke(config: Config) -> Config:
    """The run in about a minute on two CPU cores: bytes of Python's own source text, 64 tokens, a model of 0.2 M
    parameters. What differs between the paper's runs of one length and number of steps differs here as well.
    """
    paper, long = config.train, config.train.start_from is not None
    steps = 100 if long else SMOKE_STEPS // 2 if paper.steps == 500_000 else SMOKE_STEPS
    return Config(
        model=ModelConfig(length=640 if long else 64, width=64, layers=3, heads=2, dropout=0.0,
                          cond_dim=16 if config.model.cond_dim else 0),
        family=config.family,
        data=DataConfig(),
        train=TrainConfig(steps=steps, batch_size=8 if long else 32, learning_rate=4e-3, warmup=50, ema=0.995,
                          log_every=50, eval_every=steps, eval_windows=256, save_every=max(1, steps // 4),
                          compute_dtype="float32", seed=paper.seed, start_from=paper.start_from))
