"""Scores that are functions: what they may ask for, those that come with the package, and those that users name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from skipvit_fx.errors import PlanError

ScoreFunction: TypeAlias = Callable[..., Tensor]
"""From patch tokens ``[batch, patches, channels]``, given by position, to scores ``[batch, patches]``.

If it has parameters of these names, it gets them by name, of the layer's attention and for the patches that are
present: ``keys``, ``queries`` and ``values`` ``[batch, heads, patches, channels]``, as they are multiplied (after a
rotation, say), where keys and values may have fewer heads than queries; and ``attention`` ``[batch, heads, patches]``,
which the class token pays, or the mean query where there is none. Parallel attentions count as one of all heads.
"""

Asked = Literal["keys", "queries", "values", "attention"]
"""What a score function may ask for."""

Function = TypeVar("Function", bound=ScoreFunction)


def asked_by(function: ScoreFunction) -> tuple[Asked, ...]:
    """What a score function asks for besides the tokens, by the names of its parameters.

    Raises:
        PlanError: it cannot be called with tokens alone and what it asks for.
    """
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):  # of a built-in function nothing is known
        return ()
    kinds = inspect.Parameter
    takes_tokens = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.VAR_POSITIONAL)
    if not parameters or parameters[0].kind not in takes_tokens:
        raise _not_callable("takes no tokens by position")
    asked: list[Asked] = []
    for parameter in parameters[1:]:
        by_name = parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        name = next((n for n in get_args(Asked) if n == parameter.name and by_name), None)
        if name is not None:
            asked.append(name)
        elif parameter.default is kinds.empty and parameter.kind not in (
            kinds.VAR_POSITIONAL,
            kinds.VAR_KEYWORD,
        ):
            raise _not_callable(f"asks for {parameter.name!r}")
    return tuple(asked)


def _not_callable(why: str) -> PlanError:
    allowed = ", ".join(get_args(Asked))
    return PlanError(
        f"the score function {why}; it is called with the patch tokens, "
        f"and by name with those of {allowed} that it names",
        hint="write def score(tokens) or, for example, def score(tokens, *, keys, attention); give other parameters "
        "defaults, or bind them by functools.partial",
    )


# -- functions that come with the package -----------------------------------------------------------------------------


def _wide(x: Tensor) -> torch.dtype | None:
    """float32 for narrower numbers, so that close scores stay apart."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None


def _length(x: Tensor) -> Tensor:
    """Of the vectors along the last axis."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x))
    return length


def by_values(tokens: Tensor, *, values: Tensor) -> Tensor:
    """The length of a patch's value, mean over heads: what it can add to other tokens at most.

    See Kobayashi et al., "Attention is Not Only a Weight: Analyzing Transformers with Vector Norms", arXiv 2004.10102.
    """
    return _length(values).mean(1)


def by_keys(tokens: Tensor, *, keys: Tensor) -> Tensor:
    """How unlike the others a patch's key is: minus its mean cosine similarity to theirs. Redundant patches leave.

    A key is the mean over heads: it says what a token holds (Bolya et al., "Token Merging: Your ViT But Faster", arXiv
    2210.09461, section 3, "Token Similarity"). The sum of all unit keys replaces the matrix of similarities.
    """
    key = keys.mean(1, dtype=_wide(keys))
    unit = key / _length(key).unsqueeze(-1).clamp_min(1e-12)
    others = unit.sum(1, keepdim=True) - unit
    similarity: Tensor = (unit * others).sum(-1) / (
        key.shape[1] - 1
    )  # NaN for one patch alone, which stays
    return -similarity


# -- names ------------------------------------------------------------------------------------------------------------

OF_ATTENTION = ("auto", "cls", "mean", "received")
"""Scores that read the weights of the layer's attention."""

BUILT_IN = (*OF_ATTENTION, "keys", "values", "random")
"""The names that come with the package."""

_functions: dict[str, ScoreFunction] = {"keys": by_keys, "values": by_values}


def register_score(name: str, function: Function) -> Function:
    """Give a score function a name, which then works as ``score=`` and on the command line.

    :func:`save` keeps the name and not the code: register the function, under the same name, before :func:`load`.

    Args:
        name: letters, digits, ``_``, ``-`` and ``.``; not that of another score.
        function: as :func:`rewrite` takes it for ``score``.

    Returns:
        ``function``.

    Raises:
        PlanError: the name is taken, or is no name, or the function asks for something that there is not.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise PlanError(
            f"{name!r} is not a name of a score", hint="use letters, digits, '_', '-' and '.'"
        )
    if not callable(function):
        raise PlanError(
            f"the score {name!r} must be a function, got {function!r}",
            hint="call register_score(name, function)",
        )
    asked_by(function)
    if name in BUILT_IN or _functions.get(name, function) is not function:
        taken = "comes with skipvit_fx" if name in BUILT_IN else "is that of another function"
        raise PlanError(f"the name {name!r} {taken}", hint="choose another name for this score")
    _functions[name] = function
    return function


def check_score(score: object) -> None:
    """Raise PlanError unless ``score`` is a name that is known, or a function that can be called."""
    if callable(score):
        asked_by(score)
    elif not isinstance(score, str) or score not in known_scores():
        raise PlanError(
            f"score must be a function or one of {', '.join(map(repr, known_scores()))}, got {score!r}",
            hint="pass one of these as score; skipvit_fx.register_score(name, function) adds a name",
        )


def known_scores() -> tuple[str, ...]:
    """All names of scores."""
    return tuple(dict.fromkeys((*BUILT_IN, *_functions)))


def function_of(score: str | ScoreFunction) -> ScoreFunction | None:
    """The function that a score is, or names; ``None`` for the others that come with the package.

    Raises:
        PlanError: the name is not registered in this process.
    """
    if not isinstance(score, str):
        return score
    if score not in BUILT_IN:
        check_score(score)
    return _functions.get(score)


def name_of(function: ScoreFunction) -> str | None:
    """The name that a function is registered under."""
    return next((name for name, known in _functions.items() if known is function), None)
