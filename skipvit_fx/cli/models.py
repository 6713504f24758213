"""Models by name: ``timm:vit_small_patch16_224``, ``torchvision:vit_b_16``, ``hf:dinov2``, ``module:pkg.mod:make``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import nn

from skipvit_fx import optional
from skipvit_fx.errors import SkipViTError

SOURCES = "timm:NAME (or just NAME), torchvision:NAME, hf:MODEL_TYPE_OR_CLASS, open_clip:NAME, module:pkg.mod:factory"


class SpecError(SkipViTError):
    """The requested model cannot be built."""


@dataclass(frozen=True)
class Spec:
    """What to build.

    Attributes:
        source: where the model comes from: a key of ``BUILDERS``.
        name: its name there.
        pretrained: whether it has its published weights, rather than random ones.
        options: passed to the function that builds it, such as ``img_size`` and ``depth``.
    """

    source: str
    name: str
    pretrained: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.source}:{self.name}"

    def build(self) -> nn.Module:
        """The model, in eval mode.

        Raises:
            SpecError: it cannot be built.
        """
        return BUILDERS[self.source](self).eval()


def parse_spec(text: str, *, pretrained: bool = False, **options: Any) -> Spec:
    """Read ``source:name``; a bare name is one of timm's. Options that are ``None`` are left out.

    Raises:
        SpecError: there is no such source.
    """
    source, colon, name = text.partition(":")
    if not colon:
        source, name = "timm", text
    if source not in BUILDERS or not name:
        raise SpecError(f"cannot read the model {text!r}", hint=f"write {SOURCES}")
    given = {key: value for key, value in options.items() if value is not None}
    return Spec(source, name, pretrained, given)


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        SpecError: it is not installed; the hint names the extra that provides it.
    """
    return optional.need(module, extra, SpecError)


def _unknown(spec: Spec, names: list[str], error: Exception | None = None) -> SpecError:
    import difflib

    close = difflib.get_close_matches(spec.name, names, n=3)
    hint = f"close to it: {', '.join(close)}" if close else "check the spelling"
    failure = SpecError(f"{spec.source} has no model {spec.name!r}", hint=hint)
    failure.__cause__ = error
    return failure


def _call(spec: Spec, make: Callable[..., Any], *args: Any, **options: Any) -> nn.Module:
    """Build a model; an error says in one sentence what is wrong with an option or a download."""
    try:
        model = make(*args, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = f" with {dict(spec.options)}" if spec.options else ""
        raise SpecError(
            f"{spec} cannot be built{given}: {error}",
            hint="leave the option out" if given else "check the name, and what the model needs",
        ) from error
    except OSError as error:
        raise SpecError(
            f"the weights of {spec} cannot be fetched: {error}", hint="leave out --pretrained"
        ) from error
    if not isinstance(model, nn.Module):
        raise SpecError(
            f"{spec} returned a {type(model).__name__}",
            hint="a factory must return a torch.nn.Module",
        )
    return model


def _timm(spec: Spec) -> nn.Module:
    timm = need("timm", "timm")
    name = spec.name.partition(".")[0]
    if not timm.is_model(name):
        raise _unknown(spec, timm.list_models())
    return _call(spec, timm.create_model, spec.name, pretrained=spec.pretrained, **spec.options)


def _torchvision(spec: Spec) -> nn.Module:
    models = need("torchvision", "demo").models
    if spec.name not in models.list_models():
        raise _unknown(spec, models.list_models())
    options = dict(spec.options)
    if "img_size" in options:
        options["image_size"] = options.pop("img_size")
    weights = "DEFAULT" if spec.pretrained else None
    return _call(spec, models.get_model, spec.name, weights=weights, **options)


def _hugging_face(spec: Spec) -> nn.Module:
    """A model type such as ``dinov2`` or a class such as ``BlipVisionModel``, with its default configuration.

    With weights, the name is one on the hub.
    """
    transformers = need("transformers", "elsewhere")
    if spec.pretrained:
        return _call(spec, transformers.AutoModel.from_pretrained, spec.name)
    options = dict(spec.options)
    for ours, theirs in (("img_size", "image_size"), ("depth", "num_hidden_layers")):
        if ours in options:
            options[theirs] = options.pop(ours)
    if spec.name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(spec.name, **options)
        make: Callable[..., Any] = transformers.AutoModel.from_config
    else:
        make = getattr(transformers, spec.name, None)  # type: ignore[assignment]
        if not hasattr(make, "config_class"):
            raise _unknown(spec, list(transformers.CONFIG_MAPPING))
        config = make.config_class(**options)
    try:
        return _call(spec, make, config)
    except SpecError as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        raise SpecError(
            f"{spec} has no plain encoder: {error.__cause__}",
            hint="name the class of the encoder instead, such as hf:BlipVisionModel",
        ) from error


def _open_clip(spec: Spec) -> nn.Module:
    open_clip = need("open_clip", "elsewhere")
    if spec.name not in open_clip.list_models():
        raise _unknown(spec, open_clip.list_models())
    options = dict(spec.options)
    if "img_size" in options:
        options["force_image_size"] = options.pop("img_size")
    weights = "openai" if spec.pretrained else None
    whole = _call(spec, open_clip.create_model, spec.name, pretrained=weights, **options)
    visual = whole.visual
    assert isinstance(visual, nn.Module)
    return visual


def imported(place: str, text: str, kind: str) -> Any:
    """What ``pkg.mod:name`` names: a ``kind``; ``text`` is what was written.

    Raises:
        SpecError: it cannot be imported.
    """
    module, colon, name = place.rpartition(":")
    if not colon:
        raise SpecError(f"cannot read {text!r}", hint=f"write module:package.module:{kind}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise SpecError(
            f"{name!r} cannot be imported from {module!r}: {error}",
            hint="the current directory is not on the path unless PYTHONPATH says so",
        ) from error


def _own(spec: Spec) -> nn.Module:
    return _call(spec, imported(spec.name, str(spec), "factory"), **spec.options)


BUILDERS: dict[str, Callable[[Spec], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hugging_face,
    "open_clip": _open_clip,
    "module": _own,
}
