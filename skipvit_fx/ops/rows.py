"""Rows of a token sequence, per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from skipvit_fx.ops.following import in_jit_trace


def take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows ``rows[b]`` of every sample b: ``[batch, tokens, channels]``, ``[batch, k]`` to ``[batch, k, channels]``.

    No row may be taken twice in a sample. The gradient is then also a gather, by the inverse permutation, whereas that
    of ``index_select`` is a sum in an order that a GPU does not fix. Differentiable in reverse mode to any order;
    forward-mode derivatives (``torch.func.jvp``) are not defined, as ``torch.compile`` takes no function that has them.
    """
    differentiated = torch.is_grad_enabled() and tokens.requires_grad
    if in_jit_trace() or not differentiated:  # a traced file cannot hold a Python function
        return rows_of(tokens, rows)
    taken: Tensor = _Take.apply(tokens, rows)
    return taken


def rows_of(tokens: Tensor, rows: Tensor) -> Tensor:
    """The same for ``[batch, tokens, ...]``, with the gradient of ``index_select``; rows may be taken twice.

    It is one row gather on the flattened sequence, for which every backend has a fast kernel.
    """
    batch, count = tokens.shape[:2]
    flat = tokens.reshape(batch * count, *tokens.shape[2:])
    offsets = torch.arange(batch, dtype=rows.dtype, device=rows.device).unsqueeze(1) * count
    return flat.index_select(0, (rows + offsets).flatten()).reshape(batch, -1, *tokens.shape[2:])


def ascending(rows: Tensor) -> Tensor:
    """Distinct indices ``[batch, k]`` in ascending order.

    Sorted as float32, which is exact up to 2**24: some accelerators sort integers slowly, and ATC not at all.
    """
    return rows.to(torch.float32).sort(dim=1).values.to(rows.dtype)


def inverse_order(order: Tensor) -> Tensor:
    """The inverse of one permutation per sample, ``[batch, n]``; sorted as in :func:`ascending`."""
    return order.to(torch.float32).argsort(dim=1).to(order.dtype)


def _inverse_rows(rows: Tensor, count: int) -> Tensor:
    """Where each of ``count`` rows went: ``[batch, k]`` distinct indices to ``[batch, count]``; ``k`` for nowhere."""
    batch, k = rows.shape
    places = torch.arange(k, dtype=rows.dtype, device=rows.device).expand(batch, k)
    return torch.full_like(rows[:, :1], k).expand(batch, count).scatter(1, rows.long(), places)


class _Take(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, rows: Tensor) -> Tensor:
        return rows_of(tokens, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        tokens, rows = inputs
        ctx.save_for_backward(rows)
        ctx.count = tokens.shape[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _Put.apply(gradient, rows, ctx.count), None


class _Put(Function):
    """The adjoint: rows go back to where they were taken from, with zeros elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(taken: Tensor, rows: Tensor, count: int) -> Tensor:
        if rows.shape[1] < count:
            taken = torch.cat([taken, torch.zeros_like(taken[:, :1])], 1)
        return rows_of(taken, _inverse_rows(rows, count))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _Take.apply(gradient, rows), None, None


def sequence_rows(patches: Tensor, prefix: int, count: int, suffix: int) -> Tensor:
    """Rows of a whole sequence in which only the given patches remain: prefix, patches, trailing tokens.

    Args:
        patches: patch indices ``[batch, k]``; the rows have their dtype.
        prefix, count, suffix: numbers of prefix, patch and trailing rows of the full sequence.
    """
    parts = [patches + prefix if prefix else patches]
    if prefix:
        parts.insert(0, same_rows(0, prefix, patches))
    if suffix:
        parts.append(same_rows(prefix + count, prefix + count + suffix, patches))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def same_rows(start: int, stop: int, like: Tensor) -> Tensor:
    """The same rows for every sample: ``[batch, stop - start]``, with the batch, dtype and device of ``like``."""
    rows = torch.arange(start, stop, dtype=like.dtype, device=like.device)
    return rows.unsqueeze(0).expand(like.shape[0], stop - start)
