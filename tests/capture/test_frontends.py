"""One mechanism for every library: both front ends against the reference, on models that are not timm's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, ViTConfig, ViTForImageClassification

import skipvit_fx
from skipvit_fx.errors import TraceError, UnsupportedModelError
from skipvit_fx.testing import Reference
from support.checks import TOLERANCE, assert_exact, assert_same_bits, rewrite
from support.models import BY_NAME, TORCHVISION, layout_of, scramble
from support.odd_models import GOOD, Block, CausalAttention, Example, Mlp, Odd, Sdpa, image
from support.outside import (
    ATTENTIONS,
    HUGGING_FACE,
    OPEN_CLIP,
    SMALL,
    HubStyle,
    HuggingFace,
    ListOfImages,
    NeedsTensor,
    ReadsPixels,
    open_clip_layout,
    open_clip_tower,
    pixels,
)
from support.reference import masked_reference, relative_error

DEPTH = 3
PLANS: dict[str, dict[str, Any]] = {
    "two": {"stages": [(1, "0.3"), (2, "0.4")], "return_layer": 3},
    "norm": {"stages": [(2, "0.55")], "return_layer": 4},
}
TWO = PLANS["two"]
ONE: dict[str, Any] = {"stages": [(1, "0.4")], "return_layer": 2}
"""For models of two layers."""
FRONTENDS = ("symbolic", "export")


def assert_is_the_model(
    fast: Any, model: nn.Module, *args: Any, same_bits: bool = True, **kwargs: Any
) -> None:
    """With skipping off, in eval and, from the same random state, in train; the graph itself, too.

    With gradients, so that PyTorch's own layers do not take their kernels for inference. An exported graph may differ
    in the last bits: what an author computes for torch.export can be another sum of the same terms.
    """
    skipvit_fx.set_skipping(fast, False)
    for training in (False, True):
        model.train(training), fast.train(training)
        results = []
        for call in (model, fast, fast.graph_forward):
            torch.manual_seed(3)
            results.append(call(*args, **kwargs))
        wanted, got, by_graph = results
        assert_same_bits(got, wanted)
        if same_bits:
            assert_same_bits(by_graph, wanted)
        with torch.no_grad():
            assert relative_error(by_graph, wanted) < 1e-6
    model.eval(), fast.eval()
    skipvit_fx.set_skipping(fast, True)


# -- Hugging Face ---------------------------------------------------------------------------------


EXPORTED = ("vit", "dinov3_vit", "beit", "siglip_vision_model")
"""Those of which both front ends are tested every time; of the others, the second one in the slow tests."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "frontend"),
    [
        pytest.param(
            encoder,
            frontend,
            id=f"{encoder}-{frontend}",
            marks=[pytest.mark.slow]
            if frontend == "export" and encoder.kind not in EXPORTED
            else [],
        )
        for encoder in HUGGING_FACE
        for frontend in FRONTENDS
    ],
)
def test_hugging_face(encoder: HuggingFace, frontend: str) -> None:
    model, x = encoder.build(num_hidden_layers=DEPTH), pixels()
    example = {"pixel_values": pixels(2)}
    fast = rewrite(model, TWO, example, frontend=frontend)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert_exact(fast, model, x, encoder.layout(model), TWO)
    with torch.no_grad():
        assert_same_bits(fast(pixel_values=x), fast(x))
    same_bits = frontend == "symbolic"
    assert_is_the_model(fast, model, pixel_values=x, same_bits=same_bits)


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_lives_in_train_only(frontend: str, attention: str) -> None:
    """Inside attention, after it, and on whole branches."""
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "drop_path_rate": 0.3}
    encoder = HuggingFace("beit", 1, options={**rates, "attn_implementation": attention})
    model, x = encoder.build(num_hidden_layers=2), pixels(6)
    fast = rewrite(model, ONE, {"pixel_values": pixels(2)}, frontend=frontend)
    assert_is_the_model(fast, model, x)
    fast.train()
    first, second = fast(x).last_hidden_state, fast(x).last_hidden_state
    assert not torch.equal(first, second)
    first.square().mean().backward()
    assert all(
        p.grad is not None for name, p in fast.named_parameters() if name.startswith("layers.0.")
    )


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_classifier_in_its_own_output_class(frontend: str) -> None:
    config = ViTConfig(**SMALL | {"num_hidden_layers": DEPTH}, image_size=64)
    model = scramble(ViTForImageClassification(config)).eval()
    fast = rewrite(model, TWO, None, frontend=frontend)
    layout = HuggingFace("vit", 1).layout(model)
    assert_exact(fast, model, pixels(), layout, TWO)
    assert type(fast(pixels())).__name__ == "ImageClassifierOutput"
    assert_is_the_model(fast, model, pixels())


