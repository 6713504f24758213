"""The code of a graph, with its modules looked up once. Each look-up by path is slower than all checks of a call."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.graph import PythonCode

from skipvit_fx.torch_internals import function_from, spelled_path

_MODULES = "skipvit_modules"


class Direct:
    """A graph as a function of the model, its modules in order, and the inputs.

    Before::

        blocks_0_norm1 = getattr(self.blocks, "0").norm1(add)

    After::

        blocks_0_norm1 = skipvit_modules[3](add)

    Args:
        graph: of the model.
        code: of the graph, which looks up every module by its path.
    """

    def __init__(self, graph: fx.Graph, code: PythonCode) -> None:
        called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        self.targets: Sequence[str] = [*dict.fromkeys(called)]
        places = {spelled_path("self", t): i for i, t in enumerate(self.targets)}
        longest_first = sorted(map(re.escape, places), key=len, reverse=True)
        pattern = re.compile(rf"(?<![\w.])({'|'.join(longest_first)})(?=\()")
        source = pattern.sub(lambda found: f"{_MODULES}[{places[found[0]]}]", code.src)
        source = source.replace("def forward(self", f"def forward(self, {_MODULES}", 1)
        self.run: Callable[..., Any] = function_from(source, dict(code.globals))

    def modules_of(self, model: nn.Module) -> list[nn.Module]:
        """The modules of ``model`` that the function takes."""
        return [model.get_submodule(target) for target in self.targets]
