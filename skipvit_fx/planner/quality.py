"""How much of the model's answers a plan preserves, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from skipvit_fx.errors import SearchError
from skipvit_fx.torch_internals import tensor_leaves

MetricFunction: TypeAlias = Callable[[Any, Any], Tensor | float]
METRICS = ("agreement", "cosine", "accuracy")


class NotComparableError(SearchError):
    """A plan changes what the model returns so that it cannot be compared."""


@dataclass(frozen=True)
class Quality:
    """A mean over images, and how sure it is.

    Attributes:
        mean: of all images.
        spread: its standard error. For a share of images it is that of Agresti and Coull, which is not zero where all
            of them agree; ``None`` if there is a single value.
        images: how many there are.
    """

    mean: float
    spread: float | None
    images: int


def quality_of(values: list[tuple[Tensor, int]]) -> Quality:
    """The quality from the values of each batch, one per image or one for all, and its number of images."""
    images = sum(count for _, count in values)
    mean = sum(part.double().mean().item() * count for part, count in values) / images
    alone = torch.cat([part.double().flatten() for part, _ in values])
    if bool(((alone == 0) | (alone == 1)).all()) and len(alone) == images:
        centre = (mean * images + 2) / (images + 4)
        return Quality(mean, math.sqrt(centre * (1 - centre) / (images + 4)), images)
    spread = alone.std().item() / math.sqrt(len(alone)) if len(alone) > 1 else None
    return Quality(mean, spread, images)


def named_logits(outputs: Any) -> Any:
    """What a model returns as ``logits``; ``None`` if nothing has that name."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits")
    return getattr(outputs, "logits", None)


def logits_of(outputs: Any) -> Tensor:
    """The class scores ``[batch, classes]`` among the outputs of a model: ``logits``, or the first tensor.

    Raises:
        SearchError: there are none.
    """
    found = named_logits(outputs)
    scores = next(iter(tensor_leaves(outputs)), None) if found is None else found
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < 2:
        shape = list(scores.shape) if isinstance(scores, Tensor) else "no tensor"
        raise SearchError(
            f"the model returns {shape} where class scores [batch, classes] are needed",
            hint="pass metric='cosine', which compares features, or a function of outputs and batch",
        )
    return scores


def cosines(outputs: Any, wanted: list[Tensor]) -> Tensor:
    """``[batch]``: the cosine between features and those of the model, mean over tokens (or pixels) and over outputs.

    Features are on the second of four axes, as in maps ``[batch, channels, height, width]``, else on the last one.

    Raises:
        NotComparableError: there are fewer tokens.
    """
    found = features_of(outputs)
    for ours, theirs in zip(found, wanted, strict=True):
        if ours.shape != theirs.shape:
            raise NotComparableError(
                f"an output has shape {list(ours.shape)}, that of the model {list(theirs.shape)}",
                hint="let all tokens return",
            )
    dims = [1 if tensor.ndim == 4 else -1 for tensor in found]
    means = [
        F.cosine_similarity(ours.float(), theirs.float(), dim=dim).flatten(1).mean(1)
        if ours.ndim > 2
        else F.cosine_similarity(ours.float(), theirs.float(), dim=dim)
        for ours, theirs, dim in zip(found, wanted, dims, strict=True)
    ]
    return torch.stack(means).mean(0)


def features_of(outputs: Any) -> list[Tensor]:
    """The floating-point outputs with an axis for samples and one for features.

    Raises:
        SearchError: there are none.
    """
    found = _features(outputs)
    if not found:
        raise SearchError(
            "the model returns no features [batch, ..., channels]",
            hint="pass a function of outputs and batch as the metric",
        )
    return found


def _features(outputs: Any) -> list[Tensor]:
    return [t for t in tensor_leaves(outputs) if t.is_floating_point() and t.ndim >= 2]


@dataclass(frozen=True)
class Metric:
    """What quality means: one of :data:`METRICS`, or a function of outputs and batch."""

    chosen: str | MetricFunction

    @property
    def name(self) -> str:
        """The name, even if it is a function."""
        if isinstance(self.chosen, str):
            return self.chosen
        return str(getattr(self.chosen, "__name__", type(self.chosen).__name__))

    def reference(self, outputs: Any) -> Any:
        """What to keep of the model's own outputs."""
        match self.chosen:
            case "agreement":
                return logits_of(outputs).argmax(1)
            case "cosine":
                return [feature.detach() for feature in features_of(outputs)]
        return None

    def values(self, outputs: Any, reference: Any, batch: Any, images: int) -> Tensor:
        """``[batch]``, or ``[1]`` if a function returns one number for all of them; on the CPU.

        Args:
            outputs: of a plan.
            reference: what :meth:`reference` kept.
            batch: as the user gave it, for a function; labels for accuracy are its last element.
            images: how many there are in it.

        Raises:
            SearchError: the function returns something else.
            NotComparableError: the outputs cannot be compared with the reference.
        """
        match self.chosen:
            case "agreement":
                return logits_of(outputs).argmax(1).eq(reference).double().cpu()
            case "accuracy":
                scores = logits_of(outputs)
                return scores.argmax(1).eq(batch[1].to(scores.device)).double().cpu()
            case "cosine":
                return cosines(outputs, reference).double().cpu()
        assert callable(self.chosen)
        given = self.chosen(outputs, batch)
        number = isinstance(given, Tensor | int | float)
        values = torch.as_tensor(given if number else math.nan).detach().double().cpu()
        if values.shape not in ((), (images,)) or not bool(values.isfinite().all()):
            what = f"a tensor {list(values.shape)}" if values.ndim else repr(given)
            raise SearchError(
                f"the metric {self.name} returned {what} for {images} images",
                hint="return one finite number, or a tensor with one for each image; more is better",
            )
        return values.reshape(-1)


NEARLY_UNIFORM = 0.9
"""Class scores whose entropy is this share of the largest one or more say nothing. Of trained models it is far less."""

NEARLY_EQUAL = 0.99
"""Outputs for different images with a mean cosine of this or more hardly depend on the image."""


def doubts(outputs: list[Any], metric: Metric) -> str:
    """Why the model's answers on these batches are no measure of anything; empty if nothing speaks against them.

    That weights are random cannot be known, but what comes of it can be seen.
    """
    rows = torch.cat([_first(own) for own in outputs])
    if metric.name in ("agreement", "accuracy"):
        shares = rows.softmax(1)
        entropy = -(shares * shares.clamp(min=1e-30).log()).sum(1).mean() / math.log(rows.shape[1])
        if entropy >= NEARLY_UNIFORM:
            return (
                "the model's class scores are nearly uniform on these images, as with random weights: what the plans "
                "preserve of them means nothing"
            )
    if len(rows) > 1:
        rows, count = F.normalize(rows, dim=1), len(rows)
        same = (rows.sum(0).square().sum() - count) / (count * (count - 1))
        if same >= NEARLY_EQUAL:
            return (
                "the model's outputs hardly differ from image to image, as with random weights: what the plans "
                "preserve of them means nothing"
            )
    return ""


def _first(outputs: Any) -> Tensor:
    """The first output as ``[batch, numbers]``: a plain model's class scores, or its features."""
    tensors = _features(outputs)
    return tensors[0].detach().float().flatten(1).cpu() if tensors else torch.zeros(0, 2)
