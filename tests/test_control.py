"""What a user asks of samples: what is given, what is banned, where they end; of every family."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Run, engine, random_params, random_weights, tiny_config
from eso_jax import families
from eso_jax.data import ByteTokenizer, prompts
from eso_jax.decoding import loop
from eso_jax.decoding.decoders import Decoded
from eso_jax.decoding.rejection import draw_again
from eso_jax.engine.model import Model
from eso_jax.errors import EsoError
from eso_jax.run import workdir

LENGTH, MASK = 12, 8


def model_of(family: str, length: int = LENGTH, vocab_size: int = MASK + 1, **fields: object) -> Model:
    config = tiny_config(family, length, vocab_size, **({"block_size": 4} if family == "bd3lm" else {}), **fields)
    one = engine(config, random_weights(config.model))
    tokenizer = ByteTokenizer() if vocab_size == 258 else None
    return Model(config, one.weights, one.mesh, 8, step=0, tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.BY_NAME)
def test_rule_seed_and_ban_reach_every_sampler(family: str) -> None:
    """What leaves but the likeliest token draws as temperature 0 does, whatever the seed of the draws."""
    model = model_of(family)

    def draw(**fields: Any) -> np.ndarray:
        return model.sample(4, 3 if family != "bd3lm" else 6, **fields).tokens

    greedy, plain = draw(temperature=0.0), draw()
    for fields in ({"top_p": 1e-6}, {"min_p": 0.99999}, {"temperature": 1e-4}):
        np.testing.assert_array_equal(draw(**fields), greedy)
    assert (draw(seed=1) != plain).any() and (plain != greedy).any()
    likely = int(np.bincount(greedy.ravel()).argmax())
    for rule in ({}, {"temperature": 0.0}):
        found = draw(banned=(likely, 3), **rule)
        assert not np.isin(found, (likely, 3, MASK)).any() and (found < MASK).all()
    with pytest.raises(EsoError, match="banned = '8 ids': leave a token to be drawn"):
        draw(banned=range(8))


def test_a_ban_is_an_id_or_a_text() -> None:
    model, how = model_of("ar", 16, 258), {"temperature": 0.0}
    likely = bytes(model.sample(1, **how).tokens[0, :1].tolist()).decode("latin1")
    found = model.sample(1, banned=likely, **how).tokens
    assert ord(likely) < 128 and ord(likely) not in found
    np.testing.assert_array_equal(model.sample(1, banned=[ord(likely)], **how).tokens, found)
    with pytest.raises(EsoError, match="banned = 'e': the model has no tokenizer"):
        model_of("esolm").sample(1, banned="e")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["esolm", "ar"])
def test_a_prompt_of_any_length_comes_back(family: str) -> None:
    model, tokens = model_of(family), np.random.default_rng(0).integers(0, MASK, (LENGTH + 1, LENGTH))
    known = np.arange(LENGTH) < np.arange(LENGTH + 1)[:, None]
    found = model.sample(1, 3, given=np.where(known, tokens, MASK))
    np.testing.assert_array_equal(found.tokens[known], tokens[known])
    np.testing.assert_array_equal(found.given, known)
    assert (found.tokens < MASK).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["esolm", "esolm_a", "mdlm"])
def test_infilling_keeps_both_sides_and_ends_where_the_template_does(family: str) -> None:
    model = model_of(family, 16, 258)
    given = prompts.of_template("ab[MASK:5]cd", model.tokenizer, model.config.model)
    found = model.sample(3, 3, given=given)
    assert (found.tokens[:, :2] == [97, 98]).all() and (found.tokens[:, 7:9] == [99, 100]).all()
    assert (found.tokens[:, :9] != 257).all() and (found.tokens[:, 9:] == 257).all()
    assert [text for text in found.text] == [model.tokenizer.decode(row[:9]) for row in found.tokens]
    assert (found.tokens_per_step.sum(-1) == 5).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", families.BY_NAME)
def test_max_tokens_are_the_first_unknown_ones(family: str) -> None:
    """As if the rest were not there; of MDLM, which sees all masks, this is the law of the whole row's beginning."""
    model = model_of(family)
    given = np.full((2, LENGTH), MASK)
    given[1, :5] = 1
    found = model.sample(2, 3 if family != "bd3lm" else 6, given=given, max_tokens=4)
    decoded = found.tokens != MASK
    assert (decoded == (np.arange(LENGTH) < np.array([4, 4, 9, 9])[:, None])).all()
    assert (np.asarray(found.given) == (np.arange(LENGTH) < np.array([0, 0, 5, 5])[:, None])).all()
    assert np.broadcast_to(found.tokens_per_step.sum(-1), 4).tolist() == [4] * 4
    left = LENGTH - np.asarray(found.plan.end)  # decoded as well, behind the others: these stay as they are
    counts = np.broadcast_to(found.tokens_per_step, (4, found.tokens_per_step.shape[-1]))
    more = np.concatenate([counts, np.arange(8) < np.broadcast_to(left, 4)[:, None]], axis=1)
    plan = dataclasses.replace(found.plan, tokens_per_step=more)
    np.testing.assert_array_equal(model.sample(2, given=given, plan=plan).tokens[decoded], found.tokens[decoded])
    whole = model.sample(2, 3 if family != "bd3lm" else 6, given=given, max_tokens=100)
    assert (whole.tokens < MASK).all()
    with pytest.raises(EsoError, match="max_tokens = 0: must be at least 1"):
        model.sample(1, given=given, max_tokens=0)
    with pytest.raises(EsoError, match="max_tokens = 3: a plan that is given says what is decoded"):
        model.sample(2, given=given, max_tokens=3, plan=whole.plan)


