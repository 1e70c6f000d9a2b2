"""The viewer: what a page holds is what the .npz holds, it asks for nothing, and any text is shown as what it is."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import CHROMIUM, Browser
from conftest import Run, engine, random_weights, tiny_config
from eso_jax.data.tokenizers import ByteTokenizer, LibraryTokenizer
from eso_jax.decoding.record import Record
from eso_jax.engine.model import Model, Samples
from eso_jax.errors import EsoError
from eso_jax.viewer import terminal
from eso_jax.viewer.caption import Caption
from eso_jax.viewer.page import named, page
from vocabularies import bert_like, gpt2_like

NASTY = ["\t", "\n", " ", "</script><script>alert(1)</script>", "<!--", "\u2028", "\u202eabc", "שלום", "a\u0301",
         "\u0301", "\0", b"\xff\xfe", b"\xe2\x82", "&lt;", "\u00a0", "🐕", "{data}"]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")


def generation(pieces: list[str | bytes], rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A generation as the .npz holds it: a third by diffusion, three tokens a pass, the first two positions given."""
    rng, count = np.random.default_rng(seed), len(pieces)
    order = np.stack([np.append([0, 1], 2 + rng.permutation(length - 2)) for _ in range(rows)])
    groups, rest = divmod(length // 3, 3)
    counts = np.array([3] * groups + [rest] * (rest > 0) + [1] * (length - 2 - length // 3))
    step = np.empty((rows, length), np.int32)
    np.put_along_axis(step, order, np.append([-1, -1], np.repeat(np.arange(len(counts)), counts))[None], 1)
    logits = rng.normal(0, 3, (rows, length, count)).astype(np.float32)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = np.arange(rows * length).reshape(rows, length) % count
    alternatives = np.argsort(-logp, -1)[..., :5]
    own = np.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    record = Record(step, own, own / 2, -(np.exp(logp) * logp).sum(-1), alternatives,
                    np.take_along_axis(logp, alternatives, -1))
    stop = 2 + np.cumsum(counts)
    text = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    caption = Caption(np.array("Eso-LM (B)"), np.stack([stop - counts, stop], -1), np.arange(count),
                      np.cumsum([len(piece) for piece in text]), np.frombuffer(b"".join(text), np.uint8), np.array(-1),
                      np.array(count))
    return {"tokens": tokens, "order": order, "tokens_per_step": counts, "diffusion": np.array(length // 3),
            "given": np.full(rows, 2), "seconds": np.array(0.25), **record._asdict(), **caption._asdict()}


def data_of(text: str) -> Any:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_a_page_holds_the_generation_and_no_markup_of_its_text() -> None:
    made = generation(NASTY, 2, 20)
    text = page({"<b>": made})
    assert text.count("<script") == text.count("</script") == 2 and "<!--" not in text and "\u2028" not in text
    assert "alert(1)" in text and "<b>" not in text.split("<main")[1].replace('<b class', "")
    run, = data_of(text)
    assert [run["pieces"][str(i)].encode("utf-8", "surrogateescape") for i in range(len(NASTY))] == [
        piece.encode() if isinstance(piece, str) else piece for piece in NASTY]
    for row, sample in enumerate(run["samples"]):
        for field in ("tokens", *Record._fields):
            np.testing.assert_allclose(np.array(sample[field]), made[field][row], atol=5.1e-5, err_msg=field)
        phases = np.array(sample["phase"])
        assert (phases[:2] == 0).all() and (phases == 1).sum() == 20 // 3 and (phases == 2).sum() == 18 - 20 // 3
        assert sample["phases"] == [1, 1] + [2] * 12 and sum(sample["counts"]) == 18
    assert run["cached"] and run["seconds"] == 0.25 and run["passes"] == 14


def test_a_stop_that_cuts_given_tokens_moves_no_phase() -> None:
    made = generation(NASTY, 2, 20)
    whole, = data_of(page({"": made}))
    made["tokens"] = np.where(np.arange(20) < 1, made["tokens"], made["mask"])
    made["step"] = np.where(np.arange(20) < 1, made["step"], -1)
    cut, = data_of(page({"": made}))
    assert [sample["phases"] for sample in cut["samples"]] == [sample["phases"] for sample in whole["samples"]]


def test_what_a_decoder_has_found_is_its_own() -> None:
    run, = data_of(page({"": {**generation(NASTY, 1, 20), "decoder": np.array("entropy")}}))
    [sample] = run["samples"]
    assert run["decoder"] == "entropy" and set(sample["phase"]) == {0, 4} and set(sample["phases"]) == {4}
    assert data_of(page({"": generation(NASTY, 1, 20)}))[0]["decoder"] == ""


def test_what_is_no_number_stays_readable() -> None:
    made = generation(NASTY, 1, 20)
    made["logp"][0, 3] = np.nan
    assert data_of(page({"a": made}))[0]["samples"][0]["logp"][3] is None


def test_the_policy_allows_the_pages_own_script_and_style_alone() -> None:
    text = page({"a": generation(NASTY, 1, 20)})
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag, source in (("style", "style-src"), ("script", "script-src")):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{source} 'sha256-{digest}'" in policy
    for asks in ("http:", "https:", "eval(", "innerHTML", "import ", "url("):
        assert asks not in text.replace("http://www.w3.org/", ""), asks


def test_a_page_is_small() -> None:
    bytes_ = [bytes([i]) for i in range(256)]
    assert len(page({str(i): generation(bytes_, 4, 256, i) for i in range(2)}).encode()) < 1_000_000


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), gpt2_like()])
def test_pieces_are_the_bytes_of_the_text(tokenizer: ByteTokenizer | LibraryTokenizer) -> None:
    text = " the cat 🐕\n\tשלום\u202e"
    ids = tokenizer.encode(text).tolist()
    assert b"".join(tokenizer.piece(i) for i in ids) == text.encode()
    assert tokenizer.piece(tokenizer.separator_id) == tokenizer.piece(tokenizer.mask_id) == b""


def test_pieces_of_words_have_their_blank() -> None:
    tokenizer = bert_like()
    assert b"".join(tokenizer.piece(i) for i in tokenizer.encode("the cats.").tolist()) == b" the cats."


def test_from_a_model_to_a_page(tmp_path: Path, run: Run) -> None:
    config = tiny_config("mdlm", 8, ByteTokenizer.vocab_size)
    made = engine(config, random_weights(config.model))
    model = Model(config, made.weights, made.mesh, step=0, tokenizer=ByteTokenizer())
    samples = model.sample(2, 2, record=True)
    out = tmp_path / "s.npz"
    np.savez(out, **samples.arrays())
    run("view", out, "--out", tmp_path / "page.html")
    shown = samples.show()._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and len(repr(samples.show())) < 80
    for text in ((tmp_path / "page.html").read_text(), html.unescape(shown)):
        found, = data_of(text)
        assert found["label"] == "MDLM" and not found["cached"]
        assert [sample["tokens"] for sample in found["samples"]] == samples.tokens.tolist()
        pieces = [found["pieces"][str(i)] or "" for i in found["samples"][0]["tokens"]]
        assert "".join(pieces).encode("utf-8", "surrogateescape") == bytes(i for i in samples.tokens[0] if i < 256)

    np.savez(tmp_path / "plain.npz", tokens=samples.tokens, order=samples.order)
    (tmp_path / "text.npz").write_text("no archive")
    for name, said in (("plain", "eso-jax sample --record"), ("text", "not a .npz"), ("none", "no such file")):
        assert said in run("view", out, tmp_path / f"{name}.npz", "--out", tmp_path / "c.html", code=2)
    assert not (tmp_path / "c.html").exists()
    with pytest.raises(EsoError, match="record"):
        Samples(*samples[:9]).show()


@pytest.mark.parametrize("name", ["tokens", "order", "step", "logp", "tokens_per_step", "seconds"])
def test_arrays_that_do_not_fit_each_other(name: str) -> None:
    made = generation(NASTY, 2, 20)
    with pytest.raises(EsoError, match="^generation = 'a': its arrays do not fit each other .*--record has written"):
        page({"a": made | {name: np.asarray(made[name]).ravel()[:1]}})


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    made = generation(NASTY, 1, 20)
    paths = [tmp_path / "a" / "s.npz", tmp_path / "b" / "s.npz"]
    for path in paths:
        path.parent.mkdir()
        np.savez(path, **made)
    assert list(named([str(path) for path in paths])) == ["s (1)", "s (2)"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("viewer") / "page.html"
    found.write_text(page({"a": generation(NASTY, 2, 20), "b": generation(NASTY, 3, 30, 1)}))
    return found


@needs_browser
def test_a_browser_shows_the_numbers_and_asks_for_nothing(browser: Browser, file: Path) -> None:
    browser.open(file)
    labels = browser.run("panels.map(panel => panel.tokens.map(token => token.box.ariaLabel))")
    for made, shown in zip((generation(NASTY, 2, 20), generation(NASTY, 3, 30, 1)), labels, strict=True):
        for at, label in enumerate(shown):
            if made["step"][0, at] < 0:
                assert label.endswith(", given")
                continue
            found = re.search(r"pass (\d+), .*, log p (.*), entropy (.*)$", label)
            assert found and int(found[1]) == made["step"][0, at] + 1
            shown_ = [float(value.replace("\u2212", "-")) for value in found.groups()[1:]]
            np.testing.assert_allclose(shown_, [made["logp"][0, at], made["entropy"][0, at]], atol=1.01e-4)
    for passes in (0, 5, 13, 7):  # back and forth
        browser.open(file, f"#step={passes}")
        masked = browser.run("[...panels[0].text.querySelectorAll('.t')].map(box => box.matches('.masked'))")
        assert masked == (generation(NASTY, 2, 20)["step"][0] >= passes).tolist()
        assert browser.run("panels[0].text.querySelectorAll('.new').length") == (
            generation(NASTY, 2, 20)["step"][0] == passes - 1).sum() * (passes > 0)
    assert browser.trouble == []


@needs_browser
def test_text_is_shown_as_what_it_is(browser: Browser, file: Path) -> None:
    browser.open(file)
    shown = browser.run("panels[0].tokens.map(token => token.box.textContent)")
    assert shown[:len(NASTY)] == ["⇥\t", "↵", "·", "</script><script>alert(1)</script>", "<!--", "\\u{2028}",
                                  "\\u{202E}abc", "שלום", "a\u0301", "◌\u0301", "\\x00", "\\xFF\\xFE", "\\xE2\\x82",
                                  "&lt;", "\\xA0", "🐕", "{data}"]
    assert browser.run("getComputedStyle(panels[0].tokens[7].box).unicodeBidi") == "isolate"
    assert browser.run("panels[0].text.querySelectorAll('script').length") == 0


@needs_browser
def test_what_was_not_decoded_stays_masked(browser: Browser, tmp_path: Path) -> None:
    made = generation(NASTY, 1, 20)
    made["tokens"][0, 7:9] = len(NASTY)
    made["step"][0, 8] = -1
    assert data_of(page({"a": made}))[0]["samples"][0]["phase"][7:9] == [3, 3]
    (tmp_path / "page.html").write_text(page({"a": made}))
    browser.open(tmp_path / "page.html", "#at=0.8")
    masked = browser.run("panels[0].tokens.filter(token => token.box.matches('.masked')).map(token => token.at)")
    assert masked == [7, 8]
    assert "left out" in browser.run("$('card').textContent")


@needs_browser
def test_keys_play_step_and_move(browser: Browser, file: Path) -> None:
    browser.open(file, "#step=4")
    for key, passes in (("ArrowRight", 5), (".", 6), ("ArrowLeft", 5), (",", 4)):
        browser.press(key)
        assert browser.run("panels[0].passes") == passes, key
    browser.run("$('time').focus()")
    browser.press("ArrowRight")
    assert browser.run("panels[0].passes") == 5
    browser.run("$('time').blur()")
    browser.press(" ")
    assert browser.run("state.playing && $('play').ariaLabel") == "Pause"
    assert browser.run("new Promise(done => setTimeout(() => done(state.time > 4), 400))")
    browser.press(" ")
    assert browser.run("state.playing") is False
    browser.open(file, "#at=0.2")
    assert browser.run("!card.hidden && document.activeElement.token.at") == 2
    card = browser.run("$('card').textContent")
    made = generation(NASTY, 2, 20)
    assert f"pass {made['step'][0, 2] + 1}," in card and browser.run("$('card').querySelectorAll('tr').length") == 5
    for key, at in (("ArrowRight", 3), ("End", 19), ("ArrowLeft", 18), ("Home", 0)):
        browser.press(key)
        assert browser.run("document.activeElement.token.at") == at, key
    browser.press("Escape")
    assert browser.run("$('card').hidden")
    assert browser.run("getComputedStyle(panels[0].tokens[3].box).transitionDuration") == "0.25s, 0.25s"
    browser.open(file, prefers_reduced_motion="reduce")
    assert browser.run("getComputedStyle(panels[0].tokens[3].box).transitionDuration") == "0s"
    assert browser.trouble == []


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_and_both_schemes(browser: Browser, file: Path, scheme: str) -> None:
    browser.open(file, "#at=0.5", 380, 700, prefers_color_scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth") == 380
    place = browser.run("JSON.stringify($('card').getBoundingClientRect())")
    assert json.loads(place)["left"] >= 0 and json.loads(place)["right"] <= 380

    for expected in (scheme, {"light": "dark", "dark": "light"}[scheme]):
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert ("dark" if int(re.findall(r"\d+", paper)[0]) < 128 else "light") == expected
        browser.run("$('theme').click()")


@needs_browser
def test_side_by_side_by_seconds(browser: Browser, file: Path) -> None:
    browser.open(file)
    browser.run("$('by').value = 'seconds', $('by').onchange(), go(0.125)")
    assert browser.run("panels.map(panel => panel.passes)") == [7, 11]
    browser.run("panels[1].chooser.value = 2, panels[1].chooser.onchange()")
    assert browser.run("panels[1].tokens[0].id") == 60 % len(NASTY)


@pytest.mark.parametrize("name", ["esolm", "ar"])
def test_a_watcher_sees_the_tokens_come(name: str) -> None:
    config = tiny_config(name, 12, 9)
    made = engine(config, random_weights(config.model), 2)
    model = Model(config, made.weights, made.mesh, 2, step=0, tokenizer=None)
    alpha_0 = 0.5 if name == "esolm" else None
    seen: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}

    def watch(rows: np.ndarray, tokens: np.ndarray) -> None:
        for row, own in zip(rows.tolist(), tokens, strict=True):
            seen[row].append(own)

    samples = model.sample(3, 3, alpha_0, watch=watch)
    np.testing.assert_array_equal(samples.tokens, model.sample(3, 3, alpha_0).tokens)
    for row, told in seen.items():
        assert len(told) >= 2 and (told[0] == config.model.mask).any()
        for before, after in itertools.pairwise(told):
            known = before != config.model.mask
            np.testing.assert_array_equal(before[known], after[known])
        np.testing.assert_array_equal(told[-1], samples.tokens[row])


def test_a_terminal_is_drawn_over_and_a_pipe_gets_lines(monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.array([[ord("a"), 257, 10, 27]] * 2)

    def show() -> str:
        with terminal.watching(ByteTokenizer(), 1, True) as watch:
            assert watch is not None
            watch(np.array([0, 1]), tokens)
            watch(np.array([0, 0]), np.where(tokens == 257, ord("b"), tokens))
        return capsys.readouterr().err

    assert show() == "sample 0: 3 of 4 tokens | a▒\\n\\x1B\nsample 0: 4 of 4 tokens | ab\\n\\x1B\n"
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "20")
    assert show() == ("sample 0: 3 of 4 tokens\na▒\n\\x1B\n\x1b[3F\x1b[J"
                      "sample 0: 4 of 4 tokens\nab\n\\x1B\n\x1b[3F\x1b[J")
    with terminal.watching(ByteTokenizer(), 1, False) as watch:
        assert watch is None
    assert terminal.folded("日本語\nabc", 4) == ["日本", "語", "abc"]
