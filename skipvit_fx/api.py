"""The public calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from skipvit_fx.analysis.replacements import Replacements, uses_of
from skipvit_fx.arguments import check_flag
from skipvit_fx.capture.capture import Capture
from skipvit_fx.capture.example import example_of
from skipvit_fx.capture.opening import with_capture
from skipvit_fx.errors import NotRewrittenError, UnsupportedModelError
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.module_paths import naming_parts
from skipvit_fx.graph.more_graphs import watch
from skipvit_fx.graph.record import graph_lines, node_records, numbered_lines
from skipvit_fx.names import RECORD
from skipvit_fx.ops.switch import switches
from skipvit_fx.options import Cut, Frontend, Options, Score
from skipvit_fx.passes import passes_for
from skipvit_fx.plan import Plan
from skipvit_fx.reference import steps_of
from skipvit_fx.rewriting.context import start_rewrite
from skipvit_fx.rewriting.passes import run_passes
from skipvit_fx.rewriting.recording import record_rewrite
from skipvit_fx.rewriting.shapes import check_shapes
from skipvit_fx.validation import NOT_ASKED
from skipvit_fx.validation import validate as validate_rewrite


def rewrite(
    model: nn.Module,
    plan: Plan | str,
    *,
    example_inputs: Any = None,
    frontend: Frontend | Literal["auto"] = "auto",
    cut: Cut = "attention",
    score: Score = "auto",
    prefix_tokens: int | None = None,
    fill_taps: bool = False,
    eliminate_dead_tokens: bool = True,
    multiple_of: int = 1,
    train_only: bool = False,
    proportional_attention: bool = True,
    validate: bool = True,
) -> SkipViTModule:
    """Give a Vision Transformer a token-level skip connection.

    Args:
        model: any ``nn.Module`` with one sequence of tokens from its first layer to its last. It is not changed.
        plan: where tokens leave and return, as a :class:`Plan` or in the paper's notation: ``"6(55%)+11"`` drops
            55 % of the patch tokens at layer 6 and returns them at the input of layer 11. ``Plan()`` drops nothing;
            :mod:`skipvit_fx.plan` has the grammar.
        example_inputs: arguments of an example call: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments. Shapes, dtypes and devices matter; values matter only for validation, where random ones replace a
            constant. Default: images of the size in the model's configuration.
        frontend: how the model is captured: ``"symbolic"`` traces it with torch.fx, ``"export"`` uses ``torch.export``,
            and ``"auto"`` exports what cannot be traced.
        cut: ``"attention"`` cuts after the attention of the layer, before its feed-forward network (as EViT does);
            ``"block"`` cuts after the whole layer.
        score: what makes a patch important, in that layer. ``"cls"``: the attention that the class token pays it;
            ``"mean"``: the attention of the mean query; ``"auto"``: the first if there is a class token, else the
            second; ``"received"``: the attention that it gets from all tokens, on average, for which the attention
            matrix is computed beside a fused attention; ``"values"``: the length of its value, mean over heads;
            ``"keys"``: how unlike those of the other patches its key is; ``"random"``. Or a function from patch tokens
            ``[batch, patches, channels]`` to scores ``[batch, patches]``, or the name of one that
            :func:`register_score` knows. If the function has parameters named ``keys``, ``queries``, ``values``
            (``[batch, heads, patches, channels]``) or ``attention`` (``[batch, heads, patches]``, of the class token,
            or of the mean query if there is none), it gets these of the layer's attention, by name.
        prefix_tokens: the number of leading tokens that are not patches (class, distillation, registers). Default:
            found.
        fill_taps: outputs besides the last result (hidden states, a token grid of an earlier layer) that are computed
            under a drop are refused; with ``True`` they are returned in full, with the dropped tokens in the state in
            which they left.
        eliminate_dead_tokens: also leave out rows that no output reads, which is exact: after the last attention, often
            all rows except the class token's. Not applied if the plan drops 0 %, which is bit-identical to the model.
        multiple_of: more patches stay, so that the length of the shortened sequence, prefix and fused tokens included,
            is a multiple of this. Attention kernels work in tiles of 8 or 16, and pad the last one.
        train_only: skip only while training. In eval mode every token passes through every layer, bit for bit as in the
            model.
        proportional_attention: in a span with ``+merged``, add the logarithm of a token's size, the number of patches
            in it, to its logit in every attention.
        validate: run the rewritten graph once on two images and compare it with the model with the same tokens masked,
            on the model's device. This takes about three forward passes, which leave no trace. It is not done if the
            model, or the example, is on the meta device. ``False`` is for models that are too large to run.

    Returns:
        A ``torch.fx.GraphModule`` that takes and returns the same as the model. It shares the model's parameters and
        buffers, and has its ``state_dict`` keys.

    Raises:
        PlanError: the plan contradicts itself, or does not fit the model's depth, or an argument is not one of its
            choices.
        TypeError: ``model`` is not a module, or a module cannot be called with ``example_inputs``.
        TraceError: the model's Python code cannot be captured.
        UnsupportedModelError: a rewrite would not be sound; the node, its module and the reason are named.
        ValidationError: the rewritten graph does not compute what the model does; the first place is named.
    """
    args, kwargs = example_of(model, example_inputs)
    options = Options(
        plan if isinstance(plan, Plan) else Plan.parse(plan),
        frontend=frontend,
        cut=cut,
        score=score,
        prefix_tokens=prefix_tokens,
        fill_taps=fill_taps,
        eliminate_dead_tokens=eliminate_dead_tokens,
        multiple_of=multiple_of,
        train_only=train_only,
        proportional_attention=proportional_attention,
        validate=validate,
    )
    if any(isinstance(module, SkipViTModule) for module in model.modules()):
        raise UnsupportedModelError(
            "the model was already rewritten",
            hint="rewrite the original model with the plan that you want",
        )
    fast = _rewritten(options, model, args, kwargs)
    set_train_only(fast, train_only)
    return fast


def _rewritten(
    options: Options, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SkipViTModule:
    """Rewrite ``model`` for one call of its forward."""

    def work(capture: Capture) -> SkipViTModule:
        fast = capture.module
        captured = steps_of(fast.graph)
        before = graph_lines(fast.graph), numbered_lines(fast.graph)
        nodes = tuple(node_records(fast.graph))
        with naming_parts(capture.opened):
            context = start_rewrite(capture, options)
            edits = run_passes(passes_for(options), context)
            check_shapes(context)
        found = validate_rewrite(model, context, captured) if options.validate else NOT_ASKED
        record = record_rewrite(context, nodes, edits, *before, found)
        fast.meta[RECORD] = fast.own.calls[0].record = record
        fast.own.drops = options.drops
        fast.own.rewrite = functools.partial(_rewritten, options)
        watch(fast, capture.opened, context.stream.modules)
        uses = uses_of(context.analysis, context.on_fewer_tokens())
        fast.own.replacements = Replacements(fast, uses)
        return fast

    return with_capture(model, args, kwargs, work, frontend=options.frontend)


def set_skipping(fast: nn.Module, on: bool) -> None:
    """Switch skipping off, or on again. While off, the module computes bit for bit what the model does, in both modes.

    Nothing is traced again; a compiled module compiles once more for each of the two settings.

    Raises:
        NotRewrittenError: ``fast`` did not come from :func:`rewrite`.
        PlanError: ``on`` is not a bool.
    """
    check_rewritten(fast)
    check_flag("on", on)
    for switch in switches(fast):
        switch.enabled = on


@contextlib.contextmanager
def skipping(fast: nn.Module, on: bool) -> Iterator[None]:
    """A context in which skipping is on or off; afterwards it is as before: ``with skipping(fast, False):``.

    Raises:
        NotRewrittenError, PlanError: as :func:`set_skipping` does.
    """
    check_rewritten(fast)
    before = {switch: switch.enabled for switch in switches(fast)}
    set_skipping(fast, on)
    try:
        yield
    finally:
        for switch, enabled in before.items():
            switch.enabled = enabled


def set_train_only(fast: nn.Module, train_only: bool) -> None:
    """Set whether skipping is off in eval mode: ``train_only`` of :func:`rewrite`."""
    for switch in switches(fast):
        switch.train_only = train_only


def check_rewritten(fast: nn.Module) -> None:
    """Check that ``fast`` is or contains a rewritten model.

    Raises:
        NotRewrittenError: ``fast`` did not come from :func:`rewrite`.
    """
    modules = fast.modules() if isinstance(fast, nn.Module) else ()
    if not any(isinstance(module, SkipViTModule) for module in modules):
        raise NotRewrittenError(
            f"{type(fast).__name__} is not a rewritten model", hint="call skipvit_fx.rewrite first"
        )
