"""A rewritten model is the author's model to everything that touches it: class, methods, copies, hooks, other calls."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.optim import param_groups_layer_decay as layer_decay
from torch import Tensor, fx, nn

import skipvit_fx
from skipvit_fx.errors import GuardError, TraceError, UnsupportedModelError
from skipvit_fx.graph.more_graphs import MOST_CALLS
from support.models import scramble
from support.odd_models import Block, Odd, image
from support.once import made_once
from support.reference import relative_error

PLAN = "1(50%)+2"
DEPTH = 2
KEPT = 8  # of 16 patches


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    small = {"img_size": 64, "depth": DEPTH, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return scramble(timm.create_model("vit_tiny_patch16_224", **{**small, **options})).eval()


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def rewrite(model: nn.Module, plan: str = PLAN, **options: Any) -> Any:
    return skipvit_fx.rewrite(model, plan, example_inputs=images(), **options)


@made_once
def made() -> tuple[Any, Any]:
    """A model and its rewrite, which share their tensors."""
    model = vit()
    return model, rewrite(model)


@pytest.fixture(name="both")
def _both() -> tuple[Any, Any]:
    return made()


@pytest.fixture(name="model")
def _model(both: tuple[Any, Any]) -> Any:
    return both[0]


@pytest.fixture(name="fast")
def _fast(both: tuple[Any, Any]) -> Any:
    return both[1]


# -- class ------------------------------------------------------------------------------------------------------------


def saved(fast: Any) -> Any:
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "torch.save": saved,
    "pickle": lambda fast: pickle.loads(pickle.dumps(fast)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "itself": lambda fast: fast,
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.client(
    "Python",
    "deepcopy, copy, pickle, torch.save",
    caveat="unpickling rewrites again, and checks that the graph is the same",
)
@pytest.mark.slow
def test_it_is_both_in_every_copy(model: Any, fast: Any, name: str) -> None:
    x = images(3)
    copied = COPIES[name](fast)
    with torch.no_grad():
        assert isinstance(copied, type(model))
        assert isinstance(copied, fx.GraphModule)
        assert type(copied).__name__ == "VisionTransformer"  # which tools write into files
        assert str(copied).startswith("SkipViTVisionTransformer(")
        assert torch.equal(copied(x), fast(x))
        assert list(copied.state_dict()) == list(model.state_dict())
        assert copied.no_weight_decay() == model.no_weight_decay()
        assert copied.num_features == model.num_features
        assert skipvit_fx.inspect(copied).macs == skipvit_fx.inspect(fast).macs
        assert copied.forward_features(x).shape == (3, 17, 48)


def test_a_copy_has_weights_and_switches_of_its_own(fast: Any) -> None:
    x = images()
    wanted = fast(x)
    schedule = skipvit_fx.SkipSchedule(fast, warmup_epochs=0, ramp_epochs=4)
    schedule.step(2)
    copied = pickle.loads(pickle.dumps(fast))
    assert torch.equal(copied(x), fast(x))
    assert [len(t.kept[0]) for t in skipvit_fx.trace_tokens(copied, x)] == [12]
    schedule.step(4)
    assert torch.equal(fast(x), wanted)
    assert [len(t.kept[0]) for t in skipvit_fx.trace_tokens(copied, x)] == [12]
    with torch.no_grad():
        copied.head.bias += 1
    assert torch.equal(fast(x), wanted)


@pytest.mark.client("timm", "create_optimizer_v2: weight decay and layer decay groups")
def test_parameters_are_grouped_as_the_models(model: Any, fast: Any) -> None:
    def groups(of: Any) -> list[tuple[float, float, list[str]]]:
        names = {id(p): name for name, p in of.named_parameters()}
        optimizer = create_optimizer_v2(of, opt="adamw", weight_decay=0.05, layer_decay=0.7)
        return [
            (g["weight_decay"], g.get("lr_scale", 1.0), [names[id(p)] for p in g["params"]])
            for g in optimizer.param_groups
        ]

    assert groups(fast) == groups(model)
    assert len(layer_decay(fast)) == len(layer_decay(model))


def test_an_author_s_name_that_would_be_hidden_is_refused() -> None:
    class Adopts(Odd):
        def graph_forward(self) -> int:
            return 1

    with pytest.raises(TraceError, match="graph_forward"):
        skipvit_fx.rewrite(
            scramble(Adopts(Block() for _ in range(DEPTH))).eval(), PLAN, example_inputs=image()
        )


@pytest.mark.slow
def test_a_class_of_no_module_that_is_imported() -> None:
    names: dict[str, Any] = {"__name__": "nowhere", "Odd": Odd}
    exec("class Made(Odd):\n    pass", names)
    model = scramble(names["Made"](Block() for _ in range(DEPTH))).eval()
    fast = skipvit_fx.rewrite(model, PLAN, example_inputs=image())
    fast.of_a_tool = 1
    assert fast(image()).shape == model(image()).shape


def test_an_author_who_calls_all_children_in_turn() -> None:
    class InTurn(nn.Sequential):
        def forward(self, image: Tensor) -> Tensor:
            for part in self:
                image = part(image)
            return image

    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 32))

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).transpose(1, 2)
            return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)

    blocks = [Block() for _ in range(DEPTH)]
    model = scramble(InTurn(nn.Conv2d(3, 32, 8, 8), Join(), *blocks)).eval()
    fast = skipvit_fx.rewrite(model, PLAN, example_inputs=image(), prefix_tokens=1)
    x = image(3)
    with torch.no_grad():
        assert fast(x).shape == model(x).shape
        skipvit_fx.set_skipping(fast, False)
        assert torch.equal(fast(x), model(x))


# -- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.client("timm", "forward_features, forward_head, get_classifier")
@pytest.mark.slow
def test_a_method_that_runs_attention_skips(model: Any, fast: Any) -> None:
    never = rewrite(model, "1(50%)")
    x = images()
    with torch.no_grad():
        features = fast.forward_features(x)
        assert features.shape == (2, 17, 48)
        assert relative_error(fast.forward_head(features), fast(x)) < 1e-5
        assert relative_error(features, model.forward_features(x)) > 1e-3
        assert never.forward_features(x).shape == (2, 1 + KEPT, 48)
        assert torch.equal(fast.forward_features(x), features)
    assert [call.method for call in fast.own.calls] == ["forward", "forward_features"]


def test_the_same_method_is_the_author_s_where_nothing_is_skipped(model: Any, fast: Any) -> None:
    x = images()
    with torch.no_grad():
        fast.forward_features(x)
        skipvit_fx.set_skipping(fast, False)
        assert torch.equal(fast.forward_features(x), model.forward_features(x))
        assert torch.equal(
            fast.blocks[1](torch.ones(1, 3, 48)), model.blocks[1](torch.ones(1, 3, 48))
        )


@pytest.mark.client(
    "timm", "forward_intermediates", caveat="of layers under a drop: fill_taps=True"
)
@pytest.mark.slow
def test_features_of_several_layers() -> None:
    model, plan, x = vit(depth=3), "2(50%)+4", images()
    with pytest.raises(UnsupportedModelError) as caught:
        rewrite(model, plan).forward_intermediates(x, indices=[0, 1])
    assert "fill_taps" in caught.value.hint
    fast = rewrite(model, plan, fill_taps=True)
    with torch.no_grad():
        last, maps = fast.forward_intermediates(x, indices=[0, 1])
        wanted, plain = model.forward_intermediates(x, indices=[0, 1])
    assert torch.equal(maps[0], plain[0])
    assert maps[1].shape == plain[1].shape
    assert last.shape == wanted.shape
    assert relative_error(maps[1], plain[1]) > 1e-3


def test_a_method_that_fails_says_what_the_author_s_does(fast: Any) -> None:
    with pytest.raises(TypeError):
        fast.forward_features()
    with pytest.raises(TypeError):
        fast(images(), None, False, 3)


# -- what is traced through -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn", "blocks"])
def test_what_is_traced_through_is_not_called_past_the_graph(fast: Any, path: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"module '{path}' was called on its own"):
        fast.get_submodule(path)(torch.ones(1, 17, 48))


@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.client(
    "PyTorch",
    "a hook on what a graph was traced through",
    shows="refused",
    caveat="at the next call, which says where to hook instead",
)
def test_a_hook_that_would_never_run_is_refused(fast: Any, path: str, kind: str) -> None:
    x = images()
    handle = getattr(fast.get_submodule(path), f"register_{kind}")(lambda *args: None)
    with pytest.raises(UnsupportedModelError, match=rf"module '{path}' has a hook") as caught:
        fast(x)
    assert f"'{path}." in caught.value.hint
    with pytest.raises(UnsupportedModelError, match="has a hook"):
        copy.deepcopy(fast)(x)
    skipvit_fx.set_skipping(fast, False)
    fast(x)
    skipvit_fx.set_skipping(fast, True)
    handle.remove()
    fast(x)


RAN: list[str] = []


def _note(module: nn.Module, *_: Any) -> None:
    RAN.append(type(module).__name__)


@pytest.mark.client("PyTorch", "a hook on the model")
@pytest.mark.slow
def test_a_hook_on_the_model_itself_runs_whatever_graph_does(fast: Any) -> None:
    RAN.clear()
    fast.register_forward_hook(_note)
    again = pickle.loads(pickle.dumps(fast))
    for called in (fast, again):
        called(images())
        called.double()(images().double())  # another graph
    assert RAN == ["VisionTransformer"] * 4


@pytest.mark.client("PyTorch", "a hook on a layer that a graph calls")
def test_a_hook_on_what_is_called_runs(fast: Any) -> None:
    seen: list[tuple[int, ...]] = []
    fast.blocks[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fast.blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fast(images())
    assert seen == [(2, 1 + KEPT, 48), (2, 17, 144)]


# -- changes ----------------------------------------------------------------------------------------------------------


def assert_as_rewritten_anew(fast: Any, model: Any) -> None:
    x = images()
    again = rewrite(model)
    again.load_state_dict(fast.state_dict())
    with torch.no_grad():
        assert torch.equal(fast(x), again(x))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.client("timm", "reset_classifier")
@pytest.mark.slow
def test_another_head(fast: Any, pool: str) -> None:
    model = vit()
    for each in (fast, model):
        each.reset_classifier(7, global_pool=pool)
    assert fast(images()).shape == (2, 7)
    assert_as_rewritten_anew(fast, model)
    fast.head = nn.Linear(48, 3)
    assert fast(images()).shape == (2, 3)


@pytest.mark.slow
def test_a_flag_of_a_block(fast: Any) -> None:
    late, other = copy.deepcopy(fast), vit()
    for each in (fast, other):
        for block in each.blocks:
            block.attn.fused_attn = False
    assert_as_rewritten_anew(fast, other)
    assert not fast.graph.find_nodes(
        op="call_function", target=torch.nn.functional.scaled_dot_product_attention
    )
    other = vit()
    late.blocks[0].attn.fused_attn = other.blocks[0].attn.fused_attn = False
    assert_as_rewritten_anew(copy.deepcopy(late), other)


@pytest.mark.client("timm", "set_grad_checkpointing")
@pytest.mark.slow
def test_activations_may_be_recomputed(fast: Any) -> None:
    plain = copy.deepcopy(fast).train()
    fast.train()
    fast.set_grad_checkpointing(True)
    for each in (fast, plain):
        each(images()).square().sum().backward()
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert "checkpoint" in fast.code


# -- other calls ------------------------------------------------------------------------------------------------------


class Options(Odd):
    """Takes more than images."""

    def forward(
        self, image: Tensor, scale: float = 1.0, *, twice: bool = False, bias: Tensor | None = None
    ) -> Any:
        y = super().forward(image) * scale
        if bias is not None:
            y = y + bias
        return {"out": y, "double": y * 2} if twice else y


@pytest.mark.slow
def test_every_way_to_call_it() -> None:
    model: Any = scramble(Options(Block() for _ in range(DEPTH))).eval()
    fast = skipvit_fx.rewrite(model, PLAN, example_inputs=image())
    x, bias = image(3), torch.randn(3, 10)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((), {"image": x}),
        ((x, 1.0), {"twice": False}),
        ((x, 0.5), {}),
        ((x,), {"twice": True}),
        ((x,), {"bias": bias[:, : fast(x).shape[1]]}),
        ((x, 0.5), {"bias": None}),
    ]
    with torch.no_grad():
        plain = fast(x)
        for args, kwargs in calls:
            got, wanted = fast(*args, **kwargs), model(*args, **kwargs)
            assert type(got) is type(wanted)
            scale = args[1] if len(args) > 1 else 1.0
            out = got["out"] if isinstance(got, dict) else got
            shift = kwargs.get("bias")
            torch.testing.assert_close(out, plain * scale + (0 if shift is None else shift))
    assert len(fast.own.calls) == 4
    with pytest.raises(TypeError):
        fast(x, wrong=1)


def test_calls_without_end_are_stopped() -> None:
    model: Any = scramble(Options(Block() for _ in range(2))).eval()
    fast = skipvit_fx.rewrite(model, "1(50%)", example_inputs=image(), validate=False)
    fast.own.calls *= MOST_CALLS
    with pytest.raises(GuardError, match=f"in {MOST_CALLS} ways") as caught:
        fast(image(), 0.25)
    assert "as a tensor" in caught.value.hint


@pytest.mark.client("timm", "set_input_size, another image size")
@pytest.mark.slow
def test_another_size() -> None:
    model = vit(dynamic_img_size=True)
    fast, x = rewrite(model), images(size=96)
    again = skipvit_fx.rewrite(model, PLAN, example_inputs=x)
    with torch.no_grad():
        assert torch.equal(fast(x), again(x))
        assert [len(t.kept[0]) for t in skipvit_fx.trace_tokens(fast, x)] == [18]
        assert [len(t.kept[0]) for t in skipvit_fx.trace_tokens(fast, images())] == [KEPT]
    skipvit_fx.set_skipping(fast, False)
    assert torch.equal(fast(x), model(x))
    skipvit_fx.set_skipping(fast, True)
    for select in (m for m in fast.modules() if isinstance(m, skipvit_fx.ops.select.Select)):
        select.current = Fraction(1, 4)
    assert len(skipvit_fx.trace_tokens(fast, images(size=128))[0].kept[0]) == 48
