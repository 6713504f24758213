"""Hugging Face's own ways to call, train and keep a model, on a rewritten one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, ViTForImageClassification, pipeline

import skipvit_fx
from support.client_models import LABELS, STAGES, classifier, fast_classifier, pixels, rewritten
from support.outside import MIDDLES
from support.reference import Layout, Point, masked_reference


def layout(model: Any) -> Layout:
    blocks = list(model.vit.layers)
    (middle,) = (name for name in MIDDLES if hasattr(blocks[0], name))
    return Layout(blocks, [Point(getattr(block, middle)) for block in blocks], prefix=1, cls=0)


@pytest.mark.slow
@pytest.mark.client(
    "Hugging Face",
    "labels, return_dict, output_hidden_states, device, dtype",
    caveat="a call of another kind gets a graph of its own when it is made first",
)
def test_calls_with_what_the_example_had_not() -> None:
    model, fast = classifier(), fast_classifier()
    x = pixels()
    with torch.no_grad():
        wanted = masked_reference(model, x, layout(model), **STAGES).output.logits
        labelled = fast(pixel_values=x, labels=LABELS)
        got = [
            fast(x).logits,
            labelled.logits,
            fast(x, return_dict=False)[0],
            fast(x, output_hidden_states=False, output_attentions=False).logits,
        ]
        for logits in got:
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(labelled.loss, nn.functional.cross_entropy(wanted, LABELS))
    assert fast.device == model.device
    assert fast.dtype == model.dtype
    assert fast.num_parameters() == model.num_parameters()


@pytest.mark.client("Hugging Face", "another image size, interpolate_pos_encoding")
@pytest.mark.slow
def test_another_image_size() -> None:
    model, x = classifier(), pixels(size=48)
    fast = rewritten(model)
    with torch.no_grad():
        got = fast(x, interpolate_pos_encoding=True).logits
        wanted = skipvit_fx.rewrite(
            model, "2(50%)+4", example_inputs={"pixel_values": x, "interpolate_pos_encoding": True}
        )(x, interpolate_pos_encoding=True).logits
        plain = model(x, interpolate_pos_encoding=True).logits
    assert torch.equal(got, wanted)
    assert not torch.equal(got, plain)


@pytest.mark.client(
    "Hugging Face",
    "save_pretrained, from_pretrained",
    caveat="what is saved is the author's model; rewrite it again after loading",
)
@pytest.mark.slow
def test_saved_as_the_model_itself(tmp_path: Path) -> None:
    model, fast = classifier(), fast_classifier()
    fast.save_pretrained(tmp_path)
    again = ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert again.config.architectures == ["ViTForImageClassification"]
    with torch.no_grad():
        assert torch.equal(again(pixels()).logits, model(pixels()).logits)
        assert torch.equal(rewritten(again)(pixels()).logits, fast(pixels()).logits)


@pytest.mark.client("Hugging Face", 'pipeline("image-classification")')
def test_pipeline() -> None:
    from transformers import ViTImageProcessor

    fast = fast_classifier()
    size = {"height": 32, "width": 32}
    images = ViTImageProcessor(size=size)
    classify = pipeline("image-classification", model=fast, image_processor=images, device="cpu")
    from PIL import Image

    picture = Image.new("RGB", (32, 32), (200, 10, 30))
    (best, *_) = classify(picture)
    with torch.no_grad():
        given = images(picture, return_tensors="pt")
        wanted = fast(**given).logits.softmax(-1).max().item()
    assert best["score"] == pytest.approx(wanted)


# -- training ---------------------------------------------------------------------------------------------------------


def step(fast: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss and gradients of a training step, and how often a linear layer ran in it."""
    ran: list[int] = []
    fc1 = fast.get_submodule("vit.layers.1.mlp.fc1")
    hook = fc1.register_forward_hook(lambda *_: ran.append(1))
    fast.train()(
        pixel_values=pixels(), labels=LABELS
    )  # makes the graph for it, where there is none
    fast.zero_grad()
    ran.clear()
    loss = fast(pixel_values=pixels(), labels=LABELS).loss
    loss.backward()
    hook.remove()
    gradients = {n: p.grad.clone() for n, p in fast.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, len(ran)


@pytest.mark.client(
    "Hugging Face",
    "activation (gradient) checkpointing on and off",
    caveat="hooks on modules that a graph calls also run while it is made",
)
@pytest.mark.slow
def test_gradient_checkpointing_switched_on_and_off() -> None:
    fast = fast_classifier()
    plain = step(fast)
    assert plain[2] == 1
    fast.activation_checkpointing_enable()
    assert fast.is_activation_checkpointing
    for reloaded in (fast, pickle.loads(pickle.dumps(fast))):
        loss, gradients, ran = step(reloaded)
        assert ran == 2  # once more for the gradients
        torch.testing.assert_close(loss, plain[0])
        torch.testing.assert_close(gradients, plain[1])
    with torch.no_grad():
        assert torch.equal(fast(pixel_values=pixels()).logits, fast.eval()(pixels()).logits)
    fast.activation_checkpointing_disable()
    assert step(fast)[2] == 1


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": pixels(12)[i], "labels": i % 5}


class WithTower(nn.Module):
    """Somebody's own model, with a rewritten tower inside."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.tower(pixel_values).logits
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained(model: Any, folder: Path, resume: bool = False, **options: Any) -> dict[str, Tensor]:
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        save_steps=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Pictures())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["itself", "tower", "recomputing"])
@pytest.mark.client(
    "Hugging Face",
    "Trainer: {case}",
    caveat={
        "itself": "resuming a bare ViT fails in transformers 5.24, for the author's model as well"
    },
)
@pytest.mark.slow
def test_trainer(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    def fresh() -> Any:
        fast = fast_classifier()
        return WithTower(fast) if kind == "tower" else fast

    options = {"gradient_checkpointing": True} if kind == "recomputing" else {}
    first = trained(fresh(), tmp_path / "one", **options)
    start = fresh().state_dict()
    assert any(not torch.equal(first[name], start[name]) for name in start)
    if (
        kind == "tower"
    ):  # transformers 5.24 looks for other names than it saved, of the author's own model as well
        resumed = trained(fresh(), tmp_path / "one", resume=True, **options)
        for name, value in first.items():
            torch.testing.assert_close(resumed[name], value)
    off = fast_classifier()
    skipvit_fx.set_skipping(off, False)
    plain = trained(WithTower(off) if kind == "tower" else off, tmp_path / "off", **options)
    author = trained(
        WithTower(classifier()) if kind == "tower" else classifier(), tmp_path / "a", **options
    )
    for name, value in author.items():
        torch.testing.assert_close(plain[name], value)
        if name.endswith("head.weight") or name.endswith("classifier.weight"):
            assert not torch.equal(first[name], value)
