"""Configs: defaults, JSON, overrides, and errors that name the field, its value and the remedy."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from fractions import Fraction
from pathlib import Path

import pytest

from eso_jax.config import Config, FamilyConfig, ModelConfig, TrainConfig, from_dict, from_file
from eso_jax.errors import EsoError

EXPERIMENT = "from eso_jax.config import Config\nconfig = Config().override('train.steps=7')\n"


def test_defaults_are_the_papers() -> None:
    config = Config()
    assert config.model.head_size == 64 and config.model.mask == config.model.vocab_size - 1
    assert (config.train.learning_rate, config.train.warmup, config.train.batch_size) == (3e-4, 2500, 512)
    assert (config.train.weight_decay, config.train.clip_norm, config.train.ema) == (0.0, 1.0, 0.9999)


@pytest.mark.parametrize("assignments", [
    (), ("family.alpha_0=0.25", "train.accumulate=2", "model.mask_id=3", "family.kappa=0.75"),
    ("family.name=bd3lm", "family.block_size=4", "family.t_range=(0.3,0.8)", "data.source=/a=b")])
def test_json_round_trip(assignments: tuple[str, ...], tmp_path: Path) -> None:
    config = Config().override(*assignments)
    assert from_dict(json.loads(config.to_json())) == config
    (tmp_path / "config.json").write_text(config.to_json())
    read = from_file(tmp_path / "config.json")
    assert read == config and hash(read) == hash(config)


@pytest.mark.parametrize("assignment, expected", [
    ("train.steps=1e3", 1000), ("train.steps=1_000", 1000), ("train.steps= 12 ", 12), ("train.eps=1e-6", 1e-6),
    ("train.weight_decay=1e-1", 0.1), ("model.mask_id=0", 0), ("model.mask_id=None", None), ("family.kappa=None", None),
    ("family.t_range=(0.25, 0.5)", (0.25, 0.5)), ("family.t_range=[0.25,1.0]", (0.25, 1.0)),
    ("family.t_range=(0.25,1)", (0.25, 1.0)),
    ("family.kappa=1", 1.0), ("train.clip_norm=2", 2.0),
    ("data.source=None", "None"), ("data.source=my_dir/(a)", "my_dir/(a)"), ("data.source=a=b", "a=b")])
def test_override_reads_the_value_by_the_fields_type(assignment: str, expected: object) -> None:
    config = Config().override(*(["family.name=bd3lm"] if "t_range" in assignment else []), assignment)
    section, _, name = assignment.partition("=")[0].partition(".")
    value = getattr(getattr(config, section), name)
    assert repr(value) == repr(expected)  # 1 is not 1.0


def test_overrides_take_effect_together_and_leave_the_original() -> None:
    """Either of these alone is an error: MDLM has no alpha_0 below 1, 90 heads do not divide the width of 768."""
    original = Config().override("family.alpha_0=0.5")
    config = original.override("model.heads=90", "family.name=mdlm", "model.width=900", "family.alpha_0=1.0")
    assert (config.family.name, config.model.head_size) == ("mdlm", 10)
    assert original == Config(family=FamilyConfig(alpha_0=0.5))


def test_sizes() -> None:
    model = ModelConfig.of_size("small", length=1024, width=384)
    assert (model.width, model.layers, model.length) == (384, 12, 1024)
    with pytest.raises(EsoError, match=r"size = 'smal': choose one of tiny, small, medium"):
        ModelConfig.of_size("smal")


@pytest.mark.parametrize("fields, split", [
    (dict(), Fraction(1)), (dict(alpha_0=0.0), Fraction(0)), (dict(alpha_0=0.125), Fraction(1, 2)),
    (dict(alpha_0=0.5, kappa=0.75), Fraction(3, 4)), (dict(alpha_0=0.5, kappa=0.1), Fraction(1, 10)),
    (dict(alpha_0=0.5, kappa=1 / 3), Fraction(1, 3))])
def test_split_is_a_small_fraction(fields: dict, split: Fraction) -> None:
    assert FamilyConfig(**fields).split == split
    assert FamilyConfig(**fields).group_size == split.denominator


@pytest.mark.parametrize("name", ["mdlm", "bd3lm", "ar"])
def test_rows_of_other_families_stand_alone(name: str) -> None:
    assert FamilyConfig(name=name).group_size == 1 and not hasattr(FamilyConfig(name=name), "split")


@pytest.mark.parametrize("kappa", [0.005, 0.997])
def test_split_never_drops_a_loss(kappa: float) -> None:
    with pytest.raises(EsoError, match=f"family.kappa = {kappa}: must leave each loss"):
        FamilyConfig(alpha_0=0.5, kappa=kappa)


ERRORS = {  # assignments -> what the message must hold: the field and its value, and the remedy
    ("family.alpha_0=1.5",): ("family.alpha_0 = 1.5", "in [0, 1]"),
    ("family.alpha_0=-0.1",): ("family.alpha_0 = -0.1", "in [0, 1]"),
    ("family.name=mdlm", "family.alpha_0=0.5"):
        ("family.alpha_0 = 0.5", "of esolm, esolm_a alone", "leave it out", "'mdlm'"),
    ("family.name=gpt",): ("family.name = 'gpt'", "esolm, esolm_a, mdlm, bd3lm, ar"),
    ("model.heads=7",): ("model.heads = 7", "divide model.width = 768"),
    ("model.heads=256",): ("model.heads = 256", "head size 3", "even", "model.width"),
    ("model.layers=0",): ("model.layers = 0", "at least 1"),
    ("model.vocab_size=1",): ("model.vocab_size = 1", ">= 2"),
    ("model.mask_id=258",): ("model.mask_id = 258", "[0, 258)"),
    ("model.mask_id=-1",): ("model.mask_id = -1", "[0, 258)"),
    ("model.dropout=1.0",): ("model.dropout = 1.0", "[0, 1)"),
    ("model.cond_dim=-1",): ("model.cond_dim = -1", ">= 0"),
    ("family.kappa=0.5",): ("family.kappa = 0.5", "alpha_0 = 1.0", "leave family.kappa unset"),
    ("family.alpha_0=0.5", "family.kappa=1.0"): ("family.kappa = 1.0", "alpha_0 = 0.5", "both losses"),
    ("family.alpha_0_range=(0,1)",): ("family.alpha_0_range = (0.0, 1.0)", "0 < low < high <= 1"),
    ("family.alpha_0_range=(0.5,0.5)", "family.alpha_0=0.5"): ("family.alpha_0_range = (0.5, 0.5)", "low < high"),
    ("family.alpha_0_range=(0.1,0.5)",): ("family.alpha_0 = 1.0", "must be in family.alpha_0_range = (0.1, 0.5)"),
    ("family.alpha_0_range=(0.1,1)", "family.kappa=1"): ("family.kappa = 1.0", "(0.1, 1.0) needs both losses"),
    ("family.alpha_0_range=0.5",): ("family.alpha_0_range = '0.5'", "type tuple[float, float] or None"),
    ("family.kappa=1.2",): ("family.kappa = 1.2", "in [0, 1]"),
    ("family.loss_weight=flat",): ("family.loss_weight = 'flat'", "elbo or low_var"),
    ("family.name=bd3lm", "family.t_range=(0.5,0.2)"): ("family.t_range = (0.5, 0.2)", "low < high"),
    ("family.name=bd3lm", "family.t_range=(0.5,)"): ("family.t_range = '(0.5,)'", "tuple[float, float]"),
    ("family.name=bd3lm", "family.t_range=(0.5,0.6,0.7)"): ("family.t_range = '(0.5,0.6,0.7)'", "tuple"),
    ("family.name=bd3lm", "family.block_size=24"): ("family.block_size = 24", "divide model.length = 128"),
    ("family.name=ar", "family.start_id=258"): ("family.start_id = 258", "[0, 258)"),
    ("train.batch_size=6", "train.accumulate=2", "family.alpha_0=0.5"):
        ("train.batch_size = 6", "multiple of 4", "kappa = 1/2"),
    ("train.batch_size=10", "family.alpha_0=0.5", "family.kappa=0.25"): ("train.batch_size = 10", "multiple of 4"),
    ("train.accumulate=3",): ("train.accumulate = 3", "divide train.batch_size = 512"),
    ("train.learning_rate=0.0",): ("train.learning_rate = 0.0", "positive"),
    ("train.ema=1.0",): ("train.ema = 1.0", "[0, 1)"),
    ("train.schedule=step",): ("train.schedule = 'step'", "constant, cosine or linear"),
    ("train.schedule=cosine", "train.steps=2500"): ("train.warmup = 2500", "less than train.steps = 2500"),
    ("train.compute_dtype=float16",): ("train.compute_dtype = 'float16'", "float32 or bfloat16"),
    ("train.steps=1.5",): ("train.steps = '1.5'", "type int"),
    ("train.steps=many",): ("train.steps = 'many'", "type int"),
    ("train.steps=true",): ("train.steps = 'true'", "type int"),
    ("train.steps=None",): ("train.steps = 'None'", "type int"),
    ("train.steps=",): ("train.steps = ''", "type int"),
    ("family.alpha_0=half",): ("family.alpha_0 = 'half'", "type float"),
    ("model.mask_id=last",): ("model.mask_id = 'last'", "type int or None"),
    ("data.tokenizer=",): ("data.tokenizer = ''", "bytes, characters, gpt2"),
    ("data.source=",): ("data.source = ''", "stdlib"),
    ("model.widht=12",): ("model.widht: unknown", "did you mean model.width?"),
    ("modle.width=12",): ("modle.width: unknown", "did you mean model.width?"),
    ("optimizer.learning_rate=1",): ("optimizer.learning_rate: unknown", "did you mean train.learning_rate?"),
    ("zzz=1",): ("zzz: unknown", "sections are model, family, data, train"),
    ("train.steps",): ("'train.steps'", "section.field=value"), ("=5",): ("'=5'", "section.field=value"),
}


@pytest.mark.parametrize("assignments", ERRORS, ids=" ".join)
def test_error_names_field_value_and_remedy(assignments: tuple[str, ...]) -> None:
    with pytest.raises(EsoError) as caught:
        Config().override(*assignments)
    message = str(caught.value)
    assert "\n" not in message
    for part in ERRORS[assignments]:
        assert part in message


@pytest.mark.parametrize("assignment", ["train.steps=NaN", "train.eps=NaN", "train.steps=1e400"])
def test_numbers_that_are_not_finite(assignment: str) -> None:
    with pytest.raises(EsoError, match=assignment.partition("=")[0]):
        Config().override(assignment)


def test_field_without_its_section_is_recognized() -> None:
    with pytest.raises(EsoError, match=r"kappa: unknown config field; did you mean family.kappa\?"):
        Config().override("kappa=0.5")


@pytest.mark.parametrize("fields, message", [
    (dict(alpha_0=1.0, kappa=0.0), "family.kappa = 0.0: alpha_0 = 1.0 needs its one loss"),
    (dict(alpha_0=0.0, kappa=1.0), "family.kappa = 1.0: alpha_0 = 0.0 needs its one loss"),
    (dict(name="mdlm", kappa=0.5), "of esolm, esolm_a alone; leave it out"),
    (dict(name="ar", loss_weight="low_var"), "family.loss_weight = 'low_var'")])
def test_settings_that_would_train_on_nothing(fields: dict, message: str) -> None:
    with pytest.raises(EsoError, match=message):
        FamilyConfig(**fields)


def test_direct_construction_checks_as_well() -> None:
    with pytest.raises(EsoError, match=r"train.batch_size = 3: must be a multiple of 2"):
        Config(family=FamilyConfig(alpha_0=0.5), train=TrainConfig(batch_size=3))


@pytest.mark.parametrize("values, message", [
    ({"train": {"steps": "many"}}, "train.steps = 'many': must be of type int"),
    ({"train": {"steps": True}}, "train.steps = True: must be of type int"),
    ({"model": {"dropout": False}}, "model.dropout = False: must be of type float"),
    ({"model": {"depth": 3}}, "model.depth: unknown"), ({"optim": {"eps": 1.0}}, "optim.eps: unknown"),
    ({"optim": {}}, "optim: unknown")])
def test_saved_values_are_checked(values: dict, message: str) -> None:
    with pytest.raises(EsoError) as caught:
        from_dict(values)
    assert message in str(caught.value)


def test_experiment_file(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(EXPERIMENT)
    assert from_file(str(tmp_path / "run.py")).train.steps == 7


@pytest.mark.parametrize("name, content, remedy", [
    ("run.py", None, "no such file"), ("run.json", None, "no such file"),
    ("run.py", "x = 1\n", "must define config = eso_jax.Config(...)"),
    ("run.py", "config = {'model': {}}\n", "must define config"), ("run.py", "exit(3)", "failed (SystemExit: 3)"),
    ("run.json", '{"model": ', "not a config in JSON"),
    ("run.json", "[1, 2]", "not a config in JSON"),
    ("run.json", '{"model": 3}', "not a config in JSON")])
def test_unusable_file_is_named(tmp_path: Path, name: str, content: str | None, remedy: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(EsoError) as caught:
        from_file(tmp_path / name)
    assert f"config = '{tmp_path / name}'" in str(caught.value) and remedy in str(caught.value)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("section, kind", [("family='ar'", "FamilyConfig"), ("train={'steps': 1}", "TrainConfig")])
def test_a_section_is_no_value(tmp_path: Path, section: str, kind: str) -> None:
    (tmp_path / "run.py").write_text(f"from eso_jax import Config\nconfig = Config({section})\n")
    with pytest.raises(EsoError, match=f"^{section.partition('=')[0]} = .*: give a {kind}, as in Config"):
        from_file(tmp_path / "run.py")


def test_a_config_that_an_editor_has_saved(tmp_path: Path) -> None:
    """With a BOM and carriage returns."""
    (tmp_path / "run.json").write_text(Config().to_json().replace("\n", "\r\n"), "utf-8-sig")
    assert from_file(tmp_path / "run.json") == Config()


# config.json of commit 295e718 holds the fields of all families for each.
OLD = {"alpha_0": 1.0, "kappa": None, "loss_weight": "elbo", "block_size": 4, "t_range": [0.001, 1.0], "start_id": None}


@pytest.mark.parametrize("name, changes, own", [
    ("esolm", {"alpha_0": 0.25, "kappa": 0.75},
     {"alpha_0": 0.25, "alpha_0_range": None, "kappa": 0.75, "loss_weight": "elbo"}),
    ("esolm_a", {"loss_weight": "low_var"},
     {"alpha_0": 1.0, "alpha_0_range": None, "kappa": None, "loss_weight": "low_var"}),
    ("mdlm", {"loss_weight": "low_var", "start_id": 3}, {"loss_weight": "low_var"}),
    ("bd3lm", {"t_range": [0.3, 0.8]}, {"block_size": 4, "t_range": [0.3, 0.8]}),
    ("ar", {"start_id": 3}, {"start_id": 3})])
def test_configs_of_before(name: str, changes: dict, own: dict) -> None:
    """They hold what is written now, which is the family's own."""
    config = from_dict({"family": {"name": name, **OLD, **changes}})
    assert json.loads(config.to_json())["family"] == {"name": name, **own}
    assert config.family == FamilyConfig(name=name, **{key: tuple(x) if isinstance(x, list) else x
                                                       for key, x in own.items()})
    assert isinstance(config.family, FamilyConfig) and type(config.family) is not FamilyConfig


