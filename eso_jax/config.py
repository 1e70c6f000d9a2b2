"""The config of a run: frozen dataclasses that check themselves.

An experiment is a Python file that holds `config = Config(...)`, or several; `from_file` says how a run is named. Its
fields are overridden on the command line as `section.field=value`, and the whole is kept as JSON beside the
checkpoints. Every error names the field, its value and the remedy.

The fields of `family` are the family's own: each declares them in its file in eso_jax/families and registers them here.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import sys
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eso_jax.errors import EsoError, reason_of, require
from eso_jax.files import as_json, local
from eso_jax.values import check_types, parse, read, types_of

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(width=256, layers=8, heads=8),
    "small": dict(width=768, layers=12, heads=12),  # the paper's
    "medium": dict(width=1024, layers=24, heads=16),
}


ATTENTION = ("auto", "cudnn", "splash", "plain")  # see eso_jax/model/attention.py
LOGS = ("jsonl", "tensorboard", "wandb", "trackio")  # see eso_jax/run/metrics.py


@dataclass(frozen=True)
class ModelConfig:
    """The denoiser, a transformer shared by all families (a DiT whose modulation is constant)."""

    length: int = 128  # L, tokens in a sequence
    vocab_size: int = 258  # V, the mask included
    mask_id: int | None = None  # None: the last id
    width: int = 768  # D
    layers: int = 12  # N
    heads: int = 12  # H; the head size K is width / heads
    cond_dim: int = 128  # width of the AdaLN conditioning; 0: no AdaLN (the plain AR baseline)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_types("model", self)
        for name in ("length", "width", "layers", "heads"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        require(self.vocab_size >= 2, "model.vocab_size", self.vocab_size, "must hold a token and the mask, so >= 2")
        require(self.width % self.heads == 0, "model.heads", self.heads, f"must divide model.width = {self.width}")
        require(self.head_size % 2 == 0, "model.heads", self.heads,
                f"the head size {self.head_size} must be even for rotary positions; choose another model.width")
        require(self.cond_dim >= 0, "model.cond_dim", self.cond_dim, "must be >= 0 (0 turns AdaLN off)")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)")
        require(0 <= self.mask < self.vocab_size, "model.mask_id", self.mask_id, f"must be in [0, {self.vocab_size})")

    @property
    def mask(self) -> int:
        """Id of the mask token."""
        return self.vocab_size - 1 if self.mask_id is None else self.mask_id

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @staticmethod
    def of_size(size: str, **fields: Any) -> ModelConfig:
        """A named size ("tiny", "small", "medium"), other fields as given."""
        require(size in SIZES, "size", size, f"choose one of {', '.join(SIZES)}")
        return ModelConfig(**{**SIZES[size], **fields})


class _ByName(type):
    """Makes `FamilyConfig(name=..., **fields)` an instance of the class that is registered under the name."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        if cls is not FamilyConfig:
            return super().__call__(*args, **fields)
        name = args[0] if args else fields.pop("name", next(iter(SETTINGS)))
        kind = _settings_of(name)
        own = types_of(kind).keys()
        for field_name in fields.keys() - own:
            _check_foreign(name, field_name, fields[field_name])
        return kind(name=name, **{field_name: fields[field_name] for field_name in fields.keys() & own})


