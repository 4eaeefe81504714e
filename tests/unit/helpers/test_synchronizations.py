from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.synchronizations import Synchronizations

X = torch.arange(6.0)
IDS = torch.tensor([0, 2, 2])
MASK = X > 2


def put(value: float | Tensor) -> Tensor:
    rows = X.clone()
    rows[MASK] = value
    return rows


WAIT: dict[str, Callable[[], object]] = {
    "item": lambda: X[0].item(),
    "tolist": lambda: X.sum().tolist(),
    "bool": lambda: bool(MASK.any()),
    "equal": lambda: torch.equal(X, X),
    "nonzero": lambda: MASK.nonzero(),
    "read at a mask": lambda: X[MASK],
    "write at a mask": lambda: put(X[3:] + 1),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": lambda: torch.unique(IDS, return_inverse=True),
    "unique_consecutive": lambda: torch.unique_consecutive(IDS),
    "bincount": lambda: torch.bincount(IDS, minlength=6),
    "repeat_interleave": lambda: X[:3].repeat_interleave(IDS),
    "tensor": lambda: torch.tensor([1.0, 2.0]),
    "new_tensor": lambda: X.new_tensor(2.0),
    "index that is a list": lambda: X[[0, 2]],
    "eigh": lambda: torch.linalg.eigh(torch.eye(3)),
    "backward": lambda: (X.clone().requires_grad_()[MASK]).sum().backward(),
}
DO_NOT_WAIT: dict[str, Callable[[], object]] = {
    "read at ids": lambda: X[IDS],
    "write at ids": lambda: X.clone().index_put_((IDS,), X[:3]),
    "number at a mask": lambda: put(0.0),
    "where": lambda: torch.where(MASK, X, 0.0),
    "full": lambda: torch.full((), 0.5),
    "arange": lambda: torch.arange(4),
    "sort": lambda: torch.searchsorted(IDS.sort(stable=True).values, IDS),
    "repeat_interleave": lambda: X[:3].repeat_interleave(IDS, output_size=4),
    "backward": lambda: (X.clone().requires_grad_()[IDS]).sum().backward(),
}


@pytest.mark.parametrize("name", WAIT)
def test_what_makes_the_host_wait_is_found(name: str):
    with Synchronizations() as waits:
        WAIT[name]()
    assert waits.found and "test_synchronizations.py" in waits.found[0]


@pytest.mark.parametrize("name", DO_NOT_WAIT)
def test_other_operators_are_not_found(name: str):
    with Synchronizations() as waits:
        DO_NOT_WAIT[name]()
    assert waits.found == []
