"""The dataset sources that make_shards.py offers."""

from distav.config.registry import Registry
from distav.data.preparation.source import CommandLineSource
from distav.data.preparation.sources.ave import AVESource
from distav.data.preparation.sources.digits import DigitsSource
from distav.data.preparation.sources.files import ClipList, VideoFolder
from distav.data.preparation.sources.llp import LLPSource
from distav.data.preparation.sources.parquet import ParquetFiles
from distav.data.preparation.sources.published.actions import HMDB51Lists, UCF101Lists
from distav.data.preparation.sources.published.esc50 import ESC50List
from distav.data.preparation.sources.published.youtube import (
    AudioSetList,
    KineticsList,
    KineticsSoundsList,
    VGGSoundList,
)
from distav.data.preparation.sources.synthetic import SyntheticSource
from distav.data.preparation.sources.synthetic_multi import SyntheticMultiSource
from distav.data.preparation.sources.tars import TarFiles

SOURCES: Registry[type[CommandLineSource]] = Registry(
    "COMMAND",
    "distav.sources",
    {
        "videos": VideoFolder,
        "csv": ClipList,
        "tars": TarFiles,
        "parquet": ParquetFiles,
        "digits": DigitsSource,
        "synthetic": SyntheticSource,
        "synthetic-multi": SyntheticMultiSource,
        "llp": LLPSource,
        "ave": AVESource,
        "vggsound": VGGSoundList,
        "kinetics": KineticsList,
        "kinetics-sounds": KineticsSoundsList,
        "audioset": AudioSetList,
        "ucf101": UCF101Lists,
        "hmdb51": HMDB51Lists,
        "esc50": ESC50List,
    },
)
"""Source classes by the name of their command."""
