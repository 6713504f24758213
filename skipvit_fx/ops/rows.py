"""Rows of a token sequence, per sample."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows ``rows[b]`` of every sample b: ``[batch, tokens, channels]``, ``[batch, k]`` to ``[batch, k, channels]``.

    One row gather on the flattened sequence, the form that every backend has a fast kernel for.
    """
    batch, count, channels = tokens.shape
    offsets = torch.arange(batch, device=rows.device).unsqueeze(1) * count
    flat = tokens.reshape(batch * count, channels)
    return flat.index_select(0, (rows + offsets).flatten()).reshape(batch, -1, channels)


def sequence_rows(patches: Tensor, lead: int, count: int, tail: int) -> Tensor:
    """Rows of a whole sequence in which only the given patches are left: prefix, patches, trailing tokens.

    Args:
        patches: patch indices ``[batch, k]``; the rows have their dtype.
        lead, count, tail: prefix, patch and trailing rows of the full sequence.
    """
    parts = [patches + lead if lead else patches]
    if lead:
        parts.insert(0, same_rows(0, lead, patches))
    if tail:
        parts.append(same_rows(lead + count, lead + count + tail, patches))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def same_rows(start: int, stop: int, like: Tensor) -> Tensor:
    """The same rows for every sample: ``[batch, stop - start]``, batch, dtype and device as those of ``like``."""
    rows = torch.arange(start, stop, dtype=like.dtype, device=like.device)
    return rows.unsqueeze(0).expand(like.shape[0], stop - start)
