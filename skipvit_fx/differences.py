"""How far apart two results of the same computation are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Relative error up to which float32 results of the same computation, done in different orders, count as equal."""

_ROUNDINGS = 16
"""Results of one computation in different orders differ by roundings that add up like a random walk: over about 100
consecutive roundings in 12 to 48 layers, by about 10 units in the last place, and a few more if values cancel."""


_NARROW = {"tf32": torch.float16, "bf16": torch.bfloat16}
"""What products of float32 may be computed in, and what has as many digits."""


def tolerance(tensors: Iterable[Tensor]) -> float:
    """The relative error up to which results count as equal, for a model with these parameters, buffers and inputs."""
    kinds = {t.dtype for t in tensors}
    coarse = [torch.finfo(d).eps for d in (torch.bfloat16, torch.float16) if d in kinds]
    # get_float32_matmul_precision raises where these were set, and warns in torch 2.9
    allowed = {
        backend.matmul.fp32_precision for backend in (torch.backends.cuda, torch.backends.mkldnn)
    }
    coarse += [torch.finfo(dtype).eps for name, dtype in _NARROW.items() if name in allowed]
    return max([TOLERANCE, *(_ROUNDINGS * eps for eps in coarse)])


def short(error: float) -> str:
    """An error in few characters, such as ``3e-7``."""
    return f"{error:.1g}".replace("e-0", "e-").replace("e+0", "e")


def badness(error: float) -> float:
    """A key to sort errors by: NaN is the worst."""
    return math.inf if math.isnan(error) else error


def relative_error(got: Any, wanted: Any) -> float:
    """Largest difference of two outputs, relative to the largest value of ``wanted``, over all tensors in them.

    Mappings are compared by key, whatever their class. Non-finite values at the same places count as equal; if the
    places differ, the error is NaN.

    Raises:
        ValueError: the outputs differ in structure or shape.
    """
    if isinstance(wanted, Tensor):
        if not isinstance(got, Tensor) or got.shape != wanted.shape:
            raise ValueError(f"expected a tensor {tuple(wanted.shape)}, got {_outline(got)}")
        return _tensor_error(got.detach(), wanted.detach())
    if isinstance(wanted, Mapping):
        if not isinstance(got, Mapping) or got.keys() != wanted.keys():
            raise ValueError(f"expected a mapping with {list(wanted)}, got {_outline(got)}")
        errors = [relative_error(got[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(wanted):
            raise ValueError(f"expected {len(wanted)} values, got {_outline(got)}")
        errors = [relative_error(a, b) for a, b in zip(got, wanted, strict=True)]
    elif is_dataclass(wanted) and type(got) is type(wanted):
        names = [f.name for f in fields(wanted)]
        errors = [relative_error(getattr(got, name), getattr(wanted, name)) for name in names]
    elif isinstance(wanted, (bool, int, float, str, type(None))) and got != wanted:
        raise ValueError(f"expected {wanted!r:.80}, got {got!r:.80}")
    else:
        return 0.0
    return max(errors, default=0.0, key=badness)


def _tensor_error(got: Tensor, wanted: Tensor) -> float:
    if not wanted.numel():
        return 0.0
    if wanted.dtype in (torch.float16, torch.bfloat16) or not wanted.dtype.is_floating_point:
        got, wanted = got.float(), wanted.float()
    difference, scale = _largest(got - wanted), _largest(wanted)
    if not math.isfinite(float(difference)):
        finite = wanted.isfinite()
        if not torch.equal(finite, got.isfinite()):
            return math.nan
        if not finite.any():
            return 0.0
        difference, scale = _largest((got - wanted)[finite]), _largest(wanted[finite])
    return float(difference / scale.clamp_min(1e-30))


def _largest(values: Tensor) -> Tensor:
    """The largest absolute value; NaN if there is one."""
    low, high = values.aminmax()
    return torch.maximum(-low, high).abs()  # -0.0 is 0


def _outline(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
