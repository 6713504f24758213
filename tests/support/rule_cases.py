"""Calls of every ATen operator that the token analysis has a rule for, made from the rule table and the schemas.

Dimensions are written as words of letters, a letter for each factor: ``BH N D`` is a tensor with the heads merged into
the batch. Sizes are pairwise distinct, also where samples or patches are left out, so that axes cannot be confused.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipvit_fx.analysis.axes import Axes, Batch, Factor, Tokens, merge_ints, size
from skipvit_fx.analysis.rules.call import RULES

aten = torch.ops.aten

LEAD, PATCHES, TAIL = 1, 5, 1
FACTORS: dict[str, Factor] = {
    "B": Batch(4),
    "N": Tokens(LEAD, PATCHES, TAIL),
    "W": Tokens(LEAD, PATCHES, TAIL, weights=True),
    "P": Tokens(0, PATCHES, 0),
    "Q": Tokens(0, PATCHES, LEAD + TAIL),  # as long as N, and out of step with it
    "H": 2,
    "D": 9,
    "C": 18,  # heads of D channels
    "K": 11,
    "1": 1,
    "2": 2,
    "4": 4,  # as many as samples, and not the samples
}


@functools.cache
def parse(spec: str) -> Axes:
    """The axes that a text such as ``BH N D`` stands for."""
    return tuple(merge_ints(FACTORS[letter] for letter in word) for word in spec.split())


class Selection(NamedTuple):
    """The samples that stay, and of each the patches that stay."""

    samples: tuple[int, ...]
    patches: tuple[tuple[int, ...], ...]

    def count(self, letter: str) -> int:
        """The size of a factor when all others have left."""
        factor = FACTORS[letter]
        if isinstance(factor, Batch):
            return len(self.samples)
        left = PATCHES - len(self.patches[0]) if isinstance(factor, Tokens) else 0
        return size(factor) - left


_SAMPLES, _ROWS = (0, 1, 2, 3), tuple(range(PATCHES))
EVERYTHING = Selection(_SAMPLES, (_ROWS,) * 4)
SELECTIONS = {
    "patches, the same of every sample": (Selection(_SAMPLES, ((0, 1, 4),) * 4),),
    "samples": (
        Selection((0, 2, 3), (_ROWS,) * 3),
        Selection((1, 2, 3), (_ROWS,) * 3),
    ),
    "patches, of every sample its own": (
        Selection(_SAMPLES, ((0, 1, 2), (2, 3, 4), (0, 2, 4), (1, 2, 3))),
        Selection(_SAMPLES, ((3, 4), (0, 3), (1, 2), (0, 4))),
        Selection((0, 1, 3), ((0, 2, 3), (1, 3, 4), (0, 1, 4))),
    ),
}
"""What is left out. Three samples or more stay always: PyTorch squeezes and broadcasts axes of length 1."""


class Size(NamedTuple):
    """A number in the arguments that follows what is left: the product of these factors, and some more."""

    letters: str
    more: int = 0

    def at(self, selection: Selection) -> int:
        """Its value for what is left."""
        return math.prod(selection.count(letter) for letter in self.letters) + self.more

    def __str__(self) -> str:
        return "*".join(self.letters) + (f"{self.more:+d}" if self.more else "")


class Scalar(NamedTuple):
    """A number of the kind that the tensors have."""


class Operand(NamedTuple):
    """A tensor in the arguments.

    ``labelled``: whether the analysis is told its axes. ``kind``: of its numbers, if it is not the call's.
    ``expanded``: whether it is one sample, expanded over the batch.
    """

    spec: str
    labelled: bool = True
    kind: str = ""
    expanded: bool = False

    @property
    def axes(self) -> Axes:
        """What its dimensions are, whether or not the analysis is told."""
        return parse(self.spec)

    def __str__(self) -> str:
        return ("" if self.labelled else "fixed") + f"[{', '.join(self.spec.split())}]"


def fixed(spec: str, kind: str = "") -> Operand:
    """A tensor that the analysis knows nothing about."""
    return Operand(spec, False, kind)


KINDS = ("float", "large", "share", "int", "bool", "complex")
USUAL_KIND = {aten.all: "bool", aten.any: "bool", aten.bernoulli: "share"}
SCALARS: dict[str, Any] = {"int": 2, "bool": True}


@functools.cache
def numbers(operand: Operand, kind: str, seed: int) -> Tensor:
    """The values of an operand, not to be written to: all different, as far as the kind allows."""
    generator = torch.Generator().manual_seed(seed)
    shape = [math.prod(size(factor) for factor in dim) for dim in operand.axes]
    drawn = [1, *shape[1:]] if operand.expanded else shape
    kind = operand.kind or kind
    if kind in ("int", "bool", "row"):
        high = 11 if kind == "int" else 2  # rows that every axis has
        values = torch.randint(0, high, drawn, generator=generator)
        values = values.bool() if kind == "bool" else values
    elif kind in ("large", "share"):
        values = torch.rand(drawn, dtype=torch.float64, generator=generator) + (kind == "large")
    else:
        dtype = torch.complex128 if kind == "complex" else torch.float64
        values = torch.randn(drawn, dtype=dtype, generator=generator)
    return values.expand(shape) if operand.expanded else values


@dataclass
class Case:
    """One call of an operator.

    Attributes:
        func: the overload.
        given: the arguments by name; those left out have their defaults.
        keyword: whether they are passed by name.
    """

    func: Any
    given: dict[str, Any]
    keyword: bool

    @functools.cached_property
    def operands(self) -> list[Operand]:
        """The tensors among the arguments, in order."""
        return list(_operands(list(self.given.values())))

    def call(self, tensors: Iterable[Tensor], selection: Selection, kind: str) -> Any:
        """The operator's result for these operands."""
        left = iter(tensors)
        values = {name: _fill(value, left, selection, kind) for name, value in self.given.items()}
        args = []
        if not self.keyword:
            for argument in self.func._schema.arguments:
                if argument.kwarg_only or argument.name not in values:
                    break
                args.append(values.pop(argument.name))
        return self.func(*args, **values)

    def __str__(self) -> str:
        return f"{self.func}({', '.join(f'{k}={_text(v)}' for k, v in self.given.items())})"


