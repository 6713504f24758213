"""The result of :func:`skipvit_fx.find_attention`: a table, explanations in sentences, and plain values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, fx, nn

from skipvit_fx.analysis.apart import takes_tokens, why_not_apart
from skipvit_fx.analysis.axes import Batch, is_lost, size, tensors_in, tokens_of
from skipvit_fx.analysis.layers import Stream
from skipvit_fx.analysis.residual import is_softmax, keys_of
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.capture.capture import Capture
from skipvit_fx.capture.watch import Calls
from skipvit_fx.errors import SkipViTError, UnsupportedModelError
from skipvit_fx.graph.attention_ops import SDPA
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.reports.html import paragraphs, table
from skipvit_fx.reports.table import columns

_HEAD = ("layer", "module", "kind", "tokens", "heads", "prefix")


@dataclass(frozen=True)
class Site:
    """One attention, or any other softmax.

    Attributes:
        layer: the layer whose attention it is; ``None`` if it belongs to no layer.
        node: its name in the graph; empty if the model could not be captured.
        module_path: the module that it runs in.
        fused: whether it is a ``scaled_dot_product_attention``, rather than spelled out with a softmax.
        tokens: the number of keys of the attention.
        heads: attention heads per sample; ``None`` if the axes are not known.
        reason: why it is not a layer's attention; empty if it is.
    """

    layer: int | None
    node: str
    module_path: str
    fused: bool
    tokens: int
    heads: int | None
    reason: str

    @property
    def kind(self) -> str:
        """``fused`` or ``spelled out``."""
        return "fused" if self.fused else "spelled out"


@dataclass(frozen=True)
class FoundLayer:
    """One transformer layer, by names of nodes in the graph.

    Attributes:
        index: counts from 1, as plans do.
        input, cut, end: the residual stream before the layer, after its attention, after the layer.
        sites: its attentions; two in a layer of parallel blocks.
    """

    index: int
    input: str
    cut: str
    end: str
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Progress:
    """How far the analysis got."""

    capture: Capture | None = None
    analysis: TokenAnalysis | None = None
    stream: Stream | None = None
    refusal: SkipViTError | None = None


def between_layers(stream: Stream, graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes after the first layer's input, up to the last layer's end."""
    first, last = stream.layers[0].input, stream.layers[-1].end
    return (node for node in graph.nodes if first < node <= last)


