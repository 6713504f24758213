"""Scores besides a row of attention: each equals one that is worked out without the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx as sv
from support.checks import assert_matches
from support.models import BY_NAME, TORCHVISION, layout_of
from support.odd_models import EITHER, GOOD, image
from support.scoring import Kind, of_everything, scored_reference

KINDS: dict[Kind, Any] = {
    "received": "received",
    "values": "values",
    "keys": "keys",
    "all": of_everything,
}
PLANS: dict[str, dict[str, Any]] = {
    "1,3(30%,40%)+4": {"stages": [(1, "0.3"), (3, "0.4")], "return_layer": 4},
    "1,2(30%,5)+3;3(40%)+5": {
        "stages": [(1, "0.3"), (2, 5), (3, "0.4")],
        "return_layer": (3, 5),
    },
    "2,4(40%,30%)": {"stages": [(2, "0.4"), (4, "0.3")]},
}
BLOCK = {"stages": [(1, "0.4"), (2, "0.25")], "return_layer": 4, "cut": "block"}
NAMES = [
    "vit",
    "vit-unfused",
    "vit-layerscale-qknorm",
    "dinov2-reg4",
    "siglip-map",
    "parallel-things",
    "beit",
    "beit-unfused",
    "eva02",
    "eva-gqa",
    "dinov3-token",
    "rope-mixed",
    "relpos-shared",
    "cait",
    "naflex-gap",
    "torchvision",
]
ODD = {example.name: example for example in (*GOOD, *EITHER)}
SPELLED = [
    "einsum",
    "heads-last",
    "merged-heads",
    "sequence-first",
    "registers-last",
    "learned-bias",
    "talking-heads",
    "rope-leaf",
    "rope-sliced",
    "cls-last",
    "shared-block",
]


def check(kind: Kind, model: Any, plan: str, reference: dict[str, Any], layout: Any, make: Any):
    """Same output, tokens and scores as the reference."""
    for seed in range(1, 20):
        x = make(seed)
        wanted = scored_reference(kind, model, x, layout, **reference)
        if all(stage.margin > 1e-4 for stage in wanted.stages):
            break
    fast = sv.rewrite(
        model, plan, example_inputs=x, score=KINDS[kind], cut=reference.get("cut", "attention")
    )
    assert_matches(fast, x, wanted)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_every_family(kind: Kind, name: str, plan: str) -> None:
    family = TORCHVISION if name == "torchvision" else BY_NAME[name]
    model = family.build()
    check(kind, model, plan, PLANS[plan], layout_of(model), lambda seed: family.input(2, seed))


@pytest.mark.parametrize("name", ["vit", "siglip-map", "parallel-things"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_if_whole_layers_score(kind: Kind, name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    plan = "1,2(40%,25%)+4"
    check(kind, model, plan, BLOCK, layout_of(model), lambda seed: family.input(2, seed))


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_in_any_spelling(kind: Kind, name: str) -> None:
    model = ODD[name].build()
    plan = "1,2(30%,5)+3;3(40%)+5"
    check(kind, model, plan, PLANS[plan], model.layout(), lambda seed: image(2, seed))
