"""ViTs of torchvision, Hugging Face and open_clip, and styles of other code bases, all small and random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from open_clip.transformer import VisionTransformer as OpenClipTower
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import PreTrainedModel

from support.models import scramble
from support.odd_models import DIM, HEADS, TOKENS, Block, Odd, Projections
from support.reference import Layout, Point

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
MIDDLES = ("layernorm_after", "layer_norm2", "norm2")
"""What Hugging Face calls the norm before a layer's feed-forward network."""


@dataclass(frozen=True)
class HuggingFace:
    """An encoder of Hugging Face transformers.

    Attributes:
        kind: the model type, or the name of a class in ``transformers``.
        prefix: tokens before the patches.
        cls: position of the class token, or None.
        options: of the configuration.
    """

    kind: str
    prefix: int
    cls: int | None = 0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, **options: Any) -> PreTrainedModel:
        """The model, scrambled, in eval mode."""
        options = {**SMALL, "image_size": 64, "patch_size": 16, **self.options, **options}
        model = AutoModel.from_config(AutoConfig.for_model(self.kind, **options))
        assert isinstance(model, PreTrainedModel)
        scramble(model)
        return model.eval()

    def layout(self, model: nn.Module) -> Layout:
        """What the reference is told."""
        (blocks,) = (
            list(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layer", "layers")
        )
        (name,) = (name for name in MIDDLES if hasattr(blocks[0], name))
        mid = [Point(getattr(block, name)) for block in blocks]
        return Layout(blocks, mid, self.prefix, cls=self.cls)

    def __str__(self) -> str:
        return self.kind


HUGGING_FACE = [
    HuggingFace("vit", 1),
    HuggingFace("deit", 2),
    HuggingFace("dinov2", 1),
    HuggingFace("dinov2_with_registers", 5),
    HuggingFace("dinov3_vit", 5, options={"num_register_tokens": 4}),
    HuggingFace("beit", 1, options={"use_relative_position_bias": True}),
    HuggingFace("data2vec-vision", 1, options={"use_relative_position_bias": True}),
    HuggingFace("clip_vision_model", 1),
    HuggingFace("siglip_vision_model", 0, None),
    HuggingFace("vit_msn", 1),
    HuggingFace("ijepa", 0, None),
]


def pixels(batch: int = 3, seed: int = 1) -> Tensor:
    """A batch of images of the size that all models here take."""
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


# -- open_clip ------------------------------------------------------------------------------------


def open_clip_tower(**options: Any) -> OpenClipTower:
    """A vision tower, scrambled, in eval mode."""
    tower = OpenClipTower(64, 16, width=64, layers=3, heads=4, mlp_ratio=2.0, **options)
    scramble(tower)
    return tower.eval()


def open_clip_layout(tower: Any) -> Layout:
    """What the reference is told."""
    blocks = list(tower.transformer.resblocks)
    return Layout(blocks, [Point(block.ln_2) for block in blocks], prefix=1, cls=0)


OPEN_CLIP: dict[str, dict[str, Any]] = {
    "token": {},
    "average": {"pool_type": "avg", "final_ln_after_pool": True},
    "attention-pool": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4},
    "scaled": {"ls_init_value": 0.1, "output_tokens": True},
    "custom-blocks": {"block_type": "custom", "qk_norm": True},
}


# -- PyTorch's own layers -------------------------------------------------------------------------


class EncoderLayers(Odd):
    """A ViT on ``nn.TransformerEncoderLayer``."""

    def __init__(self, *, batch_first: bool, norm_first: bool, dropout: float = 0.0) -> None:
        layers = [
            nn.TransformerEncoderLayer(
                DIM,
                HEADS,
                2 * DIM,
                dropout,
                activation="gelu",
                batch_first=batch_first,
                norm_first=norm_first,
            )
            for _ in range(4)
        ]
        super().__init__(layers, sequence_first=not batch_first)
        self.norm_first = norm_first

    def layout(self) -> Layout:
        blocks: list[Any] = list(self.blocks)
        mid = [Point(b.norm2) if self.norm_first else Point(b.linear1) for b in blocks]
        dim = 0 if self.sequence_first else 1
        return Layout(blocks, mid, prefix=1, cls=0, token_dim=dim)


# -- attention that ViTs have borrowed elsewhere ---------------------------------------------------


