"""Registries: tables of named components that installed packages extend through Python entry points."""

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from distav.config.errors import UserError, did_you_mean, format_list

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Components of one kind by name, such as the visual towers or the classification losses.

    A component of distav is one entry of the table that its package defines. A component of another package is found
    through an entry point of the registry's group; it is imported on first use. In that package's `pyproject.toml`:

        [project.entry-points."distav.visual_towers"]
        my_tower = "my_package.towers:MyTower"

    A component whose name ends with a colon stands for all names that start with it, such as `timm:` for
    `timm:resnet18`.

    Attributes:
        key: setting that selects a component, for error messages, e.g. `model.visual.name`.
        group: entry point group, e.g. `distav.visual_towers`.
    """

    def __init__(self, key: str, group: str, components: Mapping[str, T]):
        """Create a registry from the components that distav defines."""
        self.key, self.group = key, group
        self._components = dict(components)

    def __iter__(self) -> Iterator[str]:
        yield from self._components
        yield from (point.name for point in entry_points(group=self.group) if point.name not in self._components)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(_entry(name) == known for known in self)

    def __getitem__(self, name: str) -> T:
        """Return the component with this name; import it if another package provides it."""
        return self._load(_entry(name), self.key)

    def _load(self, name: str, key: str) -> T:
        if name not in self._components:
            for point in entry_points(group=self.group, name=name):
                try:
                    self._components[name] = point.load()
                except (ImportError, AttributeError) as error:
                    raise UserError(
                        f"{key}={name}: entry point '{point.value}' of {self.group} cannot be loaded ({error}); "
                        "fix or uninstall the package that provides it."
                    ) from error
        return self._components[name]

    def select(self, name: str, key: str = "") -> T:
        """Return the component that a setting names.

        Args:
            name: value of the setting.
            key: the setting, where it is not always the same one, e.g. `phases.learn.loss`.

        Raises:
            UserError: if there is no such component, or if it cannot be imported.
        """
        if name not in self:
            allowed = [self.describe(known) for known in self]
            raise UserError(f"{key or self.key}={name}: allowed: {format_list(allowed)}.{did_you_mean(name, self)}")
        return self._load(_entry(name), key or self.key)

    @staticmethod
    def describe(name: str) -> str:
        """Return the name of an entry as messages show it."""
        return f"{name}NAME" if name.endswith(":") else name


def _entry(name: str) -> str:
    """Return the name of the entry that a value selects."""
    family, colon, _ = name.partition(":")
    return family + colon
