"""Parts of a model card."""

import re
from typing import Any

import yaml


def front_matter(card: str) -> dict[str, Any]:
    """Return the metadata at the beginning of a card."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def run_usage(card: str, location: str, named: str = "export") -> dict[str, Any]:
    """Run the usage example, which names one location of the export, with another one; return its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code.count(f'("{named}")') == 1
    values: dict[str, Any] = {}
    exec(code.replace(f'("{named}")', f'("{location}")'), values)  # noqa: S102
    return values
