from pathlib import Path

import pytest

from distav.config import loading
from distav.config.errors import UserError
from distav.config.phases import ContrastivePhase, Estimator, SupervisedPhase
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        "defaults: [schema, _self_]\nphases:\n  learn: {kind: contrastive, epochs: 2}\n"
        "  fix: {kind: label_correction}\n  use: {kind: supervised}\n"
    )
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_round_trips_through_yaml(path: Path, tmp_path: Path):
    config = loading.load(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(loading.to_yaml(config))
    assert loading.load(copy) == config


def test_phases_keep_their_order_and_have_the_type_of_their_kind(config_file: Path):
    config = loading.load(config_file, ["phases.learn.correspondence_estimator=cdf", "deepspeed.extra={a: {b: 1}}"])
    assert list(config.phases) == ["learn", "fix", "use"]
    learn = config.phases["learn"]
    assert isinstance(learn, ContrastivePhase) and learn.correspondence_estimator is Estimator.cdf and learn.epochs == 2
    assert isinstance(config.phases["use"], SupervisedPhase)
    assert config.deepspeed.extra == {"a": {"b": 1}}


def test_the_zero_stage_depends_on_the_device_unless_it_is_set(config_file: Path):
    assert loading.load(config_file).deepspeed.zero_stage is None
    assert "zero_stage: null" in loading.to_yaml(loading.load(config_file))
    assert loading.load(config_file, ["deepspeed.zero_stage=3"]).deepspeed.zero_stage == 3
    assert loading.load(config_file, ["deepspeed.zero_stage=null"]).deepspeed.zero_stage is None


@pytest.mark.parametrize(
    "text",
    ["/x/a=b", "/x/日本", "a,b", "/x (1)", "{a}", "[a]", "1.10", "2024_01_01", "${oc.env:HOME}", "a: b", "'quoted'"],
)
def test_texts_on_the_command_line_are_taken_literally(config_file: Path, text: str):
    config = loading.load(config_file, [f"data.root={text}", f"phases.fix.pseudo_labels={text}"])
    assert config.data.root == text and config.phases["fix"].pseudo_labels == text  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["1.10", "2024_01_01", "0x10", "1e3", "007", "yes", "3"])
def test_a_name_keeps_its_spelling(name: str, config_file: Path):
    assert loading.load(config_file, [f"run.name={name}"]).run.name == name
    config_file.write_text(config_file.read_text() + f"run: {{name: {name}}}\n")
    assert loading.load(config_file).run.name == name