class AttentionReport:
    """The attention sites and layers of a model. Print it, or call :meth:`explain`.

    Attributes:
        model: class name of the model.
        layers: the transformer layers, first to last; empty if the model is refused.
        sites: every attention and every other softmax, in the order in which they run.
        prefix_tokens, patches, trailing_tokens: numbers of rows of the sequence; ``None`` if the model is refused.
        class_token: whether there is a class token, whose attention then scores the patches; ``None`` if the model is
            refused.
        scored_by: that row and how it was told, such as ``row 0: read by the head``; empty if the model is refused.
        obstacles: names of nodes between the first and the last layer that mix tokens, each with the reason. No drop
            may span them.
        refusal: the error that :func:`skipvit_fx.rewrite` would raise for any plan; ``None`` if there is none.
    """

    def __init__(self, model: nn.Module, calls: Calls, found: Progress) -> None:
        self.model = type(model).__name__
        self.refusal = found.refusal
        self._modules = [path for path, _ in model.named_modules()]
        self._calls = calls
        self._capture, self._analysis, self._stream = found.capture, found.analysis, found.stream
        self.sites = tuple(self._find_sites())
        self.layers: tuple[FoundLayer, ...] = ()
        self.prefix_tokens: int | None = None
        self.patches: int | None = None
        self.trailing_tokens: int | None = None
        self.class_token: bool | None = None
        self.scored_by = ""
        self.obstacles: dict[str, str] = {}
        if self._stream is not None:
            self._describe(self._stream)

    def _describe(self, stream: Stream) -> None:
        tokens = stream.tokens
        self.prefix_tokens, self.patches = tokens.prefix, tokens.patches
        self.trailing_tokens = tokens.suffix
        self.class_token = stream.class_token.row is not None
        self.scored_by = str(stream.class_token)
        self.layers = tuple(
            FoundLayer(
                layer.index,
                layer.input.name,
                layer.cut.name,
                layer.end.name,
                tuple(site for site in self.sites if site.layer == layer.index),
            )
            for layer in stream.layers
        )
        assert self._analysis is not None
        assert self._capture is not None
        for node in between_layers(stream, self._capture.module.graph):
            if reason := self._analysis[node].mixing:
                self.obstacles[node.name] = reason

    # -- sites ------------------------------------------------------------------------------------------------

    def _find_sites(self) -> Iterator[Site]:
        if self._analysis is None or self._capture is None:
            reason = "the model could not be captured as a graph"
            for call in self._calls.attention:
                yield Site(None, "", call.module_path, call.fused, call.length, None, reason)
            return
        layer_of = {}
        if self._stream is not None:
            layer_of = {s.node: layer.index for layer in self._stream.layers for s in layer.sites}
        for node in self._capture.module.graph.nodes:
            if not is_softmax(self._analysis, node):
                continue
            layer = layer_of.get(node)
            yield Site(
                layer,
                node.name,
                module_path(node),
                node.target in SDPA,
                keys_of(self._analysis, node),
                _heads(self._analysis, node),
                "" if layer else self._why_no_layer(node),
            )

    def _why_no_layer(self, node: fx.Node) -> str:
        """Why an attention or softmax is not a layer's attention."""
        analysis = self._analysis
        assert analysis is not None
        facts = analysis[node]
        if facts.mixing:
            return facts.mixing
        if not takes_tokens(analysis, node):
            inputs = [t for a in node.all_input_nodes for t in tensors_in(analysis[a].value)]
            if any(is_lost(t) for t in inputs):
                return "an operator before it mixed the tokens, so where they are now is not known"
            if self._stream is None:
                return "no token axis is known here"
            return "it does not work on the sequence of tokens"
        if facts.softmax_over is None:
            return f"it runs over an axis of length {keys_of(analysis, node)}, which is not the token axis"
        if not any(
            (tokens := tokens_of(dim)) is not None and not tokens.weights
            for dim in facts.axes or ()
        ):
            return "its queries are not the tokens: class attention, or attention that pools"
        if self._stream is None:
            return "the model as a whole is refused"
        return "it is not on a branch of the residual stream that all later layers read"

    # -- explain ----------------------------------------------------------------------------------------------

    def explain(self, place: str) -> str:
        """Why a place did or did not match, in plain sentences.

        Args:
            place: path of a module, as in ``model.get_submodule``, or name of a node in the graph.
        """
        sentences = self._of_node(place)
        if place in self._modules:
            sentences = self._of_module(place)
        if not sentences:
            return self._unknown(place)
        if self.refusal is not None:
            sentences.append(f"The model as a whole is refused: {_message(self.refusal)}.")
        return " ".join(sentences)

    def _unknown(self, place: str) -> str:
        names = [path for path in self._modules if path]
        if self._capture is not None:
            names += [node.name for node in self._capture.module.graph.nodes]
        close = difflib.get_close_matches(place, dict.fromkeys(names), n=3)
        text = f"{place!r} is neither a module of this {self.model} nor a node of its graph."
        return f"{text} Close to it: {', '.join(close)}." if close else text

    def _of_module(self, path: str) -> list[str]:
        what = repr(path) if path else "The model"
        own = [site for site in self.sites if _within(site.module_path, path)]
        matched = [site for site in own if site.layer]
        if matched:
            layers = list(dict.fromkeys(str(site.layer) for site in matched))
            if len(layers) > 1:
                return [f"{what} holds the attention of layers {layers[0]} to {layers[-1]}."]
            return [self._of_site(what, site) for site in matched]
        if own:
            return [self._of_site(what, site) for site in own]
        if path not in self._calls.modules:
            return [self._never_called(what, path)]
        return self._without_attention(what, path)

    def _of_site(self, what: str, site: Site) -> str:
        how = "a fused scaled_dot_product_attention" if site.fused else "a softmax"
        node = f" (node {site.node!r})" if site.node else ""
        heads = f" and {site.heads} heads" if site.heads else ""
        if site.layer:
            rows = f"{self.prefix_tokens} prefix, {self.patches} patches"
            return (
                f"{what} holds the attention of layer {site.layer}: {how}{node} over {site.tokens} tokens "
                f"({rows}){heads}."
            )
        return f"{what} holds {how}{node}, but it is not a layer's attention: {site.reason}."

    def _never_called(self, what: str, path: str) -> str:
        if any(_within(other, path) for other in self._calls.modules):
            return f"{what} is a container: it is never called itself, but modules in it are."
        if any(
            node.op == "get_attr" and str(node.target).startswith(f"{path}.")
            for node in (self._capture.module.graph.nodes if self._capture else ())
        ):
            return f"{what} is never called, but its parameters are read by the code around it."
        return f"{what} is never executed on the example inputs."

    def _without_attention(self, what: str, path: str) -> list[str]:
        if self._capture is None or self._analysis is None:
            return [f"{what} runs no attention."]
        nodes = list(self._capture.module.graph.nodes)
        calls = [node for node in nodes if node.op == "call_module"]
        if leaf := [node for node in calls if node.target == path]:
            return [f"{what} runs no attention and is called as a whole.", *self._of_call(leaf)]
        around = [node for node in calls if _within(path, str(node.target))]
        if around:
            leaf_path = around[0].target
            inside = f"{what} is part of {leaf_path!r}, which runs no attention and is called as a whole."
            return [inside, *self._of_call([n for n in around if n.target == leaf_path])]
        inside = f"{what} runs no attention, but was traced through."
        reasons = self._reasons([n for n in nodes if _within(module_path(n), path)])
        if not reasons:
            return [inside, "Nothing in it mixes tokens."]
        return [inside, *(f"At node {name!r} it mixes tokens: {why}." for name, why in reasons)]

    def _of_call(self, nodes: list[fx.Node]) -> list[str]:
        """What the calls of a leaf do to tokens."""
        if reasons := self._reasons(nodes):
            return [
                f"It does not keep tokens apart: {why} (node {name!r})." for name, why in reasons
            ]
        assert self._analysis is not None
        if not any(takes_tokens(self._analysis, node) for node in nodes):
            return ["It does not work on the sequence of tokens."]
        return [
            "It keeps tokens apart: each row of its result depends only on the same row of its input."
        ]

    def _reasons(self, nodes: list[fx.Node]) -> list[tuple[str, str]]:
        assert self._analysis is not None
        found = [(node.name, why_not_apart(self._analysis, node)) for node in nodes]
        return [(name, reason) for name, reason in found if reason]

    def _of_node(self, name: str) -> list[str]:
        if self._capture is None:
            return []
        node = next((n for n in self._capture.module.graph.nodes if n.name == name), None)
        if node is None:
            return []
        place = module_path(node)
        what = f"Node {name!r} in module {place!r}" if place else f"Node {name!r}"
        if self._analysis is None:
            return [f"{what} was captured, but not analysed."]
        sentences = [f"{what} {role}." for role in self._roles(name)]
        site = next((site for site in self.sites if site.node == name), None)
        if site is not None:
            return [*sentences, self._of_site(what, site)]
        if not isinstance(self._analysis[node].value, Tensor):
            return [*sentences, f"{what} is not a tensor."]
        if sentences:
            return sentences
        return [f"{what} runs no attention.", *self._of_call([node])]

    def _roles(self, name: str) -> list[str]:
        roles = []
        for layer in self.layers:
            if layer.input == name:
                roles.append(f"is the residual stream before layer {layer.index}")
            if layer.cut == name:
                roles.append(
                    f"is the residual stream after the attention of layer {layer.index}, where dropped tokens leave"
                )
        if self.layers and self.layers[-1].end == name:
            roles.append(f"is the residual stream after layer {self.layers[-1].index}, the last")
        return roles

    # -- output -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {
            "model": self.model,
            "prefix_tokens": self.prefix_tokens,
            "patches": self.patches,
            "trailing_tokens": self.trailing_tokens,
            "class_token": self.class_token,
            "scored_by": self.scored_by,
            "layers": [asdict(layer) for layer in self.layers],
            "other_sites": [asdict(site) for site in self.sites if not site.layer],
            "obstacles": self.obstacles,
            "refusal": None if self.refusal is None else _message(self.refusal),
            "hint": None if self.refusal is None else self.refusal.hint,
        }

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [self._headline()]
        if rows := [self._row(site) for site in self.sites if site.layer]:
            lines += ["", *columns([_HEAD, *rows], to_the_left=range(len(_HEAD)))]
        return "\n".join(lines + self._rest())

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        rows = [self._row(site) for site in self.sites if site.layer]
        found = table(_HEAD, rows, to_the_left=range(len(_HEAD))) if rows else ""
        return paragraphs(self._headline()) + found + paragraphs("\n".join(self._rest()))

    def _rest(self) -> list[str]:
        """What is not a layer, line by line."""
        lines = []
        if others := [site for site in self.sites if not site.layer]:
            lines += ["", "Not a layer's attention:"]
            lines += [f"  {s.module_path or '<root>'} ({s.kind}): {s.reason}" for s in others]
        if self.obstacles:
            lines += ["", "Tokens mix here, so no drop may span these nodes:"]
            lines += [f"  {name}: {reason}" for name, reason in self.obstacles.items()]
        if self.refusal is not None:
            lines += ["", f"Refused: {self.refusal}"]
        return lines

    def _headline(self) -> str:
        if not self.layers:
            return f"{self.model}: no layers found"
        rows = f"{self.prefix_tokens} prefix rows, {self.patches} patches"
        if self.trailing_tokens:
            rows += f", {self.trailing_tokens} trailing rows"
        has = "with a" if self.class_token else "no"
        return (
            f"{self.model}: {len(self.layers)} layers, {rows}, {has} class token ({self.scored_by})"
        )

    def _row(self, site: Site) -> tuple[str, ...]:
        numbers = (site.tokens, site.heads, self.prefix_tokens)
        cells = ("-" if number is None else str(number) for number in numbers)
        return (str(site.layer), site.module_path or "<root>", site.kind, *cells)


def _heads(analysis: TokenAnalysis, node: fx.Node) -> int | None:
    """The number of attention matrices per sample."""
    axes = analysis.axes(node)
    if axes is None:
        return None
    leading = axes[:-2] if node.target in SDPA else [d for d in axes if not tokens_of(d)]
    factors = [factor for dim in leading for factor in dim if not isinstance(factor, Batch)]
    return math.prod(size(factor) for factor in factors)


def _within(path: str, ancestor: str) -> bool:
    return not ancestor or path == ancestor or path.startswith(f"{ancestor}.")


def _message(error: SkipViTError) -> str:
    return error.reason if isinstance(error, UnsupportedModelError) else error.message