def _operands(value: Any) -> Iterator[Operand]:
    if isinstance(value, Operand):
        yield value
    elif type(value) is list:
        for part in value:
            yield from _operands(part)


def _fill(value: Any, tensors: Iterator[Tensor], selection: Selection, kind: str) -> Any:
    if isinstance(value, Operand):
        return next(tensors)
    if isinstance(value, Size):
        return value.at(selection)
    if isinstance(value, Scalar):
        return SCALARS.get(kind, 0.5)
    if type(value) is list:
        return [_fill(part, tensors, selection, kind) for part in value]
    return value


def _text(value: Any) -> str:
    if type(value) is list:
        return f"[{', '.join(map(_text, value))}]"
    return "x" if isinstance(value, Scalar) else str(value)


# -- which overloads ----------------------------------------------------------------------------------------------


_TENSORS = ("Tensor", "Optional[Tensor]", "List[Tensor]")


ONLY_CUDA = (aten.mm.dtype, aten.bmm.dtype, aten.addmm.dtype, aten.baddbmm.dtype)


def runs_on_tensors(func: Any) -> bool:
    """Whether an overload takes tensors and returns tensors, which is when the analysis asks for its rule.

    Left out: results written into ``out``, dimensions by name, generators that must be given, TorchScript's operators
    on lists and numbers, and what no processor computes.
    """
    if func in ONLY_CUDA:
        return False
    arguments = func._schema.arguments
    if not any(str(argument.real_type) in _TENSORS for argument in arguments):
        return False
    return returns_tensors(func) and not any(
        (argument.kwarg_only and argument.alias_info and argument.alias_info.is_write)
        or "Dimname" in str(argument.real_type)
        or "name" in func._overloadname.lower()  # in torch 2.10 their type is text
        or ("Generator" in str(argument.real_type) and not argument.has_default_value())
        for argument in arguments
    )


def returns_tensors(func: Any) -> bool:
    """Whether any result is a tensor. The analysis asks for no rule where none is."""
    return any(str(value.real_type) in _TENSORS for value in func._schema.returns)


def overloads(packet: Any) -> list[Any]:
    """The overloads of an operator that the analysis can meet."""
    found = [getattr(packet, name) for name in packet.overloads()]
    return [func for func in found if runs_on_tensors(func)]


