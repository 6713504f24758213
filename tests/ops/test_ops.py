"""The inserted modules on any shape: counts add up, prefixes survive, and what left comes back to its place."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from skipvit_fx.ops.dead_tokens import Narrow
from skipvit_fx.ops.positions import GatherPositions
from skipvit_fx.ops.rows import sequence_rows, take_rows
from skipvit_fx.ops.score import ScoreAtRandom, ScoreByFunction, ScoreByQuery, ScoreByWeights
from skipvit_fx.ops.select import Select, Survivors
from skipvit_fx.ops.skip import Fuse, Keep, PassAround, PutBack
from skipvit_fx.ops.switch import Switchable
from skipvit_fx.scores import by_keys, by_values

CHANNELS = 3
MANY = settings(max_examples=150, deadline=None, derandomize=True)


class Case(NamedTuple):
    """A sequence ``lead + n + tail`` of tokens at ``dim``, and what is dropped of its patches."""

    ratio: Fraction
    batch: int
    n: int
    lead: int
    tail: int
    dim: int
    seed: int

    @property
    def place(self) -> tuple[int, int, int]:
        return self.dim, self.lead, self.tail

    def stream(self) -> Tensor:
        """Every value its own, so that no row can pass for another."""
        total = self.batch * (self.lead + self.n + self.tail) * CHANNELS
        rows = torch.arange(float(total)).reshape(self.batch, -1, CHANNELS)
        return rows if self.dim == 1 else rows.transpose(0, 1)

    def batch_first(self, stream: Tensor) -> Tensor:
        return stream if self.dim == 1 else stream.transpose(0, 1)

    def scores(self, n: int | None = None, offset: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + offset)
        return torch.rand(self.batch, self.n if n is None else n, generator=generator)


ratios = st.integers(1, 20).flatmap(
    lambda below: st.integers(0, below - 1).map(lambda above: Fraction(above, below))
)
cases = st.builds(
    Case,
    ratio=ratios,
    batch=st.integers(1, 4),
    n=st.integers(1, 30),
    lead=st.integers(0, 3),
    tail=st.integers(0, 2),
    dim=st.integers(0, 1),
    seed=st.integers(0, 1000),
)
ties = st.integers(1, 12).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n, max_size=n), min_size=1, max_size=3
    )
)


def place_of(indices: Tensor) -> list[list[int]]:
    rows: list[list[int]] = indices.tolist()
    return rows


# -- select -------------------------------------------------------------------------------------------------------


@MANY
@given(cases)
def test_counts_add_up_and_order_is_kept(case: Case) -> None:
    scores = case.scores()
    kept, dropped = Select(case.ratio)(scores)
    n_drop = case.ratio.numerator * case.n // case.ratio.denominator
    if n_drop == 0:
        assert (kept, dropped) == (None, None)
        return
    assert kept.shape == (case.batch, case.n - n_drop)
    assert dropped.shape == (case.batch, n_drop)
    for row, (stay, leave) in enumerate(zip(place_of(kept), place_of(dropped), strict=True)):
        assert stay == sorted(stay)
        assert leave == sorted(leave)
        assert sorted(stay + leave) == list(range(case.n))
        assert scores[row, stay].min() >= scores[row, leave].max()


@MANY
@given(ties, ratios)
def test_of_equal_scores_the_earlier_patch_stays(rows: list[list[float]], ratio: Fraction) -> None:
    n = len(rows[0])
    n_drop = ratio.numerator * n // ratio.denominator
    kept, dropped = Select(ratio)(torch.tensor(rows))
    if n_drop == 0:
        assert kept is None
        return
    assert kept.dtype == dropped.dtype == torch.int32
    for row, stay in zip(rows, place_of(kept), strict=True):
        best = sorted(range(n), key=lambda i: (-row[i], i))[: n - n_drop]
        assert stay == sorted(best)


odd_scores = st.integers(2, 12).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([math.nan, -math.inf, -0.0, 0.0, 1.0, math.inf]), min_size=n),
        min_size=1,
        max_size=3,
    ).map(lambda rows: [row[:n] for row in rows])
)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@MANY
@given(odd_scores, ratios, st.sampled_from(DTYPES))
def test_the_choice_is_that_of_a_stable_sort(
    rows: list[list[float]], ratio: Fraction, dtype: torch.dtype
) -> None:
    """NaN comes first, and infinite scores are scores like others."""
    scores = torch.tensor(rows)
    if not dtype.is_floating_point:
        scores = scores.nan_to_num(2, 1, 0)
    scores = scores.to(dtype)
    kept, dropped = Select(ratio)(scores)
    if kept is None:
        return
    order = scores.argsort(dim=1, descending=True, stable=True)
    first = kept.shape[1]
    assert torch.equal(kept.long(), order[:, :first].sort(1).values)
    assert torch.equal(dropped.long(), order[:, first:].sort(1).values)


@pytest.mark.parametrize("n", [1024, 4096])
def test_a_choice_among_many(n: int) -> None:
    scores = torch.rand(2, n, generator=torch.Generator().manual_seed(0)).mul(300).floor()
    kept, dropped = Select(Fraction(55, 100))(scores)
    order = scores.argsort(dim=1, descending=True, stable=True)
    first = kept.shape[1]
    assert torch.equal(kept.long(), order[:, :first].sort(1).values)
    assert torch.equal(dropped.long(), order[:, first:].sort(1).values)


def test_the_papers_counts() -> None:
    kept, dropped = Select(Fraction(55, 100))(torch.rand(2, 196))
    assert (kept.shape, dropped.shape) == ((2, 89), (2, 107))
    kept, _ = Select(Fraction(3, 10))(torch.rand(2, 196))
    assert kept.shape == (2, 138)
    kept, _ = Select(Fraction(3, 10))(torch.rand(2, 138))
    assert kept.shape == (2, 97)


def test_several_scores_count_equally_and_carry_no_gradient() -> None:
    first = torch.tensor([[0.9, 0.0, 0.5, 0.1]], requires_grad=True)
    second = torch.tensor([[0.0, 0.8, 0.5, 0.1]], requires_grad=True)
    kept, dropped = Select(Fraction(1, 2))(first, second)
    assert place_of(kept) == [[0, 2]]
    assert place_of(dropped) == [[1, 3]]
    assert not kept.requires_grad


def test_steps_aside_where_every_score_does() -> None:
    assert Select(Fraction(1, 2))(None) == (None, None)
    kept, _ = Select(Fraction(1, 2))(None, torch.tensor([[1.0, 0.0]]))
    assert place_of(kept) == [[0]]


@MANY
@given(cases)
def test_survivors_are_named_in_the_full_sequence(case: Case) -> None:
    first, _ = Select(case.ratio)(case.scores())
    left = case.n if first is None else first.shape[1]
    second, _ = Select(case.ratio)(case.scores(left, offset=1))
    positions = Survivors()(first, second)
    names = [list(range(case.n))] * case.batch
    for chosen in (first, second):
        if chosen is not None:
            names = [
                [row[i] for i in stay] for row, stay in zip(names, place_of(chosen), strict=True)
            ]
    if first is None and second is None:
        assert positions is None
    else:
        assert place_of(positions) == names


# -- keep, around, fuse, return -----------------------------------------------------------------------------------


@MANY
@given(cases)
def test_prefix_and_kept_rows_survive_in_order(case: Case) -> None:
    stream = case.stream()
    kept, dropped = Select(case.ratio)(case.scores())
    shorter = Keep(*case.place)(stream, kept)
    around = PassAround(*case.place)(stream, dropped)
    if kept is None:
        assert shorter is stream
        assert around is None
        return
    whole, rows = case.batch_first(stream), case.batch_first(shorter)
    assert rows.shape[1] + around.shape[1] == whole.shape[1]
    end = case.lead + case.n
    for b, (stay, leave) in enumerate(zip(place_of(kept), place_of(dropped), strict=True)):
        patches = [case.lead + i for i in stay]
        wanted = [*range(case.lead), *patches, *range(end, end + case.tail)]
        assert torch.equal(rows[b], whole[b, wanted])
        assert torch.equal(around[b], whole[b, [case.lead + i for i in leave]])


@MANY
@given(cases, st.booleans())
def test_return_restores_the_original_order_exactly(case: Case, fused: bool) -> None:
    """What happened to the kept rows meanwhile (here: a sign) stays; the others are as they left."""
    stream = case.stream() + 1
    scores = case.scores()
    kept, dropped = Select(case.ratio)(scores)
    shorter = Keep(*case.place)(stream, kept)
    around = PassAround(*case.place)(stream, dropped)
    if fused:
        shorter = Fuse(*case.place)(shorter, around, dropped, scores)
    back = PutBack(*case.place, fused=fused)(-shorter, around, kept, dropped)
    assert back.shape == stream.shape
    assert torch.equal(back.abs(), stream)
    left = torch.zeros(case.batch, case.lead + case.n + case.tail, dtype=torch.bool)
    if dropped is not None:
        left.scatter_(1, dropped + case.lead, True)
    assert torch.equal(case.batch_first(back)[..., 0] > 0, left)


@MANY
@given(cases)
def test_two_stages_nest(case: Case) -> None:
    stream = case.stream() + 1
    inner, opened = stream, []
    for offset in range(2):
        present = case.batch_first(inner).shape[1] - case.lead - case.tail
        kept, dropped = Select(case.ratio)(case.scores(present, offset))
        opened.append((PassAround(*case.place)(inner, dropped), kept, dropped))
        inner = Keep(*case.place)(inner, kept)
    for around, kept, dropped in reversed(opened):
        inner = PutBack(*case.place, fused=False)(inner, around, kept, dropped)
    assert torch.equal(inner, stream)


@MANY
@given(cases, st.integers(1, 2))
def test_fused_token_is_the_weighted_sum_behind_the_patches(case: Case, heads: int) -> None:
    stream = case.stream()
    scores = [case.scores(offset=i) for i in range(heads)]
    kept, dropped = Select(case.ratio)(*scores)
    shorter = Keep(*case.place)(stream, kept)
    around = PassAround(*case.place)(stream, dropped)
    longer = Fuse(*case.place)(shorter, around, dropped, *scores)
    if dropped is None:
        assert longer is shorter
        return
    whole, before, after = (case.batch_first(t) for t in (stream, shorter, longer))
    at = after.shape[1] - case.tail - 1
    assert torch.equal(torch.cat([after[:, :at], after[:, at + 1 :]], 1), before)
    for b, leave in enumerate(place_of(dropped)):
        total = torch.zeros(CHANNELS, dtype=torch.float64)
        for i in leave:
            weight = sum(float(s[b, i]) for s in scores) / heads
            total += weight * whole[b, case.lead + i].double()
        torch.testing.assert_close(after[b, at].double(), total, rtol=1e-5, atol=1e-5)


@MANY
@given(cases)
def test_gradient_reaches_every_row_once(case: Case) -> None:
    stream = case.stream().requires_grad_()
    kept, dropped = Select(case.ratio)(case.scores())
    around = PassAround(*case.place)(stream, dropped)
    PutBack(*case.place, fused=False)(
        Keep(*case.place)(stream, kept), around, kept, dropped
    ).sum().backward()
    assert stream.grad is not None
    assert torch.equal(stream.grad, torch.ones_like(stream))


# -- rows and positions -------------------------------------------------------------------------------------------


@MANY
@given(cases)
def test_rows_are_taken_per_sample(case: Case) -> None:
    tokens = case.batch_first(case.stream())
    kept, _ = Select(case.ratio)(case.scores())
    if kept is None:
        kept = torch.arange(case.n).expand(case.batch, case.n)
    rows = sequence_rows(kept, case.lead, case.n, case.tail)
    assert rows.shape == (case.batch, case.lead + kept.shape[1] + case.tail)
    wanted = torch.stack([tokens[b, rows[b]] for b in range(case.batch)])
    assert torch.equal(take_rows(tokens, rows), wanted)


@MANY
@given(cases, st.booleans())
def test_positions_are_gathered_on_both_axes(case: Case, per_sample: bool) -> None:
    """A bias ``[heads, tokens, tokens]`` of which each sample takes its own rows and columns."""
    heads, total = 2, case.lead + case.n + case.tail
    own = case.batch if per_sample else 1
    bias = torch.arange(float(own * heads * total * total)).reshape(own, heads, total, total)
    kept, _ = Select(case.ratio)(case.scores())
    dims = tuple((d, case.lead, case.tail) for d in ((2, 3) if per_sample else (1, 2)))
    gather = GatherPositions(dims, 4, 0, per_sample, 1)
    operand = bias if per_sample else bias[0]
    near = gather(operand, kept)
    if kept is None:
        assert near is operand
        return
    rows = sequence_rows(kept, case.lead, case.n, case.tail)
    for b in range(case.batch):
        wanted = bias[b if per_sample else 0][:, rows[b]][:, :, rows[b]]
        assert torch.equal(near[b], wanted)


# -- score --------------------------------------------------------------------------------------------------------


@MANY
@given(cases, st.booleans(), st.booleans(), st.integers(1, 3))
def test_score_is_a_row_of_attention(
    case: Case, by_class_token: bool, masked: bool, heads: int
) -> None:
    total = case.lead + case.n + case.tail
    generator = torch.Generator().manual_seed(case.seed)
    query, key = (torch.randn(case.batch, heads, total, 4, generator=generator) for _ in "qk")
    mask = torch.randn(total, total, generator=generator) if masked else None
    logits = query @ key.mT / 2
    if mask is not None:
        logits = logits + mask
    row = logits[:, :, 0] if by_class_token else logits.mean(2)
    wanted = row.softmax(-1).mean(1)[:, case.lead : case.lead + case.n]
    score = ScoreByQuery(0 if by_class_token else "mean", case.lead, case.tail, heads, None)
    torch.testing.assert_close(score(query, key, mask), wanted)
    weights = ScoreByWeights(score.asking, -2, -1, case.lead, case.tail, heads)
    torch.testing.assert_close(weights(logits.softmax(-1) if by_class_token else logits), wanted)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_the_mean_query_of_a_sliding_window(kind: str) -> None:
    """Every key is hidden from some queries, one from all."""
    query, key = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    place = torch.arange(6)
    sees = ((place[:, None] - place).abs() < 3) & (place != 5)
    mask = sees if kind == "bool" else torch.zeros(6, 6).masked_fill(~sees, -math.inf)
    logits = (query @ key.mT / 2).masked_fill(~sees, -math.inf)
    wanted = torch.stack([logits[:, :, sees[:, j], j].mean(2) for j in range(5)], 2).softmax(2)
    wanted = torch.cat([wanted, torch.zeros(2, 3, 1)], 2).mean(1)[:, 1:]
    torch.testing.assert_close(ScoreByQuery("mean", 1, 0, 3, None)(query, key, mask), wanted)
    torch.testing.assert_close(ScoreByWeights("mean", -2, -1, 1, 0, 3)(logits), wanted)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_what_all_queries_pay_is_what_the_fused_attention_weighs_by(kind: str) -> None:
    """Its matrix is what it makes of an identity matrix as values; a query that sees no key pays nothing."""
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    sees = torch.rand(2, 1, 6, 6) > 0.4
    sees[0, 0, 3] = False
    bias = torch.randn(2, 1, 6, 6).masked_fill(~sees, -math.inf)
    mask = {"none": None, "bool": sees, "float": bias}[kind]
    matrix = F.scaled_dot_product_attention(
        query, key, torch.eye(6).expand(2, 2, 6, 6), mask, scale=0.4, enable_gqa=True
    )
    wanted = matrix.mean(2)[:, :, 1:5]
    for each_head, scores in ((True, wanted), (False, wanted.mean(1))):
        score = ScoreByQuery("all", 1, 1, 4, 0.4, each_head)
        torch.testing.assert_close(score(query, key, mask), scores)
        weights = ScoreByWeights("all", -1, -2, 1, 1, 4, each_head)
        torch.testing.assert_close(weights(matrix.mT), scores)


@pytest.mark.parametrize("asking", [0, "mean", "all"])
def test_scores_of_half_precision_are_float32(asking: Any) -> None:
    query, key = (torch.randn(2, 2, 5, 4).to(torch.bfloat16) for _ in "qk")
    assert ScoreByQuery(asking, 1, 0, 2, None)(query, key).dtype == torch.float32


def test_keys_and_values_of_half_precision_score_in_float32() -> None:
    """Lengths whose squares half precision does not hold, and directions that are almost the same."""
    values = torch.full((1, 2, 3, 4), 300.0, dtype=torch.float16)
    assert torch.equal(by_values(values, values=values), torch.full((1, 3), 600.0))
    keys = torch.ones(1, 1, 4, 64, dtype=torch.bfloat16)
    keys[0, 0, 3, 0] = 1.125
    (close,) = by_keys(keys, keys=keys).tolist()
    assert close[3] > close[0] == close[1] == close[2]


def test_a_patch_alone_has_no_others() -> None:
    assert by_keys(torch.ones(2, 1, 3), keys=torch.ones(2, 1, 1, 3)).isnan().all()


def test_key_heads_may_be_shared() -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    score = ScoreByQuery(0, 1, 0, 4, None)
    assert torch.equal(score(query, key), score(query, key.repeat_interleave(2, 1)))


@MANY
@given(cases)
def test_other_scores_have_one_value_a_patch(case: Case) -> None:
    stream = case.stream()
    random = ScoreAtRandom(*case.place)(stream)
    assert random.shape == (case.batch, case.n)
    mine = ScoreByFunction(lambda patches: patches[..., 0], *case.place)(stream)
    end = case.lead + case.n
    assert torch.equal(mine, case.batch_first(stream)[:, case.lead : end, 0])


def test_a_score_function_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 4, 3\), expected \(2, 4\)"):
        ScoreByFunction(lambda patches: patches, 1, 1, 0)(torch.zeros(2, 5, 3))


# -- dead tokens --------------------------------------------------------------------------------------------------


def test_narrow() -> None:
    x = torch.arange(12).reshape(3, 4)
    assert torch.equal(Narrow(1, 2)(x), x[:, :2])
    assert torch.equal(Narrow(-2, 1)(x), x[:1])


def test_whatever_is_switched_off_steps_aside() -> None:
    x = torch.randn(2, 5, 3)
    modules: list[tuple[Switchable, tuple[Tensor, ...]]] = [
        (ScoreByQuery(0, 1, 0, 1, None), (x[:, None], x[:, None])),
        (ScoreByWeights(0, -2, -1, 1, 0, 1), (x[:, None],)),
        (ScoreAtRandom(1, 1, 0), (x,)),
        (ScoreByFunction(lambda patches: patches[..., 0], 1, 1, 0), (x,)),
    ]
    for module, args in modules:
        assert module(*args) is not None
        module.enabled = False
        assert module(*args) is None
    narrow = Narrow(1, 1)
    narrow.enabled = False
    assert narrow(x) is x


# -- gradients of taken rows --------------------------------------------------------------------------------------


def taken_rows(case: Case) -> Tensor:
    kept, _ = Select(case.ratio)(case.scores())
    if kept is None:
        kept = torch.arange(case.n).expand(case.batch, case.n)
    return sequence_rows(kept, case.lead, case.n, case.tail)


@MANY
@given(cases)
def test_the_gradient_of_taken_rows_is_that_of_indexing(case: Case) -> None:
    tokens = case.batch_first(case.stream()).double().clone().requires_grad_()
    rows = taken_rows(case)
    cubes = take_rows(tokens, rows).pow(3).sum()
    index = rows.unsqueeze(-1).expand(-1, -1, CHANNELS)
    wanted = tokens.gather(1, index).pow(3).sum()
    (first,) = torch.autograd.grad(cubes, tokens, create_graph=True)
    (plain,) = torch.autograd.grad(wanted, tokens, create_graph=True)
    assert torch.equal(first, plain)
    (second,) = torch.autograd.grad(first.pow(2).sum(), tokens)
    (plain_second,) = torch.autograd.grad(plain.pow(2).sum(), tokens)
    assert torch.equal(second, plain_second)


def test_taken_rows_under_function_transforms() -> None:
    tokens = torch.randn(4, 2, 5, 3, dtype=torch.float64)
    rows = torch.tensor([[4, 0, 2], [1, 3, 0]])

    def cubes(one: Tensor) -> Tensor:
        return take_rows(one, rows).pow(3).sum()

    wanted = torch.zeros_like(tokens)
    for b in range(2):
        wanted[:, b, rows[b]] = 3 * tokens[:, b, rows[b]] ** 2
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(cubes))(tokens), wanted)
    assert torch.autograd.gradgradcheck(cubes, tokens[0].requires_grad_())


def test_half_precision_gradients_are_moved_unchanged() -> None:
    tokens = torch.randn(2, 5, 3, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([[4, 0, 2], [1, 3, 0]])
    gradient = torch.randn(2, 3, 3, dtype=torch.bfloat16)
    take_rows(tokens, rows).backward(gradient)
    assert tokens.grad is not None
    for b in range(2):
        assert torch.equal(tokens.grad[b, rows[b]], gradient[b])
    assert tokens.grad.count_nonzero() == gradient.count_nonzero()


@MANY
@given(cases, st.integers(1, 20), st.integers(0, 3))
def test_more_stay_so_that_the_length_is_a_multiple(case: Case, multiple: int, others: int) -> None:
    fewest = case.n - case.ratio.numerator * case.n // case.ratio.denominator
    aligned = [k for k in range(fewest, case.n) if (k + others) % multiple == 0]
    select = Select(case.ratio, multiple, others)
    kept, _ = select(case.scores())
    assert (case.n if kept is None else kept.shape[1]) == min([*aligned, case.n])
