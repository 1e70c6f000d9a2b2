"""The quality of samples, end to end and offline: real libraries on tiny models made here, and our own models."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eso_jax
from conftest import random_params, tiny_config
from eso_jax import likelihood
from eso_jax.cli import main
from eso_jax.config import Config, DataConfig
from eso_jax.data import ByteTokenizer, Tokenizer
from eso_jax.errors import EsoError
from eso_jax.evaluation import bertscore, frontier, judges, mauve, quality
from eso_jax.evaluation.judges import Scores
from eso_jax.evaluation.texts import Texts, is_workdir, of_tokens, read
from eso_jax.run import workdir
from vocabularies import gpt2_like

pytestmark = pytest.mark.slow

TEXTS = ["a cat sat on the mat", "the dog", "", "a", "the dog sat on the dog sat on the dog sat on the dog"]


def bytes_config(family: str = "ar", length: int = 24) -> Config:
    return tiny_config(family, length=length, vocab_size=ByteTokenizer.vocab_size)


def made(folder: Path, family: str = "ar", config: Config | None = None, tokenizer: Tokenizer | None = None) -> Path:
    """A work directory with random weights."""
    config = config or bytes_config(family)
    workdir.create(folder, config, random_params(config.model), tokenizer)
    return folder


def subwords(folder: Path) -> Path:
    """The same, of a model whose tokens are a byte-level BPE's."""
    tokenizer = gpt2_like()
    (folder / "text.txt").write_text("the cat sat on the mat and the dog " * 200)
    config = tiny_config("ar", length=24, vocab_size=tokenizer.vocab_size)
    data = DataConfig(source=str(folder / "text.txt"), tokenizer="gpt2")
    return made(folder / "w", config=dataclasses.replace(config, data=data), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("ours") / "w")


def hf_tokenizer() -> Any:
    """Bytes as tokens and an end of text, by the transformers library."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra eval is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra eval is not installed")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "<|endoftext|>"])}
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>",
                                                bos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two small layers that reads 32 bytes, in a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), hf_tokenizer()
    torch = pytest.importorskip("torch", reason="the extra eval is not installed")
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256,
        initializer_range=0.5))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ModernBERT of two small layers, in a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("modernbert"), hf_tokenizer()
    torch = pytest.importorskip("torch", reason="the extra eval is not installed")
    import transformers

    torch.manual_seed(0)
    model = transformers.ModernBertModel(transformers.ModernBertConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=256, bos_token_id=256, eos_token_id=256, cls_token_id=256, sep_token_id=256))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


def test_the_transformers_judge_is_a_plain_loop(gpt2: Path) -> None:
    """Each text by itself, token by token: the authors' conventions. Batches and other texts change nothing."""
    import torch
    import transformers

    texts = [*TEXTS, "two docs<|endoftext|>here<|endoftext|>", "x" * 31, "x" * 32, "y" * 40]
    model, tokenizer = (getattr(transformers, kind).from_pretrained(gpt2)
                        for kind in ("AutoModelForCausalLM", "AutoTokenizer"))
    nats, counts = [], []
    for text in texts:
        ids = (tokenizer(text)["input_ids"] + [256] * 32)[:32]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scored = [i for i in range(1, 32) if ids[i] != 256 or 256 not in ids[:i]]
        nats.append(-sum(float(logp[i - 1, ids[i]]) for i in scored))
        counts.append(len(scored))
    for batch_size in (1, 2, 8):
        found = judges.TransformersJudge(str(gpt2), batch_size).score(Texts(None, texts))
        np.testing.assert_array_equal(found.tokens, counts)
        np.testing.assert_allclose(found.nats, nats, rtol=1e-5, atol=1e-5)
        assert found.cut == 2  # the one with two ends has 22 tokens
    assert counts[2] == 0 and counts[1] == 7 and counts[-3:] == [31, 31, 31]  # "the dog" and an end, less the first
    assert counts[5] == 8 + 1 + 4 - 1  # the second end is not counted


