"""What a graph was traced through may read more than plain attributes: settings, tables, a configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.vit.modeling_vit import ViTLayer

import skipvit_fx
from skipvit_fx.graph.kept import Kept
from support.client_models import classifier, pixels, vit
from support.once import made_once
from support.reference import relative_error

DEPTH = 2
PLAN = "1(50%)+2"


def rewritten(model: nn.Module, **options: Any) -> Any:
    return skipvit_fx.rewrite(model, PLAN, example_inputs=pixels(), **options)


@made_once
def fast_vit() -> Any:
    return rewritten(vit(depth=DEPTH))


@made_once
def fast_classifier() -> Any:
    """One that can hand out its hidden states."""
    return rewritten(classifier(num_hidden_layers=DEPTH), fill_taps=True)


class Settings:
    def __init__(self) -> None:
        self.scales = {"mlp": [1.0, 2.0]}
        self.residual = True


class Configured(nn.Module):
    """A block that reads its settings at every call."""

    def __init__(self, block: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn
        self.norm2, self.mlp = block.norm2, block.mlp
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = self.mlp(self.norm2(x)) * self.settings.scales["mlp"][1]
        return x + y if self.settings.residual else y


def _configured() -> tuple[Any, Settings]:
    model, settings = vit(depth=DEPTH), Settings()
    model.blocks = nn.Sequential(*(Configured(block, settings) for block in model.blocks))
    return model, settings


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.scales["mlp"].__setitem__(1, 3.0),
        lambda s: s.scales.update(mlp=[1.0, 0.5]),
        lambda s: setattr(s, "residual", False),
    ],
    ids=["in a list", "in a dict", "of an object"],
)
@pytest.mark.slow
def test_a_change_of_what_a_block_reads(change: Callable[[Settings], None]) -> None:
    (model, theirs), (twin, ours) = _configured(), _configured()
    fast = rewritten(twin)
    with torch.no_grad():
        before = fast(pixels())
        change(theirs), change(fast.blocks[0].settings)
        got = fast(pixels())
        wanted = rewritten(model)(pixels())
        assert relative_error(got, wanted) < 1e-6
        assert relative_error(got, before) > 1e-3
    assert vars(ours) == vars(Settings())


@pytest.mark.slow
def test_a_change_of_a_configuration() -> None:
    fast = fast_classifier()
    with torch.no_grad():
        assert fast(pixels()).hidden_states is None
        fast.config.output_hidden_states = True
        assert len(fast(pixels()).hidden_states) == 1 + DEPTH
        fast.config.output_hidden_states = False
        assert fast(pixels()).hidden_states is None


@pytest.mark.slow
def test_a_change_of_a_configuration_of_a_compiled_model() -> None:
    torch._dynamo.reset()
    fast = fast_classifier()
    compiled: Any = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(pixels()).hidden_states is None
        fast.config.output_hidden_states = True
        with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="was changed since"):
            compiled(pixels())
        torch._dynamo.reset()
        fast(pixels())
        assert len(compiled(pixels()).hidden_states) == 1 + DEPTH


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.slow
def test_a_change_of_a_dropout_that_is_read_and_not_called(replaced: bool) -> None:
    fast = fast_vit().train()
    assert torch.equal(fast(pixels()), fast(pixels()))
    for block in fast.blocks:
        if replaced:
            block.attn.attn_drop = nn.Dropout(0.5)
        else:
            block.attn.attn_drop.p = 0.5
    torch.manual_seed(0)
    once = fast(pixels())
    assert not torch.equal(once, fast(pixels()))
    torch.manual_seed(0)
    assert torch.equal(once, fast(pixels()))


class Halved(ViTLayer):
    """What a layer gives, halved."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * 0.5


def _replace_one(model: Any) -> None:
    old = model.vit.layers[0]
    model.vit.layers[0] = new = Halved(model.config).eval()
    new.load_state_dict(copy.deepcopy(old.state_dict()))


def _cut(model: Any) -> None:
    model.vit.layers = model.vit.layers[:1]


def _append(model: Any) -> None:
    model.vit.layers.append(copy.deepcopy(model.vit.layers[1]))


def _swap(model: Any) -> None:
    layers = model.vit.layers
    layers[0], layers[1] = layers[1], layers[0]


@pytest.mark.parametrize("change", [_replace_one, _cut, _append, _swap])
@pytest.mark.slow
def test_a_change_of_the_list_of_layers(change: Callable[[Any], None]) -> None:
    model, twin = (classifier(num_hidden_layers=DEPTH) for _ in range(2))
    fast = rewritten(twin)
    with torch.no_grad():
        before = fast(pixels()).logits
        change(model), change(fast)
        wanted = rewritten(model)(pixels()).logits
        assert relative_error(fast(pixels()).logits, wanted) < 1e-6
        assert relative_error(before, wanted) > 1e-3


def test_a_module_that_is_called_in_another_place() -> None:
    """Modules are looked up once; a copy, and one that was put in later, is still called."""
    fast = fast_vit()
    with torch.no_grad():
        before = fast(pixels())
        twin = copy.copy(fast)
        twin.head = nn.Linear(32, 5)
        nn.init.zeros_(twin.head.weight), nn.init.ones_(twin.head.bias)
        assert torch.equal(twin(pixels()), torch.ones(2, 5))
        assert torch.equal(fast(pixels()), before)
        fast.blocks[1].mlp.fc2 = nn.Identity()
        fast.blocks[1].mlp.fc1 = nn.Identity()
        assert relative_error(fast(pixels()), before) > 1e-3
        deep = copy.deepcopy(fast)
        nn.init.zeros_(deep.head.weight), nn.init.ones_(deep.head.bias)
        assert torch.equal(deep(pixels()), torch.ones(2, 5))
        assert not torch.equal(fast(pixels()), torch.ones(2, 5))


def test_equal_copies_are_no_change() -> None:
    """`torch.export` leaves such."""
    fast = fast_vit()
    call = fast.own.calls[0]
    fast.pretrained_cfg = copy.deepcopy(fast.pretrained_cfg)
    torch.export.export(fast, (pixels(),))
    with torch.no_grad():
        fast(pixels())
    assert fast.own.calls == [call]
    fast.feature_info[0]["num_chs"] = 7
    with torch.no_grad():
        fast(pixels())
    assert fast.own.calls != [call]


def test_a_value_under_another_name_is_a_change() -> None:
    table = {"a": object()}
    kept = Kept([table])
    assert kept.is_so()
    table["b"] = table.pop("a")
    assert not kept.is_so()
