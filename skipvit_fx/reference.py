"""The mask-and-freeze reference: a captured graph run with every token in place.

The dropped tokens are masked out of attention as keys, their values are zeroed, and their rows of the residual stream
are held at their state at the cut. It shares with the compiler the capture and the finding of attention, layers and
token axis, but none of the edits: scores, selection, gathers, sizes, returns, dead tokens. It is given which tokens
were dropped, and does not judge the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, fx, nn

from skipvit_fx.analysis.axes import Axes, Batch, Dim, Tokens, axes_of, tensors_in, tokens_of
from skipvit_fx.analysis.residual import is_softmax
from skipvit_fx.analysis.rules import Position
from skipvit_fx.analysis.spans import Spans, StageSpan
from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.errors import ValidationError
from skipvit_fx.graph.attention_ops import SDPA, AttentionArguments
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.graph.nodes import attribute, callee
from skipvit_fx.graph.sizes import RESHAPES, SPLITS
from skipvit_fx.reports.tokens import Selection
from skipvit_fx.torch_internals import aten

_EXPANDS = frozenset({"expand", "broadcast_to", torch.broadcast_to, aten.expand.default})


class Step(NamedTuple):
    """A node as it was when the steps were noted, since passes edit graphs in place.

    Attributes:
        node, args, kwargs: the node, and its arguments at that time.
        reads: the nodes among the arguments, each once, in order.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[fx.Node, ...]


def steps_of(graph: fx.Graph) -> tuple[Step, ...]:
    """A snapshot of the graph, unaffected by later edits."""
    return tuple(
        Step(node, node.args, node.kwargs, tuple(node.all_input_nodes)) for node in graph.nodes
    )


