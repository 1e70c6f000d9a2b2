"""Texts that are longer than the model: window after window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Run
from eso_jax.data import prompts
from eso_jax.data.stops import Stops
from eso_jax.engine import model as engine_model
from eso_jax.engine.model import Model, Samples
from eso_jax.errors import EsoError
from test_control import model_of

LENGTH, OVERLAP = 12, 5
MODEL = model_of("esolm", vocab_size=258)
GIVEN = prompts.of_array(np.array([[*b"ab", *[257] * 10], [*b"hello world!"]]), MODEL.config.model)


def long(given: prompts.Given = GIVEN, max_tokens: int = 20, **how: object) -> list[list[int]]:
    found = MODEL.lengthen(given, max_tokens, OVERLAP, steps=3, alpha_0=0.5, **how)
    return [tokens.tolist() for tokens in found.tokens]


@pytest.mark.slow
def test_each_window_goes_on_from_the_end_of_the_one_before() -> None:
    """Of the first row: 2 + 10 tokens, then 7 and 3 behind the last 5; of the second, whose prompt fills a window, 7, 7
    and 6. Each window is a sample of the model that is given what is before."""
    found, mask = long(temperature=0.0), MODEL.config.model.mask
    for tokens, row, sizes in zip(found, GIVEN.tokens.tolist(), ((10, 7, 3), (7, 7, 6)), strict=True):
        known = [token for token in row if token != mask]
        assert tokens[:len(known)] == known and len(tokens) == len(known) + 20
        for number, size in enumerate(sizes):
            begin = known if number == 0 and len(known) < LENGTH else known[-OVERLAP:]
            window = prompts.Given(np.array([begin + [mask] * (LENGTH - len(begin))]), np.array([len(begin) + size]))
            # At temperature 0 too: the seed draws the order.
            seed = int(np.random.default_rng([0, number]).integers(2**32)) if number else 0
            sample = MODEL.sample(1, 3, 0.5, temperature=0.0, given=window, seed=seed).tokens[0].tolist()
            known = known + sample[len(begin):len(begin) + size]
        assert tokens == known


@pytest.mark.slow
def test_a_text_is_the_same_in_any_company_and_a_short_one_is_a_sample() -> None:
    alone = long(prompts.Given(GIVEN.tokens[:1], GIVEN.end[:1]))
    assert alone[0] == long()[0] and alone != long(seed=1)[:1]
    short = MODEL.sample(1, 3, 0.5, given=GIVEN.tokens[:1], max_tokens=6).tokens[0, :8].tolist()
    assert long(prompts.Given(GIVEN.tokens[:1], GIVEN.end[:1]), 6) == [short]


def test_a_stop_may_stand_across_two_windows() -> None:
    """The last token of the first window and the first of the second."""
    whole, decode = long()[0], MODEL.tokenizer.decode
    stop = decode(np.array(whole[LENGTH - 1:LENGTH + 1]))
    end = decode(np.array(whole)).index(stop, 2)
    found = MODEL.lengthen(GIVEN, 20, OVERLAP, stop=[stop], steps=3, alpha_0=0.5)
    assert found.text[0] == decode(np.array(whole))[:end] and found.windows[0] <= 2
    assert found.tokens[0].tolist() == whole[:len(found.tokens[0])] and len(found.tokens[0]) < LENGTH


def test_an_interrupt_keeps_the_windows_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only if that is asked for, and if there are any."""
    whole, sample = long(), Model.sample

    def interrupt_at(number: int) -> None:
        windows = iter(range(9))

        def interrupted(*arguments: Any, **how: Any) -> Samples:
            if next(windows) == number:
                raise KeyboardInterrupt
            return sample(*arguments, **how)

        monkeypatch.setattr(Model, "sample", interrupted)

    interrupt_at(2)
    found = MODEL.lengthen(GIVEN, 20, OVERLAP, steps=3, alpha_0=0.5, keep=True)
    assert found.windows.tolist() == [2, 2] and found.left.tolist() == [3, 6]
    assert [tokens.tolist() for tokens in found.tokens] == [whole[0][:-3], whole[1][:-6]]
    for number, how in ((2, {}), (0, {"keep": True})):
        interrupt_at(number)
        with pytest.raises(KeyboardInterrupt):
            long(**how)


