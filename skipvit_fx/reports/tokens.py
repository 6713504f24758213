"""Which patches a rewritten model keeps on given images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipvit_fx.capture.example import arguments_of
from skipvit_fx.errors import SkipViTError
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.record import RewriteRecord, record_of
from skipvit_fx.ops.switch import switches


@dataclass(frozen=True)
class TokenTrace:
    """The patches that one stage of a plan kept and dropped, by their position in the full grid, from 0.

    In a span with ``+fused``, the fused token of an earlier stage takes part in a later one, where some samples of a
    batch keep it and others drop it. It is not a patch and is in none of the tensors; the samples' rows then differ in
    length, and shorter ones are padded at the end with -1 (scores with NaN).

    Attributes:
        layer: the layer that scored, from 1.
        kept: ``[batch, K]`` int64, ascending.
        dropped: ``[batch, N - K]`` int64, ascending.
        scores: ``[batch, N]``, those of the N patches present at this stage, ascending by position.
        fused_kept: ``[batch, F]`` bool: whether the fused token of each of the F earlier stages that dropped something
            is still present after this stage; ``None`` in a span without ``+fused``.
    """

    layer: int
    kept: Tensor
    dropped: Tensor
    scores: Tensor
    fused_kept: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """What one stage of a plan chose, by the indices of tokens in its own sequence of patches.

    A fused token of an earlier stage is one of these, after the patches.

    Attributes:
        scores: ``[batch, n]``, of the patches present.
        kept, dropped: ``[batch, k]`` and ``[batch, n - k]`` indices, int64, ascending.
    """

    scores: Tensor
    kept: Tensor
    dropped: Tensor


def selection_of(
    scores: Sequence[Tensor | None], kept: Tensor | None, dropped: Tensor | None
) -> Selection | None:
    """What :class:`skipvit_fx.ops.select.Select` was given and returned; ``None`` if there was no score."""
    present = [score.detach() for score in scores if score is not None]
    if not present:
        return None
    total = torch.stack(present).mean(0)
    batch, n = total.shape
    here = torch.arange(n, device=total.device).expand(batch, n)
    if kept is None or dropped is None:
        return Selection(total, here, here[:, :0])
    return Selection(total, kept.long(), dropped.long())


@dataclass
class Noted:
    """What the stages of one call chose.

    Attributes:
        record: the record of the graph that ran.
        selections: one per stage; ``None`` if skipping was off.
        returned: by span of the plan, the stream after its tokens have returned.
    """

    record: RewriteRecord
    selections: list[Selection | None]
    returned: dict[int, Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def selections_noted(fast: SkipViTModule) -> Iterator[Noted]:
    """Fill the yielded object while ``fast`` runs once, with an existing graph."""
    noted = Noted(record_of(fast), [None] * len(record_of(fast).stages))

    def note(record: RewriteRecord, i: int, module: nn.Module, scores: Any, chosen: Any) -> None:
        if noted.record is not record:
            noted.record, noted.selections = record, [None] * len(record.stages)
        noted.selections[i] = selection_of(scores, *chosen)

    def note_return(span: int, module: nn.Module, given: Any, stream: Tensor) -> None:
        noted.returned[span] = stream  # by the last of its stages

    handles = []
    parts = dict(fast.named_modules())
    try:
        for call in fast.own.calls:
            for i, stage in enumerate(call.record.stages):
                select, back = parts[f"{stage.path}.select"], parts.get(f"{stage.path}.put_back")
                handles.append(select.register_forward_hook(partial(note, call.record, i)))
                if back is not None:
                    handles.append(back.register_forward_hook(partial(note_return, stage.span)))
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def trace_tokens(fast: nn.Module, *args: Any, **kwargs: Any) -> list[TokenTrace]:
    """Run a rewritten model, and return what each stage of its plan kept and dropped, in order.

    Args:
        fast: what :func:`skipvit_fx.rewrite` returned. It runs as it is, in train or eval mode.
        args, kwargs: the arguments of the call; or, as in :func:`skipvit_fx.rewrite`, one tuple of arguments, or one
            dict of keyword arguments.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
        SkipViTError: skipping is switched off, or off in the current mode, so that nothing is chosen.
    """
    rewritten = check_skips(fast)
    if len(args) == 1 and not kwargs and isinstance(args[0], (tuple, Mapping)):
        args, kwargs = arguments_of(args[0])
    rewritten.prepare(*args, **kwargs)
    with selections_noted(rewritten) as noted:
        rewritten.graph_forward(*args, **kwargs)
    return traces_of(noted)


def traces_of(noted: Noted) -> list[TokenTrace]:
    """The same in terms of patches, whatever other tokens were in the sequence."""
    record, selections = noted.record, noted.selections
    traces: list[TokenTrace] = []
    span, names, patches, fused = -1, torch.empty(0), 0, 0
    for stage, chosen in zip(record.stages, selections, strict=True):
        if chosen is None:
            raise _switched_off()
        if stage.span != span:  # all patches are there again
            batch, patches = chosen.scores.shape
            names = torch.arange(patches, device=chosen.scores.device).expand(batch, patches)
            span, fused = stage.span, 0
        fuses = record.plan.spans[span].fused
        still, gone = names.gather(1, chosen.kept), names.gather(1, chosen.dropped)
        traces.append(
            TokenTrace(
                stage.layer,
                _patches_of(still, still, patches),
                _patches_of(gone, gone, patches),
                _patches_of(names, chosen.scores, patches, fill=torch.nan),
                _fused_of(still, patches, fused) if fuses else None,
            )
        )
        names = still
        if (
            fuses and gone.shape[1]
        ):  # one more token, after the patches and numbered after all of them
            names = torch.cat([names, torch.full_like(names[:, :1], patches + fused)], 1)
            fused += 1
    return traces


def check_skips(fast: nn.Module) -> SkipViTModule:
    """``fast``, if tokens are chosen when it runs.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
        SkipViTError: skipping is off.
    """
    parts = [fast.get_submodule(stage.path) for stage in record_of(fast).stages]
    if not all(switch.active for part in parts for switch in switches(part)):
        raise _switched_off()
    return cast(SkipViTModule, fast)


def _switched_off() -> SkipViTError:
    return SkipViTError(
        "skipping is switched off, so no token is chosen",
        hint="call skipvit_fx.set_skipping(fast, True) first; with train_only, also fast.train()",
    )


def _patches_of(names: Tensor, values: Tensor, patches: int, fill: float = -1) -> Tensor:
    """``values`` where ``names`` is a patch, moved to the front in their order, and padded with ``fill``."""
    real = names < patches
    if bool(real.all()):
        return values
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]
    return values.gather(1, order).masked_fill(~real.gather(1, order), fill)


def _fused_of(names: Tensor, patches: int, fused: int) -> Tensor:
    """Whether each fused token is among ``names``."""
    wanted = torch.arange(patches, patches + fused, device=names.device)
    return (names.unsqueeze(1) == wanted[:, None]).any(-1)