def ruled_packets() -> list[Any]:
    """The operators that have a rule of their own, and some result that is a tensor."""
    return [
        packet
        for packet in RULES
        if any(returns_tensors(getattr(packet, name)) for name in packet.overloads())
    ]


def pointwise_packets() -> list[Any]:
    """The other operators that PyTorch calls pointwise."""
    every = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1].split(".")[0] for name in every if name.startswith("aten::")}
    packets = [getattr(aten, name) for name in sorted(names)]
    return [
        packet
        for packet in packets
        if packet not in RULES
        and any(torch.Tag.pointwise in func.tags for func in overloads(packet))
    ]


# -- arguments by type and name -----------------------------------------------------------------------------------

LAYOUTS = (
    "B N C",
    "N B C",
    "BH N D",
    "B H N D",
    "B N H D",
    "B N",
    "B H N W",
    "BN C",
    "B C N",
    "B P C",
)

Given = dict[str, Any]


MEETINGS = (
    ("B 1 N C", "1 B N C"),
    ("4 B N C", "B 1 N C"),
    ("B N 1", "B 1 N"),
    ("B N C", "B Q C"),
    ("BH N D", "HB N D"),
    ("BN C", "NB C"),
)
"""Labelled operands of which each sample, or token, would meet those of others."""


def meeting(count: int) -> Iterator[list[Operand]]:
    """The same for an operator of ``count`` tensors."""
    for one, two in MEETINGS if count > 1 else ():
        yield [Operand(one), Operand(two), Operand(one)][:count]


def elementwise(spec: str, count: int) -> Iterator[list[Operand]]:
    """Operands for the tensors of an elementwise operator: all tokens, and what may meet them."""
    words = spec.split()
    one_row = " ".join("1" if set(word) & set("NWPQ") else word for word in words)
    one_sample = " ".join("1" if "B" in word else word for word in words)
    first = Operand(spec)
    if count == 1:
        yield [first]
        return
    for other in (
        Operand(spec),
        fixed(""),
        fixed(words[-1]),
        Operand(" ".join([*words[:-1], "1"])),
        Operand(one_row),
        fixed(one_row),
        fixed(one_sample),
        fixed(spec),
    ):
        yield [first, other, *[first, other][: count - 2]]
        if not other.labelled:
            yield [other, first, *[first, other][: count - 2]]
    if count > 2:
        yield [first, first, fixed("")]


def values_of(argument: Any, rank: int) -> list[Any]:
    """Values for an argument that is not a tensor; ``LEFT_OUT`` for its default."""
    kind, name = str(argument.real_type), argument.name
    default = [LEFT_OUT] if argument.has_default_value() else []
    if (name, kind) == ("p", "int"):
        return [2]
    if name in BY_NAME:
        return default + BY_NAME[name]
    if "dim" in name and "int" in kind:
        every: list[Any] = list(range(-rank, rank))
        if "List" in kind:
            pairs = [list(pair) for pair in itertools.combinations(range(rank), 2)]
            every = [[d] for d in every] + pairs + [[-1, 0], []]
        return default + every + ([None] if "Optional" in kind else [])
    if default:
        return [*default, not argument.default_value] if kind == "bool" else default
    return BY_TYPE[kind]


LEFT_OUT = object()
BY_NAME: dict[str, list[Any]] = {
    "p": [0.0, 0.5],
    "k": [2],
    "n": [1],
    "decimals": [1],
    "from": [0],
    "to": [5],
    "rounding_mode": ["floor", None],
    "approximate": ["tanh"],
    "min": [Scalar()],
    "max": [Scalar()],
    "implicit": [],
}
BY_TYPE: dict[str, list[Any]] = {
    "bool": [True, False],
    "Optional[bool]": [True, False],
    "int": [2],
    "number": [Scalar()],
    "Optional[number]": [2],
    "float": [0.25],
    "Optional[float]": [0.25],
    "ScalarType": [torch.float64],
}


