"""The version of distav."""

__version__ = "0.1.0"
