"""Find the operators that would make the host wait for a GPU, on a machine that has none."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_OPERATORS = {
    operator.default
    for operator in (
        aten._linalg_eigh, aten._linalg_svd, aten._local_scalar_dense, aten._unique, aten._unique2, aten.bincount,
        aten.equal, aten.masked_select, aten.nonzero, aten.unique_consecutive, aten.unique_dim,
        aten.unique_dim_consecutive,
    )
}  # fmt: skip
_METHODS = {Tensor.cpu, Tensor.numpy, Tensor.tolist}
"""What reads a CPU tensor without an operator."""
_HERE = Path(__file__)
_TORCH = Path(torch.__file__).parent


class Synchronizations(contextlib.ExitStack):
    """Lists, while it is entered, every operator whose CUDA implementation makes the host wait for the device.

    The work runs as it does without: on CPU tensors, in this thread, backward passes included. What counts:

    - a tensor whose value the host reads: `item`, `tolist`, `cpu`, `numpy`, `bool`, `int`, `float`, `equal`;
    - a result whose size depends on values: `nonzero`, `masked_select`, `unique`, `bincount`, reading or writing at a
      boolean mask (but for one number written at a mask, which is `masked_fill`), `repeat_interleave` by a tensor
      without `output_size`;
    - data of the host that becomes a tensor, which on a GPU is a copy from memory that is not pinned: `torch.tensor`,
      `new_tensor`, an index that is a list;
    - a copy from one device to another that is not `non_blocking`, where there are several, such as under
      `FakeTensorMode`;
    - a decomposition that looks whether it converged: `linalg.eigh`, `linalg.svd`.

    A few operators, such as `one_hot` and `quantile`, check their arguments on the CPU only and are listed although a
    GPU does not wait for them.

    Example:
        with Synchronizations() as waits:
            bank.update(global_batch, agreement)
        assert waits.found == []

    Attributes:
        found: one line for each time: the operator, and the innermost line outside torch that led to it.
    """

    def __init__(self, when: Callable[[], bool] = lambda: True) -> None:
        """List only what happens while `when` returns true."""
        super().__init__()
        self.when = when
        self.found: list[str] = []

    def __enter__(self) -> "Synchronizations":
        calls = _Calls(self)
        self.enter_context(calls)
        self.enter_context(_Operators(self, calls))
        return self

    def note(self, what: object) -> None:
        """Add the call that is being made."""
        if self.when():
            self.found.append(f"{what} at {_caller()}")


class _Calls(TorchFunctionMode):
    """What is called on tensors; notes where a number is assigned, of which the CPU alone makes a tensor."""

    def __init__(self, waits: Synchronizations):
        super().__init__()
        self.waits, self.assigns_number = waits, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS:
            self.waits.note(func.__name__)
        self.assigns_number = func is Tensor.__setitem__ and not isinstance(args[2], Tensor)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.assigns_number = False


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Synchronizations, calls: _Calls):
        super().__init__()
        self.waits, self.calls = waits, calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        lifted = func is aten.lift_fresh.default and not (self.calls.assigns_number and args[0].dim() == 0)
        if lifted or _waits(func, args, kwargs):
            self.waits.note(func)
        return func(*args, **kwargs)


def _waits(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    if func in _OPERATORS:
        return True
    if func is aten.index.Tensor:
        return any(_is_mask(index) for index in args[1])
    if func in (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
        one_number = len(args[1]) == 1 and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        return any(_is_mask(index) for index in args[1]) and not one_number
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func is aten._to_copy.default:
        target = torch.device(kwargs.get("device") or args[0].device)
        return target.type != args[0].device.type and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        return args[0].device.type != args[1].device.type and not (len(args) > 2 and args[2])
    return False


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _caller() -> str:
    frame = sys._getframe(1)
    while frame.f_back and (
        Path(frame.f_code.co_filename) == _HERE or _TORCH in Path(frame.f_code.co_filename).parents
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