def by_schema(func: Any, layouts: Sequence[str]) -> Iterator[Given]:
    """Every layout, every axis, every flag."""
    arguments = func._schema.arguments
    others = [a for a in arguments if str(a.real_type) not in _TENSORS]
    tensors = [a.name for a in arguments if str(a.real_type) in _TENSORS]
    kinds = ["bool" if name in ("mask", "condition") else "" for name in tensors]
    for spec in layouts:
        values = [values_of(a, len(spec.split())) for a in others]
        every = list(elementwise(spec, len(tensors)))
        if spec == layouts[0]:
            every += meeting(len(tensors))
        for operands in every:
            operands = [o._replace(kind=k) for o, k in zip(operands, kinds, strict=True)]
            for chosen in itertools.product(*values):
                given: Given = dict(zip(tensors, operands, strict=True))
                given |= dict(zip((a.name for a in others), chosen, strict=True))
                yield {a.name: given[a.name] for a in arguments}


# -- arguments that depend on one another -------------------------------------------------------------------------

Values = Iterator[tuple[Any, ...]]


def lengths(spec: str) -> list[Any]:
    """The sizes of a shape, which follow what is left."""
    return [Size(word) for word in spec.split()]


VIEWS: dict[str, tuple[str, ...]] = {
    "B N C": ("BN C", "B NC", "B N H D", "B 1 N C", "BNC", "B N C", "N B C", "B C N", "C N B"),
    "N B C": ("NB C", "N BH D", "N B H D", "B N C"),
    "BH N D": ("B H N D", "H B N D", "BH N D", "BHN D", "N BH D"),
    "B H N D": ("BH N D", "B HN D", "H B N D", "B H ND"),
    "B N H D": ("B N C", "BN H D", "BN C", "BNH D"),
    "BN C": ("B N C", "N B C", "B N H D", "BN H D"),
    "B H N W": ("BH N W", "B HN W", "B H NW"),
    "B 1 N C": ("B N C", "1 B N C"),
    "B N": ("BN", "N B", "B N 1", "B 1 N"),
    "B P C": ("BP C", "B P H D", "P B C"),
}


def _views(func: Any) -> Values:
    for spec, targets in VIEWS.items():
        for target in targets:
            sizes = lengths(target)
            yield Operand(spec), sizes
            for d in range(len(sizes)):
                yield Operand(spec), [*sizes[:d], -1, *sizes[d + 1 :]]
    for sizes in ([2, -1], [-1, 2], [2, 2, -1], [-1, 9], [-1]):
        yield Operand("B N C"), sizes
        yield Operand("N B C"), sizes


def _view(func: Any) -> Values:
    if func is aten.view.dtype:
        for spec in LAYOUTS:
            for dtype in (torch.int64, torch.float32):
                yield Operand(spec), dtype
    else:
        yield from _views(func)


def _reshape_alias(func: Any) -> Values:
    for spec, sizes in _views(func):
        if -1 not in sizes:
            letters = ["".join(size.letters for size in sizes[d + 1 :]) for d in range(len(sizes))]
            yield spec, sizes, [Size(rest) for rest in letters]


def _squeeze(func: Any) -> Values:
    for spec in (*LAYOUTS, "B 1 N C", "1 B N 1", "B N 1", "N 1 B"):
        rank = len(spec.split())
        if func is aten.squeeze.default:
            yield (Operand(spec),)
        elif func is aten.squeeze.dim:
            yield from ((Operand(spec), d) for d in range(-rank, rank))
        else:
            yield from ((Operand(spec), [d]) for d in range(-rank, rank))
            yield from ((Operand(spec), dims) for dims in ([], [0, -1], list(range(rank))))


def _unsqueeze(func: Any) -> Values:
    for spec in LAYOUTS:
        rank = len(spec.split())
        yield from ((Operand(spec), d) for d in range(-rank - 1, rank + 1))


def _expand(func: Any) -> Values:
    for spec, target in (
        ("B N 1", "B N C"),
        ("B 1 N D", "B H N D"),
        ("B N C", "B N C"),
        ("B N C", "H B N C"),
        ("B N C", "1 1 B N C"),
        ("N B 1", "K N B C"),
        ("B 1 N", "B N N"),
        ("1 B N C", "B B N C"),
        ("1 B N C", "N B N C"),
        ("BH N 1", "BH N D"),
        ("B 1 N W", "B H N W"),
    ):
        words = target.split()
        own = ["new"] * (len(words) - len(spec.split())) + spec.split()
        same = [before == after for before, after in zip(own, words, strict=True)]
        sizes = [
            size if kept else size.at(EVERYTHING)  # what is new does not follow what is left
            for kept, size in zip(same, lengths(target), strict=True)
        ]
        yield Operand(spec), sizes
        yield Operand(spec), [-1 if kept else n for kept, n in zip(same, sizes, strict=True)]


