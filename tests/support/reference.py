"""What a rewritten model must compute, worked out without the compiler.

`masked_reference` runs the *original* model with all of its tokens in place. From a cut on, the
dropped tokens are masked out of attention as keys and their residual state is held at its value at
the cut, until the layer at which they return. Only hooks and an interception of the attention
softmax are used, so any model fits that can say where its layers are (`Layout`).

`physical_reference` removes the rows for real, in a loop written out for timm's plain
`VisionTransformer`. It checks the masked reference, and, with ``fused=True``, it is the reference
of EViT's fused token, which no mask can express.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Ratio = Fraction | str | float
"""An ``int`` is a number of tokens."""
Stages = Sequence[tuple[int, Ratio]]
Cut = Literal["attention", "block"]
Score = Literal["cls", "mean"]


@dataclass(frozen=True)
class Point:
    """A place on the residual stream: the first argument of a module, or what it returns."""

    module: nn.Module
    side: Literal["input", "output"] = "input"


@dataclass(frozen=True)
class Layout:
    """Where the layers of a model are.

    Attributes:
        blocks: one module per layer, in the order they run; the same module may appear more than
            once.
        mid: per layer, the state after its attention residual, before its FFN. Where attention and
            FFN run in parallel there is none, and the layer's output stands here.
        prefix: tokens before the patches, as the layers see them; never dropped.
        suffix: tokens after the patches; never dropped.
        cls: position of the class token in the sequence the layers see, or None.
        token_dim: 1 for ``[B, N, C]``, 0 for ``[N, B, C]``.
        entry: per layer, its input. Empty: the input of each block.
        exit: what the layers hand over to the final norm. None: the end of the last layer, or the output of the last
            block.
        ends: per layer, the state after it, where that is not the next one's input (something stands between).
        taps: per layer, a state after its cut that is read besides: dropped tokens are in it as they left.
        marked: the model's own code says by `mark` where its layers are, which are no modules. Then `blocks` tells how
            many there are, and `mid`, `entry`, `exit` and `ends` nothing.
        mixed: modules that return attention weights after the softmax (talking heads), with the
            axis of the keys. A dropped token must weigh nothing there either, whatever bias the
            module adds.
    """

    blocks: Sequence[nn.Module]
    mid: Sequence[Point]
    prefix: int
    suffix: int = 0
    cls: int | None = None
    token_dim: int = 1
    entry: Sequence[Point] = ()
    exit: Point | None = None
    mixed: Sequence[tuple[nn.Module, int]] = ()
    ends: Sequence[Point] = ()
    taps: Sequence[Point] = ()
    marked: bool = False


@dataclass(frozen=True)
class StageResult:
    """One cut. Positions are of original patches, ascending; fused tokens come after them."""

    layer: int
    kept: Tensor
    dropped: Tensor
    scores: Tensor  # of the patches that were still there, ascending by position
    margin: (
        float  # relative distance between the lowest score kept and the highest dropped; 0 is a tie
    )


@dataclass(frozen=True)
class ReferenceResult:
    """The model's output and what was dropped on the way."""

    output: Any
    stages: list[StageResult]


def exact(ratio: Ratio) -> Fraction:
    """The ratio as it was written: 0.55 is 55/100 and not the nearest binary fraction."""
    return ratio if isinstance(ratio, Fraction) else Fraction(str(ratio))


def drop_count(ratio: Ratio, present: int) -> int:
    """How many of the patches that are present leave."""
    if isinstance(ratio, int):
        return min(ratio, present - 1)
    return math.floor(exact(ratio) * present)


def rank(scores: Tensor) -> Tensor:
    """Places in descending order of score; of two equal scores the earlier patch comes first."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def _select(
    scores: Tensor, n_drop: int, ranking: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Places kept and dropped, each ascending, and the margin between the two."""
    order = ranking(scores)
    n_keep = scores.shape[-1] - n_drop
    kept, dropped = order[:, :n_keep], order[:, n_keep:]
    margin = math.inf
    if n_drop and n_keep:
        lowest = scores.gather(1, kept).amin(1)
        highest = scores.gather(1, dropped).amax(1)
        margin = float(((lowest - highest) / lowest.abs()).min())
    return kept.sort(dim=1).values, dropped.sort(dim=1).values, margin


