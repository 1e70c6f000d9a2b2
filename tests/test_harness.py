"""Our models under the real lm-evaluation-harness: requests by hand, and a task of its own from a local file."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import emulated, tiny_config
from eso_jax import likelihood
from eso_jax.data import ByteTokenizer
from eso_jax.errors import EsoError
from test_quality import made, subwords

# Imported by what runs: the short run would wait for it.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None,
                                                   reason="the extra eval is not installed")]

LENGTH = 24


def of(workdir: Path, **how: object) -> Any:
    """The HarnessModel of a work directory."""
    from eso_jax.evaluation.harness import HarnessModel

    return HarnessModel(str(workdir), **how)


@pytest.fixture(scope="module", params=["ar", "esolm"])
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return of(made(tmp_path_factory.mktemp("harness") / "w", request.param), batch_size=3)


def ids(text: str) -> list[int]:
    return [int(token) for token in ByteTokenizer().encode(text)]


def plain(harness: Any, context: list[int], continuation: list[int]) -> float:
    """log p by the exact likelihood of a whole row: of context and continuation, less that of the context."""
    row = np.array([(context + continuation + [0] * LENGTH)[:LENGTH]])
    given, wanted = np.zeros((2, 1, LENGTH), bool)
    wanted[0, :len(context) + len(continuation)] = True
    both = likelihood.conditional(harness.model, row, given, wanted)
    wanted[0, len(context):] = False
    return float(both[0] - likelihood.conditional(harness.model, row, given, wanted)[0])


def requests(kind: str, *arguments: tuple[str, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_loglikelihood(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Exact, whatever else is in the batch; an empty context is a separator; too long contexts lose their left end."""
    pairs = [("the cat", " sat"), ("", "dog"), ("a", "b"), ("x" * 40, " end"), ("ends in a space ", "here"),
             ("y" * 40, "z")]
    found = harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    contexts = [ids("the cat"), [256], ids("a"), ids("x" * 20), ids("ends in a space"), ids("y" * 23)]
    continuations = [ids(text) for text in (" sat", "dog", "b", " end", " here", "z")]
    for (logp, _), context, continuation in zip(found, contexts, continuations, strict=True):
        assert logp == pytest.approx(plain(harness, context, continuation), abs=1e-3)
    said = capsys.readouterr().err
    assert said.count("2 of 6 contexts cut from the left, to the model's length 24") == 1
    harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert "cut" not in capsys.readouterr().err
    with pytest.raises(EsoError, match="25 tokens"):
        harness.loglikelihood(requests("loglikelihood", ("a", "b" * 25)), disable_tqdm=True)
    assert harness.loglikelihood([], disable_tqdm=True) == []


def test_greedy_is_what_greedy_decoding_would_give(harness: Any) -> None:
    context, continuation = ids("the "), []
    for _ in range(3):  # the likeliest byte, three times
        scores = [plain(harness, context + continuation, [byte]) for byte in range(256)]
        continuation.append(int(np.argmax(scores)))
    worse = [*continuation[:-1], (continuation[-1] + 1) % 256]
    found = harness._loglikelihood_tokens([(None, context, continuation), (None, context, worse)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_rolling_scores_every_token_once(harness: Any) -> None:
    text = "the dog sat on the dog, and the dog sat on the cat"
    tokens = [256, *ids(text)]
    total, step = 0.0, LENGTH - 1
    for low in range(1, len(tokens), step):
        new = tokens[low:low + step]
        if len(new) == step:
            total += plain(harness, tokens[low - 1:low], new)
        else:  # the last window is filled from the left
            total += plain(harness, tokens[len(tokens) - LENGTH:len(tokens) - len(new)], new)
    found = harness.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("short",)), disable_tqdm=True)
    assert found[0] == pytest.approx(total, abs=2e-3)
    assert found[1] == pytest.approx(plain(harness, [256], ids("short")), abs=1e-3)


