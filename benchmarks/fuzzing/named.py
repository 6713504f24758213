"""Models of timm, Hugging Face and the tests, small, with random options."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fuzzing.compose import Built
from support import odd_models, outside
from support.models import BY_NAME, Family, layout_of
from support.odd_models import BAD, EITHER, GOOD, MIXERS, Example
from support.outside import ATTENTIONS, HUGGING_FACE

FREE = ("vit", "vit-unfused", "vit-clip", "vit-dynamic", "deit", "deit3")
"""timm's plain ViT, whose options can be combined; for the others only depth and width vary."""
OPTIONS: dict[str, list[Any]] = {
    "patch_size": [16, 32],
    "reg_tokens": [0, 0, 2],
    "qk_norm": [False, True],
    "init_values": [None, 0.1],
    "mlp_ratio": [1.0, 2.0],
    "class_token": [True, True, False],
    "pre_norm": [False, True],
    "final_norm": [True, True, False],
    "no_embed_class": [False, True],
}
ODD = {example.name: example for example in (*GOOD, *EITHER, *BAD)}
ODD |= {name: Example(name, make) for name, make in ATTENTIONS.items()}
ODD.pop("cross-attention-head")
ENCODERS = {encoder.kind: encoder for encoder in HUGGING_FACE}
ENCODERS.pop("data2vec-vision")  # its layers return tuples, which the reference cannot handle


@dataclass(frozen=True)
class Named:
    """A model by name.

    Attributes:
        kind: ``timm``, ``hugging face``, ``odd`` or ``mixer``.
        name: the name of the tests' family, encoder or example; for a mixer also its place and layer.
        options: the options of the model.
    """

    kind: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Layers."""
        return int(self.options.get("depth") or self.options.get("num_hidden_layers") or 4)

    @property
    def plain(self) -> bool:
        """Whether `physical_reference` can run it."""
        return self.kind == "timm" and self.name in FREE and not self.options.get("pre_norm")

    def build(self) -> Built:
        """The model, scrambled, in eval mode."""
        if self.kind == "timm":
            model = self._family.build(**self.options)
            return Built(model, model, lambda at: layout_of(model))
        if self.kind == "hugging face":
            encoder = ENCODERS[self.name]
            found: Any = encoder.build(**self.options)
            for module in found.modules():
                if getattr(module, "drop_prob", 0):  # its own random draws cannot be compared
                    module.drop_prob = 0.0
            return Built(found, found, lambda at: encoder.layout(found))
        odd = (
            odd_models.mixing(*_mixer(self.name))
            if self.kind == "mixer"
            else ODD[self.name].build()
        )
        return Built(odd, odd, lambda at: odd.layout())

    def image(self, batch: int, seed: int) -> Tensor:
        """A batch of images."""
        if self.kind == "timm":
            return self._family.input(batch, seed)
        if self.kind == "hugging face":
            return outside.pixels(batch, seed)
        return odd_models.image(batch, seed)

    @property
    def _family(self) -> Family:
        return BY_NAME[self.name]

    def smaller(self) -> list[Named]:
        """The same model with fewer options."""
        rest = [
            {k: v for k, v in self.options.items() if k != name}
            for name in self.options
            if name not in ("depth", "num_hidden_layers")
        ]
        return [replace(self, options=options) for options in rest]


def _mixer(name: str) -> tuple[str, str, int]:
    mixer, place, layer = name.split("/")
    return mixer, place, int(layer)


def named(rng: random.Random) -> Named:
    """A random model by name."""
    kind = rng.choice(["timm", "timm", "hugging face", "odd", "mixer"])
    if kind == "odd":
        return Named(kind, rng.choice(sorted(ODD)))
    if kind == "mixer":
        place = rng.choice(["leaf", "traced"])
        return Named(kind, f"{rng.choice(sorted(MIXERS))}/{place}/{rng.randint(1, 4)}")
    if kind == "hugging face":
        depth = rng.randint(2, 4)
        return Named(kind, rng.choice(sorted(ENCODERS)), {"num_hidden_layers": depth})
    name = rng.choice(sorted(set(BY_NAME) - {"vit-coincident"}))
    options: dict[str, Any] = {"depth": rng.randint(2, 4)}
    if name in FREE:
        options |= {"embed_dim": rng.choice([32, 48, 64])}
        options |= {key: rng.choice(values) for key, values in OPTIONS.items()}
        if not options["class_token"]:
            options |= {"global_pool": "avg", "no_embed_class": False}
        elif rng.random() < 0.3:
            options["global_pool"] = "avg"
    return Named(kind, name, options)