class Run:
    """Runs steps one after another; subclasses observe and change values.

    Args:
        steps: the steps of the graph.
        module: the module whose attributes are read.
        parts: the modules that are called, by path.
    """

    def __init__(
        self, steps: Iterable[Step], module: nn.Module, parts: Mapping[str, nn.Module]
    ) -> None:
        self.steps = tuple(steps)
        self.module = module
        self.parts = parts
        self.env: dict[fx.Node, Any] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """The output of the graph for these values of its placeholders."""
        last = {node: i for i, step in enumerate(self.steps) for node in step.reads}
        value = None
        for i, step in enumerate(self.steps):
            given = step.node.op == "placeholder"
            value = inputs[str(step.node.target)] if given else self.step(step)
            self.env[step.node] = value
            for node in (step.node, *step.reads):
                if last.get(node, -1) <= i:
                    del self.env[node]
        return value

    def step(self, step: Step) -> Any:
        """The value of one node."""
        return self.execute(step.node, *self.arguments(step))

    def arguments(self, step: Step, replaced: Mapping[fx.Node, Any] | None = None) -> Any:
        """Positional and keyword arguments; ``replaced`` stands in for some nodes' values."""

        def value(node: fx.Node) -> Any:
            if replaced is not None and node in replaced:
                return replaced[node]
            return self.lookup(step.node, node)

        return fx.node.map_arg((step.args, step.kwargs), value)

    def lookup(self, reader: fx.Node, node: fx.Node) -> Any:
        """The value of ``node`` that ``reader`` sees."""
        return self.env[node]

    def execute(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a node.

        Raises:
            ValidationError: the author's code, or an operator in it, fails.
        """
        if node.op == "get_attr":
            return attribute(self.module, str(node.target))
        if node.op == "output":
            return args[0]
        called = callee(node, self.parts.__getitem__)
        try:
            with author_code():
                return called(*args, **kwargs)
        except AuthorError as error:
            raise ValidationError(
                f"node {node.name!r} in module {module_path(node) or '<root>'!r} does not run: {error.message}",
                hint="pass example_inputs that hold values which the model accepts",
            ) from error.__cause__


@dataclass(frozen=True)
class Left:
    """Where tokens are after a stage of the plan. A token has a slot: the index of a patch in the full sequence.

    A fused token occupies the slot of a patch that it stands in for, and a merged one that of the patch that others
    were merged into.

    Attributes:
        slots: ``[batch, present]``: those of the patches and fused tokens that are present, in their order in the
            rewritten graph.
        gone: ``[batch, patches]`` booleans: the empty slots.
        away: ``[batch, patches]`` booleans: the patches that left, whatever is in their slots now.
        frozen: a residual stream in which these have the state in which they left.
        sizes: ``[batch, patches]``: the number of patches that are part of the token in each slot.
        owner: ``[batch, patches]``: the slot of the token that each patch is part of.
    """

    slots: Tensor
    gone: Tensor
    away: Tensor
    frozen: Tensor
    sizes: Tensor
    owner: Tensor

    @classmethod
    def nothing(cls, state: Tensor, stream_dim: int, patches: int) -> Self:
        """The state before the first stage, where the stream is ``state``."""
        batch = state.shape[1 - stream_dim]
        none = torch.zeros(batch, patches, dtype=torch.bool, device=state.device)
        slots = torch.arange(patches, device=state.device).expand(batch, patches)
        # an in-place operator may change the state later
        return cls(slots, none, none, state.clone(), torch.ones_like(none, dtype=torch.long), slots)


class Masked(Run):
    """Runs a captured graph; tokens that leave stay in place, masked, in the state in which they left.

    If tokens never return, the remaining ones are gathered at the last layer's end, and the head sees only these.

    Args:
        steps, module, parts: as for :class:`Run`.
        spans: the plan applied to this graph.
        selections: what each stage of the plan kept and dropped.

    Attributes:
        returned: by span of the plan, the residual stream after its tokens returned.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        module: nn.Module,
        parts: Mapping[str, nn.Module],
        spans: Spans,
        selections: Iterable[Selection],
    ) -> None:
        super().__init__(steps, module, parts)
        self.spans = spans
        self.analysis, self.stream = spans.analysis, spans.stream
        layers = self.stream.layers
        stages = zip(spans.stages, selections, strict=True)
        self._cuts = {stage.cut: (stage, selection) for stage, selection in stages}
        self.on_stream = {n for layer in layers for n in (layer.input, layer.cut, layer.end)}
        self._end = layers[-1].end if spans.never_return else None
        self._left: dict[int, Left] = {}
        self._short: set[fx.Node] = set()
        self._filled: dict[fx.Node, Tensor] = {}
        self._attentions = self._spelled_out()
        self.returned: dict[int, Tensor] = {}

    def see(self, node: fx.Node, value: Any, rows: Tensor | None) -> None:
        """Called with every value, before tokens leave or return there; subclasses compare it.

        ``rows`` are the slots ``[batch, present]`` of the remaining tokens, ``None`` if ``value`` has only these.
        """

    def see_filled(self, node: fx.Node, state: Tensor) -> None:
        """Called with the whole sequence where tokens return, and where a tap is filled."""

    def step(self, step: Step) -> Any:
        node = step.node
        left = self._left_at(node)
        if left is None:
            value = super().step(step)
        elif not self._short.isdisjoint(step.reads):
            self._short.add(node)
            value = self._run_short(step, left)
        else:
            value = self._run_masked(step, left)
        if node in self.on_stream and node not in self._short:
            return self._at_stream(node, value, left)
        self.see(node, value, None if left is None or node in self._short else left.slots)
        return value

    def lookup(self, reader: fx.Node, node: fx.Node) -> Any:
        tapped = node in self._filled and reader in self.spans.taps[node]
        return self._filled[node] if tapped else self.env[node]

    def _left_at(self, node: fx.Node) -> Left | None:
        """Where tokens are before the node; stages are nested, so the last one that it is under decides."""
        active = self.spans.active(node)
        return self._left[active[-1].index] if active else None

    # -- on the residual stream -----------------------------------------------------------------------------------

    def _at_stream(self, node: fx.Node, state: Tensor, left: Left | None) -> Tensor:
        if left is not None:
            state = torch.where(self._rows(left.gone), left.frozen, state)
        self.see(node, state, None if left is None else left.slots)
        if node in self.spans.taps:
            self._filled[node] = self._fill(state, left)
            self.see_filled(node, self._filled[node])
        if node in self._cuts:
            left, state = self._leave(*self._cuts[node], state, left)
        back = self.spans.returning(node)
        if back is not None and left is not None:
            state = self.returned[self.spans.returns.index(back)] = self._fill(state, left)
            self.see_filled(node, state)
        if node is self._end and left is not None:
            self._short.add(node)
            state = remaining_rows(state, self.stream.dim, self.stream.tokens, left.slots)
        return state

    def _rows(self, patches: Tensor) -> Tensor:
        """Flags ``[batch, patches]`` as rows of the residual stream."""
        tokens = self.stream.tokens
        flags = nn.functional.pad(patches, (tokens.prefix, tokens.suffix))
        return (flags if self.stream.dim == 1 else flags.T).unsqueeze(-1)

    def _fill(self, state: Tensor, left: Left | None) -> Tensor:
        """The whole sequence: patches that left as they left, and those that were merged as what they are part of."""
        if left is None:
            return state
        state = remaining_rows(state, self.stream.dim, self.stream.tokens, left.owner)
        return torch.where(self._rows(left.away), left.frozen, state)

    def _leave(
        self, stage: StageSpan, selection: Selection, state: Tensor, left: Left | None
    ) -> tuple[Left, Tensor]:
        """Where tokens are after a stage, and the stream with fused and merged tokens in it."""
        tokens, dim = self.stream.tokens, self.stream.dim
        before = Left.nothing(state, dim, tokens.patches) if left is None else left
        if selection.into is not None:
            return self._join(stage, selection, selection.into, state, before)
        slots = before.slots.gather(1, selection.kept)
        leaving = before.slots.gather(1, selection.dropped)
        own = torch.zeros_like(before.away).scatter(1, leaving, True) & ~before.away
        frozen = torch.where(self._rows(own), state, before.frozen)
        if stage.returns.span.fused and leaving.shape[1]:
            slot = leaving[:, :1]
            slots = torch.cat([slots, slot], 1)
            first = state if dim == 1 else state.transpose(0, 1)
            gone = torch.take_along_dim(first, (leaving + tokens.prefix).unsqueeze(-1), 1)
            weights = selection.scores.gather(1, selection.dropped).unsqueeze(-1)
            fused = (gone * weights.to(state.dtype)).sum(1, keepdim=True)
            at = (slot + tokens.prefix).unsqueeze(-1).expand_as(fused)
            first = first.scatter(1, at, fused)
            state = first if dim == 1 else first.transpose(0, 1)
        empty = torch.ones_like(own).scatter(1, slots, False)
        away = before.away | own
        self._left[stage.index] = now = replace(
            before, slots=slots, gone=empty, away=away, frozen=frozen
        )
        return now, state

    def _join(
        self, stage: StageSpan, selection: Selection, into: Tensor, state: Tensor, before: Left
    ) -> tuple[Left, Tensor]:
        """Where tokens are after some became part of others, and the stream with the means of these."""
        slots = before.slots.gather(1, selection.kept)
        source = before.slots.gather(1, selection.dropped)
        target = slots.gather(1, into)
        # which slot's token goes to which slot, as a matrix of zeros and ones
        moved = torch.arange(before.gone.shape[1], device=slots.device).expand_as(before.gone)
        moved = moved.scatter(1, source, target)
        moves = nn.functional.one_hot(moved, moved.shape[1]).transpose(1, 2)
        parts = moves * before.sizes.masked_fill(before.gone, 0).unsqueeze(1)
        total = parts.sum(-1)
        gone = torch.ones_like(before.gone).scatter(1, slots, False)
        tokens, dim = self.stream.tokens, self.stream.dim
        first = state if dim == 1 else state.transpose(0, 1)
        prefix, patches, suffix = torch.split(
            first, [tokens.prefix, tokens.patches, tokens.suffix], 1
        )
        # on the CPU: not every accelerator has float64
        sums = parts.cpu().double() @ patches.cpu().double()
        means = (sums / total.cpu().clamp(min=1).unsqueeze(-1)).to(state)
        joined = torch.zeros_like(gone).scatter(1, target, True).unsqueeze(-1)
        first = torch.cat([prefix, torch.where(joined, means, patches), suffix], 1)
        owner = moved.gather(1, before.owner)
        self._left[stage.index] = now = replace(
            before, slots=slots, gone=gone, sizes=total, owner=owner
        )
        return now, first if dim == 1 else first.transpose(0, 1)

    # -- with every token in place --------------------------------------------------------------------------------

    def _run_masked(self, step: Step, left: Left) -> Any:
        """Run a node with the keys of tokens that left masked in its logits, and their rows zeroed in its values."""
        node, facts = step.node, self.analysis[step.node]
        if node.target in SDPA:
            return self._attention(step, {}, self._added(left))
        replaced: dict[fx.Node, Tensor] = {}
        if node in self._attentions:
            replaced = self._logits(step, self._added(left))
        elif facts.sums_weights:
            for read in step.reads:
                axes = self.analysis.axes(read) or ()
                tokens = [(d, t) for d, dim in enumerate(axes) if (t := tokens_of(dim))]
                if len(tokens) == 1 and not tokens[0][1].weights:
                    flags = _spread(left.gone, axes, tokens[0][0], self.env[read])
                    replaced[read] = self.env[read].masked_fill(flags, 0.0)
        return self.execute(node, *self.arguments(step, replaced))

    def _added(self, left: Left) -> Tensor:
        """What is added to the logits of keys in the patches' slots, ``[batch, patches]``."""
        added = left.frozen.new_zeros(left.gone.shape)
        if self.spans.options.proportional_attention:
            added = added + left.sizes.clamp(min=1).log().to(added.dtype)
        return added.masked_fill(left.gone, -math.inf)

    def _spelled_out(self) -> set[fx.Node]:
        """The softmaxes over tokens whose weights are then summed with values, and meet no tokens before that."""
        leads: set[fx.Node] = set()
        for step in reversed(self.steps):
            facts = self.analysis[step.node]
            weights = [n for n in step.reads if self._has(n, weights=True)]
            if facts.sums_weights or (step.node in leads and not self._has_tokens_too(step)):
                leads.update(weights)
        return {n for n in leads if self.analysis[n].softmax_over and is_softmax(self.analysis, n)}

    def _has_tokens_too(self, step: Step) -> bool:
        return any(self._has(node, weights=False) for node in step.reads)

    def _has(self, node: fx.Node, *, weights: bool) -> bool:
        """Whether a value has token axes of the given kind: keys of attention weights, or only others."""
        axes = self.analysis.axes(node) or ()
        found = [tokens.weights for dim in axes if (tokens := tokens_of(dim))]
        return any(found) if weights else bool(found) and not any(found)

    def _logits(self, step: Step, added: Tensor) -> dict[fx.Node, Tensor]:
        """The logits of a softmax with these ``[batch, patches]`` added to those of each key."""
        logits, axes = step.reads[0], self.analysis.axes(step.node) or ()
        dims = [d for d, dim in enumerate(axes) if (t := tokens_of(dim)) and t.weights]
        if len(dims) != 1:
            return {}
        return {logits: self.env[logits] + _spread(added, axes, dims[0], self.env[logits])}

    def _attention(self, step: Step, replaced: Mapping[fx.Node, Tensor], patches: Tensor) -> Any:
        """A fused attention with these ``[batch, patches]`` added to the logits of each key."""
        args, kwargs = self.arguments(step, replaced)
        given = AttentionArguments(*args, **kwargs)
        axes = self.analysis.axes(AttentionArguments(*step.args, **step.kwargs).key)
        if axes is None or self.analysis[step.node].softmax_over is None:
            return self.execute(step.node, args, kwargs)
        added = _spread(patches, axes, given.key.ndim - 2, given.key).transpose(-2, -1)
        mask = given.attn_mask
        if mask is None:
            mask = added.to(given.query.dtype)
        elif mask.dtype == torch.bool:
            mask = torch.where(mask, added.to(given.query.dtype), -math.inf)
        else:
            mask = mask + added.to(mask.dtype)
        return step.node.target(**given._replace(attn_mask=mask)._asdict())  # type: ignore[operator]

    # -- after the last layer, without the tokens that left -------------------------------------------------------

    def _run_short(self, step: Step, left: Left) -> Any:
        """Run a node on the remaining tokens, with sizes and tables made for all tokens adapted."""
        node, facts = step.node, self.analysis[step.node]
        replaced: dict[fx.Node, Tensor] = {}
        for position in facts.positions:
            for read in step.reads:
                if self.analysis[read].value is position.operand:
                    whole = replaced.get(read, self.env[read])
                    replaced[read] = _take_positions(whole, position, left.slots)
        weights = self._added(left).gather(1, left.slots)
        if node.target in SDPA:
            return self._attention(step, replaced, weights)
        if node in self._attentions:
            replaced |= self._logits(step, weights)
        args, kwargs = self.arguments(step, replaced)
        if node.target in RESHAPES and facts.axes is not None:
            return self._reshape(node, args, kwargs, left)
        if node.target in SPLITS:
            return self._split(node, args, kwargs, left)
        value = self.execute(node, args, kwargs)
        axes = self.analysis.axes(step.reads[0]) if step.reads else None
        if axes is None or not isinstance(value, (int, torch.Size)):
            return value
        whole = self.analysis[step.reads[0]].value.shape
        sizes = [
            int(whole[d]) if tokens_of(dim) else args[0].shape[d] for d, dim in enumerate(axes)
        ]
        if isinstance(value, torch.Size):
            return torch.Size(sizes)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return sizes[dim] if isinstance(dim, int) else value

    def _reshape(self, node: fx.Node, args: Any, kwargs: Any, left: Left) -> Any:
        axes = self.analysis.axes(node) or ()
        given = [*args[1:], *kwargs.values()]
        sizes = list(given[0]) if isinstance(given[0], (tuple, list)) else given
        if len(sizes) != len(axes):
            return self.execute(node, args, kwargs)
        live = [
            _length(dim, left.slots) if tokens_of(dim) else size
            for dim, size in zip(axes, sizes, strict=True)
        ]
        return args[0].expand(live) if node.target in _EXPANDS else args[0].reshape(live)

    def _split(self, node: fx.Node, args: Any, kwargs: Any, left: Left) -> Any:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        sections = args[1] if len(args) > 1 else next(iter(kwargs.values()))
        if not isinstance(sections, (tuple, list)):
            return self.execute(node, args, kwargs)
        live = []
        for part, size in zip(tensors_in(self.analysis[node].value), sections, strict=True):
            axes = axes_of(part)
            with_patches = axes is not None and tokens_of(axes[dim])
            live.append(_length(axes[dim], left.slots) if axes and with_patches else size)
        return torch.split(args[0], live, dim)


