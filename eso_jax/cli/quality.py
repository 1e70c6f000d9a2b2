"""The quality of samples: generative perplexity, entropy, diversity, MAUVE."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from eso_jax.cli import options
from eso_jax.console import say
from eso_jax.errors import require
from eso_jax.files import as_json, check_out, write_whole

if TYPE_CHECKING:
    from eso_jax.evaluation.quality import Quality

EXAMPLE = "eso-jax quality --samples samples.npz --judge /tmp/ar --reference /tmp/ar --features /tmp/ar --out q.json"
TEXTS = (".npz with tokens or text, .npy of tokens, rows with a text (.jsonl of {\"text\": ...}, .json, .parquet, "
         ".arrow), or a work directory (validation windows of its data)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", required=True, help="the .npz of eso-jax sample, or like --reference")
    parser.add_argument("--judge", default="gpt2-large",
                        help="of generative perplexity: a model of the transformers library (name or folder), a work "
                             "directory (AR or Eso-LM), or none (%(default)s)")
    parser.add_argument("--reference", help=f"texts to compare with: {TEXTS}")
    parser.add_argument("--features", default="none",
                        help="of MAUVE, with --reference: a model of the transformers library (the paper's: "
                             "answerdotai/ModernBERT-large), a work directory, or none, for no MAUVE (%(default)s)")
    parser.add_argument("--field", help="of rows (the first of text, sentence, article, article_text, content)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out and count rows without a text")
    options.of_devices(parser, None)
    parser.add_argument("--out", required=True, help="JSON")


def run(arguments: argparse.Namespace) -> None:
    from eso_jax.data.rows import Reading
    from eso_jax.evaluation import judges, mauve, quality, texts

    check_out(arguments.out)

    def read(name: str, flag: str, limit: int | None = None) -> texts.Texts:
        return texts.read(name, flag, limit, Reading(arguments.field, skip_rows=arguments.skip_bad_rows))

    samples = read(arguments.samples, "--samples")
    reference = read(arguments.reference, "--reference", len(samples)) if arguments.reference else None
    require(arguments.features == "none" or reference is not None, "--features", arguments.features,
            "MAUVE compares with texts; give --reference as well")
    features = None if arguments.features == "none" else mauve.get(
        arguments.features, arguments.batch_size, arguments.tensor)
    judge = None if arguments.judge == "none" else judges.get(
        arguments.judge, arguments.batch_size, arguments.tensor)
    of_samples = quality.measure(samples, judge, reference, features)
    of_reference = None if reference is None else quality.measure(reference, judge)
    write_whole(arguments.out, as_json({"source": arguments.samples, **of_samples.to_json(),
                                        "reference": None if of_reference is None else of_reference.to_json()}))
    say(f"{arguments.samples}, counted in {of_samples.unit}")
    _show(of_samples, of_reference)
    say(f"wrote {arguments.out}")


def _show(quality: Quality, reference: Quality | None) -> None:
    """The measures as a table, the reference's beside them, and what there is to say of single samples."""
    columns = {"samples": _measures(quality)}
    if reference is not None:
        columns["reference"] = _measures(reference)
    say(" " * 24 + "".join(f"{title:<24}" for title in columns).rstrip())
    for name in columns["samples"]:
        values = [column[name] for column in columns.values()]
        say(f"  {name:<22}" + "".join(f"{'-' if value is None else str(value):<24}" for value in values).rstrip())
    if quality.judge:
        say(f"  judge: {quality.judge}, {quality.judged} tokens")
    if mauve := quality.mauve:
        say(f"  MAUVE {mauve.value:.4f} +- {mauve.standard_error:.2g}, features of {mauve.features}")
        if mauve.few:
            say(f"  MAUVE of {mauve.samples} samples and {mauve.reference} reference texts is biased: compare it with "
                "equal numbers only; the papers take thousands")
    unit = quality.unit
    for count, text in ((quality.empty, f"empty (no {unit})"), (quality.unjudged, "without a token to judge"),
                        (quality.cut, "longer than the judge reads, cut"),
                        (quality.short, f"of fewer than 4 {unit}, in neither repetition nor self-BLEU")):
        if count:
            say(f"  {count} of {quality.samples} samples {text}")


def _measures(quality: Quality) -> dict[str, object]:
    distinct = {f"distinct {n}-grams": estimate for n, estimate in quality.distinct.items()}
    return {"number": quality.samples, "generative perplexity": quality.gen_ppl, "entropy, nats": quality.entropy,
            "repeated 4-grams": quality.repetition, **distinct, "self-BLEU": quality.self_bleu}
