"""Whether modules that a graph calls on fewer tokens still keep tokens and samples apart after a replacement.

A replacement (an adapter, a quantised layer) may compute with operators that no rule knows. So it is run on random rows
and on some of them: both runs must agree.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from skipvit_fx.analysis.axes import Axes, Batch, Factor, Tokens, axes_of, tensors_in
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.differences import relative_error, tolerance
from skipvit_fx.errors import GuardError, UnsupportedModelError
from skipvit_fx.graph.kept import Contents
from skipvit_fx.names import INSERTED
from skipvit_fx.ops.following import in_compilation
from skipvit_fx.torch_internals import BATCH_NORM, children_of, is_wrapped_by_functorch, pytree

SAMPLES, ROWS = 2, 4
"""With this few, any mixing makes a large difference."""

QUANTISED = 0.1
"""The largest relative error of a quantised module that keeps tokens apart: its scale may depend on all its inputs."""

_ALL = [*range(SAMPLES)], [*range(ROWS)]
_PARTS = (
    *((_ALL[0], [*pair], "tokens of a sample") for pair in itertools.combinations(_ALL[1], 2)),
    ([0], _ALL[1], "samples of a batch"),
    ([1], _ALL[1], "samples of a batch"),
)
"""Samples and rows. Every pair of rows is taken, since a symmetric pair (the middle two, the outer two) does not show a
reversal, and some pair lacks any given row that decides for all."""

_HINT = "rewrite the model with the replacement in it"


class Sketch(NamedTuple):
    """What is known about a tensor that a module takes or returns.

    Attributes:
        axes: where tokens and samples are.
        dtype: of its elements.
    """

    axes: Axes
    dtype: torch.dtype

    @property
    def factors(self) -> list[Factor]:
        """The factors of all its axes, in order."""
        return [factor for dim in self.axes for factor in dim]

    @property
    def sizes(self) -> list[int]:
        """The lengths of the factors, for :data:`ROWS` tokens and :data:`SAMPLES` samples."""
        known = {Tokens: ROWS, Batch: SAMPLES}
        return [f if isinstance(f, int) else known[type(f)] for f in self.factors]

    def drawn(self, dtype: torch.dtype, generator: Any) -> Tensor:
        """Random values, with an axis for each factor."""
        if self.dtype.is_floating_point:
            return torch.randn(self.sizes, generator=generator, device="cpu").to(dtype)
        return torch.randint(2, self.sizes, generator=generator, device="cpu").to(self.dtype)

    def taken(self, values: Tensor, samples: list[int], rows: list[int]) -> Tensor:
        """Some samples and rows of values that have an axis for each factor."""
        for at, factor in enumerate(self.factors):
            if not isinstance(factor, int):
                wanted = samples if isinstance(factor, Batch) else rows
                values = values.index_select(at, torch.tensor(wanted, device=values.device))
        return values

    def whole(self, values: Tensor) -> Tensor:
        """The tensor itself, from values that have an axis for each factor."""
        sizes = iter(values.shape)
        return values.reshape([math.prod(itertools.islice(sizes, len(dim))) for dim in self.axes])


class Use(NamedTuple):
    """One call of a module in a graph.

    Attributes:
        inputs: its positional and keyword arguments, a :class:`Sketch` for each tensor with tokens.
        outputs: a :class:`Sketch` for each tensor that it returns.
    """

    inputs: Any
    outputs: list[Sketch]


def uses_of(analysis: TokenAnalysis, nodes: Iterable[fx.Node]) -> dict[str, list[Use]]:
    """How the author's modules are called at these nodes, by path; only those that take and return tokens."""
    found: dict[str, list[Use]] = {}
    for node in nodes:
        if node.op == "call_module" and not str(node.target).startswith(INSERTED):
            outputs = [*map(_sketch, tensors_in(analysis.value(node)))]
            given = fx.node.map_arg(
                (node.args, node.kwargs), functools.partial(_of_author, analysis)
            )
            inputs = pytree.tree_map(_sketch, given)
            sketched = any(isinstance(leaf, Sketch) for leaf in pytree.tree_leaves(inputs, _whole))
            if sketched and all(isinstance(out, Sketch) for out in outputs):
                found.setdefault(str(node.target), []).append(Use(inputs, outputs))
    return found