def _length(dim: Dim, slots: Tensor) -> int:
    """The length of an axis if only these tokens remain."""
    batch, present = slots.shape
    length = 1
    for factor in dim:
        if isinstance(factor, Tokens):
            length *= factor.prefix + present + factor.suffix
        else:
            length *= batch if isinstance(factor, Batch) else factor
    return length


def _rows(tokens: Tokens, slots: Tensor) -> Tensor:
    """Rows ``[batch, prefix + present + suffix]`` of the full sequence if only the patches ``slots`` remain."""
    rows = torch.arange(tokens.prefix + tokens.patches + tokens.suffix, device=slots.device)
    rows = rows.expand(slots.shape[0], -1)
    start, stop = tokens.prefix, tokens.prefix + tokens.patches
    return torch.cat([rows[:, :start], slots + start, rows[:, stop:]], 1)


def remaining_rows(
    whole: Tensor, dim: int, tokens: Tokens, slots: Tensor, *, batch_dim: int | None = None
) -> Tensor:
    """The rows along ``dim`` of the remaining tokens: prefix, the patches ``slots [batch, present]``, trailing.

    ``batch_dim``: by default 0, or 1 if ``dim`` is 0.
    """
    at = int(dim == 0) if batch_dim is None else batch_dim
    rows = _rows(tokens, slots)
    shape = [1] * whole.ndim
    shape[at], shape[dim] = rows.shape
    return torch.take_along_dim(whole, (rows if at < dim else rows.T).reshape(shape), dim)