@pytest.mark.slow
def test_masked_autoencoder_encodes_what_its_noise_left() -> None:
    model = HuggingFace("vit_mae", 1, options={"mask_ratio": 0.25}).build(num_hidden_layers=2)
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    x = {"pixel_values": pixels(), "noise": noise}
    fast = rewrite(model, ONE, x)
    assert Reference(model, x).check(fast, **x).exact
    assert_is_the_model(fast, model, **x)


@pytest.mark.parametrize("frontend", ["auto", "symbolic"])
@pytest.mark.slow
def test_siglip2_reads_the_shapes_of_its_images(frontend: Any) -> None:
    config = AutoConfig.for_model(
        "siglip2_vision_model",
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        num_patches=64,
    )
    model = scramble(AutoModel.from_config(config)).eval()

    def batch(shapes: list[list[int]]) -> dict[str, Tensor]:
        mask = torch.zeros(len(shapes), 16, dtype=torch.int64)
        for row, (height, width) in zip(mask, shapes, strict=True):
            row[: height * width] = 1
        patches = torch.randn(len(shapes), 16, 768, generator=torch.Generator().manual_seed(1))
        return {
            "pixel_values": patches,
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor(shapes),
        }

    fast = rewrite(model, TWO, batch([[4, 4], [2, 7]]), frontend=frontend)
    for x in (batch([[4, 4], [2, 7]]), batch([[3, 5], [2, 8], [4, 4]]), batch([[2, 8]])):
        assert Reference(model, x).check(fast, **x).exact
        assert_is_the_model(fast, model, **x)


@pytest.mark.slow
def test_no_fake_tensor_stays_in_the_author_s_caches() -> None:
    """DINOv3 keeps the coordinates of its patches in a cache that outlives every model."""
    encoder = next(e for e in HUGGING_FACE if e.kind == "dinov3_vit")
    model, other = (encoder.build(num_hidden_layers=2) for _ in range(2))
    x = pixels()
    rewrite(model, ONE, {"pixel_values": x})
    skipvit_fx.find_attention(model, example_inputs={"pixel_values": x})
    for untouched in (model, other):
        assert type(untouched(x).last_hidden_state) is Tensor


# -- torchvision, open_clip, PyTorch's own layers --------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_torchvision(plan: dict[str, Any], frontend: str) -> None:
    model = TORCHVISION.build(rate=0.1, num_layers=DEPTH)
    fast = rewrite(model, plan, TORCHVISION.input(2), frontend=frontend)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert_exact(fast, model, TORCHVISION.input(), layout_of(model), plan)
    assert_is_the_model(fast, model, TORCHVISION.input())


@pytest.mark.slow
def test_inference_kernels_are_the_model_s_where_nothing_is_skipped() -> None:
    """Without gradients, ``nn.MultiheadAttention`` takes a kernel that rounds otherwise."""
    model, x = TORCHVISION.build(num_layers=2), TORCHVISION.input()
    with torch.no_grad():
        wanted = model(x)
        off = rewrite(model, ONE, TORCHVISION.input(2))
        skipvit_fx.set_skipping(off, False)
        assert torch.equal(off(x), wanted)
        nothing = rewrite(model, {"stages": [(1, "0")], "return_layer": 2}, TORCHVISION.input(2))
        assert torch.equal(nothing(x), wanted)
        in_training = rewrite(model, ONE, TORCHVISION.input(2), train_only=True)
        assert torch.equal(in_training(x), wanted)


@pytest.mark.slow
def test_other_arguments_than_the_examples() -> None:
    model, x = HUGGING_FACE[0].build(num_hidden_layers=2), pixels()
    fast = rewrite(model, ONE, {"pixel_values": pixels(2)})
    with torch.no_grad():
        wanted = fast(x).last_hidden_state
        assert torch.equal(fast(pixel_values=x, bool_masked_pos=None).last_hidden_state, wanted)
        assert len(fast.own.calls) == 1
        wide = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        got = fast(wide, interpolate_pos_encoding=True)
        again = rewrite(model, ONE, {"pixel_values": wide, "interpolate_pos_encoding": True})
        assert torch.equal(
            got.last_hidden_state, again(wide, interpolate_pos_encoding=True).last_hidden_state
        )
        skipvit_fx.set_skipping(fast, False)
        assert_same_bits(
            fast(wide, interpolate_pos_encoding=True), model(wide, interpolate_pos_encoding=True)
        )


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", OPEN_CLIP)
@pytest.mark.slow
def test_open_clip(name: str, frontend: str) -> None:
    tower = open_clip_tower(**OPEN_CLIP[name])
    fast = rewrite(tower, TWO, pixels(2), frontend=frontend)
    assert list(fast.state_dict()) == list(tower.state_dict())
    assert_exact(fast, tower, pixels(), open_clip_layout(tower), TWO)
    assert_is_the_model(fast, tower, pixels())


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.slow
def test_attention_of_other_code_bases(name: str, frontend: str) -> None:
    model = scramble(ATTENTIONS[name]()).eval()
    fast = rewrite(model, TWO, image(), frontend=frontend)
    assert_exact(fast, model, image(3), model.layout(), TWO)
    assert_is_the_model(fast, model, image(3))


