"""What a piece of code computes and allocates, from its own operations on tensors without memory.

On meta tensors code runs with all its shapes and none of its numbers. Where it asks for a number,
it gets the answer of a step in which nothing goes wrong.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(slots=True, kw_only=True)
class Operations:
    """Floating-point operations by what they are.

    Attributes:
        products: of matrix products, two for each multiplication with its addition.
        decompositions: textbook counts (Golub and Van Loan) of eigenvalue, singular value, QR and
            Cholesky decompositions and of what is solved with them.
        elementwise: one for each element and elementwise function or reduction.
    """

    products: float = 0.0
    decompositions: float = 0.0
    elementwise: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.products + self.decompositions + self.elementwise

    def add(self, other: Operations, times: float = 1.0) -> None:
        """Adds others, each ``times`` over."""
        self.products += times * other.products
        self.decompositions += times * other.decompositions
        self.elementwise += times * other.elementwise

    def per(self, count: int) -> Operations:
        """The same for one of ``count``."""
        share = Operations()
        share.add(self, 1 / count)
        return share


class DryRun(TorchDispatchMode):
    """While it is entered, counts operations, and the bytes of what was allocated since.

    Tensors with memory are counted as well; only meta tensors get their answers here.

    Attributes:
        operations: so far.
        live: bytes of tensors made since, and not yet freed.
        peak: most of them at once. What libraries take inside a call is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = Operations()
        self.live = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Counts one operation and carries it out, or answers in its place."""
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        answer = _ANSWERS.get(func.overloadpacket)
        if answer is not None and inputs and inputs[0].device.type in _ASKED[func.overloadpacket]:
            found = answer(*args, **kwargs)
            if found is not None:
                return found
        out = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.any:
            out.is_good = False
        outputs = _tensors(out)
        self._count(func, args, kwargs, out, [*inputs, *outputs])
        self._note(inputs, outputs)
        return out

    def _count(
        self, func: Any, args: Any, kwargs: Any, out: Any, tensors: Sequence[Tensor]
    ) -> None:
        packet = func.overloadpacket
        if packet in PRODUCTS:
            self.operations.products += PRODUCTS[packet](*args, **kwargs, out_val=out)
        elif packet in _DECOMPOSITIONS:
            self.operations.decompositions += _DECOMPOSITIONS[packet](*args)
        elif packet.__name__.startswith("_foreach_"):
            self.operations.elementwise += sum(x.numel() for x in _tensors(args[0]))
        elif packet in _REDUCTIONS or (torch.Tag.pointwise in func.tags and packet not in _COPIES):
            self.operations.elementwise += max((x.numel() for x in tensors), default=0)

    def _note(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """Takes note of new memory: not that of views, or of what was changed in place."""
        known = {x.untyped_storage()._cdata for x in inputs}
        for x in outputs:
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in known or key in self._alive:
                continue
            self._alive[key] = weakref.ref(storage, self._forgetting(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forgetting(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._alive.pop(key, None)
            self.live -= size

        return forget


def _tensors(value: Any) -> list[Tensor]:
    """Tensors in arguments or results: alone, in lists or tuples, by keyword."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in _tensors(item)]
    return []


# -- operation counts of decompositions --


def _eigh(a: Tensor, UPLO: str = "L", compute_v: bool = True) -> float:
    return _batch(a) * (9 if compute_v else 4 / 3) * a.shape[-1] ** 3


def _qr(a: Tensor, mode: str = "reduced") -> float:
    """R, and its reflections multiplied out to Q."""
    rows, columns = max(a.shape[-2:]), min(a.shape[-2:])
    return _batch(a) * (4 * rows * columns**2 - 4 / 3 * columns**3)


def _svd(a: Tensor, *_: Any) -> float:
    rows, columns = max(a.shape[-2:]), min(a.shape[-2:])
    return _batch(a) * (6 * rows * columns**2 + 20 * columns**3)


def _cubic(factor: float) -> Callable[..., float]:
    return lambda a, *_: factor * _batch(a) * a.shape[-1] ** 3


def _triangular(a: Tensor, b: Tensor, *_: Any) -> float:
    return float(b.numel() * a.shape[-1])


def _batch(a: Tensor) -> int:
    return a.shape[:-2].numel()


_aten = torch.ops.aten
PRODUCTS: Mapping[Any, Callable[..., float]] = {
    **flop_registry,
    # torch's counter passes over those that change their argument.
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
}
"""Operations of matrix products, by what torch calls them."""
_DECOMPOSITIONS: Mapping[Any, Callable[..., float]] = {
    _aten._linalg_eigh: _eigh,
    _aten.linalg_qr: _qr,
    _aten._linalg_svd: _svd,
    _aten.linalg_cholesky_ex: _cubic(1 / 3),
    _aten.cholesky_inverse: _cubic(2 / 3),
    _aten.linalg_inv_ex: _cubic(2),
    _aten._linalg_solve_ex: _cubic(2 / 3),
    _aten.linalg_solve_triangular: _triangular,
}
_REDUCTIONS = frozenset(
    getattr(_aten, name)
    for name in ("sum", "mean", "amax", "amin", "max", "min", "prod", "argmax", "any", "all")
) | {_aten.linalg_vector_norm, _aten.index_add_, _aten.cumsum}
_COPIES = frozenset({_aten.clone, _aten._to_copy, _aten.copy_})


# -- answers where code asks for numbers --


def _number(x: Tensor) -> Any:
    """Tests hold, and nothing that is looked for anywhere is found."""
    good = getattr(x, "is_good", True)
    return bool(good) if x.dtype == torch.bool else float(good)


def _places(x: Tensor) -> Tensor:
    return torch.empty(0, x.ndim, dtype=torch.long)


def _copied(x: Tensor, *, device: Any = None, dtype: Any = None, **_: Any) -> Tensor | None:
    """To the CPU come zeros; a vector made there stays: what it holds decides what comes next."""
    target = x.device if device is None else torch.device(device)
    if x.device.type == "meta" and target.type == "cpu":
        return torch.zeros(x.shape, dtype=dtype or x.dtype)
    if x.device.type == "cpu" and target.type == "meta" and x.ndim == 1 and x.dtype == torch.float:
        return x.clone()
    return None


_ANSWERS: Mapping[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense: _number,
    _aten.nonzero: _places,
    _aten._to_copy: _copied,
}
_ASKED: Mapping[Any, tuple[str, ...]] = {
    _aten._local_scalar_dense: ("meta",),
    _aten.nonzero: ("meta",),
    _aten._to_copy: ("meta", "cpu"),
}
