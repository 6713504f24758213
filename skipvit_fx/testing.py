"""Check a rewritten model of your own against a reference that removes no token.

The reference interprets the model's graph as it was captured, before any pass. All tokens stay in place; the dropped
ones are masked out of attention as keys, their values are zeroed, and their rows of the residual stream are held at
their state at the cut. What it shares with the compiler is the capture and the finding of attention, layers and token
axis; what it does not share is every edit: scores' places, selection, gathers, sizes, merges, dead tokens. So it finds
a wrong edit, and cannot find a wrong layer. It is given which tokens were dropped, and does not judge the choice. (The
project's own tests use another reference besides, made of hooks on the original model, which shares nothing.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from skipvit_fx.analysis.axes import Axes, Batch, Tokens, tokens_of
from skipvit_fx.analysis.explain import Located, locate
from skipvit_fx.analysis.layers import Layer
from skipvit_fx.analysis.residual import is_softmax
from skipvit_fx.analysis.tokens import SDPA
from skipvit_fx.inspect.tokens import TokenTrace, trace_tokens
from skipvit_fx.ir.example import example_of
from skipvit_fx.ir.sdpa import AttentionArguments
from skipvit_fx.ops.skip import Merge
from skipvit_fx.pipeline.record import RewriteRecord, record_of

TOLERANCE = 1e-4
"""Relative error up to which two float32 results of the same computation, in another order, count as equal."""


@dataclass(frozen=True)
class Check:
    """A rewritten model beside the reference.

    Attributes:
        error: largest difference, relative to the reference's largest value, between the outputs and between the
            residual streams behind the return (a class token alone does not tell whether patches are in order); NaN
            if not finite.
        traces: which tokens were dropped; the reference dropped the same.
    """

    error: float
    traces: tuple[TokenTrace, ...]

    @property
    def exact(self) -> bool:
        """Whether the error is within :data:`TOLERANCE`."""
        return self.error <= TOLERANCE


class Reference:
    """The mask-and-freeze reference of one model. Looking at the model is done once, for any number of rewrites.

    Args:
        model: the original model, in eval mode.
        example_inputs: as for :func:`skipvit_fx.rewrite`.
        prefix_tokens: as for :func:`skipvit_fx.rewrite`.

    Raises (from the constructor):
        SkipViTError: the compiler would refuse the model.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any = None, *, prefix_tokens: int | None = None
    ) -> None:
        if model.training:
            raise ValueError("the model must be in eval mode: there is no reference for dropout")
        self._located = locate(model, *example_of(model, example_inputs), prefix_tokens)

    @property
    def depth(self) -> int:
        """Layers found."""
        return len(self._located.stream.layers)

    @property
    def prefix_tokens(self) -> int:
        """Rows in front of the patches."""
        return self._located.stream.tokens.lead

    @property
    def patches(self) -> int:
        """Patches in the full sequence."""
        return self._located.stream.tokens.patches

    def run(
        self, record: RewriteRecord, traces: Sequence[TokenTrace], *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Run the model with the tokens of ``traces`` masked and frozen.

        Returns:
            The model's output, and the residual stream where the tokens return.

        Raises:
            ValueError: the reference does not apply, because the plan never returns its tokens or makes a fused one.
        """
        plan = record.plan
        if plan.fused:
            raise ValueError("a fused token cannot be expressed by masks")
        if plan.stages and plan.return_layer is None:
            raise ValueError("tokens that never return cannot stay in place")
        inputs = _inputs(self._located.capture.module.graph, args, kwargs)
        masked = _Masked(self._located, record, traces)
        with torch.no_grad():
            output = masked.run(*inputs)
        assert masked.returned is not None
        return output, masked.returned

    def check(self, fast: nn.Module, *args: Any, **kwargs: Any) -> Check:
        """Compare ``fast`` with the reference on these inputs.

        Raises:
            ValueError: the reference does not apply; see :meth:`run`. Or ``fast`` is in train mode.
        """
        if fast.training:
            raise ValueError("the rewritten model must be in eval mode: dropout would differ")
        record = record_of(fast)
        returned: list[Tensor] = []
        merges = [m for m in fast.modules() if isinstance(m, Merge)]
        handles = [
            m.register_forward_hook(lambda module, given, out: returned.append(out)) for m in merges
        ]
        state = (
            torch.get_rng_state()
        )  # some models draw in eval mode too, such as what an autoencoder masks
        try:
            with torch.no_grad():
                traces = tuple(trace_tokens(fast, *args, **kwargs))
                returned.clear()
                torch.set_rng_state(state)
                got = fast(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        torch.set_rng_state(state)
        wanted, stream = self.run(record, traces, *args, **kwargs)
        error = relative_error(got, wanted)
        if returned:  # rows behind the last that is read may be missing
            rows = returned[-1].shape[record.token_dim]
            there = stream.narrow(record.token_dim, 0, rows)
            error = max(error, relative_error(returned[-1], there), key=_badness)
        return Check(error, traces)


def _badness(error: float) -> float:
    return math.inf if math.isnan(error) else error


def check_rewrite(model: nn.Module, fast: nn.Module, *args: Any, **kwargs: Any) -> Check:
    """Compare a rewritten model with the mask-and-freeze reference, both in eval mode, on these inputs.

    Raises:
        ValueError: the reference does not apply; see :class:`Reference`.
    """
    example = kwargs if kwargs and not args else args
    reference = Reference(model, example, prefix_tokens=record_of(fast).prefix_tokens)
    return reference.check(fast, *args, **kwargs)


class _Masked(fx.Interpreter):
    """Runs the captured graph; ``gone`` flags the patches that are passed around, ``[batch, patches]``."""

    def __init__(
        self, located: Located, record: RewriteRecord, traces: Sequence[TokenTrace]
    ) -> None:
        super().__init__(located.capture.module.eval())
        self.analysis = located.analysis
        self.stream = located.stream
        layers = self.stream.layers
        dropped = {trace.layer: trace.dropped for trace in traces}
        self.leaving = {
            _cut(layers[layer - 1], record.cut): patches for layer, patches in dropped.items()
        }
        at = record.plan.return_layer or len(layers) + 1
        self.back = layers[at - 1].input if at <= len(layers) else layers[-1].end
        self.on_stream = {n for layer in layers for n in (layer.input, layer.cut, layer.end)}
        self.gone: Tensor | None = None
        self.frozen: Tensor | None = None
        self.returned: Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = (
            self._masked_attention(n)
            if self.gone is not None and n.target in SDPA
            else super().run_node(n)
        )
        if n in self.leaving:
            self._leave(value, self.leaving[n])
        if n in self.on_stream and self.gone is not None:
            value = self._freeze(value)
        if n is self.back:
            self.gone = None
            self.returned = value
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a node: logits without the dropped keys, values without the dropped rows."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        facts = self.analysis[n]
        if self.gone is None or n.target in SDPA:
            return args, kwargs
        replaced: dict[fx.Node, Tensor] = {}
        if facts.softmax_over is not None and is_softmax(self.analysis, n):
            logits = n.all_input_nodes[0]
            weights = facts.axes or ()
            (dim,) = (d for d, dim in enumerate(weights) if (t := tokens_of(dim)) and t.weights)
            flags = self._spread(weights, dim, self.env[logits])
            replaced[logits] = self.env[logits].masked_fill(flags, -math.inf)
        elif facts.sums_weights:
            for node in n.all_input_nodes:
                axes = self.analysis.axes(node) or ()
                tokens = [(d, t) for d, dim in enumerate(axes) if (t := tokens_of(dim))]
                if len(tokens) == 1 and not tokens[0][1].weights:
                    flags = self._spread(axes, tokens[0][0], self.env[node])
                    replaced[node] = self.env[node].masked_fill(flags, 0.0)
        if not replaced:
            return args, kwargs
        return fx.node.map_arg((n.args, n.kwargs), lambda a: replaced.get(a, self.env[a]))

    def _masked_attention(self, n: fx.Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        given = AttentionArguments(*args, **kwargs)
        axes = self.analysis.axes(AttentionArguments(*n.args, **n.kwargs).key)
        if axes is None or self.analysis[n].softmax_over is None:
            return super().run_node(n)
        flags = self._spread(axes, given.key.ndim - 2, given.key).transpose(-2, -1)
        mask = given.attn_mask
        if mask is None:
            mask = ~flags
        elif mask.dtype == torch.bool:
            mask = mask & ~flags
        else:
            mask = mask.masked_fill(flags, -math.inf)
        return n.target(**given._replace(attn_mask=mask)._asdict())  # type: ignore[operator]

    def _spread(self, axes: Axes, dim: int, like: Tensor) -> Tensor:
        """Flags of the rows along ``dim``, with as many axes as ``like``: rows at ``dim``, samples at the batch."""
        assert self.gone is not None
        tokens = tokens_of(axes[dim])
        assert isinstance(tokens, Tokens)
        flags = nn.functional.pad(self.gone, (tokens.lead, tokens.tail))
        at = next(d for d, factors in enumerate(axes) if any(isinstance(f, Batch) for f in factors))
        times = like.shape[at] // flags.shape[0]
        flags = (
            flags.repeat_interleave(times, 0)
            if isinstance(axes[at][0], Batch)
            else flags.repeat(times, 1)
        )
        shape = [1] * like.ndim
        shape[at], shape[dim] = flags.shape
        return (flags if at < dim else flags.T).reshape(shape)

    def _rows(self, patches: Tensor, like: Tensor) -> Tensor:
        """Flags ``[batch, patches]`` as rows of the residual stream."""
        tokens = self.stream.tokens
        flags = nn.functional.pad(patches, (tokens.lead, tokens.tail))
        return (flags if self.stream.dim == 1 else flags.T).unsqueeze(-1)

    def _leave(self, state: Tensor, patches: Tensor) -> None:
        count = self.stream.tokens.patches
        leaving = torch.zeros(patches.shape[0], count, dtype=torch.bool, device=state.device)
        leaving.scatter_(1, patches, True)
        if self.gone is None or self.frozen is None:
            self.gone, self.frozen = leaving, state
            return
        self.frozen = torch.where(self._rows(leaving, state), state, self.frozen)
        self.gone = self.gone | leaving

    def _freeze(self, state: Tensor) -> Tensor:
        assert self.gone is not None
        assert self.frozen is not None
        return torch.where(self._rows(self.gone, state), self.frozen, state)


def _cut(layer: Layer, cut: str) -> fx.Node:
    return layer.cut if cut == "attention" else layer.end


def _inputs(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """One value a placeholder: arguments that hold tensors have one, in the order of the signature."""
    positional = iter([a for a in args if any(isinstance(t, Tensor) for t in tree_leaves(a))])
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    return [kwargs[name] if name in kwargs else next(positional) for name in names]


def relative_error(got: Any, wanted: Any) -> float:
    """Largest difference of two outputs, relative to the largest value of ``wanted``, over all tensors in them.

    Mappings are compared by key, whatever their class. NaN if a tensor holds one.

    Raises:
        ValueError: the outputs differ in structure or shape.
    """
    if isinstance(wanted, Tensor):
        if not isinstance(got, Tensor) or got.shape != wanted.shape:
            raise ValueError(f"a tensor {tuple(wanted.shape)} is wanted, got {_outline(got)}")
        if not wanted.numel():
            return 0.0
        return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    if isinstance(wanted, Mapping):
        if not isinstance(got, Mapping) or got.keys() != wanted.keys():
            raise ValueError(f"a mapping with {list(wanted)} is wanted, got {_outline(got)}")
        errors = [relative_error(got[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(wanted):
            raise ValueError(f"{len(wanted)} values are wanted, got {_outline(got)}")
        errors = [relative_error(a, b) for a, b in zip(got, wanted, strict=True)]
    else:
        return 0.0
    return max(errors, default=0.0, key=_badness)


def _outline(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move all weights and running statistics far from their initial values, the same for the same seed.

    A fresh model hides mistakes: biases and position terms are zero, LayerScale is next to zero, norms are the
    identity. Returns the model, changed in place.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, scale: float, shift: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + shift)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            last = name.rsplit(".", 1)[-1].lower()
            if parameter.ndim >= 2 and last in ("weight", "in_proj_weight"):
                normal(parameter, parameter[0].numel() ** -0.5)
            elif parameter.ndim >= 2:  # tokens, position tables, queries
                normal(parameter, 0.7)
            elif parameter.ndim == 1 and ("weight" in last or "gamma" in last or "scale" in last):
                normal(parameter, 0.15, 0.8)
            else:
                normal(parameter, 0.3)
        for module in model.modules():
            if (
                isinstance(module, nn.modules.batchnorm._BatchNorm)
                and module.running_var is not None
            ):
                assert module.running_mean is not None
                normal(module.running_mean, 0.3)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model
