"""distav: audio-visual training that survives wrong labels and mismatched sound."""

from typing import TYPE_CHECKING, Any

from distav.config.version import __version__

if TYPE_CHECKING:
    from distav.models.pretrained import load_encoders


__all__ = ["__version__", "load_encoders"]


def __getattr__(name: str) -> Any:
    """Import what takes torch when it is first asked for."""
    if name == "load_encoders":
        from distav.models.pretrained import load_encoders

        return load_encoders
    raise AttributeError(f"module 'distav' has no attribute '{name}'")