class GroupedQueries(nn.Module):
    """Four heads of queries share two of keys and values."""

    def __init__(self, *, spelled_out: bool = False) -> None:
        super().__init__()
        self.spelled_out = spelled_out
        self.to_q, self.to_kv = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.to_q(x).reshape(b, n, 4, c // 4).transpose(1, 2)
        k, v = self.to_kv(x).reshape(b, n, 2, 2, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.spelled_out:
            k = k[:, :, None].expand(b, 2, 2, n, c // 4).reshape(b, 4, n, c // 4)
            v = v[:, :, None].expand(b, 2, 2, n, c // 4).reshape(b, 4, n, c // 4)
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, n, c))


class Gated(Projections):
    """The result of each head is multiplied by a gate that each token opens for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        y = self.join(F.scaled_dot_product_attention(q, k, v))
        return self.out(y * self.gate(x).sigmoid())


class Cosine(Projections):
    """Normalised queries and keys, a learned temperature and a learned bias on every logit."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.offset = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        logits = (q * self.temperature.exp()) @ k.transpose(-2, -1) + self.offset
        return self.out(self.join(logits.softmax(-1) @ v))


class Sliding(Projections):
    """Every token sees the class token and the five on either side of it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        at = torch.arange(TOKENS, device=x.device)
        near = (at[:, None] - at[None]).abs() <= 5
        near = near | (at == 0)[None] | (at == 0)[:, None]
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=near)))


class CrossAttentionHead(Odd):
    """Four learned queries look at all tokens, and are averaged."""

    def __init__(self) -> None:
        super().__init__(Block() for _ in range(4))
        self.queries = nn.Parameter(torch.zeros(1, 4, DIM))
        self.to_k, self.to_v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        x = self.norm(self.layers(x))
        q = self.queries.expand(x.shape[0], -1, -1)
        y = F.scaled_dot_product_attention(q, self.to_k(x), self.to_v(x))
        return self.head(y.mean(1))


class ListOfImages(Odd):
    """Takes a list of batches, and returns one of results, as DINOv2 does for crops."""

    def forward(self, images: Any) -> Any:
        return [super(ListOfImages, self).forward(image) for image in images]


class TensorOrList(Block):
    """Asks for the type of what it is given, which only torch.export can answer."""

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return super().forward(x)
        raise AssertionError("lists need another library")


class HubStyle(Odd):
    """The calling convention of DINOv2's own code: anything positional, and all features where asked for."""

    def __init__(self) -> None:
        super().__init__(TensorOrList() for _ in range(3))
        self.registers = nn.Parameter(torch.zeros(1, 4, DIM))

    def features(self, images: Any, masks: Any = None) -> dict[str, Any]:
        """All that the last norm returns, by kind of token."""
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos
        registers = self.registers.expand(x.shape[0], -1, -1)
        x = torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)
        normed = self.norm(self.layers(x))
        return {"class": normed[:, 0], "patches": normed[:, 5:], "masks": masks}

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        features = self.features(*args, **kwargs)
        return features if is_training else self.head(features["class"])

    def layout(self) -> Layout:
        blocks: list[Any] = list(self.blocks)
        return Layout(blocks, [block.middle() for block in blocks], prefix=5, cls=0)


class ReadsPixels(Odd):
    """Reads a number out of its input: neither front end can know it."""

    def forward(self, image: Tensor) -> Tensor:
        if image.mean().item() > 0:
            image = -image
        return super().forward(image)


class NeedsTensor(Odd):
    """Insists on a tensor that is not a stand-in, such as torch.export passes."""

    def forward(self, image: Tensor) -> Tensor:
        if isinstance(image, fx.Proxy):
            raise TypeError("an image is a tensor")
        return super().forward(image)


def _blocks(make: Callable[[], nn.Module]) -> list[Block]:
    return [Block(make()) for _ in range(4)]


ATTENTIONS: dict[str, Callable[[], Odd]] = {
    "grouped-queries": lambda: Odd(_blocks(GroupedQueries)),
    "grouped-queries-expanded": lambda: Odd(_blocks(lambda: GroupedQueries(spelled_out=True))),
    "gated": lambda: Odd(_blocks(Gated)),
    "cosine": lambda: Odd(_blocks(Cosine)),
    "sliding-mask": lambda: Odd(_blocks(Sliding)),
    "cross-attention-head": CrossAttentionHead,
    "encoder-layer": lambda: EncoderLayers(batch_first=True, norm_first=True),
    "encoder-layer-sequence-first": lambda: EncoderLayers(batch_first=False, norm_first=True),
    "encoder-layer-post-norm": lambda: EncoderLayers(batch_first=True, norm_first=False),
}