@pytest.mark.slow
@pytest.mark.parametrize("example", GOOD, ids=[example.name for example in GOOD])
def test_odd_models_through_export(example: Example) -> None:
    """Every style that the symbolic front end has passed in tests of its own."""
    model = example.build()
    fast = rewrite(model, TWO, image(), score="cls", frontend="export")
    assert_exact(fast, model, image(3), model.layout(), TWO)
    assert_is_the_model(fast, model, image(3))


# -- choosing the front end -----------------------------------------------------------------------


def test_auto_exports_what_cannot_be_traced() -> None:
    model = scramble(NeedsTensor([Block() for _ in range(2)])).eval()
    with pytest.raises(TraceError, match="an image is a tensor"):
        rewrite(model, ONE, image(), frontend="symbolic")
    fast = rewrite(model, ONE, image())
    assert_exact(fast, model, image(3), model.layout(), ONE)
    assert_is_the_model(fast, model, image(3))


@pytest.mark.slow
def test_any_arguments_and_a_dict_of_features() -> None:
    model = scramble(HubStyle()).eval()
    fast = rewrite(model, TWO, image())
    assert_exact(fast, model, image(3), model.layout(), TWO)
    everything = rewrite(model, TWO, {"images": image(), "is_training": True})
    with torch.no_grad():
        got = everything(images=image(3), is_training=True)
        assert set(got) == {"class", "patches", "masks"}
        assert got["patches"].shape == (3, 20, 32)
        assert relative_error(model.head(got["class"]), fast(image(3))) < TOLERANCE


@pytest.mark.parametrize("frontend", ["auto", *FRONTENDS])
def test_a_branch_on_pixels_is_refused(frontend: str) -> None:
    model = scramble(ReadsPixels([Block() for _ in range(DEPTH)])).eval()
    with pytest.raises(TraceError, match="depends on the values in its input") as caught:
        rewrite(model, TWO, image(), frontend=frontend)
    assert caught.value.hint


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("flag", [True, False])
def test_causal_attention_is_refused(flag: bool, frontend: str) -> None:
    model = scramble(Odd([Block(CausalAttention(flag=flag)) for _ in range(DEPTH)])).eval()
    with pytest.raises(UnsupportedModelError, match="causal"):
        rewrite(model, TWO, image(), frontend=frontend)


def test_unknown_front_end() -> None:
    with pytest.raises(skipvit_fx.PlanError, match=r"frontend must be one of .* got 'dynamo'"):
        rewrite(TORCHVISION.build(), TWO, TORCHVISION.input(2), frontend="dynamo")


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_another_image_size_is_an_error(frontend: str) -> None:
    model = HUGGING_FACE[0].build(num_hidden_layers=DEPTH)
    fast = rewrite(model, TWO, {"pixel_values": pixels(2)}, frontend=frontend)
    with pytest.raises(TraceError, match=r"Input image size \(64\*80\) doesn't match"):
        fast(torch.zeros(2, 3, 64, 80))


class UnderContext(Sdpa):
    """Attention in a context of its own."""

    def __init__(self, context: Any) -> None:
        super().__init__()
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return super().forward(x)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    "context",
    [torch.no_grad, functools.partial(torch.autocast, "cpu", enabled=False)],
    ids=["no-grad", "autocast"],
)
def test_a_context_that_no_graph_shows_is_refused(context: Any, frontend: str) -> None:
    model = scramble(Odd([Block(UnderContext(context)) for _ in range(DEPTH)])).eval()
    with pytest.raises(TraceError) as caught:
        rewrite(model, TWO, image(), frontend=frontend)
    assert "module" in caught.value.hint


# -- code for training only ------------------------------------------------------------------------


class Noisy(Block):
    """Adds noise to the tokens while training."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        if self.training:
            y = y + 0.1 * torch.randn_like(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class Shuffling(Block):
    """Swaps tokens while training."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        if self.training:
            y = y.flip(1)
        x = x + y
        return x + self.mlp(self.norm2(x))