def test_configs_of_before_that_were_refused_still_are() -> None:
    for changes in ({"alpha_0": 0.5}, {"kappa": 0.5}, {"alpha_0": "all"}):
        with pytest.raises(EsoError, match=f"family.{next(iter(changes))} = "):
            from_dict({"family": {"name": "mdlm", **OLD, **changes}})


@pytest.mark.parametrize("assignments, family", [
    (["family.name=mdlm"], dict(name="mdlm")),
    (["family.name=esolm_a"], dict(name="esolm_a", alpha_0=0.25, kappa=0.75, loss_weight="low_var")),
    (["family.name=ar"], dict(name="ar")),
    (["family.name=bd3lm", "family.block_size=4"], dict(name="bd3lm", block_size=4)),
    (["family.name=mdlm", "family.alpha_0=1", "family.kappa=None"], dict(name="mdlm")),
    (["family.name=mdlm", "family.loss_weight=low_var"], dict(name="mdlm", loss_weight="low_var")),
    (["family.alpha_0=0", "family.loss_weight=elbo", "family.name=ar"], dict(name="ar"))])
def test_another_family_leaves_what_it_does_not_have(assignments: list[str], family: dict) -> None:
    config = Config(family=FamilyConfig(name="esolm", alpha_0=0.25, kappa=0.75, loss_weight="low_var"))
    assert config.override(*assignments).family == FamilyConfig(**family)


