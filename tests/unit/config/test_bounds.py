import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from types import ModuleType

import pytest

from distav.config import model, phases, schema
from distav.config.bounds import Bound, above, at_least, between, check_bounds, one_of, satisfies
from distav.config.errors import UserError
from distav.config.phases import PHASE_KINDS, ContrastivePhase
from distav.config.schema import Config
from distav.models.towers import AUDIO_TOWERS, VISUAL_TOWERS


@dataclasses.dataclass
class Section:
    rate: float = dataclasses.field(default=0.5, metadata=between(0, 1, "as a fraction"))
    counts: list[int] = dataclasses.field(default_factory=lambda: [1], metadata=at_least(1))
    weights: list[float] = dataclasses.field(default_factory=lambda: [1.0], metadata=at_least(0))
    stage: int | None = dataclasses.field(default=None, metadata=one_of(0, 1, None))
    grids: dict[str, list[int]] = dataclasses.field(
        default_factory=dict[str, list[int]], metadata=satisfies(lambda grid: len(grid) == 2, "rows and columns")
    )
    free: float = -1.0


@dataclasses.dataclass
class Tree:
    section: Section = dataclasses.field(default_factory=Section)
    step: float = dataclasses.field(default=1.0, metadata=above(0))


def sections(section: type) -> Iterator[type]:
    yield section
    for annotation in typing.get_type_hints(section).values():
        if dataclasses.is_dataclass(annotation):
            yield from sections(annotation)  # pyright: ignore[reportArgumentType]


SECTIONS = [*sections(Config), *PHASE_KINDS.values()]


def is_numeric(annotation: object) -> bool:
    return annotation in (int, float) or any(is_numeric(argument) for argument in typing.get_args(annotation))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_numeric_setting_has_a_bound(section: type):
    annotations = typing.get_type_hints(section)
    for setting in dataclasses.fields(section):
        if setting.name != "phases" and is_numeric(annotations[setting.name]):
            assert isinstance(setting.metadata.get("bound"), Bound), setting.name


def test_defaults_satisfy_their_bounds():
    check_bounds(Config())
    for phase in PHASE_KINDS.values():
        check_bounds(phase())


def test_the_walker_reaches_phases_of_a_configuration():
    config = Config(phases={"learn": ContrastivePhase(temperature=-1.0)})
    with pytest.raises(UserError, match=r"^phases\.learn\.temperature=-1\.0: allowed: a number above 0\.$"):
        check_bounds(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.5}, "section.rate=1.5: allowed: 0 to 1, as a fraction."),
        ({"rate": float("nan")}, "section.rate=nan: allowed: 0 to 1, as a fraction."),
        ({"weights": [1.0, float("inf")]}, "section.weights=inf: allowed: 0 or more, and finite."),
        ({"counts": [3, 0]}, "section.counts=0: allowed: 1 or more."),
        ({"counts": []}, "section.counts=[]: allowed: at least one value (1 or more)."),
        ({"stage": 2}, "section.stage=2: allowed: 0, 1 or null."),
        ({"grids": {"clap": [2, 32], "clip": [3]}}, "section.grids.clip=[3]: allowed: rows and columns."),
    ],
)
def test_an_error_names_key_value_and_allowed_values(settings: dict[str, typing.Any], message: str):
    with pytest.raises(UserError) as error:
        check_bounds(Tree(Section(**settings)))
    assert str(error.value) == message


@pytest.mark.parametrize("module", [model, phases, schema], ids=lambda module: module.__name__)
def test_every_setting_has_a_description(module: ModuleType):
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef) and node.decorator_list and node.name != "Config":
            for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign):
                    assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), (
                        f"{node.name}.{ast.unparse(statement.target)}"
                    )


@pytest.mark.parametrize("towers", [VISUAL_TOWERS, AUDIO_TOWERS])
def test_the_description_of_a_tower_lists_the_registry(towers: typing.Mapping[str, object]):
    text = inspect.getsource(model.TowerConfig)
    for name in towers:
        assert name in text
