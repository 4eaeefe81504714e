"""Configurations that come with distav: `configs/` of a clone, `distav/configs/` of an installed package."""

from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""Directory of the configurations; in a clone a link to `configs/`."""


def resolve_config(name: str | Path) -> Path:
    """Return the file of a configuration that is given as a path, or by the name of one that comes with distav.

    A path that does not exist may begin with `configs/`, as in the documentation, and lack the suffix: both
    `configs/quickstart.yaml` and `quickstart` name a configuration of distav in any directory. A file that exists takes
    precedence.

    Returns:
        The path as given if there is no such file.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.is_absolute():
        return path
    packaged = CONFIGS / (path.relative_to("configs") if path.parts[:1] == ("configs",) else path)
    for candidate in (packaged, packaged.with_name(f"{packaged.name}.yaml")):
        if candidate.is_file() and CONFIGS.resolve() in candidate.resolve().parents:
            return candidate
    return path


def config_names() -> list[str]:
    """Return the names of the training configurations that come with distav."""
    files = (*CONFIGS.glob("*.yaml"), *CONFIGS.glob("baselines/*.yaml"))
    return sorted(str(file.relative_to(CONFIGS).with_suffix("")) for file in files)
