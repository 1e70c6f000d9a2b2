"""Make a work directory from the authors' weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from eso_jax import families
from eso_jax.console import say
from eso_jax.errors import require

EXAMPLE = "eso-jax import eso.ckpt --ema --out /tmp/w"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a .safetensors file, or the .safetensors.index.json of shards; a "
                        "Lightning .ckpt; a hub repository owner/name, or the folder of a snapshot of one")
    parser.add_argument("--out", required=True, help="the new work directory; an existing one is refused")
    parser.add_argument("--family", choices=tuple(families.BY_NAME),
                        help="what it was trained as (what SRC says, or esolm)")
    parser.add_argument("--ema", action="store_true", help="take the averaged parameters of a .ckpt, not the raw ones")
    parser.add_argument("--config", help="JSON of sizes, as eso-jax export writes it: any of hidden_size, n_heads, "
                                        "n_blocks, cond_dim, length, vocab_size, mask_id, family, alpha_0, block_size")
    parser.add_argument("--length", type=int, help="tokens in a sequence, which no tensor shows (what SRC says)")
    parser.add_argument("--heads", type=int, help="attention heads (what SRC says, or of size 64)")
    parser.add_argument("--alpha-0", type=float, help="an Eso-LM's training value (what SRC says, or 1)")
    parser.add_argument("--start-id", type=int, help="AR: the token it was trained to begin with (the mask)")
    parser.add_argument("--tokenizer", help="bytes, characters, gpt2, bert-base-uncased, a tokenizer.json, or NAME=a "
                                           "tokenizer.json, kept with the model (none: ids in and out)")
    parser.add_argument("--separator", metavar="TOKEN", help="the tokenizer.json's token between documents "
                        "(<|endoftext|>, [CLS] or </s>)")
    parser.add_argument("--check", metavar="CASES.npz", help="compare logits with stored ones before writing: tokens "
                        "[B, L], logits [B, L, V], and order [B, L] if not the natural one")


def run(arguments: argparse.Namespace) -> None:
    from eso_jax.data.tokenizers import get_tokenizer
    from eso_jax.interop import import_checkpoint, names, parity
    from eso_jax.run import workdir

    require(not Path(arguments.out).exists(), "--out", arguments.out, "exists already; nothing was written")
    config, params = import_checkpoint(
        arguments.src, arguments.config, arguments.family, ema=arguments.ema, length=arguments.length,
        heads=arguments.heads, alpha_0=arguments.alpha_0, start_id=arguments.start_id)
    tokenizer = None
    if arguments.tokenizer:
        tokenizer, model = get_tokenizer(arguments.tokenizer, arguments.separator), config.model
        require((tokenizer.vocab_size, tokenizer.mask_id) == (model.vocab_size, model.mask), "--tokenizer",
                arguments.tokenizer, f"has {tokenizer.vocab_size} ids of which {tokenizer.mask_id} is the mask, and "
                f"the model {model.vocab_size} of which {model.mask} is")
        config = config.override(f"data.tokenizer={arguments.tokenizer}")
    require(arguments.separator is None or tokenizer is not None, "--separator", arguments.separator, "is a token of "
            "--tokenizer; give that as well")
    worst = parity.worst_difference(config, params, Path(arguments.check)) if arguments.check else None
    workdir.create(Path(arguments.out), config, params, tokenizer)
    model, which = config.model, "averaged" if arguments.ema else "raw" if arguments.src.endswith(".ckpt") else "all"
    say(f"{config.family.name}: {len(names.places(model))} tensors mapped ({which}), "
        f"{sum(x.size for x in params.values()):,} parameters; width {model.width}, {model.layers} layers, "
        f"{model.heads} heads, length {model.length}, {model.vocab_size} ids of which {model.mask} is the mask; "
        f"in {arguments.out}")
    if worst is not None:
        say(f"logits differ from those in {arguments.check} by at most {worst:.2g}")
