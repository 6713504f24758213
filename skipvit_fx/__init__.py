"""skipvit_fx: a graph compiler that gives any Vision Transformer a token-level skip connection."""

from skipvit_fx.api import rewrite, set_skipping
from skipvit_fx.ascend.atc import AtcReport, atc_check
from skipvit_fx.errors import (
    ExportError,
    GuardError,
    NotRewrittenError,
    PlanError,
    SavedModelError,
    SkipViTError,
    TraceError,
    UnsupportedModelError,
    ValidationError,
)
from skipvit_fx.export.to_onnx import ExportedFile, export_onnx
from skipvit_fx.plan import Plan, Stage
from skipvit_fx.reports.attention import AttentionReport, find_attention
from skipvit_fx.reports.inspection import inspect
from skipvit_fx.reports.inspection_report import Inspection
from skipvit_fx.reports.latency import measure_latency
from skipvit_fx.reports.latency_report import LatencyReport
from skipvit_fx.reports.tokens import TokenTrace, trace_tokens
from skipvit_fx.saving import load, save
from skipvit_fx.training import SkipSchedule

__all__ = [
    "AtcReport",
    "AttentionReport",
    "ExportError",
    "ExportedFile",
    "GuardError",
    "Inspection",
    "LatencyReport",
    "NotRewrittenError",
    "Plan",
    "PlanError",
    "SavedModelError",
    "SkipSchedule",
    "SkipViTError",
    "Stage",
    "TokenTrace",
    "TraceError",
    "UnsupportedModelError",
    "ValidationError",
    "atc_check",
    "export_onnx",
    "find_attention",
    "inspect",
    "load",
    "measure_latency",
    "rewrite",
    "save",
    "set_skipping",
    "trace_tokens",
]