def _take_positions(operand: Tensor, position: Position, slots: Tensor) -> Tensor:
    """The rows of a table of fixed token length that belong to the remaining tokens."""
    at, rank = position.batch_dim, position.rank
    if at is None:
        return operand
    slots = slots.repeat_interleave(position.repeat, 0)
    sizes = [1] * (rank - operand.ndim) + list(operand.shape)
    whole = operand.reshape(sizes)
    sizes[at] = slots.shape[0]
    dim = position.dim % position.operand.ndim + rank - position.operand.ndim
    return remaining_rows(whole.expand(sizes), dim, position.tokens, slots, batch_dim=at)


def _spread(patches: Tensor, axes: Axes, dim: int, like: Tensor) -> Tensor:
    """Values ``[batch, patches]`` of rows along ``dim``, with as many axes as ``like``, samples along its batch axis.

    Zeros if that axis is not known; the two runs will then differ.
    """
    tokens = tokens_of(axes[dim])
    at = next((d for d, dims in enumerate(axes) if any(isinstance(f, Batch) for f in dims)), None)
    if tokens is None or at is None or at == dim:
        return torch.zeros([1] * like.ndim, dtype=patches.dtype, device=like.device)
    flags = nn.functional.pad(patches, (tokens.prefix, tokens.suffix))
    times = like.shape[at] // flags.shape[0]
    first = isinstance(axes[at][0], Batch)
    flags = flags.repeat_interleave(times, 0) if first else flags.repeat(times, 1)
    shape = [1] * like.ndim
    shape[at], shape[dim] = flags.shape
    return (flags if at < dim else flags.T).reshape(shape)
