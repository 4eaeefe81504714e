"""Settings of a run that its page of hyperparameters shows."""

from typing import Any

from distav.config import loading
from distav.config.schema import Config
from distav.training.run_dir import RESUMABLE_CHANGES, default_settings, flatten_yaml

SHOWN = ("run.seed", "model.visual.name", "model.audio.name", "model.embed_dim", "optim.global_batch", "optim.lr")
"""Settings that are always shown, so that runs can be compared; also kind and epochs of each phase."""


def flat_settings(config: Config) -> dict[str, Any]:
    """Return all settings by dotted key."""
    return flatten_yaml(loading.to_yaml(config))


def hyperparameters(config: Config) -> dict[str, bool | float | str]:
    """Return the settings of `SHOWN`, and all others that affect the training and differ from their defaults.

    Lists and null are texts.
    """
    settings = flat_settings(config)
    defaults = default_settings(settings)
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
        if key in SHOWN
        or (key.startswith("phases.") and key.endswith((".kind", ".epochs")))
        or (key not in RESUMABLE_CHANGES and key != "run.name" and value != defaults.get(key))
    }
