"""Write a model as .safetensors in the authors' naming, with its sizes and a model card."""

from __future__ import annotations

import argparse

from eso_jax.console import say

EXAMPLE = "eso-jax export --workdir /tmp/w --out model.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="a work directory, trained or imported")
    parser.add_argument("--out", required=True, help="a new .safetensors; its sizes go to .json, its card to .md, its "
                                                    "tokenizer to .tokenizer.json beside it")
    parser.add_argument("--raw", action="store_true", help="use the raw parameters, not their moving average")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload them to this repository of the Hugging Face "
                                                            "hub, made private if there is none")


def run(arguments: argparse.Namespace) -> None:
    from eso_jax.interop import export_model, push

    exported = export_model(arguments.workdir, arguments.out, ema=not arguments.raw)
    address = push(exported, arguments.push) if arguments.push else None
    *others, weights = exported.files.values()
    say(f"wrote {weights} ({exported.tensors} tensors, {exported.parameters:,} parameters) and beside it "
        + ", ".join(path.name for path in others))
    if address:
        say(f"pushed to {address}")
