"""Modules of a rewritten model that are replaced: judged when they are called for the first time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx import GuardError, UnsupportedModelError
from support.client_models import STAGES, fast_vit, pixels, rewritten, vit
from support.models import layout_of, scramble
from support.reference import masked_reference, relative_error

MIXERS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "mean": ("tokens", lambda x: x - x.mean(1, keepdim=True)),
    "weak-mean": ("tokens", lambda x: x + 0.2 * x.mean(1, keepdim=True)),
    "flip": ("tokens", lambda x: x.flip(1)),
    "pairs": ("tokens", lambda x: x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)),
    "first": ("tokens", lambda x: x + x[:, :1]),
    "running": ("tokens", lambda x: x.cumsum(1)),
    "softmax": ("tokens", lambda x: x.softmax(1)),
    "position": ("tokens", lambda x: x + torch.arange(x.shape[1])[None, :, None]),
    "count": ("tokens", lambda x: x * x.shape[1]),
    "batch-mean": ("samples", lambda x: x - x.mean(0, keepdim=True)),
    "batch-flip": ("samples", lambda x: x.flip(0)),
    "batch-norm": ("samples", lambda x: x / x.norm(dim=0, keepdim=True)),
    "one-scale": (
        "tokens",
        lambda x: (x / x.abs().max() * 127).round() / 127 * x.abs().max(),
    ),
    "last": ("tokens", lambda x: x + x[:, -1:]),
    "all": ("tokens", lambda x: x / x.norm()),
}
APART: dict[str, Callable[[Tensor], Tensor]] = {
    "doubled": lambda x: x * 2,
    "channels": lambda x: x.softmax(-1),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "rounded": lambda x: (x * 64).round() / 64,
}
PLACES = ("blocks.2.mlp", "blocks.2.mlp.fc1", "blocks.2.attn.proj", "blocks.3.norm2")
"""Under the drop, and after it, where only the class token's row is left."""


class Wrapped(nn.Module):
    """A module, and something done to its result."""

    def __init__(self, inner: nn.Module, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.then = inner, then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.inner(x))


