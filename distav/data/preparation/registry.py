"""The dataset sources that make_shards.py offers."""

from distav.config.registry import Registry
from distav.data.preparation.ave import AVESource
from distav.data.preparation.digits import DigitsSource
from distav.data.preparation.llp import LLPSource
from distav.data.preparation.source import CommandLineSource
from distav.data.preparation.sources import ClipList, VideoFolder
from distav.data.preparation.synthetic import SyntheticSource

SOURCES: Registry[type[CommandLineSource]] = Registry(
    "COMMAND",
    "distav.sources",
    {
        "videos": VideoFolder,
        "csv": ClipList,
        "digits": DigitsSource,
        "synthetic": SyntheticSource,
        "llp": LLPSource,
        "ave": AVESource,
    },
)
"""Source classes by the name of their command."""