def test_a_separator_is_the_judges_end_of_text(gpt2: Path, modernbert: Path, ours: Path) -> None:
    """Of the transformers library's judges and features, and of our judges, which read the text in their own tokens."""
    separator = ByteTokenizer.separator_id
    rows = np.array([[*b"two docs", separator, *b"here", separator, *b"end"]])
    theirs, shown = Texts(None, ["two docs<|endoftext|>here<|endoftext|>end"]), of_tokens(rows, ByteTokenizer())
    judge = judges.TransformersJudge(str(gpt2))
    found, exact = judge.score(shown), judge.score(theirs)
    assert found.tokens.tolist() == [8 + 1 + 4 + 3 - 1]  # the second end is not counted, nor is the first token
    np.testing.assert_allclose(found.nats, exact.nats)
    features = mauve.TransformersFeatures(str(modernbert))
    np.testing.assert_allclose(features.of(shown), features.of(theirs))
    features.tokenizer.eos_token, features.tokenizer.sep_token = None, "<|endoftext|>"  # as ModernBERT-large has it
    np.testing.assert_allclose(features.of(shown), features.of(theirs))
    (again,) = Texts(None, shown.strings).tokens_for(eso_jax.load(ours), "here")
    np.testing.assert_array_equal(again, rows[0])


@pytest.mark.parametrize("family", ["ar", "esolm"])
def test_our_judges_score_tokens_and_texts(family: str, tmp_path: Path) -> None:
    model = eso_jax.load(made(tmp_path / "w", family), batch_size=2)
    tokens = np.random.default_rng(0).integers(0, 256, (5, 24))
    found = judges.ModelJudge(model).score(of_tokens(tokens, model.tokenizer))
    exact = model.log_likelihood(tokens, np.tile(np.arange(24), (1, 5, 1)))[0]
    np.testing.assert_allclose(found.nats, -exact, rtol=1e-5)
    assert found.tokens.tolist() == [24] * 5 and found.cut == 0
    text = judges.ModelJudge(model).score(Texts(None, TEXTS))
    assert text.tokens.tolist() == [20, 7, 0, 1, 24] and text.cut == 1 and text.nats[2] == 0
    other = np.full((1, 24), 100)  # what follows a short text is not looked at
    other[0, :7] = np.frombuffer(b"the dog", np.uint8)
    given, wanted = np.zeros((2, 1, 24), bool)
    wanted[0, :7] = True
    np.testing.assert_allclose(text.nats[1:2], -likelihood.conditional(model, other, given, wanted), rtol=1e-5)


def test_masks_behind_the_end_of_a_sample_count_nowhere(ours: Path, tmp_path: Path) -> None:
    """Read with its text, by its tokenizer, or as ids alone."""
    model = eso_jax.load(ours)
    short = np.array([list(b"a cat sat"), list(b"the dog s")])
    masked = np.pad(short, ((0, 0), (0, 4)), constant_values=257)
    np.savez(tmp_path / "ids.npz", tokens=masked, mask=257)
    np.savez(tmp_path / "text.npz", tokens=masked, mask=257, text=["a cat sat", "the dog s"])
    judge = judges.ModelJudge(model)
    for texts, plain in ((of_tokens(masked, ByteTokenizer()), of_tokens(short, ByteTokenizer())),
                         (read(str(tmp_path / "text.npz"), "s"), of_tokens(short, ByteTokenizer())),
                         (read(str(tmp_path / "ids.npz"), "s"), Texts(short))):
        assert repr(quality.measure(texts, judge)) == repr(quality.measure(plain, judge))


def test_our_judges_refuse_what_they_cannot_read(tmp_path: Path, ours: Path) -> None:
    judge = judges.get(str(ours))
    small = tiny_config("ar", length=24, vocab_size=9)
    foreign = judges.get(str(made(tmp_path / "w", config=small)))
    high, low = np.full((2, 24), 300), np.full((2, 24), 5)
    with pytest.raises(EsoError, match="its vocabulary of 258 is not that of the tokens, and there is no text"):
        judge.score(Texts(high))
    assert judge.score(Texts(low)).tokens.sum() == 48
    assert foreign.score(Texts(low)).tokens.sum() == 48
    with pytest.raises(EsoError, match="it has no tokenizer"):
        foreign.score(Texts(low, ["words", "words"]))
    # Tokens of another vocabulary than the judge's, with their text: the text is judged.
    assert judge.score(Texts(low, ["words", "more words"])).tokens.tolist() == [5, 10]
    with pytest.raises(EsoError, match="only an Eso-LM"):
        judges.get(str(made(tmp_path / "mdlm", "mdlm"))).score(Texts(low))


