"""Pictures become what the model takes, as its own library would prepare them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import skipvit_fx
from skipvit_fx.page.inputs import inputs_of, read_picture
from skipvit_fx.reports.pictures import shown
from support.once import made_once
from support.tiny import Tiny

PICTURE = Path(__file__).parents[2] / "examples" / "images" / "chelsea.png"


def configured(**config: Any) -> Any:
    """A stand-in with a configuration."""
    return SimpleNamespace(pretrained_cfg=config)


@made_once
def fast() -> Any:
    return skipvit_fx.rewrite(
        Tiny().eval(), "1(50%)+3", example_inputs=torch.rand(2, 3, 16, 16), validate=False
    )


@pytest.mark.every_case
@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_as_timm_prepares_them(crop_pct: float, interpolation: str) -> None:
    """Its transform resizes all and then crops whole pixels, so the two are apart by less than one."""
    config = {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": crop_pct,
        "interpolation": interpolation,
    }
    wanted = create_transform((3, 96, 96), is_training=False, **config)(
        Image.open(PICTURE).convert("RGB")
    )
    got = read_picture(PICTURE, (96, 96), configured(**config))
    apart = (got - wanted).abs().mean()
    assert apart < 0.12
    for other in ({"crop_pct": 0.95}, {"crop_mode": "squash"}, {"std": (0.3,) * 3}):
        unlike = read_picture(PICTURE, (96, 96), configured(**config | other))
        assert (unlike - wanted).abs().mean() > 1.5 * apart, other


def test_shown_is_what_was_read() -> None:
    model = configured(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_mode="squash")
    picture = shown(read_picture(PICTURE, (32, 48), model), model)
    wanted = Image.open(PICTURE).convert("RGB").resize((48, 32), Image.Resampling.BICUBIC)
    pixels = torch.tensor(list(wanted.tobytes())).view(32, 48, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(picture, pixels, atol=1e-6, rtol=0)


def test_values_that_are_no_colours_are_stretched() -> None:
    picture = shown(torch.tensor([[[-7.0, 3.0]]]), configured())
    assert picture.shape == (3, 1, 2)
    assert picture[:, 0].tolist() == [[0, 1]] * 3


def test_paths_and_pictures() -> None:
    with Image.open(PICTURE) as opened:
        both = inputs_of(fast(), [str(PICTURE), opened, opened.copy()])
    assert both.names == ("chelsea.png", "chelsea.png", "image 3")
    assert both.image is not None
    assert both.image.shape == (3, 3, 16, 16)
    assert torch.equal(both.image[0], both.image[1])
    assert "16 x 16 pixels" in both.prepared
    assert "as it names none" in both.prepared
    one = inputs_of(fast(), PICTURE)
    assert one.image is not None
    assert torch.equal(one.image[0], both.image[0])


def test_a_picture_goes_where_the_example_had_it() -> None:
    model = Tiny().eval()
    by_name = skipvit_fx.rewrite(
        model, "1(50%)+3", example_inputs={"x": torch.rand(2, 3, 16, 16)}, validate=False
    )
    inputs = inputs_of(by_name, [PICTURE])
    assert inputs.args == ()
    assert list(inputs.kwargs) == ["x"]


def test_a_batch_is_left_alone() -> None:
    x = torch.rand(2, 3, 16, 16)
    for given in (x, (x,), [x]):
        inputs = inputs_of(fast(), given)
        assert inputs.args[0] is x
        assert inputs.names == ("image 1", "image 2")
        assert inputs.prepared == ""


def test_what_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "not.png"
    file.write_text("text")
    for picture in (file, tmp_path / "none.png"):
        with pytest.raises(skipvit_fx.ReportError, match="is not a readable image"):
            inputs_of(fast(), [picture])
    with pytest.raises(TypeError, match="must be a tensor, a tuple"):
        inputs_of(fast(), 3)
    with pytest.raises(skipvit_fx.ReportError, match="there is no image to show"):
        inputs_of(fast(), torch.rand(0, 3, 16, 16))
    grey = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, in_chans=1).eval()
    rewritten = skipvit_fx.rewrite(
        grey, "1(50%)", example_inputs=torch.rand(2, 1, 32, 32), validate=False
    )
    with pytest.raises(skipvit_fx.ReportError, match="other than a batch of colour") as refused:
        inputs_of(rewritten, [PICTURE])
    assert "pass a batch" in refused.value.hint