@dataclass(frozen=True)
class FamilyConfig(metaclass=_ByName):
    """Which language model the denoiser is trained as, and the settings of that family; see eso_jax/families.

    FamilyConfig(name="bd3lm", block_size=4) is an instance of the class that the family has registered. Without a name
    it is the family that registered first. A field of another family is an error, unless its value is the only one that
    the family could have (`only`); then it is left out.

    Attributes:
      only: fields of other families that are accepted here, with the values that mean what this family does anyway.
    """

    name: str
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {"alpha_0": (1.0,), "kappa": (None,)}

    if TYPE_CHECKING:

        def __init__(self, name: str = ..., **fields: Any) -> None: ...

        def __getattr__(self, field_name: str) -> Any: ...

    def __post_init__(self) -> None:
        check_types("family", self)
        require(_settings_of(self.name) is type(self), "family.name", self.name,
                f"{type(self).__name__} is not its class; make it with FamilyConfig(name={self.name!r}, ...)")
        self.check()

    def check(self) -> None:
        """Raises an EsoError for settings that do not fit each other."""

    def check_with(self, config: Config) -> None:
        """Raises an EsoError for settings that do not fit the other sections."""

    def change(self, **given: Any) -> FamilyConfig:
        """A copy with the settings `given`. If its name is that of a family with settings of another class, the present
        settings are dropped: all that is not given has that family's default."""
        kept = dataclasses.asdict(self) if _settings_of(given.get("name", self.name)) is type(self) else {}
        return FamilyConfig(**{**kept, **given})

    @property
    def group_size(self) -> int:
        """How many rows that follow each other in a batch stay together, in a micro-batch and on a device."""
        return 1

    @property
    def group_reason(self) -> str:
        """Why rows stay together, for error messages."""
        return "rows on their own"


SETTINGS: dict[str, type[FamilyConfig]] = {}  # the class of each family's settings, by the family's name


def register(name: str, settings: type[FamilyConfig]) -> None:
    """Makes a family known to configs and the command line by its name."""
    SETTINGS[name] = settings


def _settings_of(name: str) -> type[FamilyConfig]:
    require(name in list(SETTINGS), "family.name", name, f"choose one of {', '.join(SETTINGS)}")
    return SETTINGS[name]


def _owners(field_name: str) -> list[str]:
    """The families with a setting of that name."""
    return [name for name, kind in SETTINGS.items() if field_name in types_of(kind)]