def test_our_judges_read_text_by_their_own_tokenizers(tmp_path: Path) -> None:
    """Windows of a work directory are its tokenizer's, and score as tokens; other text is encoded by it."""
    folder = str(subwords(tmp_path))
    judge, windows, tokenizer = judges.get(folder), read(folder, "--reference", 5), gpt2_like()
    assert windows.tokens is not None and windows.strings is not None and "the cat" in windows.strings[0]
    assert tokenizer.decode(windows.tokens[4]) == windows.strings[4]
    assert judge.score(windows).tokens.tolist() == [24] * 5
    found = judge.score(Texts(None, ["the cat"]))
    assert found.tokens.tolist() == [len(tokenizer.encode("the cat"))] == [3]
    np.testing.assert_allclose(judge.score(Texts(np.zeros((1, 9), int), ["the cat"])).nats, found.nats)


def test_the_error_of_the_perplexity_is_the_spread_over_sets() -> None:
    """The delta method, for texts of very different lengths."""
    rng = np.random.default_rng(0)

    def scores() -> Scores:
        tokens = rng.integers(1, 200, 300)
        return Scores(tokens * rng.normal(3, 1, 300), tokens, 0)

    found = [scores().perplexity() for _ in range(300)]
    spread = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.standard_error for estimate in found]) == pytest.approx(spread, rel=0.15)
    assert Scores(np.array([2.0]), np.array([2]), 0).perplexity().value == pytest.approx(math.e)
    assert math.isnan(Scores(np.zeros(2), np.zeros(2, int), 0).perplexity().value)


def test_mauve_of_our_features(ours: Path) -> None:
    """Near 1 for two halves of one text, low for another; the histogram's formula is the library's."""
    library = pytest.importorskip("mauve", reason="the extra eval is not installed")
    rng = np.random.default_rng(0)
    model = eso_jax.load(ours)
    a, b, other = (of_tokens(rng.integers(low, low + 20, (120, 24)), model.tokenizer) for low in (60, 60, 90))
    features = mauve.get(str(ours))
    same, far = mauve.compare(a, b, features), mauve.compare(a, other, features)
    assert same.value > 0.7 > 0.2 > far.value and same.few and same.samples == 120
    assert 0 < same.standard_error < 0.2 and "ours, mean-pooled" in same.features
    found = library.compute_mauve(p_features=features.of(a), q_features=features.of(b))
    assert same.value == pytest.approx(found.mauve) == pytest.approx(mauve.area(found.p_hist, found.q_hist))
    with pytest.raises(EsoError, match="at least two texts"):
        mauve.compare(Texts(a.tokens[:1]), b, features)


@pytest.mark.parametrize("family", ["ar", "esolm", "esolm_a", "mdlm", "bd3lm"])
def test_our_features_look_at_the_text_alone(family: str, tmp_path: Path) -> None:
    """Short texts are pooled over their own tokens: a model half as long gives the same."""
    config = bytes_config(family, 32)
    params = random_params(config.model)
    short = dataclasses.replace(config, model=dataclasses.replace(config.model, length=16))
    for name, each in (("long", config), ("short", short)):
        workdir.create(tmp_path / name, each, params)
    texts = Texts(None, ["0123456789abcdef", "a cat", ""])
    long_, short_ = (mauve.get(str(tmp_path / name)).of(texts) for name in ("long", "short"))
    assert long_.shape == (3, config.model.width) and np.abs(long_[:2]).max() > 0.1 and not long_[2].any()
    np.testing.assert_allclose(long_, short_, atol=1e-5)


