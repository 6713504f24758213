"""PEFT: adapters on a rewritten model, or a rewritten model with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import skipvit_fx
from support.client_models import LABELS, PLAN, classifier, fast_classifier, pixels

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TARGETS = ["q_proj", "v_proj", "fc1"]
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["classifier"]),
    "lora-everywhere": lambda: peft.LoraConfig(r=4, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["fc1"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


def adapted(model: Any, kind: str) -> Any:
    torch.manual_seed(0)
    made = peft.get_peft_model(model, ADAPTERS[kind]())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in made.parameters() if p.requires_grad):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return made.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.client("PEFT", "{case}, before and after rewriting")
def test_an_adapter_on_a_rewritten_model(kind: str) -> None:
    """The same as rewriting the model with its adapter, in every way to call it; and it learns."""
    x = pixels()
    late = adapted(fast_classifier(), kind)
    inside = adapted(classifier(), kind)
    inside.base_model.model = skipvit_fx.rewrite(inside.base_model.model, PLAN, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(late(x).logits, inside(x).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            late(pixel_values=x).logits, inside(x).logits, rtol=1e-5, atol=1e-5
        )
        assert not torch.allclose(late(x).logits, fast_classifier()(x).logits, atol=1e-3)
    for model in (late, inside):
        model.zero_grad()
        model(pixel_values=x, labels=LABELS).loss.backward()
    gradients = {n: p.grad for n, p in inside.named_parameters() if p.grad is not None}
    assert gradients
    for name, parameter in late.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
        else:
            assert parameter.grad is None
    used = [n for n, p in late.named_parameters() if p.requires_grad and "last" not in n]
    assert set(used) == set(gradients)


@pytest.mark.client("PEFT", "an adapter saved, loaded, switched off, merged")
@pytest.mark.slow
def test_an_adapter_is_saved_loaded_and_merged(tmp_path: Path) -> None:
    x = pixels()
    late = adapted(fast_classifier(), "lora")
    with torch.no_grad():
        wanted = late(x).logits
        late.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(fast_classifier(), str(tmp_path)).eval()
        torch.testing.assert_close(again(x).logits, wanted)
        with again.disable_adapter():
            torch.testing.assert_close(again(x).logits, fast_classifier()(x).logits)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(x).logits, wanted, rtol=1e-4, atol=1e-5)
