"""Checks of a configuration that need no data: the bound of each setting and the rules between settings."""

import re

from distav.config.bounds import check_bounds, require
from distav.config.errors import SettingError
from distav.config.phases import NEED_CORRECTION, PhaseConfig, SupervisedPhase
from distav.config.schema import Config


def validate(config: Config) -> None:
    """Check all settings that can be checked without data.

    Raises:
        SettingError: naming the key, its value and what is allowed.
    """
    check_bounds(config)
    parser = config.model.parser
    divisor = f"a divisor of model.parser.width={parser.width}"
    require(parser.width % parser.heads == 0, "model.parser.heads", parser.heads, divisor)
    require(bool(config.phases), "phases", "{}", "at least one phase, e.g. {learn: {kind: contrastive}}")
    for name in config.phases:
        if not re.fullmatch(r"[\w-]+", name):
            raise SettingError(f"phases.{name}", f"phases: '{name}': allowed in a name: letters, digits, _ and -.")
    _check_targets(config.phases)
    for name, phase in config.phases.items():
        if isinstance(phase, SupervisedPhase) and phase.mixup:
            note = (
                f"0 with phases.{name}.mixup={phase.mixup:g}, since the memory bank stores embeddings of single clips"
            )
            require(not phase.instance_weight, f"phases.{name}.instance_weight", phase.instance_weight, note)


def _check_targets(phases: dict[str, PhaseConfig]) -> None:
    """Check that a label correction phase precedes every phase that trains on corrected labels."""
    corrected = False
    for name, phase in phases.items():
        corrected = corrected or phase.kind == "label_correction"
        if isinstance(phase, SupervisedPhase) and phase.targets in NEED_CORRECTION and not corrected:
            raise SettingError(
                f"phases.{name}.targets",
                f"phases.{name}.targets={phase.targets.name}: needs a phase with kind: label_correction before it. Add "
                "one, or set targets: given.",
            )
