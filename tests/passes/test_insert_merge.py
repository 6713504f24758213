"""Tokens are merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.passes.insert_merge import InsertMerge
from support.tiny import Tiny, assert_documented, run_up_to


def test_as_documented() -> None:
    assert_documented(run_up_to(InsertMerge, Tiny(), "1(50%)+3+merged"))


def test_a_later_stage_knows_the_positions_and_sizes_of_its_tokens() -> None:
    ran = run_up_to(InsertMerge, Tiny(), "1,2(2)+merged")
    assert "stage_2_positions = skipvit.stage_2.positions(stage_1_kept, stage_2_kept)" in ran.after
    given = "add_2, stage_2_kept, stage_2_dropped, stage_2_into, stage_1_sizes"
    assert f"stage_2_merged = skipvit.stage_2.merge({given})" in ran.after
    assert ran.context.skips[2].positions.name == "stage_2_positions"


def test_the_next_span_begins_with_single_patches() -> None:
    ran = run_up_to(InsertMerge, Tiny(), "1(2)+2+merged;2(2)+merged")
    given = "add_2, stage_2_kept, stage_2_dropped, stage_2_into"
    assert f"stage_2_merged = skipvit.stage_2.merge({given})" in ran.after
    assert ran.context.skips[2].positions is ran.context.skips[2].kept


@pytest.mark.parametrize("plan", ["", "1(50%)+3", "1(50%)+fused"])
def test_other_spans_are_left_alone(plan: str) -> None:
    assert run_up_to(InsertMerge, Tiny(), plan).events == ()


class Two(nn.Module):
    """Two attentions beside each other, of different widths."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.small = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.small(self.block.norm1(x))
        also = nn.functional.scaled_dot_product_attention(h, h, h)
        q, k, v = (part(self.block.norm1(x)) for part in (self.block.q, self.block.k, self.block.v))
        both = nn.functional.scaled_dot_product_attention(q, k, v) + torch.cat([also, also], -1)
        x = x + both
        return x + self.block.mlp(self.block.norm2(x))


def test_keys_of_different_widths_are_not_compared() -> None:
    model = Tiny()
    model.blocks[1] = Two(model.blocks[1])
    with pytest.raises(UnsupportedModelError, match=r"different numbers of channels, \[4, 8\]"):
        run_up_to(InsertMerge, model, "2(2)+merged")
