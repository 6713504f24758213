"""skipvit_fx: a graph compiler that gives any Vision Transformer a token-level skip connection."""

from skipvit_fx.analysis.explain import AttentionReport, find_attention
from skipvit_fx.api import rewrite, set_skipping
from skipvit_fx.errors import (
    ExportError,
    PlanError,
    SkipViTError,
    TraceError,
    UnsupportedModelError,
)
from skipvit_fx.plan import Plan, Stage

__all__ = [
    "AttentionReport",
    "ExportError",
    "Plan",
    "PlanError",
    "SkipViTError",
    "Stage",
    "TraceError",
    "UnsupportedModelError",
    "find_attention",
    "rewrite",
    "set_skipping",
]
