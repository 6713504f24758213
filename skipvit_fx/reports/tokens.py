"""Which patches a rewritten model keeps on given images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from skipvit_fx.capture.example import arguments_of
from skipvit_fx.errors import SkipViTError
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.record import RewriteRecord, record_of
from skipvit_fx.ops.merge import Match
from skipvit_fx.ops.switch import switches
from skipvit_fx.reports.token_report import TokenTrace, TokenTraces


@dataclass(frozen=True)
class Selection:
    """What one stage of a plan chose, by the indices of tokens in its own sequence of patches.

    A fused token of an earlier stage is one of these, after the patches.

    Attributes:
        scores: ``[batch, n]``, of the patches present.
        kept, dropped: ``[batch, k]`` and ``[batch, n - k]`` indices, int64, ascending unless tokens were merged.
        into: for each of the dropped ones, the place among the kept of the one that it was merged into.
    """

    scores: Tensor
    kept: Tensor
    dropped: Tensor
    into: Tensor | None = None


def selection_of(scores: Tensor, chosen: Sequence[Tensor | None]) -> Selection:
    """What a stage chose.

    Args:
        scores: ``[batch, n]``, of the patches present; for a merge those of all that it does not compare.
        chosen: what :class:`skipvit_fx.ops.select.Select` or :class:`skipvit_fx.ops.merge.Match` returned.
    """
    kept, dropped, *merged = chosen
    if kept is None or dropped is None:
        here = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        return Selection(scores, here, here[:, :0])
    if not merged:
        return Selection(scores, kept.long(), dropped.long())
    into, similarity = merged
    assert into is not None
    assert similarity is not None
    scores = scores.clone()
    scores[:, 1::2] = similarity
    return Selection(scores, kept.long(), dropped.long(), into.long())


def _scores_of(chooser: nn.Module, given: Sequence[Tensor | None]) -> Tensor | None:
    """The scores by which a stage chose; none of merged tokens; ``None`` if skipping was off."""
    if isinstance(chooser, Match):
        keys = [key for key in given if key is not None]
        return (
            torch.full_like(chooser.metric(*keys)[..., 0], -torch.inf) if chooser.active else None
        )
    scores = [score.detach() for score in given if score is not None]
    return torch.stack(scores).mean(0) if scores else None


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

    def note(record: RewriteRecord, i: int, module: nn.Module, given: Any, chosen: Any) -> None:
        if noted.record is not record:
            noted.record, noted.selections = record, [None] * len(record.stages)
        scores = _scores_of(module, given)
        noted.selections[i] = None if scores is None else selection_of(scores, chosen)

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


def trace_tokens(fast: nn.Module, *args: Any, **kwargs: Any) -> TokenTraces:
    """Run a rewritten model, and return what each stage of its plan kept and dropped, in order.

    Args:
        fast: what :func:`skipvit_fx.rewrite` returned. It runs as it is, in train or eval mode.
        args, kwargs: the arguments of the call; or, as in :func:`skipvit_fx.rewrite`, one tuple of arguments, or one
            dict of keyword arguments.

    Returns:
        A list of :class:`TokenTrace`, one per stage, that can also be plotted.

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
    return TokenTraces(traces_of(noted), rewritten, args, kwargs)


def traces_of(noted: Noted) -> list[TokenTrace]:
    """The same in terms of patches, whatever other tokens were in the sequence."""
    record, selections = noted.record, noted.selections
    traces: list[TokenTrace] = []
    here = _Present.all_of(-1, torch.empty(0, 0))
    for stage, chosen in zip(record.stages, selections, strict=True):
        if chosen is None:
            raise _switched_off()
        if stage.span != here.span:  # all patches are there again
            here = _Present.all_of(stage.span, chosen.scores)
        names, patches = here.names, here.owner.shape[1]
        span = record.plan.spans[stage.span]
        still, gone = names.gather(1, chosen.kept), names.gather(1, chosen.dropped)
        if chosen.into is not None:
            here.join(chosen.kept, chosen.dropped, chosen.into)
        traces.append(
            TokenTrace(
                stage.layer,
                _patches_of(still, still, patches),
                _patches_of(gone, gone, patches),
                _patches_of(names, chosen.scores, patches, fill=torch.nan),
                here.owner + record.prefix if span.merged else None,
                _fused_of(still, patches, here.fused) if span.fused else None,
            )
        )
        here.names = still
        if span.fused and gone.shape[1]:
            here.add_fused()
    return traces


@dataclass
class _Present:
    """The tokens that are present between two stages of a span.

    Attributes:
        span: of the plan.
        names: ``[batch, present]``: the position of each token; fused ones are numbered after all patches.
        owner: ``[batch, patches]``: the place among these of the one that each patch is part of, if any is merged.
        fused: the number of fused tokens so far.
    """

    span: int
    names: Tensor
    owner: Tensor
    fused: int = 0

    @classmethod
    def all_of(cls, span: int, scores: Tensor) -> Self:
        """All patches, where there are as many as scores ``[batch, patches]``."""
        names = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        return cls(span, names, names)

    def join(self, kept: Tensor, dropped: Tensor, into: Tensor) -> None:
        """Some tokens become parts of others; all are given by their places."""
        places = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
        now = torch.zeros_like(self.names).scatter(1, kept, places).scatter(1, dropped, into)
        self.owner = now.gather(1, self.owner)

    def add_fused(self) -> None:
        """One more token, after the patches and numbered after all of them."""
        number = self.owner.shape[1] + self.fused
        self.names = torch.cat([self.names, torch.full_like(self.names[:, :1], number)], 1)
        self.fused += 1


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