class TokenAdapter(nn.Module):
    """A convolution over the tokens that adds nothing yet, as adapters do when they are new."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.mix = nn.Conv1d(32, 32, 3, padding=1)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + self.mix(y.transpose(1, 2)).transpose(1, 2)


def replace(model: nn.Module, path: str, then: Callable[[Tensor], Tensor]) -> None:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, Wrapped(getattr(owner, name), then))


@pytest.mark.every_case
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_is_refused(mixer: str, place: str) -> None:
    fast = fast_vit()
    kind, then = MIXERS[mixer]
    replace(fast, place, then)
    with pytest.raises(UnsupportedModelError, match=f"{place}' was replaced .* mixes the {kind}"):
        fast(pixels())
    with pytest.raises(UnsupportedModelError, match="mixes"):  # again
        fast(pixels())


@pytest.mark.every_case
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", APART)
def test_what_keeps_tokens_apart_is_called(name: str, place: str) -> None:
    model, fast = vit(), fast_vit()
    replace(model, place, APART[name])
    replace(fast, place, APART[name])
    with torch.no_grad():
        wanted = masked_reference(model, pixels(), layout_of(model), **STAGES)
        assert relative_error(fast(pixels()), wanted.output) < 1e-5


def test_a_new_adapter_that_adds_nothing_yet() -> None:
    fast = fast_vit()
    fast.blocks[2].mlp = TokenAdapter(fast.blocks[2].mlp)
    with pytest.raises(UnsupportedModelError, match="TokenAdapter, and now mixes the tokens"):
        fast(pixels())


def test_batch_norm_is_refused_as_in_a_rewrite() -> None:
    fast = fast_vit()
    fast.blocks[2].mlp.norm = nn.BatchNorm1d(4)
    with pytest.raises(UnsupportedModelError, match="batch norm"):
        fast(pixels())


def test_what_does_not_run_alone_is_refused() -> None:
    fast = fast_vit()

    def tell(x: Tensor) -> Tensor:
        raise ValueError("not today")

    replace(fast, "blocks.2.mlp", tell)
    with pytest.raises(UnsupportedModelError, match="not today") as caught:
        fast(pixels())
    assert "rewrite the model with" in caught.value.hint


def test_where_all_tokens_pass_anything_goes() -> None:
    fast, model = fast_vit(), vit()
    for each in (fast, model):
        replace(each, "blocks.0.mlp", MIXERS["mean"][1])
        each.head = nn.Identity()
    with torch.no_grad():
        assert relative_error(fast(pixels()), rewritten(model)(pixels())) < 1e-5


def test_copies_are_judged_for_themselves() -> None:
    fast = fast_vit()
    copied = copy.deepcopy(fast)
    replace(copied, "blocks.2.mlp", MIXERS["mean"][1])
    again = copy.deepcopy(copied)
    for each in (copied, again):
        with pytest.raises(UnsupportedModelError, match="mixes the tokens"):
            each(pixels())
    fast(pixels())


def test_a_pickle_holds_what_was_replaced() -> None:
    fast = fast_vit()
    fast.blocks[2].mlp = scramble(nn.Linear(32, 32))
    with torch.no_grad():
        assert torch.allclose(pickle.loads(pickle.dumps(fast))(pixels()), fast(pixels()), atol=1e-5)


@pytest.mark.slow
def test_another_call_watches_its_modules_too() -> None:
    fast = fast_vit(dynamic_img_size=True)
    fast(pixels(size=40))
    replace(fast, "blocks.2.mlp", MIXERS["mean"][1])
    for size in (40, 32):
        with pytest.raises(UnsupportedModelError, match="mixes the tokens"):
            fast(pixels(size=size))


def test_with_skipping_off_anything_goes() -> None:
    fast, model = fast_vit(), vit()
    replace(fast, "blocks.2.mlp", MIXERS["mean"][1])
    replace(model, "blocks.2.mlp", MIXERS["mean"][1])
    skipvit_fx.set_skipping(fast, False)
    with torch.no_grad():
        assert torch.equal(fast(pixels()), model(pixels()))


def test_nothing_is_left_behind() -> None:
    fast = fast_vit(proj_drop_rate=0.3).train()
    fast.blocks[2].mlp = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5))
    weight = fast.blocks[2].mlp[0].weight.detach().clone()
    torch.manual_seed(3)
    fast._keep_up("forward", (pixels(),), {})
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(weight, fast.blocks[2].mlp[0].weight)
    assert fast.blocks[2].mlp[1].training


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_while_torch_jit_follows() -> None:
    fast = fast_vit()
    replace(fast, "blocks.2.mlp", APART["doubled"])
    traced = torch.jit.trace(fast, pixels())  # type: ignore[no-untyped-call]
    with torch.no_grad():
        assert torch.allclose(traced(pixels()), fast(pixels()), atol=1e-5)
    replace(fast, "blocks.2.mlp", MIXERS["mean"][1])
    with pytest.raises(UnsupportedModelError, match="mixes the tokens"):
        torch.jit.trace(fast, pixels())  # type: ignore[no-untyped-call]


def _export(fast: Any) -> Any:
    return torch.export.export(fast, (pixels(),)).module()


def _functional(fast: Any) -> Any:
    state = {**dict(fast.named_parameters()), **dict(fast.named_buffers())}

    def loss(parameters: Any) -> Tensor:
        out: Tensor = torch.func.functional_call(fast, parameters, (pixels(),))
        return out.square().mean()

    return torch.func.grad(loss)(state)


@pytest.mark.parametrize("follow", [_export, _functional])
def test_where_nothing_can_be_run_it_has_to_be_called_before(follow: Any) -> None:
    fast = fast_vit()
    replace(fast, "blocks.2.mlp", APART["doubled"])
    with pytest.raises(GuardError, match="was replaced by a Wrapped since") as caught:
        follow(fast)
    assert "once before" in caught.value.hint
    fast(pixels())
    follow(fast)


def test_what_is_on_the_meta_device_has_to_be_called_before() -> None:
    fast = fast_vit()
    fast.blocks[2].mlp = nn.Linear(32, 32, device="meta")
    with pytest.raises(GuardError, match="cannot be run on its own"):
        fast(pixels())


@pytest.mark.slow
def test_a_graph_that_others_run_keeps_up() -> None:
    fast = fast_vit()
    model = vit(num_classes=3)
    fast.reset_classifier(3)
    fast.load_state_dict(model.state_dict())
    fast.blocks[2].attn.scale = model.blocks[2].attn.scale = 0.9
    fast.eval()
    with pytest.raises(GuardError, match="was changed since the last call"):
        _export(fast)
    with torch.no_grad():
        fast(pixels())
        wanted = masked_reference(model, pixels(), layout_of(model), **STAGES).output
        assert relative_error(_export(fast)(pixels()), wanted) < 1e-5
    fast.blocks[2].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="has a hook"):
        _export(fast)


def test_compiled_whole_it_has_to_be_called_once_before() -> None:
    fast = fast_vit()
    replace(fast, "blocks.2.mlp", APART["doubled"])
    compiled: Any = torch.compile(fast, backend="eager", fullgraph=True)
    # up to 2.11 torch.compile keeps what was raised to itself
    says = "replaced" if Version(torch.__version__) >= Version("2.12") else "Observed exception"
    with torch.no_grad():
        with pytest.raises((GuardError, torch._dynamo.exc.TorchDynamoException), match=says):
            compiled(pixels())
        torch._dynamo.reset()
        wanted = fast(pixels())
        assert torch.equal(torch.compile(fast, backend="eager", fullgraph=True)(pixels()), wanted)
