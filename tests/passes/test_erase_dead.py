"""What nothing reads is erased."""

from __future__ import annotations

from skipvit_fx.passes.erase_dead import EraseDead
from support.tiny import Tiny, assert_documented, run_up_to


def test_as_documented() -> None:
    assert_documented(run_up_to(EraseDead, Tiny(sizes="read")))


def test_each_erased_node_is_an_event() -> None:
    ran = run_up_to(EraseDead, Tiny(sizes="read"))
    gone = {line.partition(" = ")[0] for line in ran.before} - {
        line.partition(" = ")[0] for line in ran.after
    }
    assert (
        {node for kind, node in ran.events if kind == "erase"}
        == gone
        == {"getattr_6", "getitem_11"}
    )


def test_the_module_of_an_erased_node_goes_too() -> None:
    """Tokens are put back that nothing reads."""
    ran = run_up_to(EraseDead, Tiny(), "1(50%)+4")
    assert ("erase", "stage_1_returned") in ran.events
    paths = {path for path, _ in ran.context.capture.module.named_modules()}
    assert "skipvit.stage_1.keep" in paths
    assert "skipvit.stage_1.put_back" not in paths


def test_where_all_is_read_nothing_changes() -> None:
    assert run_up_to(EraseDead, Tiny()).events == ()