def _on_axes(flags: Tensor, like: Tensor, axis: int) -> Tensor:
    """Flags ``[B, N]`` to broadcast over `like`: samples (times heads) at 0, tokens at `axis`."""
    flags = flags.repeat_interleave(like.shape[0] // flags.shape[0], dim=0)
    shape = [1] * like.dim()
    shape[0], shape[axis] = flags.shape
    return flags.view(shape)


class _Interception(TorchFunctionMode):
    """Routes attention through a `MaskedRun`; every other call passes."""

    def __init__(self, run: MaskedRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.run.layer:
            if func is F.scaled_dot_product_attention:
                return self.run.attend(*args, **kwargs)
            if func in (torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax):
                return self.run.softmax(func, args, kwargs)
            if func is F.multi_head_attention_forward:
                return self.run.multi_head(*args, **kwargs)
        return func(*args, **kwargs)


_MARKED: list[MaskedRun] = []
"""The runs that go on in models that mark their places."""


def mark(state: Tensor, *places: str) -> Tensor:
    """Says in a model's code what place of a layer this state is, where no module begins or ends. Computes nothing."""
    for run in _MARKED:
        for place in places:
            state = run.at_mark(state, place)
    return state


class MaskedRun:
    """One run of `masked_reference`; its small methods are there for tests to break."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        *,
        stages: Stages,
        return_layer: int | tuple[int, ...] | None = None,
        cut: Cut = "attention",
        score: Score | None = None,
    ) -> None:
        depth = len(layout.blocks)
        layers = [layer for layer, _ in stages]
        assert len(layout.mid) == (0 if layout.marked else depth)
        assert len(layout.entry) in (0, depth)
        assert len(layout.ends) in (0, depth)
        assert layers == sorted(set(layers))
        assert all(1 <= layer <= depth for layer in layers)
        returns = (return_layer,) if isinstance(return_layer, int) else return_layer or ()
        assert all(min(layers) < layer <= depth + 1 for layer in returns)
        assert not model.training
        self.model, self.layout, self.depth = model, layout, depth
        self.stages = dict(stages)
        self.returns, self.cut = returns, cut
        self.score: Score = score or ("mean" if layout.cls is None else "cls")
        self.layer = 0  # the layer that is running; 0 between layers
        self.count = 0
        self.gone: Tensor | None = None  # [B, N]: in the sequence but passed around
        self.frozen: Tensor | None = None  # the state they had at the cut
        self.seen: list[Tensor] = []  # scores at the attentions of the layer that is running
        self.results: list[StageResult] = []

    # What may be broken on purpose.

    def hidden(self) -> Tensor | None:
        """The keys that the running layer must not see."""
        return self.gone

    def hold(self, state: Tensor) -> Tensor:
        """The state that dropped tokens keep, given the state of all at the cut."""
        return state

    ranking = staticmethod(rank)

    # Attention.

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention`, spelled out."""
        assert dropout_p == 0.0
        assert not is_causal
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
        logits = (
            query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        return self._weights(logits, logits.dim() - 1).to(value.dtype) @ value

    def multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _width: int,
        heads: int,
        weight: Tensor,
        bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero: bool,
        _dropout: float,
        out_weight: Tensor,
        out_bias: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """The core of `nn.MultiheadAttention`: self-attention over ``[N, B, C]`` in eval mode."""
        assert query is key
        assert key is value
        assert bias_k is bias_v is None
        assert not add_zero
        for name in ("key_padding_mask", "attn_mask", "q_proj_weight"):
            assert options.get(name) is None
        q, k, v = (
            part.reshape(*part.shape[:2], heads, -1).permute(1, 2, 0, 3)  # [B, H, N, D]
            for part in F.linear(query, weight, bias).chunk(3, dim=-1)
        )
        out = self.attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        return F.linear(out, out_weight, out_bias), None

    def softmax(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """A softmax; that of an attention if it runs over the square of all tokens."""
        logits, rest = args[0], args[1:]
        axis = int(kwargs["dim"] if "dim" in kwargs else rest[0]) % logits.dim()
        n = self._tokens()
        if axis == 0 or logits.shape[axis] != n or logits.shape[axis - 1] != n:
            return func(*args, **kwargs)
        dtype = kwargs.get("dtype")
        return self._weights(logits if dtype is None else logits.to(dtype), axis)

    def _weights(self, logits: Tensor, axis: int) -> Tensor:
        """Attention weights over the keys at `axis`, the queries being the axis before it."""
        n = self._tokens()
        if logits.shape[axis] != n or logits.shape[axis - 1] != n:
            return logits.softmax(axis)
        assert self.gone is not None
        hidden = self.hidden()
        if hidden is not None:
            logits = logits.masked_fill(_on_axes(hidden, logits, axis), -math.inf)
        if self.layer in self.stages:
            flat = logits.detach().movedim((axis - 1, axis), (-2, -1))
            flat = flat.reshape(self.gone.shape[0], -1, n, n)
            if self.score == "cls":
                assert self.layout.cls is not None
                row = flat[:, :, self.layout.cls]
            else:
                sees = (flat > -math.inf) & (~self.gone)[:, None, :, None]
                row = flat.masked_fill(~sees, 0.0).sum(2) / sees.sum(2).clamp(min=1)
                row = row.masked_fill(~sees.any(2), -math.inf)
            row = row.masked_fill(self.gone[:, None], -math.inf)
            self.seen.append(row.softmax(-1).mean(1))
        return logits.softmax(axis)

    def _tokens(self) -> int:
        return 0 if self.gone is None else self.gone.shape[1]

    # The residual stream.

    def _rows(self, flags: Tensor, state: Tensor) -> Tensor:
        """Flags ``[B, N]`` shaped to broadcast over a residual state."""
        flags = flags.transpose(0, 1) if self.layout.token_dim == 0 else flags
        return flags[..., None]

    def _decide(self, layer: int, state: Tensor) -> None:
        """The cut of a layer: who leaves, and with which state."""
        assert self.gone is not None
        assert self.seen
        n = self.gone.shape[1]
        first, last = self.layout.prefix, n - self.layout.suffix
        present = (~self.gone[:, first:last]).nonzero()[:, 1].view(self.gone.shape[0], -1)
        scores = torch.stack(self.seen).mean(0)[:, first:last].gather(1, present)
        n_drop = drop_count(self.stages[layer], present.shape[1])
        kept, dropped, margin = _select(scores, n_drop, self.ranking)
        kept, dropped = present.gather(1, kept), present.gather(1, dropped)
        self.results.append(StageResult(layer, kept, dropped, scores, margin))
        leaving = torch.zeros_like(self.gone).scatter(1, dropped + first, True)
        held = self.hold(state)
        self.frozen = (
            held
            if self.frozen is None
            else torch.where(self._rows(leaving, state), held, self.frozen)
        )
        self.gone = self.gone | leaving
        self.seen = []

    def _at_mid(self, state: Tensor) -> Tensor:
        if self.cut == "attention" and self.layer in self.stages:
            self._decide(self.layer, state)
        return state

    def _at_end(self, state: Tensor) -> Tensor:
        if self.cut == "block" and self.layer in self.stages:
            self._decide(self.layer, state)
        return state

    def at_mark(self, state: Tensor, place: str) -> Tensor:
        """The place of a layer that is not a module: its `"input"`, its `"cut"` or its `"end"`."""
        if place == "input":
            self.count += 1
            self.layer = self.count
            return self._at_border(self.layer, state)
        if place == "cut":
            return self._at_mid(state)
        state = self._at_end(state)
        return self._at_border(self.depth + 1, state) if self.layer == self.depth else state

    def _at_border(self, layer: int, state: Tensor) -> Tensor:
        """Between layers `layer - 1` and `layer`."""
        if self.gone is None:
            sizes = (
                (state.shape[1], state.shape[0]) if self.layout.token_dim == 0 else state.shape[:2]
            )
            self.gone = torch.zeros(sizes, dtype=torch.bool, device=state.device)
        if (
            self.cut == "block"
            and layer - 1 in self.stages
            and not (self.layout.ends or self.layout.marked)
        ):
            self._decide(layer - 1, state)
        state = self._held(state)
        if layer in self.returns:
            self.gone, self.frozen = torch.zeros_like(self.gone), None
        if (
            layer == self.depth + 1 and self.frozen is not None
        ):  # they never return: the rest is what the head reads
            there = (~self.gone).nonzero()[:, 1].view(self.gone.shape[0], -1)
            if self.layout.token_dim == 0:
                there = there.transpose(0, 1)
            state = state.gather(
                self.layout.token_dim, there[..., None].expand(*there.shape, state.shape[-1])
            )
        return state

    def _watch(self, point: Point, layer: int, action: Callable[[Tensor], Tensor]) -> Any:
        """Runs an action on the state at a point, whenever `layer` is the one that is running."""
        if point.side == "output":

            def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                return action(output) if self.layer == layer else output

            return point.module.register_forward_hook(after, prepend=True)  # what others see, too

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (action(args[0]), *args[1:]) if self.layer == layer else args

        return point.module.register_forward_pre_hook(before)

    def _mix(self, axis: int) -> Callable[..., Tensor]:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            hidden = self.hidden()
            return (
                output
                if hidden is None
                else output.masked_fill(_on_axes(hidden, output, axis), 0.0)
            )

        return after

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.count += 1
        self.layer = self.count

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.layer = 0

    def _held(self, state: Tensor) -> Tensor:
        """The state with dropped tokens as they were when they left."""
        if self.frozen is None:
            return state
        return torch.where(self._rows(self.gone, state), self.frozen, state)

    def __call__(self, *args: Any, **kwargs: Any) -> ReferenceResult:
        """Runs the model. The model keeps nothing of it."""
        layout = self.layout
        if layout.marked:
            _MARKED.append(self)
            try:
                with _Interception(self):
                    return self._result(self.model(*args, **kwargs))
            finally:
                _MARKED.pop()
        blocks = list(dict.fromkeys(layout.blocks))
        entry = layout.entry or [Point(block) for block in layout.blocks]
        with ExitStack() as stack:

            def keep(handle: Any) -> None:
                stack.callback(handle.remove)

            for block in blocks:
                keep(block.register_forward_pre_hook(self._enter))
            end = layout.ends[-1] if layout.ends else Point(layout.blocks[-1], "output")
            last = layout.exit or end
            # first, as the last hook of a module runs first: a cut may be at the same place
            keep(self._watch(last, self.depth, partial(self._at_border, self.depth + 1)))
            for layer, (start, mid) in enumerate(zip(entry, layout.mid, strict=True), 1):
                keep(self._watch(start, layer, partial(self._at_border, layer)))
                keep(self._watch(mid, layer, self._at_mid))
                if layout.ends:
                    keep(self._watch(layout.ends[layer - 1], layer, self._at_end))
                if layout.taps:
                    keep(self._watch(layout.taps[layer - 1], layer, self._held))
            for module, axis in layout.mixed:
                keep(module.register_forward_hook(self._mix(axis)))
            for block in blocks:
                keep(block.register_forward_hook(self._leave))
            with _Interception(self):
                output = self.model(*args, **kwargs)
        return self._result(output)

    def _result(self, output: Any) -> ReferenceResult:
        assert self.count == self.depth, f"{self.count} layers ran, {self.depth} were announced"
        assert [stage.layer for stage in self.results] == list(self.stages), (
            "a layer to cut at had no attention"
        )
        return ReferenceResult(output, self.results)


def masked_reference(
    model: nn.Module,
    x: Any,
    layout: Layout,
    *,
    stages: Stages,
    return_layer: int | tuple[int, ...] | None = None,
    cut: Cut = "attention",
    score: Score | None = None,
    run: type[MaskedRun] = MaskedRun,
) -> ReferenceResult:
    """The original model with dropped tokens masked and frozen in place; see the module docstring.

    Args:
        model: the model as its author wrote it, in eval mode.
        x: its input.
        layout: where its layers are.
        stages: layer (from 1) and the share of the patches still present that leave there.
        return_layer: the layer at whose input they return; ``depth + 1`` is before the final norm;
            None is never. Several if there are several spans: after each, all patches are there again.
        cut: after the attention residual or after the whole layer.
        score: None takes the class token's row where there is a class token, and the mean query
            otherwise.
        run: a broken `MaskedRun`, for the tests of the tests.
    """
    return run(model, layout, stages=stages, return_layer=return_layer, cut=cut, score=score)(x)


@dataclass
class _Sequence:
    """The tokens that are physically there, and those set aside."""

    prefix: Tensor
    patches: Tensor
    ids: Tensor
    aside: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    n_patches: int = 0
    n_fused: int = 0

    @property
    def all(self) -> Tensor:
        return torch.cat([self.prefix, self.patches], dim=1)

    def put(self, x: Tensor) -> None:
        border = self.prefix.shape[1]
        self.prefix, self.patches = x[:, :border], x[:, border:]

    def cut(self, layer: int, scores: Tensor, ratio: Ratio, fused: bool) -> StageResult:
        kept, dropped, margin = _select(scores, drop_count(ratio, scores.shape[1]), rank)
        width = self.patches.shape[-1]

        def rows(places: Tensor) -> Tensor:
            return self.patches.gather(1, places[..., None].expand(*places.shape, width))

        leaving = rows(dropped)
        result = StageResult(
            layer, self.ids.gather(1, kept), self.ids.gather(1, dropped), scores, margin
        )
        self.aside.append((result.dropped, leaving))
        self.patches, self.ids = rows(kept), result.kept
        if fused and dropped.shape[1]:
            one = (leaving * scores.gather(1, dropped)[..., None]).sum(dim=1, keepdim=True)
            self.patches = torch.cat([self.patches, one], dim=1)
            name = torch.full_like(self.ids[:, :1], self.n_patches + self.n_fused)
            self.ids = torch.cat([self.ids, name], dim=1)
            self.n_fused += 1
        return result

    def restore(self) -> None:
        """All patches in place again; fused tokens are not patches and are removed."""
        ids = torch.cat([self.ids, *(ids for ids, _ in self.aside)], dim=1)
        rows = torch.cat([self.patches, *(rows for _, rows in self.aside)], dim=1)
        order = ids.argsort(dim=1)[:, : self.n_patches]
        self.patches = rows.gather(1, order[..., None].expand(*order.shape, rows.shape[-1]))
        self.ids = ids.gather(1, order)
        self.aside = []


def physical_reference(
    model: Any,
    x: Tensor,
    *,
    stages: Stages,
    return_layer: int | None = None,
    fused: bool = False,
    cut: Cut = "attention",
    score: Score | None = None,
) -> ReferenceResult:
    """timm's plain `VisionTransformer`, layer by layer, with rows really leaving the sequence.

    With ``fused=True`` one more token stands in for those that left, after the patches kept: the
    sum of their states, each times its score, as in EViT. It is a patch token to later stages and
    is gone when the patches return.
    """
    assert not model.training
    plan = dict(stages)
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    n_prefix = model.num_prefix_tokens
    n = x.shape[1] - n_prefix
    tokens = _Sequence(
        x[:, :n_prefix], x[:, n_prefix:], torch.arange(n).expand(x.shape[0], n), n_patches=n
    )
    score = score or ("cls" if model.has_class_token else "mean")
    results = []
    for layer, block in enumerate(model.blocks, 1):
        if layer == return_layer:
            tokens.restore()
        x = tokens.all
        scores = None
        if layer in plan:
            attn = block.attn
            qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))
            q, k = attn.q_norm(qkv[:, :, 0]), attn.k_norm(qkv[:, :, 1])
            one = q[:, 0] if score == "cls" else q.mean(dim=1)
            logits = torch.einsum("bhd,bnhd->bhn", one, k) / math.sqrt(q.shape[-1])
            scores = logits.softmax(-1).mean(1)[:, n_prefix:].detach()
        x = x + block.ls1(block.attn(block.norm1(x)))
        tokens.put(x)
        if scores is not None and cut == "attention":
            results.append(tokens.cut(layer, scores, plan[layer], fused))
        x = tokens.all
        tokens.put(x + block.ls2(block.mlp(block.norm2(x))))
        if scores is not None and cut == "block":
            results.append(tokens.cut(layer, scores, plan[layer], fused))
    if return_layer == len(model.blocks) + 1:
        tokens.restore()
    return ReferenceResult(model.forward_head(model.norm(tokens.all)), results)


def relative_error(got: Any, wanted: Any) -> float:
    """Largest difference over the largest entry wanted, in any tensor of two like outputs."""
    if isinstance(wanted, Tensor):
        assert isinstance(got, Tensor)
        assert got.shape == wanted.shape, f"{tuple(got.shape)} != {tuple(wanted.shape)}"
        assert got.dtype == wanted.dtype
        if wanted.numel() == 0:
            return 0.0
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        return math.inf if math.isnan(error) else error
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        return max(relative_error(got[key], wanted[key]) for key in wanted)
    assert type(got) is type(wanted)
    assert len(got) == len(wanted)
    return max(relative_error(a, b) for a, b in zip(got, wanted, strict=True))


def assert_same_tokens(got: Sequence[Any], wanted: Sequence[StageResult]) -> None:
    """Two records of the same cuts: layer, kept, dropped (in any order), scores to rounding."""
    assert [stage.layer for stage in got] == [stage.layer for stage in wanted]
    for mine, theirs in zip(got, wanted, strict=True):
        for name in ("kept", "dropped"):
            a, b = getattr(mine, name).sort(dim=1).values, getattr(theirs, name)
            assert torch.equal(a, b), (
                f"layer {theirs.layer}: {name} differ: {a.tolist()} != {b.tolist()}"
            )
        a, b = mine.scores, theirs.scores
        assert a.shape == b.shape, (
            f"layer {theirs.layer}: scores {tuple(a.shape)} != {tuple(b.shape)}"
        )
        assert relative_error(a, b) < 1e-4, f"layer {theirs.layer}: scores differ"


def plan_text(stages: Stages, return_layer: int | None = None, fused: bool = False) -> str:
    """The plan in the notation that users write: ``4,7(30%,30%)+10``."""

    def percent(ratio: Ratio) -> str:
        value = exact(ratio) * 100
        return f"{value}%" if value.denominator == 1 else f"{float(value)}%"

    layers = ",".join(str(layer) for layer, _ in stages)
    ratios = ",".join(percent(ratio) for _, ratio in stages)
    back = "" if return_layer is None else f"+{return_layer}"
    return f"{layers}({ratios}){back}{'+fused' if fused else ''}"
