"""Lightning checkpoints: read exactly, and not run whatever they hold."""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
import eso_jax
from checkpoints import call, listed, literal, many, mapping, named, node, tensor
from conftest import GOLDENS, Run, params_of
from eso_jax import families
from eso_jax.errors import EsoError
from eso_jax.interop import import_checkpoint, lightning, names, pickles

CKPT, SAFE = GOLDENS / "eso_tiny.ckpt", GOLDENS / "eso_tiny.safetensors"


@functools.cache
def golden_tensors() -> dict[str, np.ndarray]:
    return load_file(SAFE)


@pytest.mark.slow
def test_golden_checkpoint(tmp_path: Path, run: Run) -> None:
    """Raw weights are the .safetensors', averaged ones 1.01 times these; the sizes come with them."""
    expected = {name: array for name, array in golden_tensors().items() if not names.is_buffer(name)}
    for flags, factor in (([], np.float32(1)), (["--ema"], np.float32(1.01))):
        out = tmp_path / f"w{len(flags)}"
        text = run("import", CKPT, *flags, "--out", out)
        assert "esolm: 30 tensors mapped" in text and "82,785 parameters" in text
        model = eso_jax.load(out)
        found = names.to_tensors(params_of(out), model.config.model)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array * factor, err_msg=name)
    assert model.config.family.alpha_0 == 0.5 and model.config.model.length == 16 and model.config.model.heads == 4
    run("import", CKPT, "--family", "mdlm", "--out", tmp_path / "mdlm")  # the file's alpha_0 is an Eso-LM's
    assert families.alpha_0_of(eso_jax.load(tmp_path / "mdlm").config, None) == 1


def test_the_averaged_list_follows_the_order_of_the_parameters(tmp_path: Path) -> None:
    """A state_dict in another order than the alphabet's, with a buffer amidst."""
    tensors = {"z": np.arange(6, dtype=np.float32).reshape(2, 3), names.FREQUENCY_BUFFER: np.ones(2, np.float32),
               "a": np.arange(3, dtype=np.float32)}
    path = checkpoints.write(tmp_path / "c.ckpt", tensors, [tensors["z"] + 10, tensors["a"] + 20])
    found, _ = lightning.read_checkpoint(path, ema=True)
    np.testing.assert_array_equal(found["z"], tensors["z"] + 10)
    np.testing.assert_array_equal(found["a"], tensors["a"] + 20)
    np.testing.assert_array_equal(found[names.FREQUENCY_BUFFER], tensors[names.FREQUENCY_BUFFER])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_become_float32_exactly(dtype: type, tmp_path: Path, run: Run) -> None:
    tensors = {name: array.astype(dtype) for name, array in golden_tensors().items()}
    path = checkpoints.write(tmp_path / "c.ckpt", tensors)
    run("import", path, "--length", 16, "--out", tmp_path / "w")
    model = eso_jax.load(tmp_path / "w")
    found = names.to_tensors(params_of(tmp_path / "w"), model.config.model)
    for name, array in tensors.items():
        if not names.is_buffer(name):
            np.testing.assert_array_equal(found[name], array.astype(np.float32), err_msg=name)


def test_views_and_shared_storages(tmp_path: Path) -> None:
    """A transposed tensor, and two parts of one storage."""
    data = np.arange(12, dtype=np.float32)
    weights = mapping({"t": tensor("0", 12, (4, 3), (1, 4)), "a": tensor("0", 12, (2, 2), (2, 1), offset=3),
                       "scalar": tensor("0", 12, (), (), offset=7), "empty": tensor("1", 0, (0, 3), (3, 1)),
                       "p": call("torch._utils", "_rebuild_parameter", tensor("0", 12, (12,), (1,)), literal(True),
                                 literal(None))})
    path = checkpoints.write_zip(tmp_path / "c.ckpt", mapping({"state_dict": weights}), {"0": data.tobytes(), "1": b""})
    found, sizes = lightning.read_checkpoint(path, ema=False)
    np.testing.assert_array_equal(found["t"], data.reshape(3, 4).T)
    np.testing.assert_array_equal(found["a"], data[3:7].reshape(2, 2))
    np.testing.assert_array_equal(found["p"], data)
    assert found["scalar"] == 7 and found["empty"].shape == (0, 3) and sizes == {}


