"""distav: audio-visual training that survives wrong labels and mismatched sound."""

__version__ = "0.1.0"