class ShufflingMlp(Mlp):
    """A module that swaps tokens while training."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.flip(1) if self.training else y


class Normed(Mlp):
    """Statistics over samples and tokens while training, fixed ones afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_noise_in_training_only(frontend: str) -> None:
    model = scramble(Odd([Noisy() for _ in range(2)])).eval()
    fast = rewrite(model, ONE, image(), frontend=frontend)
    assert_exact(fast, model, image(3), model.layout(), ONE)
    assert_is_the_model(fast, model, image(3))
    fast.train()
    assert not torch.equal(fast(image(3)), fast(image(3)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Shuffling, "under the drop at layer 1"),
        (lambda: Block(mlp=ShufflingMlp()), "under the drop at layer 1"),
        (lambda: Block(mlp=Normed()), "may mix tokens, .* changes its own state"),
    ],
    ids=["inline", "module", "batch-norm"],
)
def test_mixing_in_training_only_is_refused(make: Any, reason: str, training: bool) -> None:
    """Whichever mode the model is in when it is rewritten."""
    model = scramble(Odd([make() for _ in range(DEPTH)])).train(training)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        rewrite(model, TWO, image())
    assert caught.value.module_path.startswith("blocks.")


# -- inputs and outputs that are no tensors --------------------------------------------------------


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_list_of_images(frontend: str) -> None:
    model = scramble(ListOfImages([Block() for _ in range(DEPTH)])).eval()
    fast = rewrite(model, TWO, ([image()],), frontend=frontend)
    with torch.no_grad():
        wanted = masked_reference(model, [image(3)], model.layout(), **TWO)
        (got,) = fast([image(3)])
    assert relative_error(got, wanted.output[0]) < TOLERANCE


class ManyResults(Mlp):
    """A module that returns more than one tensor, and what is none."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None, {"doubled": 2 * x, "factor": 3}


class ReadsResults(Block):
    """Uses all of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y, _, more = self.mlp(self.norm2(x))
        return x + y + more["doubled"] * more["factor"]


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_modules_that_return_several_things(frontend: str) -> None:
    model = scramble(Odd([ReadsResults(mlp=ManyResults()) for _ in range(DEPTH)])).eval()
    fast = rewrite(model, TWO, image(), frontend=frontend)
    assert_exact(fast, model, image(3), model.layout(), TWO)


def test_two_sequences_at_once_are_refused() -> None:
    model = scramble(ListOfImages([Block() for _ in range(DEPTH)])).eval()
    with pytest.raises(UnsupportedModelError) as caught:
        rewrite(model, TWO, ([image(), image()],))
    assert caught.value.reason
    assert caught.value.hint


# -- features ---------------------------------------------------------------------------------------


