"""A work directory's model for use elsewhere: the authors' tensors, sizes, model card, tokenizer; and to the hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from eso_jax import files
from eso_jax.config import Config
from eso_jax.data import tokenizers
from eso_jax.errors import EsoError, reason_of, require
from eso_jax.interop import names
from eso_jax.interop.card import card
from eso_jax.interop.sources import KEYS, MODEL
from eso_jax.run import metrics, workdir


class Exported(NamedTuple):
    """The files written, by the names they go by on the hub, and how many tensors and parameters the weights are."""

    files: dict[str, Path]
    tensors: int
    parameters: int


def export_model(directory: str | Path, out: str | Path, ema: bool = True) -> Exported:
    """Writes OUT.safetensors in the authors' naming, and beside it OUT.json (sizes), OUT.md (the model card) and, where
    the work directory holds a tokenizer, OUT.tokenizer.json.

    Importing them gives the same parameters bit for bit, and exporting an import the same tensors.

    Args:
      directory: a work directory, trained or imported.
      out: a new file that ends in .safetensors.
      ema: the averaged parameters rather than the raw ones.

    Raises:
      EsoError: the directory holds no model, or one of the files exists. All are written or none.
    """
    from safetensors.numpy import save_file

    out = Path(out)
    require(out.suffix == ".safetensors", "--out", str(out), "must end in .safetensors")
    require(out.parent.is_dir(), "--out", str(out), f"the folder {str(out.parent)!r} does not exist")
    suffixes = {"README.md": ".md", "config.json": ".json", tokenizers.FILE: f".{tokenizers.FILE}",
                "model.safetensors": ".safetensors"}  # the weights last
    places = {name: out.with_suffix(suffix) for name, suffix in suffixes.items()}
    for place in places.values():
        require(not place.exists(), "--out", str(place), "exists already; nothing was written")
    config, step, params = workdir.read(directory, ema)
    tokenizer = workdir.kept_tokenizer(Path(directory), config)
    tensors = names.to_tensors(params, config.model)
    parameters = sum(x.size for x in jax.tree.leaves(params))
    contents: dict[str, files.Content] = {
        "README.md": card(config, step, parameters, ema, metrics.read(Path(directory))),
        "config.json": files.as_json(describe(config)),
        **({tokenizers.FILE: tokenizer.json} if tokenizer is not None and tokenizer.json is not None else {}),
        # Some readers refuse a file that doesn't say that it is PyTorch's.
        "model.safetensors": lambda file: save_file(tensors, file.name, metadata={"format": "pt"})}
    written = {name: places[name] for name in contents}
    try:
        for name, content in contents.items():
            files.write_whole(written[name], content)
    except BaseException:
        for place in written.values():
            place.unlink(missing_ok=True)
        raise
    return Exported(written, len(tensors), parameters)


def describe(config: Config) -> dict[str, Any]:
    """All sizes and settings of a model, as `eso-jax import --config` reads them."""
    values: dict[str, Any] = {KEYS[name][0]: getattr(config.model, name) for name in MODEL}
    settings = dataclasses.asdict(config.family)
    values |= {"mask_id": config.model.mask, "family": settings.pop("name"), **settings}
    return {name: value for name, value in values.items() if value is not None}


def push(exported: Exported, repository: str) -> str:
    """Uploads an export to a repository of the Hugging Face hub in one commit; makes a private one if there is none.

    Returns:
      The commit's address.

    Raises:
      EsoError: the hub cannot be reached or refuses. The local files stay.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        added = [CommitOperationAdd(name, path) for name, path in exported.files.items()]
        commit = api.create_commit(repository, added, commit_message="Export of eso-jax")
    except Exception as error:  # the hub raises what its transports raise
        raise EsoError(f"--push = {repository!r}: the hub did not take it ({reason_of(error)}); to run this "
                       f"again, remove {', '.join(map(str, exported.files.values()))}, which are written") from error
    return str(commit.commit_url)