def _repeat(func: Any) -> Values:
    for spec in LAYOUTS:
        rank = len(spec.split())
        for fresh in (0, 1, 2):
            for d in (None, *range(rank + fresh)):
                repeats = [3 if at == d else 1 for at in range(rank + fresh)]
                yield Operand(spec), repeats


def _new(func: Any) -> Values:
    for shape in ([4, 7, 18], [7, 18], [4, 1, 1], [18], []):
        filled = (Scalar(),) if func is aten.new_full.default else ()
        yield Operand("B N C"), shape, *filled
        yield Operand("N B C"), shape, *filled


def _permute(func: Any) -> Values:
    for spec in LAYOUTS:
        rank = len(spec.split())
        for order in list(itertools.permutations(range(rank)))[:10]:
            yield Operand(spec), list(order)
            yield Operand(spec), [d - rank if d % 2 else d for d in order]


def _t(func: Any) -> Values:
    for spec in ("B N", "N B", "BN C", "C BN", "BHN D"):
        yield (Operand(spec),)


def _select(func: Any) -> Values:
    for spec in LAYOUTS:
        words = spec.split()
        for d, word in enumerate(words):
            for index in (0, -1, 3, Size(word, -1)):
                yield Operand(spec), d, index
                yield Operand(spec), d - len(words), index


def _slice(func: Any) -> Values:
    for spec in LAYOUTS:
        words = spec.split()
        yield (Operand(spec),)
        for d, word in enumerate(words):
            last = Size(word, -1)
            for bounds in (
                (LEFT_OUT, LEFT_OUT),
                (0, 9223372036854775807),
                (0, Size(word)),
                (0, 1),
                (1, None),
                (1, last),
                (1, -1),
                (None, -1),
                (last, None),
                (-1, LEFT_OUT),
                (last, Size(word)),
                (1, 3),
                (3, LEFT_OUT),
                (2, 2),
                (-3, -1),
                (LEFT_OUT, LEFT_OUT, 2),
                (0, 1, 2),
                (1, None, 3),
            ):
                yield Operand(spec), d, *bounds
                if bounds[0] == 0 or bounds[-1] == -1:
                    yield Operand(spec), d - len(words), *bounds


def _split(func: Any) -> Values:
    for spec in LAYOUTS:
        words = spec.split()
        for d, word in enumerate(words):
            last = Size(word, -1)
            sections: list[Any]
            if str(func._schema.arguments[1].real_type) == "int":
                sections = [Size(word), 3, 1, last]
            else:
                sections = [[1, Size(word, -2), 1], [1, last], [last, 1], [Size(word)]]
                sections += [[Size(word), 0], [2, Size(word, -2)]]
            for section in sections:
                yield Operand(spec), section, d
                yield Operand(spec), section, d - len(words)
            if d == 0:
                yield Operand(spec), sections[0], LEFT_OUT
                yield Operand(spec), sections[1], LEFT_OUT


def _index_select(func: Any) -> Values:
    for spec in LAYOUTS:
        for d in range(-len(spec.split()), len(spec.split())):
            yield Operand(spec), d, fixed("K", "row")
            yield Operand(spec), d, fixed("", "row")
    for spec in ("BN", "N"):
        yield fixed("K C"), 0, Operand(spec, kind="row")
        yield Operand("B N C"), 2, Operand(spec, kind="row")


JOINED: tuple[list[Operand], ...] = (
    [Operand("B N C"), Operand("B N C")],
    [Operand("N B C"), Operand("N B C"), Operand("N B C")],
    [Operand("BH N D"), Operand("BH N D")],
    [Operand("B N C")],
    [fixed("B 1 C"), Operand("B N C")],
    [Operand("B N C"), fixed("B 2 C")],
    [fixed("B 2 C"), Operand("B P C"), fixed("B 1 C")],
    [fixed("1 B C"), Operand("N B C")],
    [Operand("N B C"), fixed("N 1 C")],
    [Operand("B N C"), fixed("B N C")],
    [fixed("B N C"), Operand("B N C")],
    [Operand("B N C"), fixed("2 N C")],
    [Operand("B N C"), Operand("B Q C")],
    [Operand("B N C"), Operand("B P C")],
    [Operand("B N C"), fixed("B N 2")],
    [Operand("B N C"), Operand("B N 1")],
    [Operand("B H N W"), Operand("B H N W")],
    [Operand("B H N W"), fixed("B H N 1")],
    [Operand("BN C"), Operand("BN C")],
    [Operand("BN C"), fixed("2 C")],
)


