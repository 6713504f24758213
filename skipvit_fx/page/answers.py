"""What the model and its rewrite answer, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from skipvit_fx.planner.quality import named_logits
from skipvit_fx.torch_internals import tensor_leaves

BEST = 3
"""Classes shown for every image."""


@dataclass(frozen=True)
class Answer:
    """One image.

    Attributes:
        cosine: between the two outputs; ``None`` if their shapes differ.
        before, after: the best classes with their shares, if the outputs are logits: of the model and of its rewrite.
    """

    cosine: float | None
    before: tuple[tuple[str, float], ...] = ()
    after: tuple[tuple[str, float], ...] = ()

    @property
    def same(self) -> bool:
        """Whether both have the same best class."""
        return self.before[0][0] == self.after[0][0]


def answers(model: nn.Module, before: Any, after: Any, samples: int) -> tuple[Answer, ...]:
    """The answers to each image.

    Outputs are logits if they are named so, or if the model's number of classes says so. Else, the first tensors of
    the outputs that fit each other are compared.

    Args:
        model: the rewritten model, for its configuration.
        before, after: outputs of the model and of its rewrite, for the same batch.
        samples: its size.
    """
    logits = _logits(model, before), _logits(model, after)
    if logits[0] is None or logits[1] is None:
        pairs = zip(tensor_leaves(before), tensor_leaves(after), strict=False)
        fitting = (
            (a, b)
            for a, b in pairs
            if a.shape == b.shape and a.is_floating_point() and a.ndim and len(a) == samples
        )
        pair = next(fitting, None)
        found = [None] * samples if pair is None else _cosines(*pair)
        return tuple(map(Answer, found))
    best = [_best(model, part) for part in (logits[0], logits[1])]
    cosines = _cosines(logits[0], logits[1])
    return tuple(Answer(*parts) for parts in zip(cosines, *best, strict=True))


def _logits(model: nn.Module, output: Any) -> Tensor | None:
    """The logits ``[batch, classes]`` of an output; ``None`` if it is not known that it has such."""
    named = named_logits(output)
    if isinstance(named, Tensor) and named.ndim == 2:
        return named
    config = getattr(model, "config", None)
    classes = {getattr(model, "num_classes", None), getattr(config, "num_labels", None)}
    if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] in classes:
        return output
    return None


def _cosines(a: Tensor, b: Tensor) -> list[float | None]:
    values = cosine_similarity(a.flatten(1).double(), b.flatten(1).double()).tolist()
    return [value if value == value else None for value in values]


def _best(model: nn.Module, logits: Tensor) -> list[tuple[tuple[str, float], ...]]:
    labels = _labels(model, logits.shape[1])
    shares, classes = logits.float().softmax(1).topk(min(BEST, logits.shape[1]))
    return [
        tuple((labels[index], share) for index, share in zip(some, values, strict=True))
        for some, values in zip(classes.tolist(), shares.tolist(), strict=True)
    ]


def _labels(model: nn.Module, classes: int) -> Sequence[str]:
    """The names of the classes in the model's configuration, or their numbers."""
    named = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(named, Mapping) and all(i in named for i in range(classes)):
        return [str(named[i]) for i in range(classes)]
    config = getattr(model, "pretrained_cfg", None)
    listed = config.get("label_names") if isinstance(config, Mapping) else None
    if isinstance(listed, Sequence) and len(listed) == classes:
        return [str(name) for name in listed]
    return [f"class {i}" for i in range(classes)]


def mean_cosine(found: Sequence[Answer]) -> float | None:
    """The mean over the images; ``None`` if one has none."""
    cosines = [answer.cosine for answer in found if answer.cosine is not None]
    return torch.tensor(cosines).mean().item() if cosines and len(cosines) == len(found) else None