def test_an_interrupt_after_a_window_keeps_whole_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the second text of the second window is searched for a stop."""
    found, looked, done = MODEL.lengthen(GIVEN, 20, OVERLAP, steps=3, alpha_0=0.5), list[int](), Stops.done

    def interrupted(self: Stops, tokens: np.ndarray, known: np.ndarray) -> np.ndarray:
        looked.extend([1] if tokens.shape[1] > LENGTH + 1 else [])  # a whole text, not a window
        if len(looked) == 3:
            raise KeyboardInterrupt
        return done(self, tokens, known)

    monkeypatch.setattr(Stops, "done", interrupted)
    kept = MODEL.lengthen(GIVEN, 20, OVERLAP, stop=["no such text"], steps=3, alpha_0=0.5, keep=True)
    assert kept.windows.tolist() == [1, 1] and kept.left.tolist() == [10, 13]
    assert [len(tokens) for tokens in kept.tokens] == [12, 19]
    assert all((part == whole[:len(part)]).all() for part, whole in zip(kept.tokens, found.tokens, strict=True))


@pytest.mark.slow
def test_the_command_says_what_an_interrupt_kept(trained: Path, run: Run, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, or windows."""
    out, decode, windows = tmp_path / "long.jsonl", engine_model.decode, list[int]()

    def interrupted(*arguments: Any) -> Any:
        windows.append(0)
        if len(windows) == 2:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(engine_model, "decode", interrupted)
    arguments = ["sample", "--workdir", trained, "--steps", 4, "--out", out, "--max-tokens"]
    said = run(*arguments, 500, "--stop", "no such text")
    assert "interrupted: 0 of 1 texts are whole; the others end where a window did" in said
    assert json.loads(out.read_text("utf-8"))["stopped"] is False
    for number, words in ((500, "interrupted: nothing is written; windows are kept once the first of each"),
                          (9, "interrupted: nothing is written; with a smaller")):
        windows[:] = [0]
        said = run(*arguments, number, code=130)
        assert words in said and "training" not in said


@pytest.mark.parametrize(("tokens", "how", "said"), [
    ([[97] + [257] * 10 + [98]], {}, "has nothing given behind its beginning"),
    ([[97]], {"overlap": LENGTH}, r"overlap = 12: must be in \[1, 12\)"),
    ([[97]], {"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
    ([[97]], {"max_tokens": 10**30}, "must be at least 1, and less than"),
])
def test_what_cannot_be_lengthened(tokens: list[list[int]], how: dict[str, int], said: str) -> None:
    with pytest.raises(EsoError, match=said):
        MODEL.lengthen(np.array(tokens), **{"max_tokens": 20, **how})


@pytest.mark.slow
def test_the_command_writes_long_texts(trained: Path, run: Run, tmp_path: Path) -> None:
    """And refuses what an .npz cannot hold."""
    arguments = ["sample", "--workdir", str(trained), "--prompt", "def ", "--num-samples", "2", "--steps", "4",
                 "--max-tokens", "500", "--out"]
    run(*arguments, str(tmp_path / "long.jsonl"))
    texts = [json.loads(line)["text"] for line in (tmp_path / "long.jsonl").read_text("utf-8").splitlines()]
    assert len(texts) == 2 and all(text.startswith("def ") and len(text.encode()) > 100 for text in texts)
    assert "give a .jsonl" in run(*arguments, str(tmp_path / "long.npz"), code=2)
    assert "have no --watch" in run(*arguments, str(tmp_path / "x.jsonl"), "--watch", code=2)