def _join(func: Any) -> Values:
    for operands in JOINED:
        rank = len(operands[0].spec.split())
        yield operands, LEFT_OUT
        for d in range(-rank - 1, rank + 1):
            yield operands, d


def _pad(func: Any) -> Values:
    for spec in LAYOUTS:
        for d in range(len(spec.split())):
            for pair in ([0, 1], [1, 0], [0, -1], [0, 0], [-1, 1]):
                yield Operand(spec), [0, 0] * d + pair, LEFT_OUT
            yield Operand(spec), [0, 0] * d + [1, 1], Scalar()
        yield Operand(spec), [], LEFT_OUT


def _roll(func: Any) -> Values:
    for spec in LAYOUTS:
        rank = len(spec.split())
        yield Operand(spec), [1], LEFT_OUT
        yield Operand(spec), [5], []
        for d in range(-rank, rank):
            yield Operand(spec), [2], [d]
            yield Operand(spec), [1, 1], [d, (d + 1) % rank]
        yield Operand(spec), [0], [0]
        yield Operand(spec), [1, -1], [-1, -1]


def _layer_norm(func: Any) -> Values:
    rest = (1e-5,) if func is aten.native_layer_norm.default else (None,)
    for spec in (*LAYOUTS, "N C B", "C B N"):
        words = spec.split()
        for d in range(len(words)):
            shape = " ".join(words[d:])
            for affine in ((None, None), (fixed(shape), None), (fixed(shape), fixed(shape))):
                count = 1 if func is aten._fused_rms_norm.default else 2
                yield Operand(spec), lengths(shape), *affine[:count], *rest
    weight = (Operand("B N"), None) if func is aten.native_layer_norm.default else (Operand("B N"),)
    yield fixed("K B N"), lengths("B N"), *weight, *rest
    yield Operand("N B N"), lengths("B N"), *weight, *rest


def _embedding(func: Any) -> Values:
    for spec in ("B N", "N B", "BN", "BH N", "B N C", "B H N W"):
        indices = Operand(spec, kind="int")
        yield fixed("K C"), indices
        yield fixed("K C"), indices, 0
        yield fixed("K C"), indices, -1, True
        yield Operand("BN C"), indices
        yield Operand("NB C"), indices
    yield Operand("BN C"), fixed("K", "int")


MATRICES: tuple[tuple[Operand, Operand], ...] = (
    (Operand("BN C"), fixed("C K")),
    (Operand("NB C"), fixed("C K")),
    (fixed("K C"), Operand("C BN")),
    (Operand("BN C"), Operand("C BN")),
    (Operand("C BN"), Operand("BN C")),
    (fixed("K BN"), Operand("BN C")),
    (Operand("B N"), fixed("N K")),
    (fixed("K B"), Operand("B N")),
    (Operand("N B"), fixed("B K")),
    (Operand("B N"), Operand("N B")),
    (Operand("N B"), Operand("B N")),
    (Operand("BN C"), fixed("C 4")),
    (Operand("BN C"), fixed("C N")),
    (Operand("BHN W"), fixed("N D")),
    (Operand("BN C"), Operand("C NB")),
)
BATCHES: tuple[tuple[Operand, Operand], ...] = (
    (Operand("B N C"), Operand("B C N")),
    (Operand("BH N D"), Operand("BH D N")),
    (Operand("B N C"), Operand("B C Q")),
    (Operand("B N W"), Operand("B N C")),
    (Operand("BH N W"), Operand("BH N D")),
    (Operand("BH N W"), Operand("BH P D")),
    (Operand("BH N W"), Operand("BH Q D")),
    (Operand("BH N N"), Operand("BH N D")),
    (Operand("BH N W"), Operand("BH W D")),
    (Operand("B C N"), Operand("B W N")),
    (Operand("B W N"), Operand("B N C")),
    (Operand("B N W"), fixed("B N C")),
    (Operand("B C N"), Operand("B N C")),
    (Operand("B N C"), fixed("B C K")),
    (Operand("B N C"), Operand("B C K", labelled=False, expanded=True)),
    (Operand("B K C", labelled=False, expanded=True), Operand("B C N")),
    (Operand("B C N"), fixed("B N K")),
    (Operand("B C N"), Operand("B N K", labelled=False, expanded=True)),
    (Operand("N B C"), fixed("N C K")),
    (Operand("N B C"), Operand("N C B")),
    (Operand("N B C"), Operand("N C K")),
    (Operand("N C B"), Operand("N B C")),
    (Operand("N C B"), fixed("N B K")),
    (Operand("H BN D"), fixed("H D K")),
    (Operand("H BN D"), Operand("H D BN")),
    (Operand("H BN D"), fixed("H D 4")),
    (Operand("HB N D"), Operand("HB D N")),
    (Operand("BH N D"), Operand("HB D N")),
    (Operand("BN H D"), fixed("BN D K")),
    (Operand("BN H D"), Operand("BN D H")),
    (Operand("BN H D"), Operand("NB D H")),
    (Operand("BN 1 C"), Operand("BN C 1")),
    (Operand("C N B"), Operand("C B N")),
    (Operand("C B N"), fixed("C N K")),
)