@pytest.mark.parametrize("fields", [
    dict(name="mdlm", block_size=4), dict(name="esolm", start_id=3), dict(name="bd3lm", loss_weight="low_var"),
    dict(name="ar", alpha_0=0.5), dict(name="mdlm", kappa=0.5)])
def test_foreign_settings_are_refused(fields: dict) -> None:
    name, field, value = fields["name"], *list(fields.items())[1]
    for attempt in (lambda: FamilyConfig(**fields),
                    lambda: Config().override(f"family.name={name}", f"family.{field}={value}")):
        with pytest.raises(EsoError, match=f"family.{field} = .*alone; leave it out for family.name = {name!r}"):
            attempt()


@pytest.mark.usefixtures("no_shape_checks")
def test_python_values_become_those_of_their_fields() -> None:
    """Lists and whole numbers, as a config.json would give them."""
    config = Config(family=FamilyConfig(name="bd3lm", t_range=[0.3, 1]), train=TrainConfig(learning_rate=1))
    assert config.family.t_range == (0.3, 1.0) and hash(config) == hash(from_dict(json.loads(config.to_json())))
    assert isinstance(config.train.learning_rate, float) and '"learning_rate": 1.0' in config.to_json()
    assert config.override("train.steps=3").family.t_range == (0.3, 1.0)