def _of_author(analysis: TokenAnalysis, node: fx.Node) -> Any:
    """The value of a node; for an inserted node, that of the author's node whose rows it passes on."""
    while node not in analysis.facts:
        node = node.all_input_nodes[0]
    return analysis[node].value


def _sketch(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    axes = axes_of(leaf)
    if axes is not None:
        return Sketch(axes, leaf.dtype)
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")


def _whole(leaf: Any) -> bool:
    return isinstance(leaf, Sketch)


class Replacements:
    """The modules that the graphs of a rewritten model call on fewer tokens, as they were when they were judged.

    Args:
        root: the model.
        uses: how they are called.
        judged: whether their current state has been judged sound.
    """

    def __init__(
        self, root: nn.Module, uses: Mapping[str, list[Use]], *, judged: bool = True
    ) -> None:
        self.uses = dict(uses)
        self._root = root
        self._parts: dict[str, list[nn.Module]] = {path: [] for path in uses}
        self._contents: Contents | None = None  # None if a judgement is due
        if judged:
            self._look()

    def _look(self) -> None:
        holders: dict[int, dict[str, Any]] = {}
        for path in self.uses:
            parts = self._parts[path] = [*self._root.get_submodule(path).modules()]
            for module in [self._root.get_submodule(path.rpartition(".")[0]), *parts]:
                if children_of(module):
                    holders[id(children_of(module))] = children_of(module)
        self._contents = Contents(holders.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return ``None``: the modules that it refers to may not be copied, or not yet. See :meth:`of_copy`."""

    def of_copy(self, root: nn.Module) -> Replacements:
        """The same for a copy of the model."""
        return Replacements(root, self.uses, judged=not self._changed())

    def with_more(self, uses: Mapping[str, list[Use]]) -> Replacements:
        """The same, with the calls of another graph added."""
        both = {path: [*self.uses.get(path, ()), *more] for path, more in uses.items()}
        return Replacements(self._root, {**self.uses, **both})

    def _changed(self) -> bool:
        return self._contents is None or not self._contents.are_so()

    def check(self) -> None:
        """Find modules that were replaced since the last check, and judge them.

        Raises:
            UnsupportedModelError: one does not keep tokens and samples apart, or cannot be run on its own.
            GuardError: the model is being traced by a tool under which nothing can be run.
        """
        if not self._changed():
            return
        following = in_compilation()
        for path, parts in self._parts.items():
            module = self._root.get_submodule(path)
            now = [*module.modules()]
            if len(now) != len(parts) or not all(map(operator.is_, now, parts)):
                named = _what_is_new(path, module, parts)
                if following or any(map(_stands_in, [*module.parameters(), *module.buffers()])):
                    raise GuardError(
                        f"{named} since the last call, and cannot be run on its own while the model is compiled, "
                        "exported, transformed or sharded",
                        hint="call the rewritten model once before that",
                    )
                _alone(_judge, path, named, module, self.uses[path], _dtype_of([*now, self._root]))
        self._look()


def _stands_in(tensor: Tensor) -> bool:
    """Whether a ``torch.func`` transform, or sharding, has put something else in the place of a parameter."""
    wrapped = is_wrapped_by_functorch(tensor)
    return wrapped or tensor.is_meta or hasattr(tensor, "device_mesh")


def _what_is_new(path: str, module: nn.Module, before: list[nn.Module]) -> str:
    """What was replaced in a module, in words."""
    known = set(map(id, before))
    new = ((name, part) for name, part in module.named_modules() if id(part) not in known)
    name, part = next(new, ("", module))
    place = f"{path}.{name}".removesuffix(".")
    return f"module {place!r} was replaced by a {type(part).__name__}"


def _dtype_of(modules: list[nn.Module]) -> torch.dtype:
    """The dtype of the first floating-point parameter."""
    found = (p.dtype for module in modules for p in module.parameters() if p.is_floating_point())
    return next(found, torch.float32)


def _alone(function: Callable[..., None], *args: Any) -> None:
    """Call ``function`` in a thread of its own: no tracer, mode or autocast of this one is active there."""
    raised: list[BaseException] = []

    def call() -> None:
        try:
            function(*args)
        except BaseException as error:  # raised again below
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _judge(path: str, named: str, module: nn.Module, uses: list[Use], dtype: torch.dtype) -> None:
    """Run a module on all of a few random rows, and on some of them.

    Args:
        path: the path of the module that the graph calls.
        named: what was replaced in it.
        module: this module.
        uses: how it is called.
        dtype: that of its floating-point inputs.

    Raises:
        UnsupportedModelError: the results differ, or it does not run.
    """
    if any(isinstance(part, BATCH_NORM) for part in module.modules()):
        raise UnsupportedModelError(
            f"{named}, whose batch norm mixes tokens and samples in training",
            module_path=path,
            hint=_HINT,
        )
    try:
        with torch.no_grad():
            scratch = _scrambled(module)
            largest = _largest(scratch)
            for use in uses:
                for samples, rows, mixed in _PARTS:
                    error = _apart(scratch, use, samples, rows, dtype)
                    if not error <= largest:
                        raise UnsupportedModelError(
                            f"{named}, and now mixes the {mixed}: what {path!r} computes for one depends on the others",
                            module_path=path,
                            hint="undo that, and choose a plan under which all tokens pass this module",
                        )
    except (AuthorError, ValueError) as error:
        raise UnsupportedModelError(
            f"{named}, and running it on its own does not tell whether it keeps tokens apart: {error}",
            module_path=path,
            hint=_HINT,
        ) from error


def _largest(module: nn.Module) -> float:
    """The largest relative error at which two results of a module count as equal."""
    tensors = [*module.parameters(), *module.buffers()]
    plain = all(t.is_floating_point() and type(t) in (Tensor, nn.Parameter) for t in tensors)
    packed = any("quantized" in type(part).__module__ for part in module.modules())
    return tolerance(tensors) if plain and not packed else QUANTISED


def _scrambled(module: nn.Module) -> nn.Module:
    """A copy in eval mode with noise in its parameters, since a fresh adapter adds nothing."""
    with author_code():
        scratch = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in scratch.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.ndim:
            noise = (
                torch.randn(parameter.shape, generator=generator, device="cpu")
                * parameter.shape[-1] ** -0.5
            )
            parameter.data = parameter.data + noise.to(parameter)
    return scratch


def _apart(
    module: nn.Module, use: Use, samples: list[int], rows: list[int], dtype: torch.dtype
) -> float:
    """The error between a module's output for some rows and the same rows of its output for all."""
    generator = torch.Generator().manual_seed(1)
    device = next((t.device for t in [*module.parameters(), *module.buffers()]), None)

    def draw(leaf: Any) -> Any:
        if isinstance(leaf, Sketch):
            return leaf, leaf.drawn(dtype, generator).to(device)
        return torch.ones_like(leaf, device=device) if isinstance(leaf, Tensor) else leaf

    drawn = pytree.tree_map(draw, use.inputs, is_leaf=_whole)

    def run(select: Callable[[Sketch, Tensor], Tensor]) -> list[Tensor]:
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf[0].whole(select(*leaf)) if _is_drawn(leaf) else leaf,
            drawn,
            is_leaf=_is_drawn,
        )
        with author_code():
            return tensors_in(module(*args, **kwargs))

    every = run(lambda sketch, values: values)
    some = run(lambda sketch, values: sketch.taken(values, samples, rows))
    wanted = [
        sketch.whole(sketch.taken(out.reshape(sketch.sizes), samples, rows))
        for sketch, out in zip(use.outputs, every, strict=True)
    ]
    return relative_error(some, wanted)


def _is_drawn(leaf: Any) -> bool:
    return type(leaf) is tuple and len(leaf) == 2 and isinstance(leaf[0], Sketch)