def _product(func: Any) -> Values:
    yield from MATRICES if func.overloadpacket is aten.mm else BATCHES


def _product_with_bias(func: Any) -> Values:
    for left, right in MATRICES if func.overloadpacket is aten.addmm else BATCHES:
        words = [*left.spec.split()[:-1], right.spec.split()[-1]]
        shapes = {" ".join(words): True, words[-1]: True}
        shapes |= {" ".join([*words[:-1], "1"]): True, " ".join(["1", *words[1:]]): True}
        for spec in shapes:
            yield fixed(spec), left, right
        yield Operand(" ".join(words)), left, right


def _matrix_vector(func: Any) -> Values:
    yield from (
        (Operand("BN C"), fixed("C")),
        (Operand("BHN D"), fixed("D")),
        (Operand("B N"), fixed("N")),
        (Operand("N B"), fixed("B")),
        (Operand("C BN"), Operand("BN")),
        (fixed("C BN"), Operand("BN")),
        (fixed("K BN"), Operand("BN")),
        (Operand("BN W"), fixed("N")),
    )


def _linear(func: Any) -> Values:
    for spec in (*LAYOUTS, "N C B", "C BN"):
        inner = spec.split()[-1]
        yield Operand(spec), fixed(f"K {inner}"), LEFT_OUT
        yield Operand(spec), fixed(f"K {inner}"), fixed("K")
    yield Operand("B N C"), Operand("BN C"), LEFT_OUT
    yield Operand("BN C"), Operand("NB C"), LEFT_OUT
    yield fixed("K C"), Operand("BN C"), LEFT_OUT
    yield Operand("BN C"), fixed("4 C"), fixed("4")
    yield Operand("B N C"), fixed("BN C"), Operand("BN")


def _convolution(func: Any) -> Values:
    def options(rank: int, **changed: Any) -> tuple[Any, ...]:
        usual: dict[str, Any] = {
            "stride": [1] * rank,
            "padding": [0] * rank,
            "dilation": [1] * rank,
        }
        usual |= {"transposed": False, "output_padding": [0] * rank, "groups": 1}
        return tuple((usual | changed).values())

    for spec in (
        "B C N",
        "N C B",
        "B N C",
        "N B C",
        "BH D N",
        "BN C 2",
        "C B N",
        "B C W",
        "K C BN",
    ):
        inner = spec.split()[1]
        yield Operand(spec), fixed(f"{inner} 1 1"), None, *options(1, groups=Size(inner))
        for kernel in ("1", "2"):
            weight = fixed(f"K {inner} {kernel}")
            yield Operand(spec), weight, None, *options(1)
            yield Operand(spec), weight, fixed("K"), *options(1, padding=[1])
            yield Operand(spec), weight, fixed("K"), *options(1, stride=[2])
            yield Operand(spec), weight, None, *options(1, dilation=[3])
            yield Operand(spec), fixed(f"{inner} K {kernel}"), None, *options(1, transposed=True)
    for spec in ("B C N H", "B C H N", "B D N W", "N C B H", "B H N D", "BN C H D"):
        inner = spec.split()[1]
        for kernel in ("1 1", "1 2", "2 1"):
            weight = fixed(f"K {inner} {kernel}")
            yield Operand(spec), weight, None, *options(2)
            yield Operand(spec), weight, fixed("K"), *options(2, padding=[0, 1])
            yield Operand(spec), weight, fixed("K"), *options(2, padding=[1, 0])
            yield Operand(spec), weight, None, *options(2, stride=[1, 2])
            yield Operand(spec), weight, None, *options(2, stride=[2, 1])
    yield Operand("B C N"), Operand("BN C 1"), None, *options(1)
    yield fixed("K C 2"), Operand("BN C 1"), None, *options(1)
    yield Operand("B C N"), fixed("K C 1"), Operand("K"), *options(1)


