"""Published ways to drop or merge tokens, as plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Method:
    """A published way to drop or merge tokens: ``rewrite(model, method.plan, **method.options)``.

    Attributes:
        name: as its authors write it.
        paper: the title of the paper.
        arxiv: its number in arXiv.
        plan: for a Vision Transformer with a class token, 12 layers and 196 patches, as published for one where it
            was.
        options: the other keyword arguments of :func:`skipvit_fx.rewrite`.
        equal: what is as published.
        differs: what is not.
    """

    name: str
    paper: str
    arxiv: str
    plan: str
    equal: str
    differs: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def url(self) -> str:
        """Where the paper is."""
        return f"https://arxiv.org/abs/{self.arxiv}"


def _in_each(amounts: Iterable[tuple[int, str]], kind: str = "") -> str:
    """In each of these layers a span that ends with it."""
    return ";".join(f"{layer}({amount})+{layer + 1}{kind}" for layer, amount in amounts)


_ALL = (
    Method(
        "SkipViT",
        "SkipViT: Speeding Up Vision Transformers with a Token-Level Skip Connection",
        "2401.15293",
        "6(55%)+11",
        equal="The layers, the amount and the return of the paper's fastest method with one stage. Patches are chosen "
        "by the class token's attention, pass around layers 7 to 10, and return to their positions.",
        differs="The paper does not say where in layer 6 they leave. Here it is after the attention, as in EViT, "
        'whose score the paper uses; `cut="block"` is after the whole layer. The paper\'s warm-up is '
        "`SkipSchedule(fast, warmup_epochs=15)`.",
    ),
    Method(
        "EViT",
        "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
        "2202.07800",
        "4,7,10(30%,30%,30%)+fused",
        equal="The layers, the numbers of tokens (keep rate 0.7), the score, the cut after the attention, and the "
        "fused token: the sum of what leaves, weighted by its scores and not normalised, which competes in later "
        "stages. Gradients flow through these weights, and none through the choice.",
        differs="Scores are taken before attention dropout, there after it. In distilled models the distillation "
        "token always stays, there it competes with the patches. The authors lower the keep rate along a cosine at "
        "the beginning of training: `SkipSchedule(fast, warmup_epochs=..., ramp_epochs=...)`.",
    ),
    Method(
        "ToMe",
        "Token Merging: Your ViT But Faster",
        "2210.09461",
        "1-12(8)+merged",
        equal="On a plain timm ViT with a class token, everything, to 1e-5: the two halves, the similarity of keys, "
        "the mean weighted by sizes, the order of what is left, and proportional attention. `tests/test_merging.py` "
        "compares with a second implementation, which follows the paper.",
        differs="Without a class token, or with more prefix tokens, the two halves begin with another patch than in "
        "the authors' code. That code computes the matrix of attention weights; here the model's fused attention "
        "takes the logarithms of the sizes as a mask.",
    ),
    Method(
        "ToMeSD",
        "Token Merging for Fast Stable Diffusion",
        "2303.17604",
        _in_each([(layer, "30%") for layer in range(1, 12)], "+merged"),
        equal="In each layer similar tokens are merged for a part of it, computed once, and given back to all places "
        "that they came from.",
        differs="Much, as it is made for another kind of network. Tokens are merged around the feed-forward network, "
        "there around the self-attention. The tokens that were merged are equal afterwards; there each keeps its own "
        "residual, and only what the attention adds is shared. They are compared by the keys of the attention, there "
        "by the block's input. They merge into every second token, up to half of them; there into one, at random, of "
        "each window of 2 x 2, up to three quarters. Layer 12 is left out, as only the class token is read after it; "
        "for a model that returns all tokens add `;12(30%)+13+merged`.",
    ),
    Method(
        "IdleViT",
        "No Token Left Behind: Efficient Vision Transformer via Dynamic Token Idling",
        "2310.05654",
        _in_each(
            [(layer, "30%") for layer in (4, 5, 6)]
            + [(layer, "51%") for layer in (7, 8, 9)]
            + [(layer, "65.7%") for layer in (10, 11)]
        ),
        equal="From the fourth layer on, each layer chooses anew among all tokens, by the class token's attention, "
        "also among those that were idle. Idle tokens keep their state and their positions. The amounts are those of "
        "keep ratio 0.7.",
        differs="Idle tokens skip only the feed-forward network; there they also skip the attention, as queries and "
        "as keys, which saves more. The score is the mean over heads of attention weights, there of logits. Of 196 "
        "tokens 138, 97 and 68 take part, there one less. Layer 12 is left out, as only the class token is read after "
        "it; there its attention sees fewer tokens. The token cut loss and the distillation are not included.",
    ),
    Method(
        "PatchDropout",
        "PatchDropout: Economizing Vision Transformers Using Patch Dropout",
        "2208.07220",
        "0(50%)",
        equal="Everything: in training only, each image keeps its own random half of its patches, with their "
        "positions, and the class token. `tests/test_spans.py` compares with timm's patch dropout, given the same "
        "patches.",
        differs="Of an odd number of patches the larger half stays, there the smaller one.",
        options={"score": "random", "train_only": True},
    ),
    Method(
        "Random-LTD",
        "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-scale Transformers",
        "2211.11586",
        "1(50%)+3;3(50%)+5;5(50%)+7;7(50%)+9;9(50%)+11",
        equal="In training only, a random half of the tokens takes part in layers 2, 4, 6, 8 and 10, drawn anew for "
        "each image and layer. The others pass around the whole layer and return to their positions. The first and "
        "the last layer see all tokens.",
        differs="There all layers but the first and the last drop tokens, here every second one, as a span begins "
        "only after the one before has returned. The class token always takes part, there it is a token like others. "
        "The amount is fixed; there more tokens take part as training goes on, and the learning rate is made for it.",
        options={"cut": "block", "score": "random", "train_only": True},
    ),
    Method(
        "DynamicViT",
        "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
        "2106.02034",
        "3,6,9(30%,30%,30%)",
        equal="The places, in front of layers 4, 7 and 10, and the keep ratio of 0.7 at each. As there in inference, "
        "those with the highest scores stay, and the others leave for good.",
        differs="The score is the class token's attention in the layer before, there what a trained predictor says: a "
        "function of the patches, which `score=` takes, but one for all stages. There, training masks tokens by "
        "Gumbel-softmax, so that the predictor learns; here no gradient flows through the choice. Of 196 patches 138, "
        "97 and 68 stay, there one less.",
        options={"cut": "block"},
    ),
    Method(
        "VisionZip",
        "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
        "2412.04467",
        "11(142)",
        equal="The choice of dominant tokens: the class token, and the 54 patches to which it pays most attention in "
        "the last layer but one, in their state after that layer.",
        differs="The other patches are lost, there they are merged into a few contextual tokens. There, 54 of 576 "
        "patches of a CLIP encoder go to a language model, without its last layer; here, 54 of 196 go through the "
        "last layer. For that encoder's 24 layers it is `23(522)`.",
        options={"cut": "block"},
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name.lower(): method for method in _ALL})
