"""The file of a report, without a browser: what is in it, what is not, and when there is none."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import skipvit_fx
from skipvit_fx.page import writing
from support.once import made_once
from support.report_models import SCRIPT, hostile
from support.tiny import Tiny

X = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@made_once
def rewritten(plan: str = "1(50%)+3", **options: Any) -> Any:
    return skipvit_fx.rewrite(Tiny().eval(), plan, example_inputs=X[:2], **options)


class Reader(HTMLParser):
    """The text of a page, the addresses in it, and the scripts that run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in in ("script", "style") else self.words).append(data)


def made(path: Path, fast: Any, images: Any = X, **options: Any) -> str:
    skipvit_fx.report(fast, images, path, **{"rounds": 0, **options})
    return path.read_text(encoding="utf-8")


def data_of(text: str) -> Any:
    return json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])


def figure(text: str, name: str) -> str:
    """A number of the summary, with its detail."""
    (found,) = re.findall(rf"<dt>{name}</dt>\s*<dd class=.value.>(.*?)</dd>\s*<dd>(.*?)</dd>", text)
    return " | ".join(found)


def test_its_data_is_the_trace(tmp_path: Path) -> None:
    fast = rewritten("1,2(50%,50%)+3")
    data = data_of(made(tmp_path / "report.html", fast))
    assert (data["rows"], data["columns"], data["known"]) == (4, 4, True)
    assert [stage["returns"] for stage in data["stages"]] == [3, 3]
    traces = skipvit_fx.trace_tokens(fast, X)
    for sample, stages in enumerate(data["images"]):
        for stage, trace in zip(stages, traces, strict=True):
            assert stage["dropped"] == trace.dropped[sample].tolist()
        scores = stages[1]["scores"]
        present = traces[0].kept[sample].tolist()
        assert [i for i, score in enumerate(scores) if score is not None] == present
        wanted = traces[1].scores[sample].tolist()
        assert [scores[i] for i in present] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_scores_of_merged_tokens_stand_where_they_are(tmp_path: Path) -> None:
    """After a first merge the sequence is in another order, and a trace has scores in that order."""
    fast = rewritten("1,2(4)+merged", validate=False)
    data = data_of(made(tmp_path / "report.html", fast))
    traces = skipvit_fx.trace_tokens(fast, X)
    for sample, stages in enumerate(data["images"]):
        order = traces[0].kept[sample].tolist()
        assert order != sorted(order)
        wanted = dict(zip(order, traces[1].scores[sample].tolist(), strict=True))
        for patch, score in enumerate(stages[1]["scores"]):
            expected = wanted.get(patch, -torch.inf)
            assert score == (pytest.approx(expected, rel=1e-3) if expected > -2 else None)
        owner, kept = traces[1].owner, traces[1].kept[sample]
        assert owner is not None
        assert stages[1]["owner"] == [int(kept[place - 1]) for place in owner[sample]]
        for patch, token in enumerate(stages[1]["owner"]):
            assert (patch == token) == (patch in kept.tolist())


def test_the_summary_says_what_inspect_says(tmp_path: Path) -> None:
    fast = rewritten()
    text = made(tmp_path / "report.html", fast, rounds=1, title="A model", note="A note.")
    inspection = skipvit_fx.inspect(fast)
    share = f"{100 * (1 - inspection.macs / inspection.baseline_macs):.1f}"
    assert figure(text, "Multiply-adds").startswith(f"−{share} %")  # noqa: RUF001
    assert figure(text, "Tokens").startswith("17 → 9 | in the attention of layer 2")
    assert "times as fast" in figure(text, "Time")
    assert figure(text, "Check").startswith("validated | ")
    words = " ".join(Reader(text).words)
    assert "In layer 1, 8 of 16 patches leave; at the input of layer 3 they return" in words
    assert "▼ 8 leave" in words
    assert "▲ 8 return" in words
    assert "A note." in words
    assert torch.__version__ in words
    for line in inspection.diff().splitlines():
        assert line.strip() in words


