from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from distav.config import loading
from distav.config.errors import UserError
from distav.data.data_module import DataModule
from distav.training.validation import validate_labels, validate_names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        "defaults: [schema, _self_]\nphases:\n  learn: {kind: contrastive}\n"
        "  fix: {kind: label_correction}\n  use: {kind: supervised}\n"
    )
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("phases.use.loss=glr",
         ["phases.use.loss=glr: allowed: ce, gce, elr, sop, bce, asymmetric.", "Did you mean 'elr'?"]),
        ("phases.use.mixup=1 phases.use.loss=elr",
         ["phases.use.mixup=1: allowed: 0 with phases.use.loss=elr, which stores predictions"]),
        ("phases.learn.negatives_source=bach",
         ["phases.learn.negatives_source=bach: allowed: memory_bank, sampled, batch.", "Did you mean 'batch'?"]),
        ("phases.learn.num_negatives=8", ["phases.learn.soft_targets=cycle", "phases.learn.num_negatives=8",
                                          "soft_targets=none"]),
        ("phases.learn.num_negatives=8 phases.learn.soft_targets=none phases.learn.mask_uninitialized=true",
         ["phases.learn.mask_uninitialized=true", "phases.learn.num_negatives=8"]),
        ("phases.learn.num_negatives=8 phases.learn.loss=acl phases.learn.nce=true",
         ["phases.learn.nce=true", "phases.learn.loss=xid"]),
        ("phases.learn.nce=true", ["phases.learn.nce=true", "phases.learn.num_negatives"]),
        ("phases.learn.loss=acl", ["phases.learn.loss=acl", "negatives_source=batch", "127"]),
        ("phases.learn.negatives_source=batch", ["phases.learn.soft_targets=cycle", "negatives_source=batch", "=none"]),
        ("phases.learn.negatives_source=batch phases.learn.num_negatives=8",
         ["phases.learn.num_negatives=8", "negatives_source=memory_bank", "num_negatives=0"]),
        ("phases.learn.negatives_source=batch phases.learn.nce=true", ["phases.learn.nce=true", "num_negatives"]),
        ("phases.learn.negatives_source=sampled",
         ["phases.learn.negatives_source=sampled", "phases.learn.num_negatives"]),
    ],
)  # fmt: skip
def test_error_names_key_value_and_remedy(file: Path, overrides: str, message: list[str]):
    config = loading.load(file, overrides.split())
    with pytest.raises(UserError) as error:
        validate_names(config)
    for part in message:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "phases.learn.negatives_source=batch phases.learn.loss=acl",
        "phases.learn.num_negatives=8 phases.learn.soft_targets=none phases.learn.nce=true",
        "phases.learn.negatives_source=sampled phases.learn.num_negatives=8 phases.learn.loss=acl",
        "phases.learn.mask_uninitialized=true phases.learn.soft_targets=neighbor",
    ],
)
def test_valid_objectives_are_accepted(file: Path, overrides: str):
    validate_names(loading.load(file, overrides.split()))


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[3].glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path):
    validate_names(loading.load(path))


def test_labels_need_two_classes(file: Path):
    shards = SimpleNamespace(multi_label=False, classes=["dog"], location="shards/dogs")
    data = cast(DataModule, SimpleNamespace(shards=shards))
    with pytest.raises(UserError, match="phases.fix: all clips of shards/dogs have the label dog; allowed: two"):
        validate_labels(loading.load(file), data)
    validate_labels(loading.load(file, ["~phases.fix", "~phases.use"]), data)
