"""The model card: what a model is, what it was trained on and what was measured of it. Nothing else is said."""

from __future__ import annotations

from typing import Any

from eso_jax import families
from eso_jax.config import Config

MEASURED = {"validation_nats_per_token": "validation (NELBO; for AR -log p), nats per token",
            "validation_standard_error": "... its standard error", "validation_windows": "... windows",
            "validation_bits_per_byte": "... bits per byte", "validation_perplexity": "... perplexity per token",
            "loss": "training loss, nats per token"}


def card(config: Config, step: int, parameters: int, averaged: bool, lines: list[dict[str, Any]]) -> str:
    """The card of a work directory's model, in Markdown.

    Args:
      step: of the checkpoint; 0: an imported model.
      parameters: how many numbers it has.
      averaged: whether they are the moving average, which the validation numbers are measured on.
      lines: of metrics.jsonl.
    """
    model, family, train = config.model, families.get(config), config.train
    settings = family.describe(config.family)
    facts = {"family": family.label + (f", {settings}" if settings else ""), "parameters": f"{parameters:,}",
             "width, layers, heads": f"{model.width}, {model.layers}, {model.heads}",
             "AdaLN": f"conditioning of width {model.cond_dim}" if model.cond_dim else "none",
             "length": f"{model.length} tokens",
             "vocabulary": f"{model.vocab_size:,} ids, the mask ({model.mask}) included"}
    if step:
        tokens = step * train.batch_size * model.length
        facts |= {"trained on": f"`{config.data.source}`, tokenizer {config.data.tokenizer}",
                  "steps": f"{step:,}, each of {train.batch_size} x {model.length} tokens; {tokens:,} tokens in all",
                  "weights": "moving average" if averaged else "raw, not the moving average"}
        if train.start_from:
            facts["started from"] = f"the model in `{train.start_from}`"
    else:
        facts["trained on"] = "not recorded here: the weights were imported"
    title = f"# {family.label}, {parameters:,} parameters"
    return "\n".join(["---", "library_name: eso_jax", "---", "", title, "", *_table(facts), "", "## Measured", "",
                      *_measurements(step, averaged, lines), "", "## Use", "", "```bash",
                      "eso-jax import WEIGHTS.safetensors --config SIZES.json --out W", "```", "",
                      "The tensors have the names and shapes of the Eso-LM authors' PyTorch models; see "
                      "[Esoteric Language Models](https://arxiv.org/abs/2506.01928).", ""])


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _measurements(step: int, averaged: bool, lines: list[dict[str, Any]]) -> list[str]:
    """A table of the last number of each kind up to the checkpoint's step, and at which step it was measured."""
    last = {name: line for line in lines if line["step"] <= step for name in MEASURED if line.get(name) is not None}
    rows = {f"{label}, at step {last[name]['step']:,}": f"{last[name][name]:.4g}"
            for name, label in MEASURED.items() if name in last}
    if not rows:
        return ["Nothing was measured on this model here."]
    of_average = "validation_nats_per_token" in last and not averaged
    note = ["", "The validation numbers are of the moving average, which these weights are not."] if of_average else []
    return [*_table(rows), *note]
