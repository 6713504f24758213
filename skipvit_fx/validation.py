"""Every rewrite is run once and compared with a reference, on two images, before it is returned.

There are two comparisons. The author's forward on one image against the captured graph shows whether the graph is the
model. That graph on two images with the dropped tokens masked (:mod:`skipvit_fx.reference`) against the rewritten graph
shows whether the passes preserved what it computes. Which tokens leave is random, and as different as possible for the
two images, so that a row that belongs to another token, or to another image, cannot pass unnoticed.

Outputs, the residual stream, and the results of every module called as a whole are compared. The last show differences
that the stream hides if a fresh model scales its branches by almost zero.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from skipvit_fx.analysis.axes import Batch, Tokens, plain_token_dim
from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.author.generators import GeneratorStates, generators_kept
from skipvit_fx.capture.cloning import scratch_copy
from skipvit_fx.capture.example import has_samples, image_of
from skipvit_fx.differences import badness, relative_error, short, tolerance
from skipvit_fx.errors import GuardError, ValidationError
from skipvit_fx.graph.inputs import Inputs
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.graph.nodes import authors_node
from skipvit_fx.names import INSERTED_BY, OWN_CHILD
from skipvit_fx.ops.merge import Match, Unmerge
from skipvit_fx.ops.score import ScoreAtRandom, ScoreByFunction
from skipvit_fx.ops.select import Select
from skipvit_fx.ops.skip import PutBack
from skipvit_fx.reference import Masked, Run, Step, remaining_rows, steps_of
from skipvit_fx.reports.tokens import Selection, selection_of
from skipvit_fx.rewriting.context import Context
from skipvit_fx.torch_internals import pytree, tensor_leaves

IMAGES = 2
NOT_ASKED = "not validated (validate=False)"
NO_VALUES = "not validated (meta device)"


def validate(model: nn.Module, context: Context, captured: tuple[Step, ...]) -> str:
    """Compare a rewritten graph with the model that it was made from. Neither is changed.

    Args:
        model: as its author wrote it, in any mode.
        context: after all passes.
        captured: its graph before the passes.

    Returns:
        What was found, for :func:`skipvit_fx.inspect`.

    Raises:
        ValidationError: they differ, or one of them does not run.
    """
    capture = context.capture
    tensors = [*model.parameters(), *model.buffers()]
    tensors += tensor_leaves((capture.args, capture.kwargs))
    if any(tensor.is_meta for tensor in tensors):
        return NO_VALUES
    devices = sorted({tensor.device for tensor in tensors}, key=str)
    call = capture.module.own.calls[0]
    gradients = call.recorded.told and False in call.recorded.asked  # the author asks in eval mode
    with _alone(devices) as states, torch.set_grad_enabled(gradients):
        check = _Validation(model, context, captured, states, tolerance(tensors))
        both, first, many = sets_of_images(capture.args, capture.kwargs)
        largest = max(
            _as_guarded(check.capture, first, both, many),
            _as_guarded(check.rewrite, both, first, many),
        )
    return f"validated: largest difference {short(largest)} over {IMAGES} images"


def _as_guarded(compare: Callable[[Any], float], *sets: Any) -> float:
    """Compare on the first of these sets of images that the graph was made for; it always runs on the last."""
    *others, last = sets
    for images in others:
        with contextlib.suppress(GuardError):
            return compare(images)
    return compare(last)


@contextlib.contextmanager
def _alone(devices: Iterable[torch.device]) -> Iterator[GeneratorStates]:
    """A context without gradients and autocast, and without effect on the global generators."""
    devices = list(devices)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in sorted({"cpu", *(device.type for device in devices)}):
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield stack.enter_context(generators_kept(devices))


# -- images -----------------------------------------------------------------------------------------------------------


def sets_of_images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The example call with two different samples, its own if it holds two; with only the first of them; and with its
    own number of samples, alternating between the two.

    A tensor has one value per sample if its first axis is as long as that of the largest floating-point one. Random
    numbers replace constant tensors, except those of fewer axes than a picture: masks, or scales.
    """
    example = (args, kwargs)
    image = image_of(args, kwargs)
    assert image is not None
    samples = image.shape[0]
    second = next((i for i in range(1, samples) if _differ(image, i)), min(1, samples - 1))
    generator = torch.Generator().manual_seed(0)

    def pair(leaf: Any) -> Any:
        if not has_samples(leaf, samples):
            return leaf
        two: Tensor = leaf.detach()[[0, second]]
        if not two.is_floating_point() or (two.ndim < 3 and leaf is not image):
            return two
        if _is_constant(two):
            return torch.randn(two.shape, generator=generator, device="cpu").to(two)
        if not torch.equal(two[0], two[1]):
            return two
        mirrored = two[0].flatten().flip(0).reshape(two[0].shape)  # other values in the same range
        return torch.stack([two[0], mirrored])

    def alone(leaf: Any, two: Any) -> Any:
        return two[:1] if has_samples(leaf, samples) else two

    def in_turns(leaf: Any, two: Any) -> Any:
        return (
            two[torch.arange(samples, device=two.device) % 2] if has_samples(leaf, samples) else two
        )

    both = pytree.tree_map(pair, example)
    return (
        both,
        pytree.tree_map(alone, example, both),
        pytree.tree_map(in_turns, example, both),
    )