@pytest.mark.slow
def test_stops_cut_and_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens and texts as without saving, and fewer passes; a stop in the prompt is none."""
    model = model_of("esolm", 256, 258)
    given = prompts.of_prompt("a.b", model.tokenizer, model.config.model)
    passes = []
    inner = loop.decode_run

    def counted(weights: Any, state: Any, steps: Any, *arguments: Any) -> Any:
        passes.append(np.asarray(steps.count).sum())
        return inner(weights, state, steps, *arguments)

    monkeypatch.setattr(loop, "decode_run", counted)
    whole = model.sample(3, alpha_0=0.0, given=given)
    every = sum(passes)
    stop = model.tokenizer.decode(whole.tokens[0, 20:21])  # a byte that comes up
    passes.clear()
    stops = [stop, *(model.tokenizer.decode(row[24:25]) for row in whole.tokens)]
    found = model.sample(3, alpha_0=0.0, given=given, stop=stops)
    assert sum(passes) < every / 2
    for row, text, full in zip(found.tokens, found.text, whole.tokens, strict=True):
        said = model.tokenizer.decode(full)
        end = min(place for stop in stops if (place := said.find(stop, 3)) >= 0)
        assert text == said[:end] and text.startswith("a.b")
        kept = row != 257
        assert (row[kept] == full[kept]).all() and kept[:kept.sum()].all()
    dots = model.sample(1, alpha_0=0.0, given=given, stop=["a.b"])
    np.testing.assert_array_equal(dots.tokens[0], whole.tokens[0])


@pytest.mark.slow
def test_masks_are_no_tokens_of_low_entropy() -> None:
    """A sample that ends early is drawn again for what it says, not for the masks behind it."""
    model = model_of("esolm", 272, 258)
    found = model.sample(4, max_tokens=8, num_tries=2, min_entropy=1.0)
    assert (found.tokens[:, -256:] == 257).mean() > 0.9 and found.tries.tolist() == [1] * 4
    assert model.sample(1, max_tokens=8, num_tries=2, min_entropy=5.0).tries.tolist() == [2]


@pytest.mark.slow
def test_a_record_says_nothing_of_what_a_stop_has_cut() -> None:
    """So that it is the same in any batch."""
    model = model_of("esolm", 64, 258)
    whole = model.sample(3, alpha_0=0.0)
    stops = [model.tokenizer.decode(row[at:at + 1]) for row, at in zip(whole.tokens, (3, 20, 30), strict=True)]
    found, alone = (model.sample(3, alpha_0=0.0, stop=stops, record=True, batch_size=size) for size in (3, 1))
    assert (found.tokens == 257).any() and (found.record.step[found.tokens == 257] == -1).all()
    for ours, theirs in zip(found.record, alone.record, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_an_interrupt_of_a_later_try_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inner, calls = model_of("esolm"), families.sample, list[int]()

    def second(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*arguments)

    once = model.sample(2, 3)
    monkeypatch.setattr(families, "sample", second)
    found = model.sample(2, 3, num_tries=3, min_entropy=9.0, keep=True)
    assert found.tries.tolist() == [1, 1] and (found.tokens == once.tokens).all()
    assert found.interrupted and not once.interrupted
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        model.sample(2, 3, num_tries=3, min_entropy=9.0)


def test_an_interrupt_amid_a_draw_keeps_its_rows_and_ends_the_work() -> None:
    def draw(attempt: int, rows: np.ndarray) -> Decoded:
        return Decoded(np.full((len(rows) - (attempt == last), 2), attempt, np.int32), None)

    for last, drawn, times in ((1, [0, 1, 0], [1, 2, 1]), (0, [0, 0], [1, 1])):
        found, tries, cut = draw_again(draw, lambda tokens: np.array([1, 2]), 3, 5, keep=True)
        assert cut and found.tokens[:, 0].tolist() == drawn and tries.tolist() == times


def test_tries_end_where_nothing_is_to_be_drawn_again() -> None:
    assert model_of("esolm").sample(2, 3, num_tries=10**12, min_entropy=0.0).tries.tolist() == [1, 1]


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(length=16, vocab_size=258)
    out = tmp_path_factory.mktemp("bytes") / "w"
    workdir.create(out, config, random_params(config.model), ByteTokenizer())
    return out


@pytest.mark.slow
def test_the_command(bytes_run: Path, tmp_path: Path, run: Run) -> None:
    sample = ["sample", "--workdir", bytes_run, "--steps", 2, "--num-samples", 2, "--out"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n{"template": "c[MASK:2]d"}\n')
    np.save(tmp_path / "x.npy", np.array([[1, 257, 3]]))

    def made(*arguments: object) -> Any:
        run(*sample, tmp_path / "s.npz", *arguments)
        return np.load(tmp_path / "s.npz")

    prompted = made("--prompt", "~ab", "--ban", "x", "--ban-id", 256)
    assert (prompted["tokens"][:, :3] == list(b"~ab")).all() and prompted["text"].shape == (2,)
    assert not np.isin(prompted["tokens"], (ord("x"), 256, 257)).any()
    several = made("--prompts", tmp_path / "p.jsonl", "--max-tokens", 4)
    assert several["tokens"].shape == (4, 16) and (several["tokens"][:2, :2] == list(b"ab")).all()
    assert (several["tokens"][2:, [0, 3]] == list(b"cd")).all()
    assert ((several["tokens"] != 257).sum(1) == [6, 6, 4, 4]).all()
    template = made("--template", "c[MASK:2]d")
    np.testing.assert_array_equal(template["tokens"], several["tokens"][2:])  # alone as beside others
    assert (made("--given", tmp_path / "x.npy")["tokens"][:, [0, 2]] == [1, 3]).all()
    run(*sample, tmp_path / "s.jsonl", "--template", "c[MASK:2]d")
    lines = [json.loads(line)["text"] for line in (tmp_path / "s.jsonl").read_text("utf-8").splitlines()]
    assert lines == template["text"].tolist()
    stop = ["--stop", prompted["text"][0][-1], "--stop-at-separator"]
    stopped = made(*stop, "--prompt", "~ab", "--ban", "x", "--ban-id", 256)
    assert str(prompted["text"][0]).startswith(str(stopped["text"][0]))


def test_the_command_says_which_samples_came_to_a_stop(bytes_run: Path, tmp_path: Path, run: Run) -> None:
    """One always does; another one never. What is cut counts neither as a token nor, for sure, as a pass."""
    (tmp_path / "p.jsonl").write_text('{"template": "a[MASK:2]xy"}\n{"template": "b[MASK:2]z"}\n')
    sample = ["sample", "--workdir", bytes_run, "--prompts", tmp_path / "p.jsonl", "--steps", 1, "--ban", "x", "--out"]
    said = run(*sample, tmp_path / "s.jsonl", "--stop", "x")
    found = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text("utf-8").splitlines()]
    assert [row["stopped"] for row in found] == [True, False] and found[1]["text"][-1] == "z"
    assert "1 of 2 samples came to a stop" in said and "NFE at most " in said and "; 4 tokens in" in said
    said = run(*sample, tmp_path / "s.jsonl")
    assert "stop" not in said and "at most" not in said
    assert all(list(json.loads(line)) == ["text"] for line in (tmp_path / "s.jsonl").read_text("utf-8").splitlines())


def test_the_command_says_which_long_texts_are_whole(bytes_run: Path, tmp_path: Path, run: Run,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the third window: two are enough for the first text, not for the second."""
    windows, sample, out = iter(range(9)), Model.sample, tmp_path / "s.jsonl"

    def interrupted(*arguments: Any, **how: Any) -> Any:
        if next(windows) == 2:
            raise KeyboardInterrupt
        return sample(*arguments, **how)

    monkeypatch.setattr(Model, "sample", interrupted)
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "0123456789abcdef"}\n')
    for stop, said in (([], [{"whole": True}, {"whole": False}]),
                       (["--stop", "no such text"], [{"whole": True, "stopped": False}] * 2)):
        run("sample", "--workdir", bytes_run, "--prompts", tmp_path / "p.jsonl", "--steps", 2, "--max-tokens", 20,
            "--out", out, *stop)
        found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        assert [{name: row[name] for name in row if name != "text"} for row in found] == said