def test_what_else_a_checkpoint_holds_is_passed_over(tmp_path: Path, run: Run) -> None:
    """Loops, optimizers, a tokenizer, a path, numpy scalars, an OmegaConf config with an interpolation: no class of
    these is imported."""
    config = node({"model": {"hidden_size": 48, "length": 16, "n_blocks": "${some.where}"},
                   "algo": {"name": "esolm", "alpha_0": 0.25, "diffusion_attn_mode": "mixed2"}})
    tokenizer = named("transformers.models.gpt2", "GPT2TokenizerFast") + b")\x81" + mapping({
        "_tokenizer": call("tokenizers", "Tokenizer", call("tokenizers.models", "Model", literal(b"{}"))),
        "names": b"\x8f(" + literal("a") + literal("b") + b"\x90"}) + b"b"
    ordered = call("collections", "OrderedDict") + literal("x") + literal(1) + b"s" + mapping({
        "_metadata": literal({"version": 1})}) + b"b"
    extra = {"hyper_parameters": mapping({"config": config, "tokenizer": tokenizer}),
             "loops": literal({"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}}),
             "optimizer_states": listed([literal({"state": {0: 1.5}, ("a", "b"): 2})]), "ordered": ordered,
             "device": call("torch", "device", literal("cuda"), literal(0)), "dtype": named("torch", "float32"),
             "path": call("pathlib", "PosixPath", literal("/"), literal("home")),
             "score": call("numpy.core.multiarray", "scalar", call("numpy", "dtype", literal("f8")), literal(b"x" * 8)),
             "kind": call("operator", "getitem", named("typing", "List"), named("builtins", "int"))}
    path = checkpoints.write(tmp_path / "c.ckpt", golden_tensors(), extra=extra)
    before = set(sys.modules)  # another test may have imported them
    run("import", path, "--out", tmp_path / "w")
    found = eso_jax.load(tmp_path / "w").config
    assert found.family.name == "esolm_a" and found.family.alpha_0 == 0.25 and found.model.layers == 2
    assert not {"torch", "omegaconf", "transformers"} & (set(sys.modules) - before)


class _Runs:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.made = function, arguments

    def __reduce__(self) -> tuple:
        return self.made


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, run: Run) -> None:
    marker = tmp_path / "marker"
    command = f"touch {marker}"
    bomb = pickle.dumps(_Runs(os.system, command), 2)
    pickle.loads(bomb)
    assert marker.exists()  # it is a bomb
    marker.unlink()
    attempts = {
        "os.system": literal(_Runs(os.system, command)),
        "subprocess": literal(_Runs(subprocess.Popen, command, 0, None, None, None, None, None, True, True)),
        "exec": literal(_Runs(exec, f"open({str(marker)!r}, 'w')")),
        "eval": call("__builtin__", "eval", literal(f"open({str(marker)!r}, 'w')")),
        "open": call("io", "open", literal(str(marker)), literal("w")),
        "getattr": call("builtins", "getattr", named("torch", "os"), literal("system")),
        "import": call("builtins", "__import__", literal("os")),
        "INST": b"(" + literal(command) + b"iposix\nsystem\n",
        "OBJ": b"(" + named("posix", "system") + literal(command) + b"o",
        "NEWOBJ": named("subprocess", "Popen") + many(literal(command)) + b"\x81",
        "NEWOBJ_EX": named("subprocess", "Popen") + many(literal(command)) + literal({"shell": True}) + b"\x92",
        "STACK_GLOBAL": literal("os") + literal("system") + b"\x93" + many(literal(command)) + b"R",
        "a module behind a module": literal("torch") + literal("os.system") + b"\x93" + many(literal(command)) + b"R",
        "a class behind a module": literal("torch") + literal("subprocess.Popen") + b"\x93",
        "a function of a package": call("torch.hub", "load", literal("evil/repository"), literal("model")),
        "numpy's": call("numpy.testing._private.utils", "runstring", literal("1"), literal({})),
        "partial": call("functools", "partial", named("torch", "device")),
        "a record called": call("omegaconf", "DictConfig") + many(literal(command)) + b"R",
        "a method": named("collections", "OrderedDict.__init__") + b")R",
        "extension": b"\x82\x01" + many(literal(command)) + b"R",
        "__setstate__": named("omegaconf.nodes", "AnyNode") + b")\x81" + mapping(
            {"__setstate__": named("os", "system")}) + b"b" + literal(command) + b"b",
        "state of a class": named("omegaconf.nodes", "AnyNode") + many(literal(None), mapping(
            {"__init__": named("os", "system")})) + b"b" + many(literal(command)) + b"R",
        "codec": call("codecs", "decode", literal("x"), literal("rot13")),
        "breakpoint": call("pdb", "set_trace"),
    }
    for i, (name, body) in enumerate(attempts.items()):
        path = checkpoints.write(tmp_path / f"{i}.ckpt", golden_tensors(), extra={"callbacks": body})
        text = run("import", path, "--length", 16, "--out", tmp_path / "w", code=2)
        assert ("never writes" if name == "extension" else "nothing was run") in text, (name, text)
        assert not marker.exists() and not (tmp_path / "w").exists(), name


def test_records_are_not_made(tmp_path: Path) -> None:
    """Classes that may be named are not called, and what is set on them is set nowhere."""
    before = dict(vars(pickles.Inert))
    body = named("omegaconf", "DictConfig") + literal({"name": 1, "__class__": 2}) + b"b" + many(literal(3)) + b"R"
    found = pickles.read(checkpoints.program(body), "x")
    assert isinstance(found, pickles.Inert) and found.name == "omegaconf.DictConfig" and found.arguments == (3,)
    assert dict(vars(pickles.Inert)) == before
    path = pickles.read(checkpoints.program(call("pathlib", "Path", literal("/x"))), "x")
    assert not isinstance(path, Path) and path.arguments == ("/x",)


@pytest.mark.slow
def test_deep_and_repeated_structures_cost_what_they_weigh() -> None:
    """A key and the names of a class whose hash would exhaust the stack, and a big dict taken over and over."""
    deep = b")" + b"\x85" * 200_000
    for module, name in ((deep, literal("device")), (literal("torch"), literal(2))):
        with pytest.raises(EsoError, match="not text"):
            pickles.read(checkpoints.program(module + name + b"\x93"), "x")
    assert pickles.read(checkpoints.program(b"}" + deep + literal(1) + b"s"), "x") == {}
    big = literal({str(i): i for i in range(20_000)}) + b"r\xff\xff\xff\x7f"
    again = b"j\xff\xff\xff\x7f\x85R"
    body = b"](" + big + (named("collections", "OrderedDict") + again) * 20_000 + b"e"
    found = pickles.read(checkpoints.program(body), "x")
    assert len(found) == 20_001 and all(record.arguments[0] is found[0] for record in found[1:])


def test_damaged_pickles_are_errors_of_one_kind() -> None:
    """Whatever byte changes: an EsoError, or a value; nothing else is raised."""
    with zipfile.ZipFile(CKPT) as archive:
        good = archive.read("eso_tiny/data.pkl")
    generator = random.Random(0)
    failed = 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(generator.choice((1, 3))):
            bad[generator.randrange(len(bad))] = generator.randrange(256)
        try:
            pickles.read(bytes(bad[:generator.choice((len(bad), generator.randrange(len(bad))))]), "x")
        except EsoError as error:
            failed += 1
            assert len(str(error).splitlines()) == 1
    assert failed > 100


def weights(**changed: np.ndarray | None) -> dict[str, np.ndarray]:
    """The golden tensors, some changed (or left out) by the last part of their names."""
    tensors = dict(golden_tensors())
    for part, array in changed.items():
        name = next(n for n in tensors if part in n.replace(".", "_"))
        tensors.pop(name)
        if array is not None:
            tensors[name] = array
    return tensors


def test_import_mistakes(tmp_path: Path, run: Run) -> None:
    raw = weights()
    shadow = [array for name, array in raw.items() if not names.is_buffer(name)]
    out = raw["backbone.blocks.1.attn_out.weight"]
    good = CKPT.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(good[:300_000])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    (tmp_path / "flipped.ckpt").write_bytes(good[:200_000] + b"\xff\xff\xff" + good[200_003:])
    write = checkpoints.write
    write(tmp_path / "missing.ckpt", weights(blocks_1_attn_out=None))
    write(tmp_path / "unknown.ckpt", raw | {"backbone.extra\x1b[31m\n": out})
    write(tmp_path / "shape.ckpt", weights(blocks_1_attn_out=out[:-1]))
    write(tmp_path / "nan.ckpt", weights(blocks_1_attn_out=out * np.float32("nan")))
    write(tmp_path / "double.ckpt", weights(blocks_1_attn_out=out.astype(np.float64)))
    write(tmp_path / "angles.ckpt", weights(inv_freq=np.linspace(1, 0.5, 6, dtype=np.float32)))
    write(tmp_path / "no_embedding.ckpt", weights(vocab_embed=None))
    write(tmp_path / "fewer.ckpt", raw, shadow[:-1])
    write(tmp_path / "other.ckpt", raw, [shadow[0], shadow[1].T.copy(), *shadow[2:]])
    sedd = mapping({"config": node({"algo": {"name": "sedd"}})})
    write(tmp_path / "sedd.ckpt", raw, extra={"hyper_parameters": sedd})
    checkpoints.write_zip(tmp_path / "list.ckpt", listed([literal(1)]), {})
    checkpoints.write_zip(tmp_path / "not_a_tensor.ckpt", mapping({"state_dict": mapping({"x": literal(3)})}), {})
    with zipfile.ZipFile(tmp_path / "foreign.ckpt", "w") as archive:
        archive.writestr("notes.txt", "x")
    for file, message in (
            ("absent", "no such file"), ("half", "not a whole .ckpt"), ("empty", "not a whole .ckpt"),
            ("old", "torch before 1.6"), ("flipped", "Bad CRC"),
            ("missing", "tensor backbone.blocks.1.attn_out.weight is missing"),
            ("unknown", r"unknown tensor 'backbone.extra\x1b[31m\n'"), ("shape", "attn_out.weight = (47, 48)"),
            ("nan", "attn_out.weight = 'nan or inf'"), ("double", "attn_out.weight = 'float64'"),
            ("angles", "check the number of heads"), ("no_embedding", "vocab_embed.embedding is missing"),
            ("sedd", "family.name = 'sedd': choose one of"), ("list", "no state_dict"),
            ("not_a_tensor", "should hold a tensor"), ("foreign", "no data.pkl")):
        text = run("import", tmp_path / f"{file}.ckpt", "--length", 16, "--out", tmp_path / "w", code=2)
        assert message in text, text
    for file, message in (("fewer", "29 tensors': "), ("other", "ema.shadow_params[1] = "),
                          ("missing", "holds no ema.shadow_params")):
        text = run("import", tmp_path / f"{file}.ckpt", "--ema", "--length", 16, "--out", tmp_path / "w", code=2)
        assert message in text, text
    assert "give --length" in run("import", tmp_path / "fewer.ckpt", "--out", tmp_path / "w", code=2)
    assert not list(tmp_path.glob("w*"))


TWICE = b")" + b"q\x00h\x00\x86" * 20  # a tuple of one tuple twice, and so on: prints as 4 million characters


@pytest.mark.parametrize(("record", "message"), [
    (tensor("0", 13, (4, 3), (3, 1)), "13 numbers of 4 bytes"),  # the storage is shorter than its record says
    (tensor("0", 12, (4, 4), (3, 1)), "don't fit the storage"),
    (tensor("0", 12, (4, 3), (3, 1), offset=1), "don't fit the storage"),
    (tensor("0", 12, (4, 3), (-3, 1), offset=11), "don't fit the storage"),
    (tensor("0", 12, (4, 3), (3, 1), offset=-4), "don't fit the storage"),
    (tensor("0", 12, (-4, -3), (3, 1)), "don't fit the storage"),
    (tensor("0", 12, (10**6, 10**6), (0, 0)), "don't fit the storage"),  # 4 TB out of 48 bytes
    (tensor("0", 12, (10**30,), (1,)), "don't fit the storage"),
    (tensor("0", 10**18, (4, 3), (3, 1)), "numbers of 4 bytes"),
    (tensor("0", 12, (4, 3), (3,)), "not a readable .ckpt"),
    (tensor("0", 12, ("4", 3), (3, 1)), "as integers"),
    (tensor("0", 12, (4, 3), (3, True)), "as integers"),
    (tensor("0", 12, (4, 3), (3, 1), offset=[0]), "as integers"),
    (tensor("0", 12.0, (4, 3), (3, 1)), "as integers"),
    (tensor("0", "12", (4, 3), (3, 1)), "as integers"),
    (tensor(0, 12, (4, 3), (3, 1)), "as integers"),
    (tensor("0", 12, (4, 3), (3, 1)).replace(literal("0"), TWICE), "as integers"),
    (tensor("0", 12, (4, 3), (3, 1)).replace(literal(12), TWICE), "as integers"),
    (tensor("0", 12, (4, 3), (3, 1)).replace(literal((4, 3)), many(TWICE, literal(3))), "as integers"),
    (tensor("1", 12, (4, 3), (3, 1)), "not a readable .ckpt"),
    (tensor("../../../etc/passwd", 12, (4, 3), (3, 1)), "not a readable .ckpt"),
    (tensor("0", 12, (4, 3), (3, 1), storage="UntypedStorage"), "save it as float32"),
    (tensor("0", 12, (4, 3), (3, 1), storage="system"), "save it as float32"),
    (call("torch._utils", "_rebuild_tensor_v2", literal("0"), literal(0), literal((3,)), literal((1,))), "a storage"),
])
def test_tensors_that_disagree_with_their_storage(record: bytes, message: str, tmp_path: Path) -> None:
    body = mapping({"state_dict": mapping({"x": record})})
    path = checkpoints.write_zip(tmp_path / "c.ckpt", body, {"0": np.arange(12, dtype=np.float32).tobytes()})
    with pytest.raises(EsoError, match=message) as error:
        lightning.read_checkpoint(path, ema=False)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(("data", "kind", "said"), [
    (random.Random(0).randbytes(48), zipfile.ZIP_DEFLATED, {}),  # even where that makes it no smaller
    (bytes(4 * 10**6), zipfile.ZIP_DEFLATED, {}),
    (bytes(4 * 10**6), zipfile.ZIP_DEFLATED, {"file_size": 48}),
    (bytes(4 * 10**6), zipfile.ZIP_DEFLATED, {"file_size": 48, "compress_type": zipfile.ZIP_STORED}),
    (bytes(48), zipfile.ZIP_STORED, {"file_size": 10**9, "compress_size": 10**9}),
], ids=["no smaller", "smaller", "said smaller", "said stored", "said larger"])
def test_entries_that_would_unpack_to_more_than_they_are(
        data: bytes, kind: int, said: dict[str, int], tmp_path: Path) -> None:
    """Refused by what the zip says of them, and before they are unpacked where what it says is a lie."""
    body = mapping({"state_dict": mapping({"x": tensor("0", 12, (12,), (1,))})})
    path = checkpoints.write_zip(tmp_path / "c.ckpt", body, {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", data, kind)
        for name, value in said.items():
            setattr(archive.getinfo("archive/data/0"), name, value)
    tracemalloc.start()
    with pytest.raises(EsoError, match="archive/data/0 in it is compressed or larger than the file"):
        lightning.read_checkpoint(path, ema=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_a_big_file_that_is_no_zip_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF" + bytes(4 * 10**6))
    tracemalloc.start()
    with pytest.raises(EsoError, match="torch before 1.6"):
        lightning.read_checkpoint(tmp_path / "old.ckpt", ema=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_a_long_family_is_cut(tmp_path: Path, run: Run) -> None:
    config = node({"algo": {"name": "x" * 10_000}})
    path = checkpoints.write(tmp_path / "c.ckpt", golden_tensors(), extra={
        "hyper_parameters": mapping({"config": config})})
    text = run("import", path, "--length", 16, "--out", tmp_path / "w", code=2)
    assert f"family.name = '{'x' * 200}': choose one of" in text


def as_people_have_them() -> dict[str, dict[str, str]]:
    """The golden tensors' names, by what was done to the model before it was saved."""
    plain = {name: name for name in golden_tensors()}

    def renamed(function: Callable[[str], str]) -> dict[str, str]:
        return {function(name): name for name in plain}

    return {"as they are": plain, "compiled": renamed("_orig_mod.{}".format), "parallel": renamed("module.{}".format),
            "both": renamed("module._orig_mod.{}".format),
            "alone": renamed(lambda name: name.removeprefix("backbone.")),
            "compiled within": renamed(lambda name: name.replace("backbone.", "backbone._orig_mod.")),
            "compiled alone": renamed(lambda name: name.replace("backbone.", "_orig_mod."))}


@pytest.mark.parametrize("how", as_people_have_them())
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "averaged"])
def test_names_that_wrappers_have_changed(how: str, kind: str, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {name: golden_tensors()[theirs] for name, theirs in as_people_have_them()[how].items()}
    if kind == "safetensors":
        path = tmp_path / "m.safetensors"
        save_file(tensors, path)
    else:
        shadow = [array for name, array in tensors.items() if "inv_freq" not in name]
        path = checkpoints.write(tmp_path / "m.ckpt", tensors, shadow if kind == "averaged" else None)
    config, params = import_checkpoint(path, length=16, ema=kind == "averaged")
    found = names.to_tensors(params, config.model)
    for name, array in golden_tensors().items():
        np.testing.assert_array_equal(found[name], array)
    said = capsys.readouterr().err
    assert bool(said) == (how != "as they are") and said.count("\n") <= 1
    for word, hows in (("_orig_mod.", ("compiled", "both")), ("module.", ("parallel", "both")),
                       ("no backbone.", ("alone",))):
        assert word in said or how not in hows


def test_names_that_become_one_are_refused(tmp_path: Path) -> None:
    tensors = golden_tensors()
    save_file(tensors | {"module.backbone.vocab_embed.embedding": tensors["backbone.vocab_embed.embedding"]},
              tmp_path / "m.safetensors")
    with pytest.raises(EsoError, match="two tensors backbone.vocab_embed.embedding, but for the names of wrappers"):
        import_checkpoint(tmp_path / "m.safetensors", length=16)


def test_shards_and_snapshots(tmp_path: Path) -> None:
    """Weights in several files behind an index; a folder of the hub's cache, of either kind."""
    tensors, folder = golden_tensors(), tmp_path / "snapshot"
    folder.mkdir()
    parts = [dict(list(tensors.items())[start::3]) for start in range(3)]
    shards = {name: f"model-{number:05d}-of-00003.safetensors" for number, part in enumerate(parts, 1) for name in part}
    for number, part in enumerate(parts, 1):
        save_file(part, folder / f"model-{number:05d}-of-00003.safetensors")
    index = folder / "model.safetensors.index.json"

    def write_index(values: object) -> None:
        index.write_text(json.dumps(values))

    write_index({"metadata": {"total_size": 1}, "weight_map": shards})
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(tensors, whole / "any.safetensors")
    for source in (index, folder, whole):
        config, params = import_checkpoint(source, length=16)
        found = names.to_tensors(params, config.model)
        assert all((found[name] == array).all() for name, array in tensors.items())
    shutil.copy(GOLDENS / "config.json", whole)
    config, _ = import_checkpoint(whole)
    assert config.model.length == 16
    (whole / "config.json").write_text("[]")
    with pytest.raises(EsoError, match="^SRC = .*config.json.*: must be a JSON object"):
        import_checkpoint(whole)
    first = next(iter(shards))
    for values, message in (
            ({"weight_map": shards | {"more": shards[first]}}, "lacks more .1 are missing"),
            ({"weight_map": shards | {first: "gone.safetensors"}}, "gone.safetensors': no such file"),
            ({"weight_map": shards | {first: "../whole/any.safetensors"}}, "not an index of shards"),
            ({"weight_map": {}}, "not an index"), ({}, "not an index"), ([], "not an index"), ("x", "not an index")):
        write_index(values)
        with pytest.raises(EsoError, match=message):
            import_checkpoint(folder, length=16)
    index.unlink()
    with pytest.raises(EsoError, match="must hold one .safetensors"):
        import_checkpoint(folder, length=16)
    old = tmp_path / "old"
    old.mkdir()
    (old / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(EsoError, match="holds none; give the file .what it holds: pytorch_model.bin"):
        import_checkpoint(old, length=16)