def _differ(images: Tensor, i: int) -> bool:
    return not torch.equal(images[0], images[i])


def _is_constant(values: Tensor) -> bool:
    return bool((values == values.flatten()[0]).all()) if values.numel() else True


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finding:
    """How much two runs differ at a node; ``filled``: in the whole sequence, after tokens have returned there."""

    node: fx.Node
    error: float
    filled: bool = False


def _apart(got: Any, wanted: Any) -> float:
    """The relative error; infinite if the shapes differ."""
    try:
        return relative_error(got, wanted)
    except ValueError:
        return math.inf


class _Captured(Run):
    """The captured graph, compared with what the author's modules returned, in the order of their calls."""

    def __init__(
        self, steps: Iterable[Step], parts: Mapping[str, nn.Module], returned: dict[str, list[Any]]
    ) -> None:
        super().__init__(steps, parts[""], parts)
        self.returned = returned
        self.findings: list[_Finding] = []

    def step(self, step: Step) -> Any:
        value = super().step(step)
        if step.node.op == "call_module" and (calls := self.returned.get(str(step.node.target))):
            self.findings.append(_Finding(step.node, _apart(value, calls.pop(0))))
        return value


class _Rewritten(Run):
    """The rewritten graph, with a random choice of the tokens that leave; notes everything to be compared."""

    def __init__(
        self,
        steps: Iterable[Step],
        context: Context,
        parts: Mapping[str, nn.Module],
        devices: Iterable[torch.device],
    ) -> None:
        super().__init__(steps, parts[""], parts)
        self.context = context
        self.devices = tuple(devices)
        self.selections: dict[str, Selection] = {}
        self.noted: dict[fx.Node, Tensor] = {}
        self.filled: dict[fx.Node, Tensor] = {}
        self._edited = False

    def step(self, step: Step) -> Any:
        node = step.node
        part = self.parts[str(node.target)] if node.op == "call_module" else None
        if isinstance(part, Select):
            return self._select(step, part)
        if isinstance(part, Match):
            return self._match(step, part)
        drawing = isinstance(part, (ScoreAtRandom, ScoreByFunction))
        with generators_kept(self.devices) if drawing else contextlib.nullcontext():
            value = super().step(step)  # undo what the score draws: the captured graph has no score
        inserted = INSERTED_BY in node.meta
        self._edited |= inserted
        # copies: an in-place operator may change the value later
        if inserted and isinstance(part, (PutBack, Unmerge)):
            self.filled[authors_node(node)] = value.clone()
        elif self._edited and _place(self.context, node) is not None:
            self.noted[node] = value.clone()
        return value

    def _select(self, step: Step, part: Select) -> Any:
        """Select by random scores, and check that the kept patches have the highest scores and stay in order."""
        (scores, *others), _ = self.arguments(step)
        drawn = self._draw(scores.shape[:1], scores.shape[1:]).to(scores.device)
        chosen = part(drawn)
        total = torch.stack([scores, *others]).mean(0)
        self._note(step, selection_of(total, chosen), _selection_fault(drawn, *chosen))
        return chosen

    def _match(self, step: Step, part: Match) -> Any:
        """Match random keys, and check that the most similar pairs are merged."""
        metric = part.metric(*self.arguments(step)[0])
        samples, patches, channels = metric.shape
        drawn = self._draw((samples,), (patches, channels)).sub(0.5).to(metric)
        chosen = part.choose(drawn)
        scores = torch.full_like(metric[..., 0], -torch.inf)
        self._note(step, selection_of(scores, chosen), _matching_fault(drawn, *chosen))
        return chosen

    def _draw(self, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Random numbers, with the opposite ones for every other sample."""
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        both = torch.stack([drawn, 1 - drawn if len(shape) == 1 else drawn.flip(0)])
        return both[torch.arange(*samples) % 2]

    def _note(self, step: Step, selection: Selection, fault: str) -> None:
        path = str(step.node.target).rpartition(".")[0]
        if fault:
            names = {f"{OWN_CHILD}.{s.name}": s.layer.index for s in self.context.spans.stages}
            raise ValidationError(
                f"the choice in layer {names[path]} {fault}", layer=names[path], hint=_HINT
            )
        self.selections[path] = selection


class _Compared(Masked):
    """The captured graph with tokens masked, compared with what was noted of the rewritten one."""

    def __init__(
        self,
        steps: Iterable[Step],
        context: Context,
        parts: Mapping[str, nn.Module],
        rewritten: _Rewritten,
    ) -> None:
        selections = [rewritten.selections[f"{OWN_CHILD}.{s.name}"] for s in context.spans.stages]
        super().__init__(steps, parts[""], parts, context.spans, selections)
        self.context = context
        self.rewritten = rewritten
        self.findings: list[_Finding] = []

    def see(self, node: fx.Node, value: Any, rows: Tensor | None) -> None:
        got = self.rewritten.noted.pop(node, None)
        place = _place(self.context, node)
        if got is None or place is None:
            return
        dim, batch_dim, tokens = place
        error = math.inf  # if tokens and samples are not where the analysis says
        if rows is None or value.shape[dim] == tokens.prefix + tokens.patches + tokens.suffix:
            if rows is not None and value.shape[batch_dim] == rows.shape[0]:
                value = remaining_rows(value, dim, tokens, rows, batch_dim=batch_dim)
            # rows after the last that is read may be missing
            value = value.narrow(dim, 0, min(got.shape[dim], value.shape[dim]))
            error = _apart(got, value)
        self.findings.append(_Finding(node, error))

    def see_filled(self, node: fx.Node, state: Tensor) -> None:
        got = self.rewritten.filled.pop(node, None)
        if got is not None:
            self.findings.append(_Finding(node, _apart(got, state), filled=True))


def _place(context: Context, node: fx.Node) -> tuple[int, int, Tokens] | None:
    """The token and batch dimensions of an author's node, and its tokens; ``None`` if it is not compared."""
    analysis, stream = context.analysis, context.stream
    if node not in analysis.facts:
        return None
    value, axes = analysis[node].value, analysis.axes(node)
    if any(node in (layer.input, layer.cut, layer.end) for layer in stream.layers):
        return stream.dim, 1 - stream.dim, stream.tokens
    if node.op != "call_module" or axes is None or not isinstance(value, Tensor):
        return None
    dim = plain_token_dim(axes)
    batches = [d for d, own in enumerate(axes) if len(own) == 1 and isinstance(own[0], Batch)]
    if dim is None or len(batches) != 1:
        return None
    (tokens,) = axes[dim]
    assert isinstance(tokens, Tokens)
    return dim, batches[0], tokens


def _selection_fault(scores: Tensor, kept: Tensor | None, dropped: Tensor | None) -> str:
    """Why a stage's choice is not an ordered partition that follows the given scores; empty if it is."""
    if kept is None or dropped is None:
        return ""
    ordered = all(bool((part.diff(dim=1) > 0).all()) for part in (kept, dropped))
    if _is_partition(scores, kept, dropped) and ordered:
        lowest = scores.gather(1, kept.long()).amin(1)
        highest = scores.gather(1, dropped.long()).amax(1)
        if bool((lowest >= highest).all()):
            return ""
    return "does not keep the patches with the highest scores, in their order"


def _matching_fault(
    keys: Tensor,
    kept: Tensor | None,
    merged: Tensor | None,
    into: Tensor | None,
    similarity: Tensor | None,
) -> str:
    """Why a stage's choice does not merge the most similar of the patches with these keys; empty if it does."""
    if kept is None or merged is None or into is None:
        return ""
    patches = keys.shape[1]
    odd, even = torch.arange(1, patches, 2), torch.arange(0, patches, 2)
    stay = kept.shape[1] - len(even)
    halves = bool((merged % 2 == 1).all()) and bool((kept[:, :stay] % 2 == 1).all())
    in_order = bool((kept[:, stay:].cpu() == even).all()) and all(
        bool((part.diff(dim=1) > 0).all()) for part in (kept[:, :stay], merged)
    )
    if _is_partition(keys[..., 0], kept, merged) and halves and in_order:
        unit = keys.cpu().double() / keys.cpu().double().norm(dim=-1, keepdim=True)
        best, nearest = (unit[:, odd] @ unit[:, even].mT).max(-1)
        chosen = (merged.long().cpu() - 1) // 2
        others = (kept[:, :stay].long().cpu() - 1) // 2
        right = torch.equal(into.long().cpu(), nearest.gather(1, chosen) + stay)
        highest = best.gather(1, others).amax(1) if stay else torch.tensor(-torch.inf)
        if right and bool((best.gather(1, chosen).amin(1) >= highest).all()):
            return ""
    return (
        "does not merge the most similar patches, or not into those that they are most similar to"
    )


def _is_partition(every: Tensor, kept: Tensor, others: Tensor) -> bool:
    both = torch.cat([kept, others], 1).sort(1).values
    return both.shape == every.shape and bool((both.diff(dim=1) == 1).all())


# -- comparisons ------------------------------------------------------------------------------------------------------

_HINT = (
    "choose another plan or frontend; validate=False rewrites without this check, and may be wrong"
)


class _Validation:
    """The two comparisons of one rewrite."""

    def __init__(
        self,
        model: nn.Module,
        context: Context,
        captured: tuple[Step, ...],
        states: GeneratorStates,
        allowed: float,
    ) -> None:
        self.author = scratch_copy(model).eval()
        copied = scratch_copy(context.capture.module).eval()
        self.parts = dict(copied.named_modules(remove_duplicate=False))
        self.context = context
        self.captured = captured
        self.states = states
        self.allowed = allowed
        self.draws = False

    def capture(self, image: tuple[Any, Any]) -> float:
        """Compare the captured graph with the author's forward; return the largest difference.

        Raises:
            ValidationError: they differ.
        """
        author, (args, kwargs) = self.author, image
        self.states.restore()
        with _returned(author, self.captured) as returned:
            try:
                with author_code():
                    wanted = author.forward(*args, **kwargs)
            except AuthorError as error:
                raise ValidationError(
                    f"{type(author).__name__} does not run on one image: {error.message}",
                    hint="pass example_inputs that hold values which the model accepts",
                ) from error.__cause__
        self.draws = not self.states.are_unchanged()
        run = _Captured(self.captured, self.parts, returned)
        got = self._run(run, image)
        what = "the captured graph does not compute what the model's own forward does"
        return self._judge(what, run.findings, got, wanted)

    def rewrite(self, images: tuple[Any, Any]) -> float:
        """Compare the rewritten graph with the captured one with tokens masked; return the largest difference.

        Raises:
            ValidationError: they differ.
        """
        steps = steps_of(self.context.capture.module.graph)
        rewritten = _Rewritten(steps, self.context, self.parts, self.states.devices)
        got = self._run(rewritten, images)
        masked = _Compared(self.captured, self.context, self.parts, rewritten)
        wanted = self._run(masked, images)
        what = (
            "the rewritten graph does not compute what the model does with the same tokens masked"
        )
        return self._judge(what, masked.findings, got, wanted)

    def _run(self, run: Run, images: tuple[Any, Any]) -> Any:
        args, kwargs = images
        self.states.restore()
        return run(Inputs(self.author.forward, args, kwargs).taken())

    def _judge(self, what: str, findings: list[_Finding], got: Any, wanted: Any) -> float:
        try:
            error = relative_error(got, wanted)
        except ValueError as difference:
            raise ValidationError(f"{what}: {difference}", hint=_HINT) from difference
        errors = [*(finding.error for finding in findings), error]
        largest = max(errors, key=badness)
        if largest <= self.allowed:
            return largest
        bad = next((i for i, e in enumerate(errors) if not e <= self.allowed), len(findings))
        raise self._error(what, largest, findings, bad)

    def _error(
        self, what: str, largest: float, findings: list[_Finding], bad: int
    ) -> ValidationError:
        """Name the first place that differs, and the modules between it and the last that does not."""
        order = {step.node: i for i, step in enumerate(self.captured)}
        start = order[findings[bad - 1].node] + 1 if bad else 0
        stop = order[findings[bad].node] if bad < len(findings) else len(self.captured) - 1
        between = (self.captured[i].node for i in range(start, stop + 1))
        modules = tuple(dict.fromkeys(path for node in between if (path := module_path(node))))
        layers = self.context.stream.layers
        layer = sum(order[layer.input] < stop for layer in layers)
        filled = bad < len(findings) and findings[bad].filled
        back = self.context.spans.returning(findings[bad].node) if filled else None
        if back is not None and back.span.return_layer is not None:
            layer = back.span.return_layer
        elif order[layers[-1].end] < stop:
            layer = len(layers) + 1
        place = f"in layer {layer}" if 0 < layer <= len(layers) else "after the last layer"
        text = (
            f"{what}; the largest difference is {short(largest)} of the largest value, up to "
            f"{short(self.allowed)} is rounding; they first differ {place if layer else 'before the first layer'}"
        )
        if modules:
            text += f", at {', '.join(modules)}"
        if self.draws:
            text += "; the model draws random numbers in eval mode, which differ between the two"
        return ValidationError(text, difference=largest, layer=layer, modules=modules, hint=_HINT)


@contextlib.contextmanager
def _returned(author: nn.Module, captured: Iterable[Step]) -> Iterator[dict[str, list[Any]]]:
    """While ``author``, a copy that nothing else uses, runs, note what the modules that the graph calls return.

    Modules that these call in turn are not noted.
    """
    modules = dict(author.named_modules(remove_duplicate=False))
    called = [str(step.node.target) for step in captured if step.node.op == "call_module"]
    calls: dict[nn.Module, list[Any]] = {modules[path]: [] for path in called if path in modules}
    returned = {path: calls[modules[path]] for path in called if path in modules}
    inside: list[nn.Module] = []

    def enter(module: nn.Module, given: Any) -> None:
        inside.append(module)

    def leave(module: nn.Module, given: Any, value: Any) -> None:
        inside.pop()
        if not inside:  # an in-place operator may change it later
            copied = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, value)
            calls[module].append(copied)

    handles: list[Any] = []
    for module in calls:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()
