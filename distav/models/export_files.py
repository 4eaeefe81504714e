"""Files of an `export/` directory."""

import json
from pathlib import Path
from typing import Any

import safetensors

from distav.config.errors import UserError

EXPORT_FORMAT = 4
"""Version of the files in an `export/` directory: names of settings and of weights."""
DESCRIPTION, WEIGHTS, MODEL_CARD = "config.json", "model.safetensors", "README.md"
EXAMPLE_REPOSITORY = "USER/NAME"
"""Repository in the usage example of a model card that has not been uploaded."""
EXAMPLE_LOCATION = f'"export")  # or "hf://{EXAMPLE_REPOSITORY}"'
"""End of the line that loads the network in this usage example."""
UNKNOWN_LICENSE = "license: unknown"
LICENSE_NOTE = "not stated. Whoever publishes the weights names it in the first lines of this file"
"""What a model card says of its license until one is stated, in its metadata and in its text."""


def read_description(folder: Path, location: str | Path) -> dict[str, Any]:
    """Return the description of an exported network.

    Args:
        folder: local directory of the export.
        location: what the user named, for messages.

    Raises:
        UserError: if the directory holds no export in the current format.
    """
    path = folder / DESCRIPTION
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{location} holds no export; expected {WEIGHTS} and {DESCRIPTION}, as in runs/NAME/export.")
    try:
        description: Any = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is corrupt ({error}); copy it again.") from None
    stored = description.get("format") if isinstance(description, dict) else None
    if stored != EXPORT_FORMAT:
        raise UserError(
            f"{path} has export format {stored}; this version of distav reads format {EXPORT_FORMAT}. Export the "
            "network with this version, or load it with the version that exported it."
        )
    return description


def check_weights(folder: Path) -> None:
    """Check that the file of the weights is complete.

    Raises:
        UserError: if it is not.
    """
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise corrupt_weights(folder, error) from None


def corrupt_weights(folder: Path, error: Exception) -> UserError:
    """Return the error for weights that cannot be read."""
    return UserError(f"{folder / WEIGHTS} is corrupt ({error}); copy it again.")