def _check_foreign(name: str, field_name: str, value: Any) -> None:
    """Raises an EsoError unless a value for another family's setting is the only one that the family could have."""
    only = SETTINGS[name].only.get(field_name, ())
    if value not in only:
        _check_field(f"family.{field_name}", "family", field_name)
        where = f", where it is {' or '.join(map(str, only))}" if only else ""
        raise EsoError(f"family.{field_name} = {value!r}: a setting of {', '.join(_owners(field_name))} alone; leave "
                       f"it out for family.name = {name!r}{where}")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from; see eso_jax/data."""

    # "stdlib": Python's own source text; a folder that `eso-jax data prepare` made; a folder, a file, or a glob of text
    source: str = "stdlib"
    tokenizer: str = "bytes"  # or "characters", "gpt2", "bert-base-uncased", a tokenizer.json, NAME=a tokenizer.json
    seed: int = 0  # of the shuffle

    def __post_init__(self) -> None:
        check_types("data", self)
        for name in ("source", "tokenizer"):
            object.__setattr__(self, name, local(getattr(self, name), f"data.{name}"))
        require(0 <= self.seed < 2**32, "data.seed", self.seed, "must be in [0, 2**32)")
        require(bool(self.source), "data.source", self.source, "give 'stdlib', a folder, a file or a glob")
        require(bool(self.tokenizer), "data.tokenizer", self.tokenizer,
                "give bytes, characters, gpt2, bert-base-uncased, or the path of a tokenizer.json")


@dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work; see eso_jax/sharding.py. A run may resume with another mesh."""

    data: int | None = None  # copies of the model, each with its own rows; None: all devices that the others leave
    fsdp: int = 1  # devices that share one copy's parameters and optimizer state
    tensor: int = 1  # devices that share one copy's heads, hidden units, vocabulary and rows

    def __post_init__(self) -> None:
        check_types("mesh", self)
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"mesh.{name}", value, "must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer and the loop. Defaults are the paper's (its appendix C.3 and the authors' configs)."""

    start_from: str | None = None  # a work directory whose model the run begins from, not from random parameters
    steps: int = 1_000_000
    random_length: float = 0.0  # share of steps on the beginnings of rows: see eso_jax/run/train.py, length_of_step
    batch_size: int = 512  # global, over all devices
    accumulate: int = 1  # micro-batches per step
    learning_rate: float = 3e-4
    warmup: int = 2500  # steps of linear warm-up
    schedule: str = "constant"  # of the rate after it: "constant", or "cosine" or "linear" to 0 at `steps`
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # of all but norms and biases
    clip_norm: float = 1.0
    ema: float = 0.9999  # decay of the averaged weights that evaluation uses, ramped as (1 + n) / (10 + n)
    compute_dtype: str = "bfloat16"  # of activations; parameters, optimizer and loss are float32
    attention: str = "auto"  # who computes it: "cudnn" (NVIDIA), "splash" (TPU), "plain", or whoever can
    remat: str = "none"  # what the backward pass computes again: "none", "dots" (all but products) or "full" (blocks)
    non_finite: str = "stop"  # at a loss or gradient that is not finite: "stop", or "skip" the step and count it
    seed: int = 1
    log_every: int = 50
    eval_every: int = 5000
    eval_windows: int = 512  # validation windows per evaluation
    save_every: int = 1000
    keep: int = 3  # the last checkpoints kept
    keep_every: int | None = None  # and those of every so many steps, for good
    hang_seconds: int = 1800  # a step that takes longer ends the process, for the launcher to start again; 0: never
    profile_steps: int = 0  # steps traced into W/profile, from the third of this process on
    log: str = "jsonl"  # where metrics go beside W/metrics.jsonl: "jsonl" (nowhere), "tensorboard", "wandb", "trackio"
    sample_every: int = 0  # steps between texts of the model, printed and logged; 0: none

    def __post_init__(self) -> None:
        check_types("train", self)
        require(self.start_from != "", "train.start_from", self.start_from, "give a work directory, or None")
        object.__setattr__(self, "start_from", self.start_from and local(self.start_from, "train.start_from"))
        require(0 <= self.seed < 2**32, "train.seed", self.seed, "must be in [0, 2**32)")
        for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "eval_windows", "save_every",
                     "keep", "keep_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name}", value, "must be at least 1")
        for name in ("warmup", "weight_decay", "hang_seconds", "profile_steps", "sample_every"):
            require(0 <= getattr(self, name) < math.inf, f"train.{name}", getattr(self, name), "must be >= 0")
        for name in ("learning_rate", "eps", "clip_norm"):
            require(0 < getattr(self, name) < math.inf, f"train.{name}", getattr(self, name),
                    "must be positive and finite")
        require(0 <= self.random_length <= 1, "train.random_length", self.random_length, "must be in [0, 1]")
        for name in ("beta1", "beta2", "ema"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "must be in [0, 1)")
        require(self.batch_size % self.accumulate == 0, "train.accumulate", self.accumulate,
                f"must divide train.batch_size = {self.batch_size}")
        require(self.keep_every is None or self.keep_every % self.save_every == 0, "train.keep_every", self.keep_every,
                f"must be a multiple of train.save_every = {self.save_every}")
        for name, choices in (("schedule", ("constant", "cosine", "linear")), ("attention", ATTENTION),
                              ("compute_dtype", ("float32", "bfloat16")), ("remat", ("none", "dots", "full")),
                              ("non_finite", ("stop", "skip")), ("log", LOGS)):
            value = getattr(self, name)
            require(value in choices, f"train.{name}", value, f"choose {', '.join(choices[:-1])} or {choices[-1]}")
        require(self.schedule == "constant" or self.warmup < self.steps, "train.warmup", self.warmup,
                f"must be less than train.steps = {self.steps}, for train.schedule = {self.schedule!r}")


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    family: FamilyConfig = field(default_factory=FamilyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        for section, kind in _SECTIONS.items():
            require(isinstance(getattr(self, section), kind), section, getattr(self, section),
                    f"give a {kind.__name__}, as in Config({section}=config.{kind.__name__}(...))")
        self.family.check_with(self)
        groups = self.train.accumulate * self.family.group_size
        require(self.train.batch_size % groups == 0, "train.batch_size", self.train.batch_size,
                f"must be a multiple of {groups} (train.accumulate = {self.train.accumulate}, with "
                f"{self.family.group_reason})")

    def override(self, *assignments: str) -> Config:
        """A copy with `section.field=value` assignments applied, values read by the field's type.

        Assignments take effect together, so that fields which must agree can change in one call. With another
        `family.name`, the settings of the previous family are dropped (FamilyConfig.change).
        """
        texts: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
        for assignment in assignments:
            path, separator, text = assignment.partition("=")
            if not (separator and path.strip()):
                raise EsoError(f"{assignment!r}: write an override as section.field=value, e.g. train.steps=1000")
            section, _, name = path.strip().partition(".")
            _check_field(path.strip(), section, name)
            texts[section][name] = text.strip()
        family = texts["family"].get("name", self.family.name)
        kinds = {section: _kinds_in(section, family) for section in _SECTIONS}
        values = {section: {name: parse(f"{section}.{name}", text, kinds[section][name])
                            for name, text in fields.items()} for section, fields in texts.items()}
        sections = {section: dataclasses.replace(getattr(self, section), **values[section])
                    for section in _SECTIONS if section != "family"}
        return Config(family=self.family.change(**values["family"]), **sections)

    def law(self) -> Config:
        """A config with these sections `model` and `family`, and defaults elsewhere: all that a law (a probability
        distribution of texts) depends on. Scores are compiled for it, so that runs which differ in `data`, `train` or
        `mesh` share the compiled programs."""
        # The batch size has no meaning here; this one is a whole group of rows, as a Config demands.
        return Config(self.model, self.family, train=TrainConfig(batch_size=self.family.group_size))

    def to_json(self) -> str:
        return as_json(dataclasses.asdict(self))


_SECTIONS: dict[str, type] = {"model": ModelConfig, "family": FamilyConfig, "data": DataConfig, "train": TrainConfig,
                              "mesh": MeshConfig}


def _kinds_in(section: str, family: Any = None) -> dict[str, Any]:
    """The fields of a section and their types. The section `family` has the fields of all families; where two have
    fields of one name, the type is that of the family named."""
    if section != "family":
        return types_of(_SECTIONS[section])
    kinds: dict[str, Any] = {}
    for settings in reversed(SETTINGS.values()):
        kinds |= types_of(settings)
    return kinds | (types_of(SETTINGS[family]) if family in list(SETTINGS) else {})


def family_fields() -> dict[str, list[str]]:
    """The settings of all families, and by each the names of the families that have it."""
    return {name: _owners(name) for kind in SETTINGS.values() for name in types_of(kind) if name != "name"}


def fields() -> str:
    """The names of all fields, for --help."""
    lines = {section: ", ".join(types_of(kind)) for section, kind in _SECTIONS.items()}
    lines["family"] += "".join(f", {name} (of {', '.join(owners)})" for name, owners in family_fields().items())
    return "\n".join(["fields (what they mean: eso_jax/config.py; of a family: its file in eso_jax/families):", *(
        textwrap.fill(f"  {section}: {line}", 100, subsequent_indent="    ") for section, line in lines.items())])


def from_dict(values: dict[str, dict[str, Any]]) -> Config:
    """The Config of a nested dict such as `json.loads(config.to_json())`; unknown fields are errors.

    Settings of other families are ignored, since configs of earlier versions hold those of all families.
    """
    sections: dict[str, Any] = {}
    for section, given in values.items():
        if section not in _SECTIONS:
            raise EsoError(f"{'.'.join([section, *list(given)[:1]])}: unknown; sections are {', '.join(_SECTIONS)}")
        fields = {}
        kinds = _kinds_in(section, given.get("name"))
        for name, value in given.items():
            path = f"{section}.{name}"
            _check_field(path, section, name)
            fields[name] = read(path, value, kinds[name])
        if section == "family":
            kind = _settings_of(fields.get("name", next(iter(SETTINGS))))
            fields = {name: value for name, value in fields.items() if name in types_of(kind) or name in kind.only}
        sections[section] = _SECTIONS[section](**fields)
    return Config(**sections)


SHIPPED = ("quickstart",)  # modules of this package that hold a `config`


def from_file(experiment: str | Path) -> Config:
    """The config of a run, as `eso-jax train`, `eso-jax plan` and the scripts in launch/ take it.

    Args:
      experiment: one of
        FILE.py, Python that defines `config = Config(...)`;
        FILE.py:RUN, one of several that the file defines as `configs = {RUN: Config(...), ...}`;
        a config.json, as work directories hold it;
        "quickstart", a run of this package (a file of that name is `./quickstart`).
        A path that exists is that file, even if it has a colon in it.

    Raises:
      EsoError: there is no such file or run, or it is not usable. The message says which runs there are.
    """
    name = str(experiment)
    if name in SHIPPED and isinstance(experiment, str):
        shipped: Config = importlib.import_module(f"eso_jax.{name}").config
        return shipped
    path, run = Path(name), None
    if not path.is_file() and ":" in name:
        file, _, after = name.rpartition(":")
        if Path(file).suffix in (".py", ".json"):
            path, run = Path(file), after
    require(path.is_file(), "config", name, _remedy(path))
    if path.suffix == ".json":
        require(run is None, "config", name, f"{path} holds a single config; leave out ':{run}'")
        return _from_json(path)
    variables = _variables(path)
    config, configs = variables.get("config"), variables.get("configs")
    if configs is None or isinstance(config, Config) and not isinstance(configs, dict):  # a module, say
        require(isinstance(config, Config), "config", name, "the file must define config = eso_jax.Config(...), or "
                "several as configs = {'RUN': eso_jax.Config(...)}")
        require(run is None, "config", name, f"{path} holds a single config; leave out ':{run}'")
        return typing.cast(Config, config)
    require(config is None, "config", name, "the file defines both config and configs; keep one of them")
    usable = isinstance(configs, dict) and len(configs) > 0 and all(
        isinstance(key, str) and isinstance(value, Config) for key, value in configs.items())
    require(usable, "config", name, "configs must be a dict {'RUN': eso_jax.Config(...)}, and not empty")
    if run not in configs:
        close = difflib.get_close_matches(run or "", configs, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"its runs are {', '.join(configs)}"
        raise EsoError(f"config = {name!r}: " + (f"no run {run!r} in {path}; {hint}" if run else
                                                 f"the file holds several runs; give one as {path}:RUN; {hint}"))
    return typing.cast(Config, configs[run])


def _remedy(path: Path) -> str:
    """What to give instead of a file that is not there."""
    if path.suffix == ".py" and path.parent.name in ("lm1b", "owt"):  # where each run of the paper was a file
        paper = path.parent.parent / "paper.py"
        return f"no such file; the paper's runs are in one file now: {paper}:{path.parent.name}/{path.stem}"
    return ("no such file; give FILE.py, FILE.py:RUN (such as experiments/paper.py:owt/esolm_025), a config.json, or "
            + " or ".join(SHIPPED))


def _from_json(path: Path) -> Config:
    try:
        values = json.loads(path.read_text("utf-8-sig"))  # some editors put a BOM in front
    except ValueError as error:  # not JSON, or not text
        raise EsoError(f"config = {str(path)!r}: not a config in JSON ({error})") from error
    sections = isinstance(values, dict) and all(isinstance(fields, dict) for fields in values.values())
    require(sections, "config", str(path), "not a config in JSON (an object of sections of fields)")
    return from_dict(values)


def _variables(path: Path) -> dict[str, Any]:
    """The variables that a Python file defines."""
    import runpy

    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as for a script, which may import the files beside it
    try:
        return runpy.run_path(str(path))
    except EsoError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's Python raises
        raise EsoError(f"config = {str(path)!r}: running it failed ({reason_of(error)})") from error
    finally:
        sys.path.remove(folder)


def _check_field(path: str, section: str, name: str) -> None:
    known = [f"{s}.{f}" for s in _SECTIONS for f in _kinds_in(s)]
    if section in _SECTIONS and path in known:
        return
    close = difflib.get_close_matches(path, known, n=1) or [k for k in known if k.endswith(f".{name or path}")]
    hint = f"sections are {', '.join(_SECTIONS)}"
    if close:
        owners = family_fields().get(close[0].removeprefix("family."))
        hint = f"did you mean {close[0]}?" + (f" (of {', '.join(owners)})" if owners else "")
    raise EsoError(f"{path}: unknown config field; {hint}")