def _complex(func: Any) -> Values:
    for spec in ("B N C 2", "N B C 2", "BN 2", "BH N D 2", "B H N 2"):
        yield (Operand(spec),)


def _wide(func: Any) -> Values:
    for spec in LAYOUTS:
        yield (Operand(spec, kind="complex"),)


def _prelu(func: Any) -> Values:
    for spec in LAYOUTS:
        for weight in (fixed("1"), fixed(spec), Operand(spec), fixed(spec.split()[-1])):
            yield Operand(spec), weight
    yield fixed("B N C"), Operand("B N 1")


def _noisy(func: Any) -> Values:
    for spec in LAYOUTS:
        for training in (LEFT_OUT, True):
            for noise in (Operand(spec), fixed(spec)):
                yield Operand(spec), noise, LEFT_OUT, LEFT_OUT, training


SPECIAL: dict[Any, Callable[[Any], Values]] = {
    aten.view: _view,
    aten._unsafe_view: _views,
    aten.reshape: _views,
    aten._reshape_alias: _reshape_alias,
    aten.squeeze: _squeeze,
    aten.unsqueeze: _unsqueeze,
    aten.expand: _expand,
    aten.repeat: _repeat,
    aten.new_empty: _new,
    aten.new_zeros: _new,
    aten.new_ones: _new,
    aten.new_full: _new,
    aten.permute: _permute,
    aten.t: _t,
    aten.select: _select,
    aten.slice: _slice,
    aten.split: _split,
    aten.split_copy: _split,
    aten.split_with_sizes: _split,
    aten.split_with_sizes_copy: _split,
    aten.index_select: _index_select,
    aten.cat: _join,
    aten.stack: _join,
    aten.constant_pad_nd: _pad,
    aten.roll: _roll,
    aten.native_layer_norm: _layer_norm,
    aten._fused_rms_norm: _layer_norm,
    aten.embedding: _embedding,
    aten.mm: _product,
    aten.bmm: _product,
    aten.addmm: _product_with_bias,
    aten.baddbmm: _product_with_bias,
    aten.mv: _matrix_vector,
    aten.linear: _linear,
    aten.convolution: _convolution,
    aten.view_as_complex: _complex,
    aten.view_as_real: _wide,
    aten._prelu_kernel: _prelu,
    aten.rrelu_with_noise: _noisy,
}
"""Operators whose arguments depend on one another: what is passed, by position."""


def cases_of(packet: Any) -> Iterator[Case]:
    """Every call that is tried of an operator, by position and by name in turn.

    Operators that share the pointwise rule share the layouts, too: each has some of them, and attention weights.
    """
    layouts = LAYOUTS
    if packet not in RULES:
        at = sum(map(ord, str(packet))) % len(LAYOUTS)
        layouts = (LAYOUTS[at], "B H N W")
    for func in overloads(packet):
        names = [argument.name for argument in func._schema.arguments]
        every: Iterable[Given]
        if packet in SPECIAL:
            every = (dict(zip(names, values, strict=False)) for values in SPECIAL[packet](func))
        else:
            every = by_schema(func, layouts)
        for i, given in enumerate(every):
            left = {name: value for name, value in given.items() if value is not LEFT_OUT}
            yield Case(func, left, keyword=i % 2 == 1)
