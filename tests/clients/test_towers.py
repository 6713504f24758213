"""Image towers of larger models: rewritten, and put back where they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
import transformers as hf
from torch import Tensor

import skipvit_fx
from skipvit_fx.errors import SkipViTError
from support.client_models import PLAN, SMALL, pixels
from support.models import scramble

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PICTURE = 99
"""Token that stands for a piece of an image."""
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WORDS = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(2))


def llama() -> Any:
    return hf.LlamaConfig(**TEXT, **TOKENS, num_key_value_heads=2)


def with_pictures(count: int) -> Tensor:
    return torch.cat([torch.full((2, count), PICTURE), WORDS], 1)


class Parent(NamedTuple):
    """A model with a tower in it.

    Attributes:
        model: without weights far from their start.
        tower: its path.
        call: what is compared.
        options: of the rewrite.
    """

    model: Any
    tower: str
    call: Callable[[Any], Tensor]
    options: Any = {}  # noqa: RUF012


def clip() -> Parent:
    text = {**TEXT, **TOKENS}
    model = hf.CLIPModel(hf.CLIPConfig(vision_config=SMALL, text_config=text, projection_dim=16))
    return Parent(model, "vision_model", lambda m: m(WORDS, pixels()).logits_per_image)


def clip_features() -> Parent:
    return clip()._replace(call=lambda m: m.get_image_features(pixels()).pooler_output)


def siglip() -> Parent:
    model = hf.SiglipModel(hf.SiglipConfig(vision_config=SMALL, text_config={**TEXT, **TOKENS}))
    return Parent(model, "vision_model", lambda m: m(WORDS, pixels()).logits_per_image)


def blip2() -> Parent:
    config = hf.Blip2Config(
        vision_config=SMALL,
        qformer_config={**TEXT, "encoder_hidden_size": 32},
        text_config=hf.OPTConfig(**TEXT, **TOKENS, ffn_dim=64, word_embed_proj_dim=32).to_dict(),
        num_query_tokens=4,
        image_token_index=PICTURE,
    )
    model = hf.Blip2ForConditionalGeneration(config)
    call = lambda m: m(pixel_values=pixels(), input_ids=with_pictures(4)).logits  # noqa: E731
    return Parent(model, "vision_model", call)


def llava() -> Parent:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**SMALL),
        text_config=llama(),
        image_token_index=PICTURE,
        vision_feature_layer=-2,
    )
    model = hf.LlavaForConditionalGeneration(config)
    call = lambda m: m(pixel_values=pixels(), input_ids=with_pictures(16)).logits  # noqa: E731
    return Parent(model, "model.vision_tower", call, {"fill_taps": True})


def paligemma() -> Parent:
    vision = hf.SiglipVisionConfig(**SMALL, vision_use_head=False, projection_dim=32)
    text = hf.GemmaConfig(**TEXT, **TOKENS, num_key_value_heads=2, head_dim=16)
    config = hf.PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=32, image_token_index=PICTURE
    )
    model = hf.PaliGemmaForConditionalGeneration(config)
    call = lambda m: m(pixel_values=pixels(), input_ids=with_pictures(16)).logits  # noqa: E731
    return Parent(model, "model.vision_tower", call)


def owlvit() -> Parent:
    text = {**TEXT, **TOKENS}
    config = hf.OwlViTConfig(vision_config=SMALL, text_config=text, projection_dim=32)
    model = hf.OwlViTForObjectDetection(config)
    call = lambda m: m(pixel_values=pixels(), input_ids=WORDS).logits  # noqa: E731
    return Parent(model, "owlvit.vision_model", call)


def idefics3() -> Parent:
    config = hf.Idefics3Config(
        vision_config=SMALL, text_config=llama(), scale_factor=2, image_token_id=PICTURE
    )
    model = hf.Idefics3ForConditionalGeneration(config)

    def call(m: Any) -> Tensor:
        seen = torch.ones(2, 1, 32, 32, dtype=torch.bool)
        given = {"pixel_values": pixels()[:, None], "pixel_attention_mask": seen}
        logits: Tensor = m(**given, input_ids=with_pictures(4)).logits
        return logits

    seen = torch.ones(2, 4, 4, dtype=torch.bool)
    example = {"pixel_values": pixels(), "patch_attention_mask": seen}
    return Parent(model, "model.vision_model", call, {"example_inputs": example})


def internvl() -> Parent:
    vision = hf.InternVLVisionConfig(**{**SMALL, "image_size": [32, 32], "patch_size": [8, 8]})
    config = hf.InternVLConfig(
        vision_config=vision, text_config=llama(), image_token_id=PICTURE, downsample_ratio=0.5
    )
    model = hf.InternVLForConditionalGeneration(config)
    call = lambda m: m(pixel_values=pixels(), input_ids=with_pictures(4)).logits  # noqa: E731
    return Parent(model, "model.vision_tower", call)


def open_clip_model() -> Parent:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    words = torch.cat([WORDS, WORDS[:, :2]], 1)
    return Parent(model, "visual", lambda m: m(pixels(), words)[0])


PARENTS = [
    clip,
    clip_features,
    siglip,
    blip2,
    llava,
    paligemma,
    owlvit,
    idefics3,
    internvl,
    open_clip_model,
]


def rewrite_tower(parent: Parent) -> Any:
    owner, _, name = parent.tower.rpartition(".")
    holder = parent.model.get_submodule(owner)
    options = {"example_inputs": pixels(), **parent.options}
    fast = skipvit_fx.rewrite(getattr(holder, name), PLAN, **options)
    setattr(holder, name, fast)
    return fast


@pytest.mark.slow
@pytest.mark.parametrize("make", PARENTS)
@pytest.mark.client(
    "towers",
    "{case}: rewritten and put back",
    caveat={"llava": "it reads a layer under the drop: fill_taps=True"},
)
def test_a_tower_is_put_back(make: Callable[[], Parent]) -> None:
    """The parent computes with what the tower drops, off it is the parent's own, and the tower is right by itself."""
    torch.manual_seed(0)
    parent = make()
    scramble(parent.model).eval()
    with torch.no_grad():
        plain = parent.call(parent.model)
        fast = rewrite_tower(parent)
        seen: list[Any] = []
        hook = fast.register_forward_hook(
            lambda module, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
        )
        got = parent.call(parent.model)
        hook.remove()
        assert not torch.allclose(got, plain, rtol=1e-3)
        skipvit_fx.set_skipping(parent.model, False)
        assert torch.equal(parent.call(parent.model), plain)
        skipvit_fx.set_skipping(parent.model, True)
        torch.testing.assert_close(parent.call(parent.model), got)
    assert len(seen) == 1
    assert all(call.record.validated.startswith("validated") for call in fast.own.calls)


@pytest.mark.slow
@pytest.mark.client("open_clip", "lock_image_tower")
def test_an_image_tower_that_open_clip_locks() -> None:
    parent = open_clip_model()
    rewrite_tower(parent)
    parent.model.lock_image_tower(unlocked_groups=1)
    other = open_clip_model().model
    other.lock_image_tower(unlocked_groups=1)
    trained = {name: p.requires_grad for name, p in other.named_parameters()}
    assert {name: p.requires_grad for name, p in parent.model.named_parameters()} == trained
    parent.call(parent.model).sum().backward()


@pytest.mark.client(
    "towers", "Qwen2-VL", shows="refused", caveat="it packs images of any size into one sequence"
)
@pytest.mark.slow
def test_packed_images_are_refused_with_the_reason() -> None:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(
        depth=4, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4
    )
    model = Qwen2VisionTransformerPretrainedModel(config).eval()
    example = (torch.randn(16, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4]]))
    with pytest.raises(SkipViTError, match="grid_thw") as caught:
        skipvit_fx.rewrite(model, PLAN, example_inputs=example)
    assert caught.value.hint
