"""What teachers are asked of each class, and from which score on they are believed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distav.config.errors import UserError, format_list
from distav.data.modalities import MODALITIES


@dataclass(frozen=True)
class Prompts:
    """One teacher's.

    Attributes:
        checkpoint: a folder, or a name on the hub.
        classes: C names, in the order of their numbers.
        captions: C texts.
        thresholds: [C] float32; a score above it is an event.
    """

    checkpoint: str
    classes: list[str]
    captions: list[str]
    thresholds: np.ndarray


def read_prompts(path: Path) -> dict[str, Prompts]:
    """Read the prompts of both modalities, `audio` and `visual`, from a YAML file such as configs/teachers/llp.yaml.

    Raises:
        UserError: for a missing file or anything that is missing or of another kind in it, by its place.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; configs/teachers has some.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    classes = _part(content, "classes", dict, path)
    if not classes:
        raise UserError(f"{path}: classes is empty; give at least one.")
    found = {}
    for modality in MODALITIES:
        teacher = _part(content, modality, dict, path)
        template = _part(teacher, "template", str, path, f"{modality}.")
        if template.count("{}") != 1:
            raise UserError(f"{path}: {modality}.template='{template}' has to hold {{}} once, where the class goes.")
        captions, thresholds = [], []
        for name, words in classes.items():
            where = f"classes.{name}."
            captions.append(template.replace("{}", _part(words, modality, str, path, where)))
            thresholds.append(_part(words, f"{modality}_threshold", (int, float), path, where))
        checkpoint = _part(teacher, "checkpoint", str, path, f"{modality}.")
        found[modality] = Prompts(checkpoint, list(map(str, classes)), captions, np.array(thresholds, dtype=np.float32))
    return found


def _part(content: Any, key: str, kind: type | tuple[type, ...], path: Path, where: str = "") -> Any:
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = [each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,))]
        raise UserError(f"{path}: {where}{key} is missing or not of the kind {format_list(kinds)}.")
    return value
