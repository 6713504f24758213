"""Small random ViTs of every family in timm, their layers, and the models to be refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from support.reference import Layout, Point

IMAGE = (
    64,
    96,
)  # 4 x 6 patches of 16: not square, so that rows and columns cannot be mixed up unnoticed
DEPTH = 4
SMALL: dict[str, Any] = {"depth": DEPTH, "embed_dim": 64, "num_heads": 4, "num_classes": 10}
RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Moves every weight and running statistic far from its initial value, so that each matters to
    the output.

    Fresh models hide mistakes: LayerScale is near zero, biases and relative position tables are
    zero, norms are the identity, class and register tokens all but vanish.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, scale: float, shift: float = 0.0) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale + shift

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    matrices = (nn.Linear, nn.Conv2d)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_floating_point():
                    continue
                lower = name.lower()
                if isinstance(module, matrices) and name == "weight":
                    value = normal(parameter, parameter[0].numel() ** -0.5)
                elif "gamma" in lower or (
                    parameter.dim() == 1 and "bias" not in lower and "lambda" not in lower
                ):
                    value = uniform(parameter, 0.5, 1.0)  # norms, LayerScale
                elif parameter.dim() <= 1:
                    value = normal(parameter, 0.3)
                elif "token" in lower or "latent" in lower or "query" in lower:
                    value = normal(parameter, 1.0)
                elif "pos" in lower or "table" in lower:
                    value = normal(parameter, 0.7)
                else:
                    value = normal(parameter, parameter.shape[-1] ** -0.5)
                parameter.copy_(value)
            if (
                isinstance(module, nn.modules.batchnorm._BatchNorm)
                and module.running_mean is not None
            ):
                assert module.running_var is not None
                module.running_mean.copy_(normal(module.running_mean, 0.3))
                module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
    return model


def middle(block: Any) -> Point:
    """Where a timm block holds its state after the attention residual."""
    if hasattr(block, "ffns"):
        return Point(block.ffns[0])
    if hasattr(block, "in_proj"):  # attention and MLP in parallel: nothing in between
        return Point(block, "output")
    norm_after = type(block).__name__ in ("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm")
    return Point(block.mlp if norm_after else block.norm2)


def layout_of(model: Any) -> Layout:
    """Where the layers of a ViT of timm's or torchvision's are."""
    trunk = getattr(model, "encoder", model)
    if hasattr(trunk, "layers"):  # torchvision
        blocks = list(trunk.layers)
        return Layout(blocks, mid=[Point(block.ln_2) for block in blocks], prefix=1, cls=0)
    blocks = list(trunk.blocks)
    if hasattr(model, "blocks_token_only"):  # CaiT: the class token joins after the layers
        prefix, cls = 0, None
    else:
        prefix = getattr(model, "num_prefix_tokens", 0)
        embeds = getattr(model, "embeds", model)
        cls = 0 if getattr(embeds, "cls_token", None) is not None else None
    return Layout(
        blocks=blocks,
        mid=[middle(block) for block in blocks],
        prefix=prefix,
        cls=cls,
        mixed=[
            (block.attn.proj_w, 2)
            for block in blocks
            if hasattr(getattr(block, "attn", None), "proj_w")
        ],
    )


@dataclass(frozen=True)
class Family:
    """One kind of ViT.

    Attributes:
        name: what tests call it.
        model: timm's name, or what builds the model from `options` and rates alone.
        options: passed to timm over `SMALL`.
        image: height and width.
        batch: samples of an input.
        rates: the dropout rates that the model knows.
        prepare: applied to the finished model.
    """

    name: str
    model: str | Callable[..., nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    image: tuple[int, int] = IMAGE
    batch: int = 3
    rates: tuple[str, ...] = RATES
    prepare: Callable[[nn.Module], None] | None = None

    def build(self, *, rate: float = 0.0, seed: int = 0, **options: Any) -> Any:
        """The model, scrambled, in eval mode; `rate` sets every kind of dropout."""
        kwargs = {**dict.fromkeys(self.rates, rate), **self.options, **options}
        if isinstance(self.model, str):
            kwargs = {**SMALL, "img_size": self.image, **kwargs}
            model = timm.create_model(self.model, **kwargs)
        else:
            model = self.model(**kwargs)
        if self.prepare is not None:
            self.prepare(model)
        return scramble(model, seed).eval()

    def input(self, batch: int | None = None, seed: int = 1) -> Tensor:
        """A batch of images."""
        return torch.randn(
            batch or self.batch, 3, *self.image, generator=torch.Generator().manual_seed(seed)
        )

    def __str__(self) -> str:
        return self.name


def _unfused(model: nn.Module) -> None:
    """Attention by matrix product and softmax."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


