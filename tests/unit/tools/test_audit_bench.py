"""Precision of the audit rankings."""

import numpy as np

from tools.bench.audit import FIRST, precision_of_first, table


def test_precision_is_that_of_the_clips_that_are_listed():
    wrong, ranking = np.array([True, False, True, True]), np.array([2, 1])
    assert precision_of_first(wrong, ranking) == {str(first): 0.5 for first in FIRST}
    assert precision_of_first(wrong, ranking[:0]) == {str(first): None for first in FIRST}


def test_a_ranking_without_clips_is_shown_as_such():
    precision = {
        "labels": {"distav": {str(first): 0.978 for first in FIRST}},
        "pairs": {str(first): None for first in FIRST},
    }
    rows = table({"rows": [{"run": "hard_seed-0", **precision}]}).splitlines()
    assert rows[2] == "| hard | labels, distav |" + " 97.8 % |" * len(FIRST)
    assert rows[3] == "| hard | pairs, distav |" + " none listed |" * len(FIRST)