def test_generated_texts(harness: Any) -> None:
    """Each as if it were alone, whatever the others' settings; a long context loses its left end; without one
    there is a separator; the text ends before the first stop."""
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": True}
    asked = [("the cat", settings), ("a" * 40, {"max_gen_toks": 20}), ("the dog", settings), ("", {"max_gen_toks": 4})]
    found = harness.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert found == [harness.generate_until(requests("generate_until", one))[0] for one in asked]
    for index, context, count in ((1, [97] * 4, 20), (3, [256], 4)):
        given = np.full((1, LENGTH), 257)
        given[0, :len(context)] = context
        tokens = harness.model.sample(1, temperature=0.0, given=given, max_tokens=count).tokens[0]
        text = ByteTokenizer().decode(tokens[len(context):len(context) + count]).split("\n\f\n")[0]
        assert found[index] == text
    free = harness.generate_until(requests("generate_until", ("the cat", {"max_gen_toks": 6, "do_sample": True})))[0]
    stop = free[2]
    cut = harness.generate_until(requests("generate_until", ("the cat", {**settings, "until": stop})))[0]
    assert cut == free[:free.index(stop)]


def test_subwords_are_split_where_the_context_ends(tmp_path: Path) -> None:
    """The context and the whole are encoded; what the whole has more of is the continuation, a blank moved to it."""
    harness = of(subwords(tmp_path))
    whole = harness.tok_encode("the cat")
    found = harness.loglikelihood(requests("loglikelihood", ("the ", "cat"), ("the", " cat")), disable_tqdm=True)
    assert whole[0] == harness.tok_encode("the")[0] and len(whole) == 3
    assert found[0] == found[1] == (pytest.approx(plain(harness, whole[:1], whole[1:]), abs=1e-3), found[0][1])


def test_what_it_cannot_do_it_says(harness: Any, tmp_path: Path) -> None:
    with pytest.raises(EsoError, match="max_gen_toks = 256: must leave room for a context"):
        harness.generate_until(requests("generate_until", ("a", {"until": ["b"]})))
    with pytest.raises(EsoError, match="only an Eso-LM"):
        of(made(tmp_path / "mdlm", "mdlm"))
    with pytest.raises(EsoError, match="no tokenizer fits its vocabulary of 9"):
        of(made(tmp_path / "small", config=tiny_config("ar")))
    with pytest.raises(EsoError, match="batch_size = 'auto'"):
        of(made(tmp_path / "ar"), batch_size="auto")


def test_a_task_of_its_own(tmp_path: Path) -> None:
    """simple_evaluate finds the model by its name and runs a multiple-choice task from a local file, offline."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    workdir = made(tmp_path / "w", "esolm")
    documents = [{"question": f"{a} and {b} is", "choices": [" one", " two", " three"], "answer": a % 3}
                 for a in range(3) for b in range(3)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(f"""
task: tiny_choice
dataset_path: json
dataset_kwargs:
  cache_dir: {tmp_path}
  data_files:
    test: {tmp_path / 'documents.jsonl'}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
""")
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(model="eso_jax", model_args=f"workdir={workdir},batch_size=8",
                                    tasks=["tiny_choice"], task_manager=tasks, bootstrap_iters=0)
    harness = of(workdir)
    best = [int(np.argmax([plain(harness, ids(d["question"]), ids(choice)) for choice in d["choices"]]))
            for d in documents]
    accuracy = np.mean([choice == d["answer"] for choice, d in zip(best, documents, strict=True)])
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(accuracy)


DEVICES = """
import sys
from eso_jax.evaluation.harness import HarnessModel
model = HarnessModel(sys.argv[1], batch_size=3, tensor=2)
assert dict(model.model.mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
print(model._loglikelihood_tokens([(None, [1, 2, 3], [n, 4]) for n in range(5)])[4][0])
"""


def test_it_takes_devices(tmp_path: Path) -> None:
    """Four of them, two to a copy of the model, and rows that they do not divide."""
    workdir = made(tmp_path / "w", "esolm")
    command = [sys.executable, "-c", DEVICES, str(workdir)]
    done = subprocess.run(command, capture_output=True, text=True, env=emulated(4))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(plain(of(workdir), [1, 2, 3], [4, 4]), rel=1e-4)
