"""Generate sequences."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eso_jax.cli import options
from eso_jax.cli.files import given_of_plan, read_array, read_plan
from eso_jax.console import say
from eso_jax.decoding.plan import POLICIES, Plan
from eso_jax.errors import EsoError, require
from eso_jax.files import check_out, npz, write_whole

if TYPE_CHECKING:
    import numpy as np

    from eso_jax.data.prompts import Given
    from eso_jax.engine.model import Model, Samples

EXAMPLE = "eso-jax sample --workdir /tmp/w --num-samples 4 --steps 64 --alpha-0 0.25 --out samples.npz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.of_model(parser)
    parser.add_argument("--num-samples", type=int, default=1, help="sequences; of each prompt (%(default)s)")
    parser.add_argument("--prompt", type=options.text, metavar="TEXT", help="what the samples begin with")
    parser.add_argument("--template", type=options.text, metavar="TEXT", help="text with gaps to fill: [MASK:40] of 40 "
                        "tokens, [MASK] of one; escapes such as \\n are not interpreted")
    parser.add_argument("--prompts", metavar="FILE", help='rows of {"prompt": ...}, {"template": ...} or {"text": ...}')
    parser.add_argument("--given", help=".npy, int [N, K <= L], ids, with the mask where a token is not given")
    parser.add_argument("--max-tokens", type=int, help="how many tokens to decode of each sample, besides the "
                        "given ones (all of them); if they do not fit the model: window after window")
    parser.add_argument("--stop", action="append", default=[], type=options.text, metavar="TEXT", help="a text at "
                        "which a sample ends, and is cut; several times for several")
    parser.add_argument("--stop-at-separator", action="store_true", help="a sample ends where its document ends")
    parser.add_argument("--ban", action="append", default=[], dest="banned", type=options.text, metavar="TEXT",
                        help="a token that is never drawn; several times for several")
    parser.add_argument("--ban-id", action="append", default=[], dest="banned", type=int, metavar="ID",
                        help="the same, by its id")
    parser.add_argument("--steps", type=int, help="T, diffusion steps (128); plans of one token per step have none")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus mass; 1 keeps all (%(default)s)")
    parser.add_argument("--min-p", type=float, default=0.0,
                        help="drop tokens less likely than this share of the likeliest (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--plan", help=f"{', '.join(POLICIES)}; or the .npz of an earlier sample, to decode along its "
                                      "plan (the family's own: binomial, or left-to-right for AR)")
    parser.add_argument("--decoder", metavar="NAME[:NUMBER]", help="chooses how many tokens each pass decodes, "
                        "in the order of --plan (one-by-one): "
                        "speculative:4 (4 drafts, which the next pass verifies; same distribution as one token a pass; "
                        "without a number, each sample adapts its own), "
                        "entropy:0.5 (limit in nats on the sum of the entropies of a pass, without the largest), "
                        "confidence:0.9 (least probability of the likeliest value, after the first token of a pass), "
                        "likeliest:2 or margin:2 (the 2 most certain of all tokens that are left, by the likeliest "
                        "value or its lead over the second)")
    parser.add_argument("--num-tries", type=int, default=1,
                        help="draw samples of low entropy again, up to this often in all (%(default)s: keep them)")
    parser.add_argument("--min-entropy", type=float, help="with --num-tries: nats of the last 256 tokens' unigrams "
                                                         "below which a sample is drawn again (BD3-LM's code: 4)")
    options.of_precision(parser)
    options.of_devices(parser)
    parser.add_argument("--show", type=int, default=1, help="samples to print (%(default)s)")
    parser.add_argument("--record", action="store_true", help="the .npz then holds when each token was decoded, "
                        "its log p and the likeliest alternatives (eso-jax view makes a page of it); the .jsonl "
                        "holds log p of all decoded tokens, in nats, and their number")
    parser.add_argument("--watch", action="store_true", help="show the samples in the terminal while they are "
                        "decoded, as many as --show says")
    parser.add_argument("--html", help="also write a page that plays the generation, as eso-jax view does")
    parser.add_argument("--out", required=True, help="FILE.npz: tokens [N, L], order [N, L], tokens_per_step, text; or "
                                                     "FILE.jsonl: the text")


def given_of(arguments: argparse.Namespace, model: Model) -> Given | None:
    """The tokens that the options give; None if they give none."""
    from eso_jax.data import prompts

    readers = {"prompt": prompts.of_prompt, "template": prompts.of_template, "prompts": prompts.of_rows}
    names = [name for name in (*readers, "given") if getattr(arguments, name) is not None]
    if len(names) > 1:
        raise EsoError(f"{' and '.join(f'--{name}' for name in names)}: give one of them")
    for name in set(names) & set(readers):
        return readers[name](getattr(arguments, name), model.tokenizer, model.config.model, f"--{name}")
    if not names:
        return None
    return prompts.of_array(read_array(arguments.given, "--given", "given"), model.config.model, "--given")


def plan_of(arguments: argparse.Namespace, model: Model) -> tuple[str | Plan | None, Given | None, int]:
    """(the plan: a policy or one read from a file; the given tokens; how many samples of each row of these)."""
    from eso_jax.data.prompts import of_array

    policy, given, count = arguments.plan, given_of(arguments, model), arguments.num_samples
    if not policy or not policy.endswith(".npz"):
        return policy, given, count
    if arguments.steps is not None or arguments.alpha_0 is not None:
        raise EsoError(f"--plan = {policy!r}: holds a whole plan; leave out --steps and --alpha-0")
    plan, arrays = read_plan(policy)
    require(given is None, "--plan", policy, "says what is given; leave out --prompt and the like")
    require(count == len(plan.order), "--num-samples", count, f"the plan is that of {len(plan.order)} samples; "
            "give their number")
    tokens = given_of_plan(policy, plan, arrays.get("tokens"), model.config.model.mask)
    return (plan, None, count) if tokens is None else (plan, of_array(tokens, model.config.model), 1)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from eso_jax import load
    from eso_jax.data.prompts import of_array
    from eso_jax.data.tokenizers import SHOWN_SEPARATOR
    from eso_jax.viewer.page import page
    from eso_jax.viewer.terminal import watching

    check_out(arguments.out)
    require(Path(arguments.out).suffix in ("", ".npz", ".jsonl"), "--out", arguments.out, "must end in .npz or .jsonl")
    for stop in arguments.stop:
        require(bool(stop), "--stop", stop, "must not be empty")
    require(arguments.show >= 0, "--show", arguments.show, "must be at least 0")
    if arguments.html:
        check_out(arguments.html, "--html")
    model = load(arguments.workdir, ema=not arguments.raw, dtype=arguments.dtype, tensor=arguments.tensor,
                 batch_size=arguments.batch_size, attention=arguments.attention)
    lines = arguments.out.endswith(".jsonl")
    if lines and model.tokenizer is None:
        raise EsoError(f"--out = {arguments.out!r}: the model has no tokenizer, so there is no text; give a .npz")
    plan, given, count = plan_of(arguments, model)
    require(arguments.decoder is None or arguments.steps is None, "--steps", arguments.steps, "a decoder finds its own "
            "steps; leave it out")
    if arguments.watch and model.tokenizer is None:
        raise EsoError("--watch: the model has no tokenizer, so there is no text to see; leave it out")
    steps = 128 if arguments.steps is None else arguments.steps
    stop = [*arguments.stop, *[SHOWN_SEPARATOR] * arguments.stop_at_separator]
    if arguments.max_tokens is not None and not isinstance(plan, Plan):
        prompts = of_array(np.zeros((1, 0), int), model.config.model) if given is None else given
        if _is_longer(prompts, arguments.max_tokens, model):
            return _lengthen(arguments, model, prompts, steps, stop)
    with (watching(model.tokenizer, arguments.show, arguments.watch) as watch,
          _interrupted("nothing is written; with a smaller --batch-size more batches are done, and kept")):
        found = model.sample(count, steps, arguments.alpha_0, arguments.top_p,
                             arguments.temperature, arguments.seed, min_p=arguments.min_p, plan=plan,
                             decoder=arguments.decoder, num_tries=arguments.num_tries,
                             min_entropy=arguments.min_entropy, keep=True, banned=arguments.banned,
                             given=given, max_tokens=arguments.max_tokens, stop=stop,
                             record=arguments.record or bool(arguments.html), watch=watch)
    text, wanted = found.text, count * (1 if given is None else len(given.tokens))
    stopped = (found.tokens != model.config.model.mask).sum(1) < found.plan.end
    if found.interrupted:
        say(f"interrupted: the first {len(found.tokens)} of {wanted} samples are kept"
            + "; those of low entropy were not all drawn again" * (arguments.num_tries > 1))
    if lines:
        more: list[dict[str, Any]] = _stopped(stopped, stop)
        if found.record is not None and arguments.record:
            decoded = found.record.step >= 0
            more = [{**fields, "logp": float(logp), "decoded": int(count)} for fields, logp, count in
                    zip(more, (found.record.logp * decoded).sum(1), decoded.sum(1), strict=True)]
        write_whole(arguments.out, _lines(text, more))
    else:
        extra: dict[str, Any] = {"text": np.array(text)} if text else {}
        write_whole(arguments.out, npz(**{**found.arrays(), "mask": np.array(model.config.model.mask)}, **extra))
    say(f"wrote {arguments.out}")
    if arguments.html:
        write_whole(arguments.html, page({Path(arguments.out).stem: found.arrays()}), "--html")
        say(f"wrote {arguments.html}")
    _show(text[:arguments.show], stopped, stop)
    _report(arguments, found, model.config.model.mask, bool(stopped.any()))


def _report(arguments: argparse.Namespace, found: Samples, mask: int, stopped: bool) -> None:
    """Prints draws, passes, tokens and seconds. `stopped`: some sample came to a stop."""
    import numpy as np

    from eso_jax.decoding.rejection import unigram_entropy

    if arguments.num_tries > 1:
        say(f"{(found.tries > 1).sum()} of {len(found.tries)} samples drawn again, {found.tries.sum()} draws in all")
    running, count = found.seconds - found.compile_seconds, int(((found.tokens != mask) & ~found.given).sum())
    if arguments.decoder is not None:
        each = np.broadcast_to(found.tokens_per_pass, (len(found.tokens), found.tokens_per_pass.shape[-1]))
        bits = unigram_entropy(found.tokens, mask=mask).mean() / np.log(2)
        # The samples of speculation are those of one token a pass.
        hint = "" if arguments.decoder.startswith("speculative") else (
            " (if --decoder entropy:0 gives many more, these samples repeat themselves)")
        say(f"{found.passes.mean():.1f} passes a sample, {each.sum() / max((each > 0).sum(), 1):.2f} tokens a pass; "
            f"entropy of unigrams {bits:.2f} bits{hint}")
    most = "at most " if stopped and arguments.decoder is None else ""
    say(f"NFE {most}{found.tokens_per_pass.shape[-1]} per batch; {count} tokens in {found.seconds:.2f} s, "
        f"{found.compile_seconds:.2f} s of it compilation; {count / running:.0f} tokens/s without that")


def _is_longer(prompts: Given, max_tokens: int, model: Model) -> bool:
    """Whether a prompt and `max_tokens` tokens are longer than the model. (Nothing is decoded after a template.)"""
    config = model.config.model
    room = (prompts.tokens == config.mask).sum(1)
    return bool((room < max_tokens)[prompts.end == config.length].any())


def _lengthen(arguments: argparse.Namespace, model: Model, prompts: Given, steps: int, stop: list[str]) -> None:
    import numpy as np

    length, limit = model.config.model.length, f"--max-tokens = {arguments.max_tokens}"
    if not arguments.out.endswith(".jsonl"):
        raise EsoError(f"{limit}: with its prompt it is longer than the model's {length} tokens, and an .npz holds "
                       "what is decoded at once; give a .jsonl for the text, or a smaller number")
    refused = [name for name in ("html", "watch", "record", "min_entropy") if getattr(arguments, name)]
    if refused:
        raise EsoError(f"{limit}: texts of several windows have no --{refused[0].replace('_', '-')}; leave it out")
    rows = prompts.repeat(arguments.num_samples)
    with _interrupted("nothing is written; windows are kept once the first of each text is done"):
        found = model.lengthen(rows, arguments.max_tokens, stop=stop, steps=steps, alpha_0=arguments.alpha_0,
                               top_p=arguments.top_p, min_p=arguments.min_p, temperature=arguments.temperature,
                               seed=arguments.seed, keep=True, plan=arguments.plan, decoder=arguments.decoder,
                               banned=arguments.banned)
    whole = found.left == 0
    if not whole.all():
        say(f"interrupted: {whole.sum()} of {len(whole)} texts are whole; the others end where a window did")
    stopped = whole & (np.array([len(tokens) for tokens in found.tokens]) < arguments.max_tokens + (
        rows.tokens != model.config.model.mask).sum(1))
    more = [{"whole": bool(each), **fields} for each, fields in zip(whole, _stopped(stopped, stop), strict=True)]
    write_whole(arguments.out, _lines(found.text, more))
    say(f"wrote {arguments.out}")
    _show(found.text[:arguments.show], stopped, stop)
    say(f"{sum(map(len, found.tokens))} tokens, prompts included, in {found.windows.sum()} windows of {length}")


@contextlib.contextmanager
def _interrupted(words: str) -> Iterator[None]:
    """A block whose interrupt (Ctrl-C), if it is raised, says these words."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {words}") from None


def _stopped(stopped: np.ndarray, stop: list[str]) -> list[dict[str, Any]]:
    """The fields of each sample in the .jsonl if stops were given: whether the sample stopped."""
    return [{"stopped": bool(each)} if stop else {} for each in stopped]


def _show(texts: Sequence[str], stopped: np.ndarray, stop: list[str]) -> None:
    for index, text in enumerate(texts):
        say(f"--- sample {index}\n{text}")
    if stop:
        say(f"{stopped.sum()} of {len(stopped)} samples came to a stop")


def _lines(texts: Sequence[str], more: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps({"text": text, **fields}, ensure_ascii=False) + "\n"
                   for text, fields in zip(texts, more, strict=True))