def test_answers_are_those_of_the_model(tmp_path: Path) -> None:
    """The head of this model does not say what it is, so outputs are compared as vectors."""
    model = Tiny().eval()
    fast = skipvit_fx.rewrite(model, "1(50%)+3", example_inputs=X[:2], validate=False)
    with torch.no_grad():
        wanted = torch.cosine_similarity(model(X).double(), fast(X).double()).mean().item()
        assert figure(made(tmp_path / "r.html", fast), "Same answer").startswith(f"{wanted:.3f}")
        model.num_classes = 5
        named = skipvit_fx.rewrite(model, "1(50%)+3", example_inputs=X[:2], validate=False)
        same = int((model(X).argmax(1) == named(X).argmax(1)).sum())
    assert figure(made(tmp_path / "r.html", named), "Same answer").startswith(f"{same} of 3 | ")


def test_whatever_the_switches_say_the_plan_is_shown(tmp_path: Path) -> None:
    fast = rewritten().train()
    skipvit_fx.set_skipping(fast, False)
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    data = data_of(made(tmp_path / "report.html", fast))
    assert len(data["images"][0][0]["dropped"]) == 8
    assert fast.training
    assert not fast.skipping
    assert all(torch.equal(value, before[name]) for name, value in fast.state_dict().items())


def test_a_plan_that_drops_nothing(tmp_path: Path) -> None:
    text = made(
        tmp_path / "report.html", rewritten("", validate=False, eliminate_dead_tokens=False)
    )
    assert "The plan drops nothing." in text
    assert data_of(text)["stages"] == []
    assert figure(text, "Multiply-adds").startswith("+0.0 %")
    assert figure(text, "Check") == "not validated | validate=False"


def test_nothing_is_loaded_and_nothing_runs_but_its_own(tmp_path: Path) -> None:
    fast, x = hostile()
    text = made(tmp_path / "report.html", fast, x, title=f"</title>{SCRIPT}", note=f"<!--{SCRIPT}")
    read = Reader(text)
    for tag, attributes in read.tags:
        for name in ("src", "href", "action", "srcset"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, address)
        assert not [name for name in attributes if name.startswith("on")]
    assert SCRIPT in "".join(read.words)
    assert SCRIPT not in text
    policies = [str(a.get("content")) for t, a in read.tags if t == "meta" and "http-equiv" in a]
    assert [policy.partition(";")[0] for policy in policies] == ["default-src 'none'"]


@pytest.mark.slow
def test_four_noisy_images_of_a_large_model_fit_into_five_megabytes(tmp_path: Path) -> None:
    """Noise is the worst that a picture can hold."""
    large = Tiny()
    large.embed = torch.nn.Conv2d(3, 8, 16, 16)
    x = torch.rand(4, 3, 512, 512)
    fast = skipvit_fx.rewrite(
        large.eval(),
        "1(10%);2(10%);3(10%)" if False else "1,2,3(10%)",
        example_inputs=x,
        validate=False,
    )
    made(tmp_path / "report.html", fast, x)
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_what_is_refused(tmp_path: Path) -> None:
    fast, out = rewritten(), tmp_path / "report.html"
    for images, options, error, words in (
        (X, {"rounds": -1}, skipvit_fx.ReportError, "-1 rounds"),
        (X, {"path": tmp_path}, skipvit_fx.ReportError, "is a folder"),
        (X, {"path": tmp_path / "no" / "r.html"}, skipvit_fx.ReportError, "does not exist"),
        (X[:, :, :8], {}, skipvit_fx.ReportError, "of another size or kind"),
        (X.double(), {}, skipvit_fx.ReportError, "of another size or kind"),
        (None, {}, TypeError, "must be a tensor"),
    ):
        with pytest.raises(error, match=words):
            skipvit_fx.report(fast, images, **{"path": out, "rounds": 0, **options})  # type: ignore[arg-type]
    with pytest.raises(skipvit_fx.NotRewrittenError):
        skipvit_fx.report(Tiny(), X, out)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_file_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(skipvit_fx.ReportError, match="No space left on device"):
        writing.write(tmp_path / "report.html", "text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["jinja2", "PIL"])
def test_without_a_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    class Absent:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(skipvit_fx.ReportError, match=f"{package} is not installed") as missing:
        made(tmp_path / "report.html", rewritten())
    assert missing.value.hint == "pip install 'skipvit_fx[report]'"
    assert list(tmp_path.iterdir()) == []