def test_features_of_transformers(modernbert: Path) -> None:
    """The last token's state, whatever stands beside it in the batch; cut to 512 tokens."""
    import torch
    import transformers

    texts = ["a cat", "a much longer text than that " * 3, "b" * 600]
    found = mauve.TransformersFeatures(str(modernbert), batch_size=2).of(Texts(None, texts))
    model, tokenizer = (getattr(transformers, kind).from_pretrained(modernbert)
                        for kind in ("AutoModel", "AutoTokenizer"))
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer(text)["input_ids"][:512]])).last_hidden_state
        np.testing.assert_allclose(row, hidden[0, -1], atol=1e-4)


def test_bertscore_of_transformers(modernbert: Path) -> None:
    """A plain loop over tokens. The marks at both ends are matched and not counted; batches change nothing."""
    import tokenizers
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(modernbert)
    encoder = bertscore.TransformersEncoder(str(modernbert), layer=1, batch_size=2)
    mark = encoder.tokenizer.pad_token = "<|endoftext|>"
    encoder.tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{mark} $A {mark}", special_tokens=[(mark, 256)])
    texts, references = ["a cat sat", "the dog", "", "one", "x"], ["the cat", "the dog", "a", "and two", "x y z"]

    def vectors(text: str) -> Any:
        ids = [256, *encoder.tokenizer(f" {text}", add_special_tokens=False)["input_ids"], 256]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
        return hidden / hidden.norm(dim=-1, keepdim=True)

    def raw(text: str, reference: str) -> tuple[float, ...]:
        cosine = vectors(text) @ vectors(reference).T
        precision, recall = float(cosine.amax(1)[1:-1].mean()), float(cosine.amax(0)[1:-1].mean())
        return (precision, recall, 2 * precision * recall / (precision + recall)) if text else (0, 0, 0)

    unrelated = np.mean([raw(*pair) for pair in zip([*references[1:], references[0]], references)], axis=0)
    expected = [(np.array(raw(*pair)) - unrelated) / (1 - unrelated) for pair in zip(texts, references)]
    found = bertscore.score(texts, references, encoder)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found[1], 1, atol=1e-5)
    encoder.unrelated = (0.25, 0.5, 0.75)
    np.testing.assert_allclose(bertscore.score(texts, references, encoder)[2], [-1 / 3, -1, -3], atol=1e-5)


def test_bertscore_of_our_models(ours: Path) -> None:
    encoder = bertscore.ModelEncoder(eso_jax.load(ours))
    texts, references = ["a cat", "", "the dog sat on the mat, longer than 24"], ["a cat", "a", "the dog sat on it"]
    found = bertscore.score(texts, references, encoder)
    np.testing.assert_allclose(found[0], 1, atol=1e-5)
    assert found[1].max() < 0 and (found[1] < found[2]).all() and (found[2] < 1).all()
    assert [len(tokens.vectors) for tokens in encoder.of(texts)] == [5, 0, 24]