def test_the_home_directory_is_expanded_in_every_path(config_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/user")
    keys = [
        "data.root",
        "data.cache",
        "data.label_overrides",
        "run.root",
        "model.pretrained",
        "phases.fix.pseudo_labels",
    ]
    config = loading.to_yaml(loading.load(config_file, [f"{key}=~/x" for key in keys]))
    assert config.count("/home/user/x") == len(keys) and "~" not in config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ["command line (optim.lrr=1)", "Did you mean 'optim.lr'?"]),
        ("optim.learning_rate=1", ["Did you mean 'optim.lr'?", "Settings of optim: lr, ", "config/schema.py"]),
        ("learning_rate=1", ["Did you mean 'optim.lr'?"]),
        ("phases.learn.epoch=1", ["phases.learn.epoch", "Did you mean 'phases.learn.epochs'?"]),
        ("phases.lern.epochs=1", ["no phase 'lern'", "Did you mean 'phases.learn.epochs'?", "learn, fix, use"]),
        ("~phases.learn_3", ["no phase 'learn_3'", "learn, fix, use"]),
        ("~optim.lr", ["optim.lr cannot be removed"]),
        ("+optim.foo=3", ["command line (+optim.foo=3)", "no setting 'optim.foo'"]),
        ("phases.learn.correspondence_estimator=gm", ["estimator=gm: allowed", "oracle", "Did you mean 'gmm'?"]),
        ("phases.learn.kind=supervized", ["supervized: not a kind of phase", "Did you mean 'supervised'?"]),
        ("phases.learn.kind=supervised", ["cannot be overridden", "it is contrastive"]),
        ("optim.lr=fast", ["optim.lr=fast: allowed: a number above 0"]),
        ("data.test_split=null", ["data.test_split=null: allowed: a text", "write data.test_split="]),
        *(
            (f"run.name={name}", [f"run.name={name}: allowed: the name of one directory"])
            for name in ("..", "a/b", "", ".x", " x")
        ),
        ("optim.global_batch=0", ["optim.global_batch=0", "2 or more"]),
        ("run.seed=-1", ["run.seed=-1", "0 or more"]),
        ("data.decode_threads=-1", ["data.decode_threads=-1", "0 to choose"]),
        ("phases.learn.matching_reference_size=1", ["phases.learn.matching_reference_size=1", "2 or more"]),
        ("phases.learn.correspondence_threshold=2", ["phases.learn.correspondence_threshold=2", "0 to 1"]),
        ("phases.learn.category_memory_weight=-1", ["phases.learn.category_memory_weight=-1", "0 or more"]),
        ("memory_bank.replicate_below_mib=-1", ["memory_bank.replicate_below_mib=-1", "0 or more"]),
        ("optim.beta1=1", ["optim.beta1=1"]),
        ("augment.audio_shift_s=1", ["augment.audio_shift_s=1", "0 to 0.5"]),
        *(
            (f"data.synthetic.label_noise={noise}", [f"data.synthetic.label_noise={noise}: allowed: symmetric:RATE or"])
            for noise in ("symmetric:1.5", "symetric:0.4", "asymmetric", "symmetric:nan")
        ),
        ("deepspeed.zero_stage=4", ["deepspeed.zero_stage=4", "0, 1, 2, 3 or null"]),
        ("deepspeed.zero_stage=auto", ["deepspeed.zero_stage=auto: allowed: 0, 1, 2, 3 or null"]),
        ("phases.fix.min_change_odds=inf", ["phases.fix.min_change_odds=inf: allowed: 1 or more, and finite."]),
        ("phases.learn.temperature=0", ["phases.learn.temperature=0", "above 0"]),
        ("+phases.more={kind: supervised}", ["no phase 'more'", "the file can add others"]),
        ("optim.lr", ["key=value"]),
        ("optim.lr=[", ["optim.lr=["]),
    ],
)
def test_an_invalid_override_is_reported_with_the_allowed_values(config_file: Path, override: str, parts: list[str]):
    with pytest.raises(UserError) as error:
        loading.load(config_file, [override])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrate: 1}\nphases: {a: {kind: supervised}}", "optim.lrate"),
        ("phases: {a: {kind: supervized}}", "Did you mean 'supervised'"),
        ("phases: {}", "at least one phase"),
        (
            "phases: {a: {kind: contrastive}, b: {kind: supervised}}",
            "phases.b.targets=posterior: needs a phase with kind: label_correction",
        ),
        (
            "phases: {a: {kind: supervised, targets: given, mixup: 1, instance_weight: 0.1}}",
            r"phases\.a\.instance_weight=0\.1: allowed: 0 with phases\.a\.mixup=1",
        ),
        ("phases: [", "not valid YAML"),
    ],
)
def test_an_invalid_file_is_reported_with_the_allowed_values(tmp_path: Path, text: str, message: str):
    path = tmp_path / "wrong.yaml"
    path.write_text("defaults: [schema, _self_]\n" + text)
    with pytest.raises(UserError, match=message):
        loading.load(path)


def test_a_missing_file_is_reported_with_a_similar_name(config_file: Path):
    with pytest.raises(UserError, match=r"Did you mean 'config\.yaml'"):
        loading.load(config_file.with_name("confg.yaml"))


@pytest.mark.parametrize(
    ("overrides", "enabled"),
    [
        ([], True),
        (["run.name=other"], True),
        (["data.root=shards/mine"], False),
        (["data.root=shards/mine", "data.synthetic.enabled=true"], True),
        (["data.synthetic.train_clips=20", "data.root=shards/mine"], True),
    ],
)
def test_a_dataset_on_the_command_line_is_not_rendered(overrides: list[str], enabled: bool):
    config = loading.load("quickstart", overrides)
    assert config.data.synthetic.enabled == enabled
