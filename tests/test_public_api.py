"""What looks public is declared public, and the reverse."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import skipvit_fx


def public_looking(module: ModuleType | SimpleNamespace) -> set[str]:
    """Names without underscore that are no submodules."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }


def test_declared_is_what_is_there() -> None:
    assert public_looking(skipvit_fx) == set(skipvit_fx.__all__)
    assert len(skipvit_fx.__all__) == len(set(skipvit_fx.__all__))


def test_the_comparison_sees_both_mistakes() -> None:
    module = SimpleNamespace(__all__=["a"], a=1, _hidden=2, tests=skipvit_fx.__class__("tests"))
    assert public_looking(module) == {"a"}
    assert public_looking(SimpleNamespace(a=1, forgotten=2)) != {"a"}
    assert public_looking(SimpleNamespace()) != {"a"}


def test_every_public_name_is_documented() -> None:
    for name in skipvit_fx.__all__:
        assert getattr(skipvit_fx, name).__doc__, name


def test_every_error_is_one_of_ours_and_has_a_hint() -> None:
    for name in skipvit_fx.__all__:
        value = getattr(skipvit_fx, name)
        if name.endswith("Error"):
            assert issubclass(value, skipvit_fx.SkipViTError), name
            assert value("what is wrong", hint="what to do").hint == "what to do"
