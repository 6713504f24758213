"""What notebooks show of reports and traces, and figures for papers."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
from typing import Any

import pytest
import torch
from PIL import Image

import skipvit_fx
from skipvit_fx.reports.html import paragraphs, patch_map, share_bar, table
from support.once import made_once
from support.report_models import SCRIPT, Hostile, Shuffled
from support.tiny import Tiny

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@made_once
def rewritten(plan: str = "1,2(50%,25%)+3") -> Any:
    return skipvit_fx.rewrite(Tiny().eval(), plan, example_inputs=X, validate=False)


def cells(html: str) -> list[str]:
    return [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", html)]


@pytest.mark.slow
def test_an_inspection_is_a_table_with_the_numbers_of_its_text() -> None:
    inspection = skipvit_fx.inspect(rewritten())
    html = inspection._repr_html_()
    shown = cells(html)
    for layer in inspection.layers:
        assert f"{layer.ffn_tokens}" in shown
        assert layer.module_path in shown
    assert "8 leave" in shown
    assert "not validated" in html
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", html)]
    tokens = [round(100 * layer.ffn_tokens / 17, 1) for layer in inspection.layers]
    assert widths[::2] == tokens


def test_what_was_found_is_a_table() -> None:
    report = skipvit_fx.find_attention(Tiny().eval(), example_inputs=X)
    html = report._repr_html_()
    assert "3 layers, 1 prefix rows, 16 patches" in html
    assert cells(html).count("fused") == 3
    refused = skipvit_fx.find_attention(torch.nn.Conv2d(3, 3, 1), example_inputs=X)
    assert "Refused: " in refused._repr_html_()


@pytest.mark.slow
def test_names_are_text() -> None:
    model = Hostile().eval()
    fast = skipvit_fx.rewrite(model, "1(50%)+3", example_inputs=X, validate=False)
    found = skipvit_fx.find_attention(model, example_inputs=X)
    for report in (skipvit_fx.inspect(fast), found):
        html = report._repr_html_()
        assert "<script" not in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert SCRIPT not in table([SCRIPT], [[SCRIPT]]) + paragraphs(SCRIPT) + share_bar(SCRIPT, 1, 2)


def test_a_trace_is_still_a_list() -> None:
    fast = rewritten()
    trace = skipvit_fx.trace_tokens(fast, X)
    assert isinstance(trace, list)
    first, second = trace
    assert trace[0] is first
    assert [stage.layer for stage in trace] == [1, 2]
    assert trace[1:] == [second]
    assert len(pickle.loads(pickle.dumps(list(trace)))) == len(copy.copy(trace)) == 2


def test_a_trace_draws_its_patches() -> None:
    trace = skipvit_fx.trace_tokens(rewritten(), X)
    html = trace._repr_html_()
    assert cells(html)[:5] == ["layer", "kept", "left", "sample 0", "sample 1"]
    assert "8 dropped" in html
    maps = re.findall(r'aria-label="(\d+) of 16.*?<path d="(.*?)"', html)
    assert [int(kept) for kept, _ in maps] == [8, 8, 6, 6]
    places = {tuple(map(int, place)) for place in re.findall(r"M(\d) (\d)h", maps[1][1])}
    assert places == {(int(i) % 4, int(i) // 4) for i in trace[0].kept[1]}
    assert patch_map([1], (2, 2)).count("M") == 1


def test_without_a_grid_a_trace_has_numbers_only() -> None:
    fast = skipvit_fx.rewrite(Shuffled().eval(), "1(50%)", example_inputs=X, validate=False)
    trace = skipvit_fx.trace_tokens(fast, X)
    assert "<svg" not in trace._repr_html_()
    assert "8 dropped" in trace._repr_html_()
    with pytest.raises(skipvit_fx.SkipViTError, match="not known where in the image"):
        trace.plot()


@pytest.mark.parametrize("sample", [0, 1])
def test_a_plot_darkens_what_left(sample: int) -> None:
    light = X * 0.2 + 0.6
    trace = skipvit_fx.trace_tokens(rewritten(), light)
    figure: Any = trace.plot(sample)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["input", "layer 1: 8 of 16", "layer 2: 6 of 16"]
    panels = [torch.tensor(axes.get_images()[0].get_array()) for axes in figure.axes]
    for stage, panel in zip(trace, panels[1:], strict=True):
        for patch in range(16):
            y, x = 4 * (patch // 4) + 1, 4 * (patch % 4) + 1
            kept = patch in stage.kept[sample].tolist()
            ratio = (panel[y, x] / panels[0][y, x]).tolist()
            assert ratio == pytest.approx([1.0 if kept else 0.25] * 3)
    drawn = Image.open(io.BytesIO(figure._repr_png_()))
    assert drawn.width > 2 * drawn.height


def test_a_plot_of_merged_patches_has_their_colours() -> None:
    trace = skipvit_fx.trace_tokens(rewritten("1(4)+merged"), X)
    figure: Any = trace.plot()
    panel = torch.tensor(figure.axes[1].get_images()[0].get_array())
    owner = trace[0].owner
    assert owner is not None
    for token in owner[0].unique().tolist():
        places = [divmod(int(i), 4) for i in (owner[0] == token).nonzero()]
        colours = {tuple(panel[4 * y + 1, 4 * x + 2].tolist()) for y, x in places}
        assert len(colours) == 1


def test_a_plot_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = skipvit_fx.trace_tokens(rewritten(), X)
    with pytest.raises(skipvit_fx.SkipViTError, match="there is no sample 2") as missing:
        trace.plot(2)
    assert "the batch has 2" in missing.value.hint
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(skipvit_fx.SkipViTError, match="matplotlib is not installed") as absent:
        trace.plot()
    assert "skipvit_fx[report]" in absent.value.hint