def test_settings_without_a_name_are_the_first_familys() -> None:
    assert from_dict({"family": {**OLD, "alpha_0": 0.5}}).family == FamilyConfig(name="esolm", alpha_0=0.5)


def test_unknown_settings_in_python() -> None:
    with pytest.raises(EsoError,
                       match=r"family.blok_size: unknown config field; did you mean family.block_size\? \(of bd3lm"):
        FamilyConfig(name="bd3lm", blok_size=4)
    with pytest.raises(EsoError, match=r"family.name = 'mdlm': EsoLMConfig is not its class"):
        dataclasses.replace(FamilyConfig(name="esolm"), name="mdlm")


@pytest.mark.parametrize("name", ["esolm", "esolm_a", "mdlm", "bd3lm", "ar"])
def test_settings_are_values(name: str) -> None:
    settings = FamilyConfig(name=name)
    assert pickle.loads(pickle.dumps(settings)) == dataclasses.replace(settings) == copy.deepcopy(settings) == settings
    assert len({settings, FamilyConfig(name=name)}) == 1


SEVERAL = """from eso_jax.config import Config
configs = {f"a/{n}": Config().override(f"train.steps={n}") for n in (10, 20)} | {"b": Config()}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with a file of each kind."""
    (tmp_path / "one.py").write_text(EXPERIMENT)
    (tmp_path / "several.py").write_text(SEVERAL)
    (tmp_path / "both.py").write_text(SEVERAL + "config = Config()\n")
    (tmp_path / "module.py").write_text("from eso_jax import config as configs\nconfig = configs.Config()\n")
    (tmp_path / "none.py").write_text("configs = {}\n")
    (tmp_path / "other.py").write_text("configs = {'a': 1}\n")
    (tmp_path / "config.json").write_text(Config().to_json())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, steps", [
    ("module.py", 1_000_000), ("several.py:a/10", 10), ("several.py:a/20", 20), ("several.py:b", 1_000_000),
    ("./one.py", 7), ("quickstart", 900)])
