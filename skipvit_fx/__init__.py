"""skipvit_fx: a graph compiler that gives any Vision Transformer a token-level skip connection."""

from skipvit_fx.api import rewrite, set_skipping, skipping
from skipvit_fx.ascend.atc import AtcReport, Finding, atc_check
from skipvit_fx.errors import (
    ExportError,
    GuardError,
    NotRewrittenError,
    PlanError,
    ReportError,
    SavedModelError,
    SearchError,
    SkipViTError,
    TraceError,
    UnsupportedModelError,
    ValidationError,
)
from skipvit_fx.export.to_onnx import ExportedFile, export_onnx
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.methods import METHODS, Method
from skipvit_fx.page.front import report_search
from skipvit_fx.page.page import report
from skipvit_fx.plan import Plan, Span, Stage
from skipvit_fx.planner.profile import Profile, Sensitivity
from skipvit_fx.planner.result import Candidate, SearchResult
from skipvit_fx.planner.running import Progress
from skipvit_fx.planner.search import search
from skipvit_fx.reports.attention import find_attention
from skipvit_fx.reports.attention_report import AttentionReport, FoundLayer, Site
from skipvit_fx.reports.environment import version_of
from skipvit_fx.reports.inspection import inspect
from skipvit_fx.reports.inspection_report import (
    Inspection,
    LayerReport,
    NodeReport,
    RestReport,
    StageReport,
)
from skipvit_fx.reports.latency import measure_latency
from skipvit_fx.reports.latency_report import LatencyReport, LayerLatency
from skipvit_fx.reports.token_report import TokenTrace, TokenTraces
from skipvit_fx.reports.tokens import trace_tokens
from skipvit_fx.saving import load, save
from skipvit_fx.scores import register_score
from skipvit_fx.training import SkipSchedule

__version__ = version_of("skipvit_fx")
del version_of

__all__ = [
    "METHODS",
    "AtcReport",
    "AttentionReport",
    "Candidate",
    "ExportError",
    "ExportedFile",
    "Finding",
    "FoundLayer",
    "GuardError",
    "Inspection",
    "LatencyReport",
    "LayerLatency",
    "LayerReport",
    "Method",
    "NodeReport",
    "NotRewrittenError",
    "Plan",
    "PlanError",
    "Profile",
    "Progress",
    "ReportError",
    "RestReport",
    "SavedModelError",
    "SearchError",
    "SearchResult",
    "Sensitivity",
    "Site",
    "SkipSchedule",
    "SkipViTError",
    "SkipViTModule",
    "Span",
    "Stage",
    "StageReport",
    "TokenTrace",
    "TokenTraces",
    "TraceError",
    "UnsupportedModelError",
    "ValidationError",
    "__version__",
    "atc_check",
    "export_onnx",
    "find_attention",
    "inspect",
    "load",
    "measure_latency",
    "register_score",
    "report",
    "report_search",
    "rewrite",
    "save",
    "search",
    "set_skipping",
    "skipping",
    "trace_tokens",
]
