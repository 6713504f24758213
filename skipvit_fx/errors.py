"""Every error that this package raises on purpose. Each has a hint: what to try next."""

from __future__ import annotations

import math
import re

_STAND_INS = re.compile(
    r"'?\b(?:_?Witnessed(?:Proxy|Attribute)|Proxy|FakeTensor|FakeParameter)\b'?"
)


def _plain(message: str) -> str:
    """A message that may quote Python or torch, with the classes that stand in for tensors in tracing replaced."""
    return _STAND_INS.sub("a traced tensor", message)


class SkipViTError(Exception):
    """Base of all errors of this package.

    Attributes:
        message: what is wrong, and where.
        hint: one sentence that says what to do about it; empty if nothing is known to help.
    """

    # torch.compile cannot trace Exception.__init__, but does trace calls that one graph refuses and another computes
    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class PlanError(SkipViTError, ValueError):
    """A plan that cannot be read, contradicts itself, or does not fit the model."""


class TraceError(SkipViTError):
    """The model could not be captured as a graph."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(_plain(message), hint=hint)


class UnsupportedModelError(SkipViTError):
    """The model (or this plan on it) cannot be rewritten soundly.

    Attributes:
        node: name of the graph node in the way; empty if no single node is responsible.
        module_path: path of the module that the node comes from, as in ``model.get_submodule``.
        reason: why a rewrite would not be sound, without the place.
        in_every_part: whether the parts of the model are no better, so that none of them could be rewritten alone.
    """

    def __init__(
        self,
        reason: str,
        *,
        node: str = "",
        module_path: str = "",
        hint: str = "",
        in_every_part: bool = False,
    ) -> None:
        reason = _plain(reason)
        place = f" (node {node!r} in module {module_path or '<root>'!r})" if node else ""
        super().__init__(f"{reason}{place}", hint=hint)
        self.node = node
        self.module_path = module_path
        self.reason = reason
        self.in_every_part = in_every_part


class ValidationError(SkipViTError):
    """A rewritten model does not compute what the model does with the same tokens masked, or it does not run.

    Attributes:
        difference: the largest one found, relative to the largest value; infinite or NaN if that has no meaning.
        layer: the first in which the residual streams differ, from 1; 0 before the layers, the number of layers plus
            one after them; ``None`` if the place is not known.
        modules: paths of the modules between the last place that agrees and the first that does not, in order.
    """

    def __init__(
        self,
        message: str,
        *,
        difference: float = math.inf,
        layer: int | None = None,
        modules: tuple[str, ...] = (),
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.difference = difference
        self.layer = layer
        self.modules = modules


class GuardError(SkipViTError, ValueError):
    """A call of a rewritten model for which its graph was not made: another size, dtype, device or branch."""


class ExportError(SkipViTError):
    """The rewritten model could not be written as ONNX."""


class ReportError(SkipViTError):
    """A report that cannot be made: a picture that cannot be read, or a file that cannot be written."""


class NotRewrittenError(SkipViTError, TypeError):
    """A module that :func:`skipvit_fx.rewrite` did not make, where a rewritten one is needed."""


class SearchError(SkipViTError, ValueError):
    """A search for plans that cannot be made: an argument, the images, the metric, the storage or a missing package."""


class SavedModelError(SkipViTError):
    """A rewritten model could not be saved, or what was saved does not fit."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the pages that compilers add to it."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
