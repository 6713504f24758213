"""Fake tensors: shapes, dtypes and devices without data."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeGuard

import torch
from torch import nn
from torch.fx.immutable_collections import immutable_dict
from torch.utils.weak import WeakIdKeyDictionary

from skipvit_fx.author.caches import caches_of
from skipvit_fx.author.code import author_code
from skipvit_fx.author.surroundings import Surroundings, holds_traced
from skipvit_fx.torch_internals import FakeTensor, FakeTensorMode, ShapeEnv, pytree

MOST_KNOWN = 4096
"""The largest number of elements of an integer tensor whose values stay known."""


TORCHS_OWN = frozenset({"aten", "prim", "prims"})
"""Namespaces of operators whose code is torch's."""


class TracelessFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A mode in which real parameters may meet fake activations, and nothing is computed or left behind.

    An author's function under ``functools.lru_cache`` that makes a table would keep a fake one, and return it to the
    author's model later. So on leaving the mode, every such cache that caught a fake tensor is emptied.

    Everything else that the author's code may keep is handled by ``surroundings``.

    Values of small integer inputs stay known, for modules that read them, such as an embedding that needs the heights
    and widths of images. The captured graph never depends on them: proxies stand for tensors, and have no values.
    """

    def __init__(self, model: nn.Module) -> None:
        shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        super().__init__(allow_non_fake_inputs=True, shape_env=shapes)
        self._caches = {cache: cache.cache_info().misses for cache in caches_of(model)}
        self._twins = WeakIdKeyDictionary()
        self.surroundings = Surroundings()
        self._entered = 0  # operators enter it again while they run

    def __enter__(self) -> Self:
        self._entered += 1
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._entered -= 1
        if not self._entered:
            self.empty_caches()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] = immutable_dict(),
    ) -> Any:
        """Make parameters fake first: operators on real ones are not cached, and take ten times as long."""
        args = tuple(
            self.twin(arg) if isinstance(arg, torch.Tensor) and _has_gradient(arg) else arg
            for arg in args
        )
        torchs_own = func.namespace in TORCHS_OWN
        with self.surroundings.unwatched() if torchs_own else contextlib.nullcontext():
            return super().__torch_dispatch__(func, types, args, kwargs)

    def twin(self, tensor: torch.Tensor) -> FakeTensor:
        """The fake tensor for a parameter or buffer, without gradient; the same one every time."""
        twin: FakeTensor | None = self._twins.get(tensor)  # type: ignore[no-untyped-call]
        if twin is None:
            with author_code():  # some kinds of tensor cannot be faked
                twin = self.from_tensor(tensor.detach(), static_shapes=True)
            self._twins[tensor] = twin
        return twin

    def may_turn_const(self, t: torch.Tensor) -> bool:
        """Whether values stay known while operators work on them: for small integer tensors, not on the meta device."""
        small = t.numel() <= MOST_KNOWN and not t.is_floating_point() and not t.is_complex()
        return small and not t.is_sparse and not t.is_meta and not self.is_our_fake(t)

    def forget(self) -> None:
        """Remove everything that the author's code kept of what it was given."""
        self.empty_caches()
        self.surroundings.restore()

    def empty_caches(self) -> None:
        """Empty every cache that has caught traced values since the last time."""
        for cache, known in self._caches.items():
            if cache.cache_info().misses != known:
                held = gc.get_referents(cache)  # results, keys, and the function
                if holds_traced([thing for thing in held if thing is not cache.__wrapped__]):
                    cache.cache_clear()
                self._caches[cache] = cache.cache_info().misses


def _has_gradient(arg: object) -> TypeGuard[torch.Tensor]:
    """Whether this is a parameter, or a real tensor that an earlier call left somewhere."""
    return type(arg) is nn.Parameter or (type(arg) is torch.Tensor and not arg.is_leaf)


def fake_inputs(
    mode: TracelessFakeMode, example: Any, *, more_batch: int = 0, known: bool = True
) -> Any:
    """``example`` with every tensor made fake, its batch axis (axis 0) longer by ``more_batch``.

    Args:
        mode: the mode that they belong to.
        example: nested tuples, lists and dicts of real tensors.
        more_batch: how often the first sample is repeated.
        known: whether the values of small integer tensors (the shapes of images, say) stay known.
    """

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        real = leaf.detach()
        if more_batch and leaf.ndim:
            if leaf.is_floating_point():  # no need to copy pixels
                size = (leaf.shape[0] + more_batch, *leaf.shape[1:])
                with mode:
                    return torch.empty(size, dtype=leaf.dtype, device=leaf.device)
            real = torch.cat([real, *[real[:1]] * more_batch])
        if known and mode.may_turn_const(real):
            return mode.fake_tensor_converter.from_real_tensor(mode, real, make_constant=True)
        return mode.from_tensor(real, static_shapes=True)

    return pytree.tree_map(fake, example)
