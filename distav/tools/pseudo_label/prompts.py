"""Prompts files: the teacher of each modality, and a caption and a threshold for each class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distav.config.errors import UserError, format_list
from distav.config.packaged import resolve_config
from distav.data.modalities import MODALITIES


@dataclass(frozen=True)
class Prompts:
    """Teacher and prompts of one modality.

    Attributes:
        teacher: name of the teacher in `distav.tools.pseudo_label.teachers.TEACHERS`.
        checkpoint: directory, or name on the Hugging Face hub.
        classes: C class names, in the order of the file.
        captions: C captions.
        thresholds: [C] float32; a second with a higher score has the event.
    """

    teacher: str
    checkpoint: str
    classes: list[str]
    captions: list[str]
    thresholds: np.ndarray


def read_prompts(path: Path) -> dict[str, Prompts]:
    """Return the prompts of both modalities, `audio` and `visual`, from a YAML file such as configs/teachers/llp.yaml.

    Raises:
        UserError: for a missing file, or a key that is missing or has a value of the wrong type.
    """
    path = resolve_config(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; see configs/teachers for examples.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    classes = _get(content, "classes", dict, path)
    if not classes:
        raise UserError(f"{path}: classes is empty; add at least one class.")
    prompts = {}
    for modality in MODALITIES:
        section = _get(content, modality, dict, path)
        template = _get(section, "template", str, path, f"{modality}.")
        if template.count("{}") != 1:
            raise UserError(
                f"{path}: {modality}.template='{template}' has to contain {{}} once, as the placeholder of the class."
            )
        captions, thresholds = [], []
        for name, entry in classes.items():
            prefix = f"classes.{name}."
            captions.append(template.replace("{}", _get(entry, modality, str, path, prefix)))
            thresholds.append(_get(entry, f"{modality}_threshold", (int, float), path, prefix))
        prompts[modality] = Prompts(
            teacher=_get(section, "teacher", str, path, f"{modality}."),
            checkpoint=_get(section, "checkpoint", str, path, f"{modality}."),
            classes=[str(name) for name in classes],
            captions=captions,
            thresholds=np.array(thresholds, dtype=np.float32),
        )
    return prompts


def _get(mapping: Any, key: str, types: type | tuple[type, ...], path: Path, prefix: str = "") -> Any:
    """Return a value of a mapping, or raise a UserError that names the key and the allowed types."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if not isinstance(value, types) or isinstance(value, bool):
        names = [allowed.__name__ for allowed in (types if isinstance(types, tuple) else (types,))]
        raise UserError(f"{path}: {prefix}{key} is missing or has the wrong type; allowed: {format_list(names)}.")
    return value
