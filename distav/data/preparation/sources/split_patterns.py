"""Arguments of the form `[SPLIT=]PATTERN`, which name files and the split that their samples belong to."""

import glob
import re
from dataclasses import dataclass
from typing import Self

from distav.config.errors import UserError
from distav.data.storage.object_store import is_url

_SPLIT = re.compile(r"([A-Za-z0-9_-]+)=(.+)")


@dataclass(frozen=True)
class SplitPattern:
    """Files, and the split that their samples belong to.

    Attributes:
        split: name of the split; empty: the source decides.
        pattern: path or URL; paths may have `*`, `?` and `[...]`, and both may have `{000..999}` and `{a,b}`.
    """

    split: str
    pattern: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `[SPLIT=]PATTERN`."""
        match = _SPLIT.fullmatch(text)
        return cls(match[1], match[2]) if match else cls("", text)

    def files(self) -> list[str]:
        """Return the paths or URLs: braces expanded in their order, wildcards in alphabetical order.

        Raises:
            UserError: for braces that cannot be expanded, or wildcards that match no file.
        """
        from webdataset.shardlists import expand_urls  # It imports torch, which the encoding processes do not need.

        try:
            expanded = expand_urls(self.pattern)
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"{self.pattern}: the braces cannot be expanded ({error}); use e.g. {{000..999}}."
            ) from None
        files = []
        for file in expanded:
            if is_url(file) or not glob.has_magic(file):
                files.append(file)
                continue
            matches = sorted(glob.glob(file))
            if not matches:
                raise UserError(f"{file}: no such file.")
            files += matches
        return files