def test_everything_with_the_libraries(gpt2: Path, modernbert: Path, tmp_path: Path) -> None:
    """The command, as in the paper but for the size of the models: GPT-2's perplexity and ModernBERT's MAUVE."""
    rng = np.random.default_rng(0)
    tokens = {name: rng.choice(list(b"abcde   "), (40, 24)) for name in ("samples", "reference")}
    for name, rows in tokens.items():
        np.savez(tmp_path / f"{name}.npz", tokens=rows, text=[ByteTokenizer().decode(row) for row in rows])
    out = tmp_path / "q.json"
    assert main(["quality", "--samples", str(tmp_path / "samples.npz"), "--judge", str(gpt2), "--reference",
                 str(tmp_path / "reference.npz"), "--features", str(modernbert), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["samples"] == found["reference"]["samples"] == found["mauve"]["reference"] == 40
    assert found["judged"] == 40 * 24 and found["judge"] == str(gpt2) and 0 < found["mauve"]["value"] <= 1
    for measure in ("gen_ppl", "entropy", "repetition", "self_bleu"):
        assert math.isfinite(found[measure]["value"])
    assert found["gen_ppl"]["value"] == pytest.approx(found["reference"]["gen_ppl"]["value"], rel=0.3)


@pytest.mark.slow
def test_everything_offline_with_our_models(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the .npz of eso-jax sample, a work directory being judge, reference and features."""
    pytest.importorskip("mauve", reason="the extra eval is not installed")
    out = tmp_path / "samples.npz"
    assert main(["sample", "--workdir", str(ours), "--num-samples", "30", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["quality", "--samples", str(out), "--judge", str(ours), "--reference", str(ours),
                 "--features", str(ours), "--out", str(tmp_path / "q.json")]) == 0
    said = capsys.readouterr().err
    found = json.loads((tmp_path / "q.json").read_text())
    model, tokens = eso_jax.load(ours), np.load(out)["tokens"]
    exact = -model.log_likelihood(tokens, np.tile(np.arange(24), (1, 30, 1))).mean() / 24
    assert found["gen_ppl"]["value"] == pytest.approx(math.exp(exact), rel=1e-4) and found["judged"] == 30 * 24
    assert "MAUVE of 30 samples and 30 reference texts is biased" in said
    for name in ("generative perplexity", "entropy, nats", "distinct 1-grams"):
        (line,) = (line for line in said.splitlines() if line.strip().startswith(name))
        assert line.count("+-") == 2  # of the samples, and of the reference
    assert "repeated 4-grams" in said and "self-BLEU" in said
    assert set(found["distinct"]) == {"1", "2", "3", "4"}
    assert set(found["reference"]) == set(found) - {"source", "reference"}


def test_a_reference_is_read_once(ours: Path) -> None:
    """Whatever number of samples it is compared with; and it is never judged."""
    pytest.importorskip("mauve", reason="the extra eval is not installed")
    model = eso_jax.load(ours)
    read_by: dict[str, list[Texts]] = {"judge": [], "features": []}

    class Judge(judges.ModelJudge):
        def score(self, texts: Texts) -> Scores:
            read_by["judge"].append(texts)
            return super().score(texts)

    class Features(mauve.ModelFeatures):
        def of(self, texts: Texts) -> np.ndarray:
            read_by["features"].append(texts)
            return super().of(texts)

    rng, judge, features = np.random.default_rng(0), Judge(model), Features(model)
    first, second, reference = (of_tokens(rng.integers(60, 90, (30, 24)), model.tokenizer) for _ in range(3))
    found = [quality.measure(samples, judge, reference, features) for samples in (first, second)]
    assert read_by == {"judge": [first, second], "features": [first, reference, second]}
    assert found[1].mauve == mauve.compare(second, Texts(reference.tokens, reference.strings), Features(model))


def test_mauve_is_measured_where_asked_for(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference alone needs neither the network nor the extra eval."""
    monkeypatch.setattr(mauve, "get", lambda name: pytest.fail(f"loads {name}"))
    (tmp_path / "s.jsonl").write_text('{"text": "a b c"}\n{"text": "d"}\n')
    assert main(["quality", "--samples", str(tmp_path / "s.jsonl"), "--judge", "none", "--reference", str(ours),
                 "--out", str(tmp_path / "q.json")]) == 0
    found = json.loads((tmp_path / "q.json").read_text())
    assert found["mauve"] is None and found["reference"]["samples"] == 2


def test_nothing_is_left_out_in_silence(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert main(["quality", "--samples", str(tmp_path / "s.jsonl"), "--judge", str(ours),
                 "--out", str(tmp_path / "q.json")]) == 0
    said = capsys.readouterr().err
    found = json.loads((tmp_path / "q.json").read_text())
    assert (found["samples"], found["empty"], found["unjudged"], found["cut"], found["short"]) == (5, 1, 1, 1, 3)
    assert found["entropy"] is None and found["mauve"] is None and found["reference"] is None
    for words in ("1 of 5 samples empty (no words)", "1 of 5 samples without a token", "1 of 5 samples longer",
                  "3 of 5 samples of fewer than 4 words"):
        assert words in said
    repeated = quality.measure(Texts(None, TEXTS[4:])).repetition.value
    assert repeated == pytest.approx(1 - 4 / 11) and found["repetition"]["value"] == pytest.approx(repeated / 2)


def test_mistakes_are_a_line_each(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good, tokens_only = tmp_path / "good.jsonl", tmp_path / "t.npy"
    good.write_text('{"text": "a b c"}\n{"text": "d"}\n')
    np.save(tokens_only, np.zeros((2, 24), int))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "empty.jsonl").write_text("")
    np.savez(tmp_path / "neither.npz", x=1)
    for arguments, message in (
            (["--samples", good, "--judge", tmp_path / "nowhere"], "no such folder"),
            (["--samples", good, "--features", ours], "give --reference as well"),
            (["--samples", tmp_path / "no.npz"], "no such file"),
            (["--samples", tmp_path / "bad.jsonl"], "line 1 has no field"),
            (["--samples", tmp_path / "empty.jsonl"], "nothing to measure"),
            (["--samples", tmp_path / "neither.npz"], "has no column text"),
            (["--samples", "s.txt"], "give a .npz, .npy, .jsonl"),
            (["--samples", good, "--judge", ours, "--out", tmp_path / "no" / "q.json"], "does not exist")):
        assert main(["quality", "--out", str(tmp_path / "q.json"), *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and message in said, said
    with pytest.raises(EsoError, match="MAUVE compares with reference texts"):
        quality.measure(Texts(np.zeros((2, 24), int)), features=mauve.get(str(ours)))


def test_without_a_network_the_default_judge_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra eval is not installed")

    def offline(name: str) -> None:
        raise OSError(f"We couldn't connect to load {name}\nand more lines")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    (tmp_path / "s.jsonl").write_text('{"text": "a b c"}\n')
    assert main(["quality", "--samples", str(tmp_path / "s.jsonl"), "--out", str(tmp_path / "q.json")]) == 2
    said = capsys.readouterr().err
    assert "--judge = 'gpt2-large': cannot be loaded (We couldn't connect to load gpt2-large)" in said
    assert "give a folder that holds the model, or a work directory" in said and len(said.splitlines()) == 1


def test_token_ids_alone_are_measured_in_tokens(tmp_path: Path, ours: Path) -> None:
    rows = np.tile(np.arange(6), (3, 4))
    found = quality.measure(Texts(rows), judges.ModelJudge(eso_jax.load(ours)))
    assert found.unit == "tokens" and found.entropy is not None
    assert found.entropy.value == pytest.approx(math.log(6)) and found.judged == 72
    assert found.repetition.value == pytest.approx(1 - 6 / 21) and found.self_bleu.value == pytest.approx(1)


def test_texts(ours: Path, tmp_path: Path) -> None:
    assert is_workdir(str(ours)) and not is_workdir(str(tmp_path)) and not is_workdir("gpt2-large")
    windows = read(str(ours), "--reference", 7)
    assert len(windows) == 7 and windows.tokens is not None and windows.strings is not None
    assert ByteTokenizer().decode(windows.tokens[3]) == windows.strings[3]
    np.save(tmp_path / "t.npy", windows.tokens)
    assert read(str(tmp_path / "t.npy"), "--samples").strings is None
    for tokens, strings in ((np.zeros((2, 2)), None), (np.zeros(3, int), None), (np.zeros((2, 2), int), ["a"])):
        with pytest.raises(EsoError):
            Texts(tokens, strings)


def test_frontiers() -> None:
    points = [(3.0, 120.0), (6.4, 53.0), (10.0, 60.0), (24.0, 49.0), (3.0, 110.0)]
    assert frontier.frontier(points, True) == [(3.0, 110.0), (6.4, 53.0), (24.0, 49.0)]
    assert frontier.frontier(points, False) == [(3.0, 120.0)]


def test_the_harness_without_its_library_is_one_line() -> None:
    script = ("import runpy, sys; sys.modules['lm_eval'] = None; "
              "runpy.run_module('eso_jax.evaluation.harness', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("eso-jax: error: the lm-evaluation-harness needs the extra eval (")
    assert len(done.stderr.splitlines()) == 1 and "pip install 'eso-jax[eval]'" in done.stderr