class Intermediates(nn.Module):
    """timm's ``forward_intermediates`` as a forward."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor) -> Any:
        return self.model.forward_intermediates(x, **self.options)


def states_of(model: nn.Module, x: Tensor, layout: Any, first: str) -> list[Tensor]:
    """Inputs of all layers in a masked run; ``first`` is the module that reads them."""
    seen: list[Tensor] = []
    hooks = [
        getattr(block, first).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for block in layout.blocks
    ]
    try:
        with torch.no_grad():
            masked_reference(model, x, layout, **TWO)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_hidden_states_are_filled_where_asked_for(frontend: str) -> None:
    if frontend == "export" and torch.__version__ < "2.14":
        pytest.skip("torch.export refuses the attributes that transformers sets meanwhile")
    encoder = HUGGING_FACE[0]
    model, x = encoder.build(num_hidden_layers=DEPTH), pixels()
    example = {"pixel_values": pixels(2), "output_hidden_states": True}
    with pytest.raises(UnsupportedModelError, match="off the path to its return") as caught:
        rewrite(model, TWO, example, frontend=frontend)
    assert caught.value.module_path == "layers.0"
    assert "fill_taps=True" in caught.value.hint
    fast = rewrite(model, TWO, example, frontend=frontend, fill_taps=True)
    wanted = states_of(model, x, encoder.layout(model), "layernorm_before")
    with torch.no_grad():
        got = fast(x, output_hidden_states=True)
        reference = masked_reference(model, x, encoder.layout(model), **TWO)
        assert relative_error(got.last_hidden_state, reference.output.last_hidden_state) < TOLERANCE
    assert len(wanted) == DEPTH
    for mine, theirs in zip(got.hidden_states, wanted, strict=False):
        assert relative_error(mine, theirs) < TOLERANCE
    kept_state = torch.equal(got.hidden_states[1], got.hidden_states[2])
    assert not kept_state, "some tokens must have moved on"
    skipvit_fx.set_skipping(fast, False)
    with torch.no_grad():
        hidden = {"output_hidden_states": True}
        assert_same_bits(fast(x, **hidden), model(x, **hidden))


@pytest.mark.parametrize("plan", ["1,3(30%,40%)+4", "2(50%)+5", "1(40%)+3+fused"])
@pytest.mark.parametrize(
    "options",
    [
        {"indices": [0, 1, 2, 3]},
        {"indices": [1, 2], "norm": True, "return_prefix_tokens": True},
        {"indices": [1, 3], "intermediates_only": True},
    ],
    ids=["all", "normed", "alone"],
)
@pytest.mark.slow
def test_timm_intermediates_are_whole_and_in_order(options: dict[str, Any], plan: str) -> None:
    family = BY_NAME["dinov2-reg4"]
    model, x = Intermediates(family.build(), **options).eval(), family.input()
    fast = skipvit_fx.rewrite(model, plan, example_inputs=x, fill_taps=True)
    if not plan.endswith("fused"):
        assert Reference(model, x).check(fast, x).exact
    with torch.no_grad():
        got, wanted = fast(x), model(x)
        assert [leaf.shape for leaf in tree_leaves(got)] == [t.shape for t in tree_leaves(wanted)]
        skipvit_fx.set_skipping(fast, False)
        assert_same_bits(fast(x), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["1,2(30%,40%)+3", "1,2,3(30%,40%,20%)+4"])
def test_states_at_several_cuts_that_are_handed_out_together(plan: str) -> None:
    class States(Odd):
        def forward(self, image: Tensor) -> Any:
            x = self.embed(image).flatten(2).transpose(1, 2)
            states = [torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos]
            for block in self.blocks:
                states.append(block(states[-1]))
            return self.head(self.norm(states[-1])[:, 0]), states[:-1]

    model, x = scramble(States([Block() for _ in range(DEPTH)])).eval(), image(3)
    fast = skipvit_fx.rewrite(model, plan, example_inputs=x, fill_taps=True, cut="block")
    with torch.no_grad():
        (got, states), (_, plain) = fast(x), model(x)
    (span,) = skipvit_fx.Plan.parse(plan).spans
    stages = [(stage.layer, stage.amount) for stage in span.stages]
    wanted = masked_reference(
        model, x, model.layout(), stages=stages, return_layer=span.return_layer, cut="block"
    )
    torch.testing.assert_close(got, wanted.output[0], rtol=1e-4, atol=1e-4)
    assert [state.shape for state in states] == [state.shape for state in plain]


@pytest.mark.slow
def test_a_tap_that_is_no_state_cannot_be_filled() -> None:
    class Branches(Odd):
        """Hands out what a layer adds to the stream."""

        def forward(self, image: Tensor) -> Any:
            x = self.embed(image).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
            added = []
            for block in self.blocks:
                added.append(block.attn(block.norm1(x)))
                x = x + added[-1]
                x = x + block.mlp(block.norm2(x))
            return self.head(self.norm(x)[:, 0]), added[1]

    model = scramble(Branches([Block() for _ in range(DEPTH)])).eval()
    with pytest.raises(UnsupportedModelError, match="not the residual stream"):
        rewrite(model, TWO, image(), fill_taps=True)
    fast = rewrite(model, {"stages": [(1, "0.4")], "return_layer": 2}, image(), fill_taps=True)
    assert Reference(model, image(3)).check(fast, image(3)).exact


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_class_tokens_of_all_layers_need_no_filling(plan: dict[str, Any]) -> None:
    class DeepSupervision(Odd):
        """A head at every layer."""

        def forward(self, image: Tensor) -> Any:
            x = self.embed(image).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
            results = []
            for block in self.blocks:
                x = block(x)
                results.append(self.head(x[:, 0]))
            return results

    model = scramble(DeepSupervision([Block() for _ in range(DEPTH)])).eval()
    fast = rewrite(model, plan, image())
    assert_exact(fast, model, image(3), model.layout(), plan)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_the_length_of_a_tensor_is_its_batch_size(frontend: str) -> None:
    class Lengths(Odd):
        def forward(self, image: Tensor) -> Tensor:
            x = self.embed(image).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos
            assert len(x.shape) == 3
            y: Tensor = self.head(self.norm(self.layers(x))[:, 0])
            return y

    model = scramble(Lengths([Block() for _ in range(DEPTH)])).eval()
    fast = rewrite(model, TWO, image(), frontend=frontend)
    assert_exact(fast, model, image(5), model.layout(), TWO)
    assert "len" not in globals()
