"""Lightning, accelerate, torchao, bitsandbytes, pruning, and timm's own training pieces, beside the author's model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, adaptive_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import skipvit_fx
from support.client_models import LABELS, PLAN, fast_vit, pixels, rewritten, vit


def twins(act: Callable[[Any], Any]) -> tuple[Any, Any]:
    """A rewritten model with something done to it, and one rewritten after it was done to the author's."""
    late, early = fast_vit(), vit()
    late, early = act(late) or late, act(early) or early
    return late, skipvit_fx.rewrite(early, PLAN, example_inputs=pixels())


def assert_alike(late: Any, early: Any) -> None:
    with torch.no_grad():
        got, wanted = late(pixels()), early(pixels())
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, fast_vit()(pixels()), rtol=1e-4, atol=1e-5)


# -- pruning ----------------------------------------------------------------------------------------------------------


def pruned(model: Any) -> None:
    for block in model.blocks:
        prune.l1_unstructured(block.attn.qkv, "weight", 0.4)
        prune.ln_structured(block.mlp.fc1, "weight", 0.5, n=2, dim=0)


@pytest.mark.slow
@pytest.mark.client("torch.nn.utils.prune", "l1_unstructured, ln_structured, remove")
def test_pruning() -> None:
    late, early = twins(pruned)
    assert_alike(late, early)
    for block in late.blocks:
        prune.remove(block.attn.qkv, "weight")
        prune.remove(block.mlp.fc1, "weight")
    assert_alike(late, early)


# -- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.client("timm", "train script: layer decay, EMA, AGC, checkpoint saver")
@pytest.mark.slow
def test_the_pieces_of_timms_train_script(tmp_path: Path) -> None:
    def trained(model: Any, folder: Path) -> tuple[Any, Any]:
        folder.mkdir()
        model.train()
        optimizer = create_optimizer_v2(
            model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8
        )
        average = ModelEmaV3(model, decay=0.5)
        saver = CheckpointSaver(
            model,
            optimizer,
            model_ema=average,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
        )
        for epoch in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels()), LABELS).backward()
            adaptive_clip_grad(model.parameters(), clip_factor=0.01)
            optimizer.step()
            average.update(model)
            saver.save_checkpoint(epoch, metric=float(epoch))
        return model.eval(), average.module.eval()

    fast, average = trained(fast_vit(), tmp_path / "fast")
    off = fast_vit()
    skipvit_fx.set_skipping(off, False)
    off, off_average = trained(off, tmp_path / "off")
    model, model_average = trained(vit(), tmp_path / "model")
    for one, other in ((off, model), (off_average, model_average)):
        for name, value in other.state_dict().items():
            torch.testing.assert_close(one.state_dict()[name], value)
    with torch.no_grad():
        assert not torch.equal(fast(pixels()), average(pixels()))
        kept = torch.load(tmp_path / "fast" / "model_best.pth.tar", weights_only=False)
        again = vit()
        again.load_state_dict(kept["state_dict"])
        fast_again = rewritten(again)
        torch.testing.assert_close(fast_again(pixels()), fast(pixels()))
        again.load_state_dict(kept["state_dict_ema"])
        torch.testing.assert_close(fast_again(pixels()), average(pixels()))


# -- accelerate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["cpu_offload", "dispatch"])
@pytest.mark.client("accelerate", "{case}")
def test_accelerate_offload(offload: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    fast, x = fast_vit(), pixels()
    with torch.no_grad():
        wanted = fast(x)
        if offload == "cpu_offload":
            accelerate.cpu_offload(fast, execution_device="cpu")
        else:
            accelerate.disk_offload(fast, str(tmp_path), execution_device="cpu")
        torch.testing.assert_close(fast(x), wanted)


@pytest.mark.client("accelerate", "prepare, backward, unwrap")
def test_accelerate_prepares() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def trained(model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model.train(), optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(pixels()), LABELS))
            optimizer.step()
        return accelerator.unwrap_model(model)

    off = fast_vit()
    skipvit_fx.set_skipping(off, False)
    theirs, ours, fast = trained(vit()), trained(off), trained(fast_vit())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    assert not torch.equal(fast.head.weight, theirs.head.weight)


# -- Lightning --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, loggers and devices
@pytest.mark.client("Lightning", "fit, save_checkpoint, load")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trained(model: Any, folder: Path) -> Any:
        data = torch.utils.data.DataLoader(
            [(pixels()[i], LABELS[i]) for i in range(2)], batch_size=2
        )
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=True,
        )
        task = Task(model)
        trainer.fit(task, data)
        trainer.save_checkpoint(folder / "last.ckpt")
        return task

    off = fast_vit()
    skipvit_fx.set_skipping(off, False)
    theirs, ours = trained(vit(), tmp_path / "a"), trained(off, tmp_path / "b")
    fast = trained(fast_vit(), tmp_path / "c")
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    assert not torch.equal(fast.model.head.weight, theirs.model.head.weight)
    again = Task(fast_vit())
    again.load_state_dict(
        torch.load(tmp_path / "c" / "last.ckpt", weights_only=False)["state_dict"]
    )
    with torch.no_grad():
        assert torch.equal(again.model(pixels()), fast.model.eval()(pixels()))


# -- low precision ----------------------------------------------------------------------------------------------------


@pytest.mark.client("torchao", "int8 weights")
def test_torchao_weight_only() -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def quantised(model: Any) -> None:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())

    late, early = twins(quantised)
    assert_alike(late, early)
    assert type(late.blocks[3].attn.qkv.weight) is not nn.Parameter


@pytest.mark.client("torchao", "QAT, int4 weights")
def test_torchao_quantisation_aware_training() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=16)

    def prepared(model: Any) -> None:
        config = qat.QATConfig(weight_config=weights, step="prepare")
        quantization.quantize_(model, config)

    late, early = twins(prepared)
    assert_alike(late, early)
    for model in (late, early):
        F.cross_entropy(model.train()(pixels()), LABELS).backward()
    for name, parameter in early.named_parameters():
        torch.testing.assert_close(dict(late.named_parameters())[name].grad, parameter.grad)


@pytest.mark.client("bitsandbytes", "4-bit layers", caveat="rewrite first, then replace the layers")
def test_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantised(model: Any) -> None:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and name in ("qkv", "fc1", "fc2"):
                    four = bitsandbytes.nn.Linear4bit(
                        child.in_features, child.out_features, quant_type="nf4"
                    )
                    four.weight = bitsandbytes.nn.Params4bit(
                        child.weight.detach().clone(), requires_grad=False, quant_type="nf4"
                    )
                    four.bias = child.bias
                    setattr(module, name, four.to("cpu").eval())

    fast, model = fast_vit(embed_dim=64), vit(embed_dim=64)
    quantised(fast), quantised(model)  # such a model itself cannot be looked at: rewrite first
    with torch.no_grad():
        got, wanted = fast(pixels()), fast_vit(embed_dim=64)(pixels())
        assert 0 < (got - wanted).norm() < 0.2 * wanted.norm()
        skipvit_fx.set_skipping(fast, False)
        assert torch.equal(fast(pixels()), model(pixels()))


@pytest.mark.client("PyTorch", "a layer is replaced by another")
@pytest.mark.slow
def test_a_layer_is_replaced() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    def replaced(model: Any) -> None:
        for block in model.blocks:
            old = block.attn.qkv
            new = Doubled(old.in_features, old.out_features)
            new.load_state_dict(copy.deepcopy(old.state_dict()))
            block.attn.qkv = new

    assert_alike(*twins(replaced))