_no_pos = tuple(rate for rate in RATES if rate != "pos_drop_rate")
_patch14 = (56, 84)

FAMILIES: list[Family] = [
    Family("vit", "vit_tiny_patch16_224"),
    Family("vit-unfused", "vit_tiny_patch16_224", prepare=_unfused),
    Family("vit-layerscale-qknorm", "vit_tiny_patch16_224", {"init_values": 1e-5, "qk_norm": True}),
    Family(
        "vit-scale-norms", "vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}
    ),
    Family("vit-clip", "vit_base_patch16_clip_224"),
    Family("vit-dynamic", "vit_tiny_patch16_224", {"dynamic_img_size": True}),
    Family("vit-cls-avg", "vit_tiny_patch16_224", {"global_pool": "avg"}),
    Family("vit-no-pos", "vit_tiny_patch16_224", {"pos_embed": "none"}),
    # 64 patches, 64 channels, 8 heads of 8, a batch of 8: sizes say nothing about axes
    Family(
        "vit-coincident",
        "vit_tiny_patch16_224",
        {"class_token": False, "global_pool": "avg", "num_heads": 8, "mlp_ratio": 1.0},
        (128, 128),
        batch=8,
    ),
    Family("dinov2", "vit_small_patch14_dinov2", image=_patch14),
    Family("dinov2-reg4", "vit_small_patch14_reg4_dinov2", image=_patch14),
    Family("dinov2-reg4-swiglu", "vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 4}, image=_patch14),
    Family("reg4-gap", "vit_medium_patch16_reg4_gap_256"),
    Family("reg4-map", "vit_so150m_patch16_reg4_map_256"),
    Family("siglip-map", "vit_base_patch16_siglip_224"),
    Family("siglip-gap", "vit_base_patch16_siglip_gap_224"),
    Family("parallel-things", "vit_small_patch16_18x2_224"),
    Family("parallel-scaling", "vit_base_patch16_xp_224"),
    Family("res-post-norm", "vit_base_patch16_rpn_224"),
    Family("diff-attention", "vit_dwee_patch16_reg1_gap_256"),
    Family("diff-attention-parallel", "vit_dpwee_patch16_reg1_gap_256"),
    Family("hybrid-resnet26d", "vit_small_resnet26d_224", image=(96, 160)),
    Family("hybrid-r-s16", "vit_tiny_r_s16_p8_224", image=(128, 192)),
    Family("deit", "deit_tiny_patch16_224"),
    Family("deit-distilled", "deit_tiny_distilled_patch16_224"),
    Family("deit3", "deit3_small_patch16_224"),
    Family("beit", "beit_base_patch16_224"),
    Family("beit-unfused", "beit_base_patch16_224", prepare=_unfused),
    Family(
        "beit-shared-bias",
        "beit_base_patch16_224",
        {
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "use_abs_pos_emb": True,
            "global_pool": "token",
        },
    ),
    Family("beitv2", "beitv2_base_patch16_224"),
    Family("beit3", "beit3_base_patch16_224"),
    Family("eva", "eva_giant_patch14_224", image=_patch14),
    Family("eva02", "eva02_tiny_patch14_224", image=_patch14),
    Family("eva02-clip", "eva02_base_patch16_clip_224"),
    Family("eva02-post-norm", "eva02_enormous_patch14_clip_224", {"mlp_ratio": 4}, image=_patch14),
    Family("eva-gqa", "vit_small_patch16_rope_224", {"num_kv_heads": 2, "qkv_fused": False}),
    Family("dinov3", "vit_small_patch16_dinov3"),
    Family("dinov3-token", "vit_small_patch16_dinov3", {"global_pool": "token"}),
    Family("rope-reg1-gap", "vit_medium_patch16_rope_reg1_gap_256"),
    Family("rope-axial", "vit_small_patch16_rope_224"),
    Family("rope-mixed", "vit_small_patch16_rope_mixed_224"),
    Family("rope-mixed-ape", "vit_small_patch16_rope_mixed_ape_224"),
    Family("pe-core", "vit_pe_core_tiny_patch16_384", {"attn_pool_num_heads": 4}),
    Family("relpos-mlp", "vit_relpos_small_patch16_224", {"rel_pos_type": "mlp"}, rates=_no_pos),
    Family("relpos-bias", "vit_relpos_small_patch16_224", {"rel_pos_type": "bias"}, rates=_no_pos),
    Family("relpos-unfused", "vit_relpos_small_patch16_224", rates=_no_pos, prepare=_unfused),
    Family("relpos-shared", "vit_srelpos_small_patch16_224", rates=_no_pos),
    Family("relpos-cls", "vit_relpos_medium_patch16_cls_224", rates=_no_pos),
    Family("relpos-post-norm", "vit_relpos_small_patch16_rpn_224", rates=_no_pos),
    Family("cait", "cait_xxs24_224"),
    Family("cait-avg", "cait_xxs24_224", {"global_pool": "avg"}),
    Family("naflex-gap", "naflexvit_base_patch16_gap"),
    Family("naflex-map", "naflexvit_base_patch16_map"),
    Family("naflex-factorized", "naflexvit_base_patch16_parfac_gap"),
    Family(
        "naflex-rope",
        "naflexvit_base_patch16_gap",
        {"rope_type": "axial", "attn_type": "rope", "pos_embed": "none", "attn_gated": True},
    ),
]

# Attention inside `nn.MultiheadAttention`.
TORCHVISION = Family(
    "torchvision",
    VisionTransformer,
    {
        "image_size": 64,
        "patch_size": 16,
        "num_layers": DEPTH,
        "num_heads": 4,
        "hidden_dim": 64,
        "mlp_dim": 128,
        "num_classes": 10,
    },
    (64, 64),
    rates=("dropout", "attention_dropout"),
)

BY_NAME = {family.name: family for family in FAMILIES}


@dataclass(frozen=True)
class Refused:
    """A model without one sequence of tokens to drop from, or that mixes them in its own way."""

    name: str
    build: Callable[[], nn.Module]
    image: tuple[int, int] = (64, 64)

    def input(self) -> Tensor:
        """A batch of images."""
        return torch.randn(2, 3, *self.image, generator=torch.Generator().manual_seed(1))

    def __str__(self) -> str:
        return self.name


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: scramble(timm.create_model(name, num_classes=10, **options)).eval()


class PlainMLP(nn.Module):
    """No attention and no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 32 * 32, 32), nn.GELU(), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


REFUSED: list[Refused] = [
    Refused(
        "swin",
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 4),
        ),
    ),
    Refused(
        "swinv2",
        _timm(
            "swinv2_tiny_window8_256",
            img_size=64,
            window_size=4,
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 4),
        ),
    ),
    Refused("pvt-v2", _timm("pvt_v2_b0")),
    Refused("mvitv2", _timm("mvitv2_tiny", img_size=64)),
    Refused("hiera", _timm("hiera_tiny_224", img_size=64, embed_dim=32, stages=(1, 1, 1, 1))),
    Refused("xcit", _timm("xcit_nano_12_p16_224", img_size=64, depth=3, embed_dim=32)),
    Refused("convit", _timm("convit_tiny", img_size=64, depth=4, local_up_to_layer=3)),
    Refused("resnet", _timm("resnet18")),
    Refused("mixer", _timm("mixer_s32_224", img_size=64)),
    Refused("plain-mlp", PlainMLP, (32, 32)),
]


def names(items: Iterable[Family | Refused]) -> list[str]:
    """Test ids."""
    return [item.name for item in items]