def test_a_run_by_its_name(name: str, steps: int, here: Path) -> None:
    assert from_file(name).train.steps == steps
    if ".py" in name:
        assert from_file(here / name).train.steps == steps


@pytest.mark.parametrize("name, said", [
    ("several.py", "holds several runs; give one as several.py:RUN; its runs are a/10, a/20, b"),
    ("several.py:a/30", "no run 'a/30' in several.py; did you mean a/20 or a/10?"),
    ("several.py:else", "no run 'else' in several.py; its runs are a/10, a/20, b"),
    ("several.py:", "give one as several.py:RUN"),
    ("one.py:a", "one.py holds a single config; leave out ':a'"),
    ("config.json:a", "config.json holds a single config; leave out ':a'"),
    ("both.py:b", "both config and configs"), ("both.py", "both config and configs"),
    ("none.py:b", "not empty"), ("other.py:a", "configs must be a dict"),
    ("no.py:a/10", "no such file"), ("C:/no.py", "no such file"), ("quickstrat", "or quickstart"),
    ("experiments/owt/esolm_025.py", "the paper's runs are in one file now: experiments/paper.py:owt/esolm_025"),
    ("/x/lm1b/ar.py", "in one file now: /x/paper.py:lm1b/ar")])
def test_a_run_that_is_not_there(name: str, said: str, here: Path) -> None:
    with pytest.raises(EsoError) as caught:
        from_file(name)
    assert str(caught.value).startswith(f"config = {name!r}: ") and said in str(caught.value)


def test_a_file_is_taken_as_it_is(here: Path) -> None:
    """Whatever is in its name; what the package ships goes before a file of the same bare name."""
    for name in ("C:one.py", "several.py:a", "quickstart"):
        (here / name).write_text(EXPERIMENT)
    assert [from_file(name).train.steps for name in ("C:one.py", "several.py:a", "./quickstart")] == [7, 7, 7]
    assert from_file("quickstart").train.steps == 900 and from_file(Path("quickstart")).train.steps == 7