def test_a_file_that_is_read_is_not_written(bytes_run: Path, tmp_path: Path, run: Run,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "ab"}\n')
    said = run("sample", "--workdir", bytes_run, "--prompts", path, "--out", f"{tmp_path}/./p.jsonl", code=2)
    assert "p.jsonl': is given for prompts too, and would be overwritten; give another name" in said
    assert path.read_text() == '{"prompt": "ab"}\n'
    assert "given for samples too" in run("view", path, "--out", path, code=2)
    monkeypatch.chdir(tmp_path)
    assert "overwritten" not in run("import", "mdlm.ckpt", "--family", "mdlm", "--out", "mdlm", code=2)  # no file


@pytest.mark.slow
def test_a_plan_whose_given_tokens_a_stop_has_cut(bytes_run: Path, tmp_path: Path, run: Run) -> None:
    sample = ["sample", "--workdir", bytes_run, "--steps", 2]
    run(*sample, "--template", "a[MASK:2]xyz", "--stop", "y", "--out", tmp_path / "s.npz")
    assert "a stop cut tokens that were given" in run(*sample[:3], "--plan", tmp_path / "s.npz", "--out",
                                                      tmp_path / "t.npz", code=2)


def test_mistakes_of_the_command(bytes_run: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    np.save(tmp_path / "x.npy", np.array([[1, 300]]))
    np.save(tmp_path / "long.npy", np.zeros((1, 17), int))
    cases: list[tuple[Callable[[], list[object]] | list[object], str]] = [
        (["--prompt", "a" * 17], "--prompt = 'aaaaaaaaaaaaaaaaa': is 17 tokens, and the model has length 16"),
        (["--template", "abc"], "--template = 'abc': has no blank"),
        (["--prompts", tmp_path / "empty.jsonl"], "holds no rows"),
        (["--prompts", tmp_path / "no.jsonl"], "no such file"),
        (["--given", tmp_path / "x.npy"], "--given[0, 1] = 300: ids must be in [0, 258)"),
        (["--given", tmp_path / "long.npy"], "the model has length 16"),
        (["--prompt", "a", "--template", "b[MASK]"], "--prompt and --template: give one of them"),
        (["--stop", ""], "stop = '': must not be empty"),
        (["--ban", "ab"], "banned = 'ab': is 2 tokens of tokenizer 'bytes', not one"),
        (["--ban-id", 258], "banned = 258"),
        (["--max-tokens", 0], "--max-tokens = 0"), (["--show", -1], "--show = -1: must be at least 0"),
        (["--max-tokens", 10**30], f"--max-tokens = {10**30}: with its prompt it is longer than the model's 16"),
        (["--max-tokens", 17, "--num-samples", 0, "--out", tmp_path / "s.jsonl"], "--num-samples = 0: must be"),
        (["--ban", "\udcff"], "--ban: '\\udcff': is not UTF-8"), (["--stop", "\udcff"], "--stop: '\\udcff': is not"),
        (["--html", tmp_path / "s.npz"], "is given for html too, and would be overwritten")]
    for arguments, message in cases:
        said = run("sample", "--workdir", bytes_run, "--out", tmp_path / "s.npz", *arguments, code=2)
        assert message in said, said
    assert not (tmp_path / "s.npz").exists()
