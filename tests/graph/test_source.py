"""Nodes name the author's lines that made them, in the way in which torch prints and keeps them."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import skipvit_fx as sv
from skipvit_fx.graph.source import (
    Frame,
    Source,
    source_of,
    spelled_trace,
    trace_of_inserted,
    without_files,
)
from skipvit_fx.names import INSERTED_BY
from support import tiny
from support.once import made_once
from support.tiny import Tiny

FRONT_ENDS = ["symbolic", "export"]
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LINES = inspect.getsource(tiny).splitlines()


def line_of(code: str) -> int:
    """The only line of the tiny model's file that reads so."""
    (found,) = [i for i, line in enumerate(LINES, start=1) if line.strip() == code]
    return found


@made_once
def rewritten(frontend: Any) -> Any:
    return sv.rewrite(Tiny().eval(), "1(50%)+3", example_inputs=(X,), frontend=frontend)


def sources(fast: fx.GraphModule) -> dict[str, Source | None]:
    return {node.name: source_of(node) for node in fast.graph.nodes}


@pytest.mark.parametrize("frontend", FRONT_ENDS)
@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("embed", "x = self.embed(x).flatten(2).transpose(1, 2)"),
        ("blocks.1.norm1", "h = self.norm1(x)"),
        ("blocks.1.k", "q, k, v = self.q(h), self.k(h), self.v(h)"),
        ("blocks.2.mlp", "return x + self.mlp(self.norm2(x))"),
    ],
)
@pytest.mark.every_case
def test_a_module_has_the_line_that_calls_it(frontend: str, target: str, code: str) -> None:
    fast = rewritten(frontend)
    (node,) = fast.graph.find_nodes(op="call_module", target=target)
    if frontend == "export" and target == "embed":  # torch.export notes forwards only
        code = "out = self.head(self.norm(self.tokens(x, states))[:, 0])"
    source = source_of(node)
    assert source is not None
    assert (Path(source.file), source.line) == (Path(tiny.__file__), line_of(code))
    assert source.code == code
    assert source.place == f"support/tiny.py:{source.line}"


@pytest.mark.parametrize("frontend", FRONT_ENDS)
@pytest.mark.every_case
def test_every_node_has_a_line_or_what_inserted_it(frontend: str) -> None:
    fast = rewritten(frontend)
    for node in fast.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        source = source_of(node)
        if INSERTED_BY in node.meta:
            assert source is None
            assert f"inserted by the pass {node.meta[INSERTED_BY]}" in node.stack_trace
        elif str(node.target).startswith("skipvit."):
            assert "inserted by the capture" in node.stack_trace
        else:
            assert source is not None, node
            assert source.file == tiny.__file__
    code = fast.print_readable(print_output=False)
    assert "No stacktrace" not in code
    place = line_of("return x + self.mlp(self.norm2(x))")
    assert f"{tiny.__file__}:{place} in " in code
    assert "in the pass insert-skip, code: inserted by the pass insert-skip" in code


def test_the_whole_way_to_a_line_is_kept() -> None:
    """The symbolic front end has every call of the author's code, and nobody else's."""
    (node,) = rewritten("symbolic").graph.find_nodes(op="call_module", target="blocks.1.q")
    places = [line.strip() for line in node.stack_trace.splitlines()[::2]]
    assert [place.rpartition(" in ")[2] for place in places] == [
        *("Tiny.forward", "Tiny.tokens", "Block.forward")
    ]


@pytest.mark.parametrize("frontend", FRONT_ENDS)
@pytest.mark.every_case
def test_an_error_names_the_line(frontend: str, capsys: pytest.CaptureFixture[str]) -> None:
    fast = rewritten(frontend)
    (node,) = fast.graph.find_nodes(op="call_module", target="blocks.1.mlp")
    node.args = (node.args[0], "one too many")
    fast.recompile()
    line = line_of("return x + self.mlp(self.norm2(x))")
    said = f'File "{tiny.__file__}", line {line}, in '
    with pytest.raises(TypeError) as caught:
        fast(X)
    (note,) = caught.value.__notes__
    assert note.startswith(f"While executing {node.name}, which was made by:\n")
    assert said in note
    with pytest.raises(TypeError, match="While executing") as interpreted:
        fx.Interpreter(fast).run(X)
    assert said in str(interpreted.value)
    capsys.readouterr()  # torch also prints such an error


def test_an_error_of_what_was_inserted_names_the_pass() -> None:
    fast = rewritten("symbolic")
    fast.skipvit.stage_1.keep.forward = fast.blocks[0].mlp.forward
    with pytest.raises(TypeError) as caught:
        fast(X)
    (note,) = caught.value.__notes__
    assert note.endswith("inserted by the pass insert-skip")


def test_a_refusal_is_not_annotated() -> None:
    fast = rewritten("symbolic")
    with pytest.raises(sv.SkipViTError) as caught:
        fast.own.calls[0].compute(fast, [X[..., :8]])
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.every_case
def test_copies_have_the_same_lines(copied: Any) -> None:
    fast = rewritten("symbolic")
    assert sources(copied(fast)) == sources(fast)


def test_a_graph_of_another_call_has_lines() -> None:
    fast = rewritten("symbolic")
    fast(X.double().float()[:, :, :, :16].to(torch.float32))
    fast.double()(X.double())
    graphs = [call.graph for call in fast.own.calls]
    assert len(graphs) == 2
    first, second = ({node.name: source_of(node) for node in graph.nodes} for graph in graphs)
    assert first == second


def test_code_without_a_file() -> None:
    """Such as code that was typed into an interpreter that keeps none."""
    made: dict[str, Any] = {"Tiny": Tiny, "Tensor": Tensor, "__name__": "typed"}
    source = (
        "class Typed(Tiny):\n    def forward(self, x):\n        return super().forward(x) * 2\n"
    )
    exec(compile(source, "<typed>", "exec"), made)
    fast = sv.rewrite(made["Typed"]().eval(), "1(50%)+3", example_inputs=(X,))
    *_, last = (node for node in fast.graph.nodes if node.op != "output")
    assert source_of(last) == Source("<typed>", 3, "Typed.forward", "")
    assert "<typed>:3 in Typed.forward" in fast.print_readable(print_output=False)


def test_traces_are_those_of_python() -> None:
    frames = (Frame("/a/b.py", 3, "f"), Frame("<string>", 7, "C.forward"))
    trace = spelled_trace(frames)
    assert trace.splitlines()[0] == '  File "/a/b.py", line 3, in f'
    assert without_files(trace, ("/a/",)) == spelled_trace(frames[1:])
    assert without_files(trace, ("/a/", "<string>")) == ""
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert source_of(node) is None
    node.stack_trace = trace
    assert source_of(node) == Source("<string>", 7, "C.forward", "")
    node.stack_trace = trace_of_inserted("the pass a")
    assert source_of(node) is None
