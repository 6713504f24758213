"""The numbers of a report, and what they mean in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from skipvit_fx.graph.record import RewriteRecord
from skipvit_fx.page.answers import mean_cosine
from skipvit_fx.page.runs import Runs
from skipvit_fx.reports.inspection_report import Inspection, LayerReport, RestReport


@dataclass(frozen=True)
class Figure:
    """One number of the summary.

    Attributes:
        name: what it is of.
        value: as text, with its unit.
        detail: where it comes from.
    """

    name: str
    value: str
    detail: str


def figures_of(inspection: Inspection, runs: Runs) -> tuple[Figure, ...]:
    """What a reader wants to know first."""
    return (
        macs_figure(inspection),
        _time(runs),
        tokens_figure(inspection),
        agreement_figure(runs),
        validation_figure(inspection),
    )


def macs_figure(inspection: Inspection) -> Figure:
    """Multiply-adds saved."""
    now, before = inspection.macs, inspection.baseline_macs
    value = change(now / before - 1) if before else "none"
    size, unit = unit_of(before)
    return Figure(
        "Multiply-adds",
        value,
        f"{short(before / size)} → {short(now / size)} {unit} for one image",
    )


def _time(runs: Runs) -> Figure:
    if runs.latency is None or runs.milliseconds is None or runs.time_saved is None:
        return Figure("Time", "not measured", "the report was made with rounds=0")
    before, after = runs.milliseconds
    low, high = min(runs.latency.speedups), max(runs.latency.speedups)
    detail = f"{before:.1f} → {after:.1f} ms; {low:.2f} to {high:.2f} times as fast"
    return Figure("Time", change(-runs.time_saved), detail)


def tokens_figure(inspection: Inspection) -> Figure:
    """How many tokens there are where there are fewest."""
    fewest = min(inspection.layers, key=lambda layer: layer.attention_tokens)
    if fewest.attention_tokens < inspection.tokens:
        count, where = (
            fewest.attention_tokens,
            "in the attention of layer {}, where there are fewest",
        )
    elif dropping := [layer for layer in inspection.layers if layer.dropped]:
        fewest = min(dropping, key=lambda layer: layer.ffn_tokens)
        count, where = fewest.ffn_tokens, "after the attention of layer {}"
    else:
        return Figure("Tokens", str(inspection.tokens), "in every attention")
    return Figure("Tokens", f"{inspection.tokens} → {count}", where.format(fewest.index))


def agreement_figure(runs: Runs) -> Figure:
    """How many images have the model's own answer."""
    answers = runs.answers
    cosine = mean_cosine(answers)
    if answers[0].before:
        same = sum(answer.same for answer in answers)
        images = "image has" if len(answers) == 1 else "images have"
        detail = f"{images} the model's own best class"
        if cosine is not None:
            detail += f"; mean cosine of the logits {cosine:.3f}"
        return Figure("Same answer", f"{same} of {len(answers)}", detail)
    if cosine is None:
        return Figure("Same answer", "unknown", "the outputs have different shapes")
    low = min(answer.cosine for answer in answers if answer.cosine is not None)
    detail = f"mean cosine to the model's own output; {low:.3f} at worst"
    return Figure("Same answer", f"{cosine:.3f}", detail)


def validation_figure(inspection: Inspection) -> Figure:
    """Whether the rewrite was validated."""
    verdict, _, rest = inspection.validated.partition(": ")
    if not rest:
        why = inspection.validated.partition(" (")[2].rstrip(")")
        return Figure("Check", "not validated", why)
    return Figure("Check", verdict, f"against the model with masked tokens: {rest}")


def unit_of(macs: int) -> tuple[float, str]:
    """In what multiply-adds are given, as a number and in a word."""
    return (1e9, "billion") if macs >= 1e9 else (1e6, "million")


def change(share: float) -> str:
    """A share as a change, with a real minus sign."""
    return f"{share:+.1%}".replace("-", "−").replace("%", " %")  # noqa: RUF001


def short(value: float) -> str:
    """With three digits."""
    return f"{value:#.3g}".rstrip(".")


# -- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Amount:
    """A number before and after, for a bar.

    Attributes:
        after, before: as text.
        share: of the longest bar of its column, after and before.
    """

    after: str
    before: str
    share: tuple[float, float]

    @property
    def same(self) -> bool:
        """Whether both read alike."""
        return self.after == self.before


@dataclass(frozen=True)
class LayerRow:
    """One line of the layer table.

    Attributes:
        name: number of the layer, or what runs before or after all layers.
        module: path of the attention.
        leave, come: rows that leave in the layer, and that come back at its input.
        merged: whether those that leave become part of others.
        attention, ffn, macs, time: amounts; ``None`` where there is none.
    """

    name: str
    module: str
    leave: int
    come: int
    merged: bool
    attention: Amount | None
    ffn: Amount | None
    macs: Amount
    time: Amount | None


def layer_rows(record: RewriteRecord, inspection: Inspection, runs: Runs) -> list[LayerRow]:
    """Embedding, layers and head."""
    parts: list[LayerReport | RestReport] = [
        inspection.embedding,
        *inspection.layers,
        inspection.head,
    ]
    longest = max(part.baseline_macs for part in parts) or 1
    times = _times(runs, len(parts))
    spans = record.plan.spans
    merging = {stage.layer for stage in record.stages if spans[stage.span].merged}
    names = ["embedding", *(str(layer.index) for layer in inspection.layers), "head"]
    rows = []
    for name, part, time in zip(names, parts, times, strict=True):
        layer = part if isinstance(part, LayerReport) else None
        now, before = part.macs / longest, part.baseline_macs / longest
        rows.append(
            LayerRow(
                name,
                layer.module_path if layer else "",
                part.dropped,
                part.returned,
                layer is not None and layer.index in merging,
                _count(layer.attention_tokens, inspection.tokens) if layer else None,
                _count(layer.ffn_tokens, inspection.tokens) if layer else None,
                Amount(_billions(part.macs), _billions(part.baseline_macs), (now, before)),
                time,
            )
        )
    return rows


def _count(now: int, before: int) -> Amount:
    most = max(now, before, 1)
    return Amount(str(now), str(before), (now / most, before / most))


def _billions(macs: int) -> str:
    return f"{macs / 1e9:.3f}"


def _times(runs: Runs, rows: int) -> list[Amount | None]:
    """Milliseconds of each part of the model, if they were measured."""
    if runs.latency is None:
        return [None] * rows
    layers = runs.latency.layers
    longest = max(max(layer.measured, layer.baseline_measured) for layer in layers) or 1
    return [
        Amount(
            short(1e3 * layer.measured),
            short(1e3 * layer.baseline_measured),
            (layer.measured / longest, layer.baseline_measured / longest),
        )
        for layer in layers
    ]


# -- words ------------------------------------------------------------------------------------------------------------


def spans_in_words(record: RewriteRecord, inspection: Inspection, runs: Runs) -> list[str]:
    """What the plan does, one sentence for every span."""
    return list(_sentences(record, inspection, runs)) or ["The plan drops nothing."]


def _sentences(record: RewriteRecord, inspection: Inspection, runs: Runs) -> Iterator[str]:
    for number, span in enumerate(record.plan.spans):
        stages = [
            (stage.layer, trace)
            for stage, trace in zip(record.stages, runs.traces, strict=True)
            if stage.span == number
        ]
        layers = [layer for layer, _ in stages]
        left = len(stages[-1][1].kept_of(0))
        where = _where(layers)
        away = inspection.patches - left
        if span.merged:
            what, how, never = _MERGED
        else:
            what, how, never = _FUSED if span.fused else _DROPPED
        back = (
            never
            if span.return_layer is None
            else f"at the input of layer {span.return_layer} {how}"
        )
        yield f"{where} {away} of {inspection.patches} patches {what}; {back}."


_DROPPED = "leave", "they return to their places", "they never return"
_FUSED = "leave, and one token stands in for them", *_DROPPED[1:]
_MERGED = (
    "become part of others that are like them",
    "each gets the state of the token that it is part of",
    "they stay merged",
)


def _where(layers: list[int]) -> str:
    if layers == [0]:
        return "In front of layer 1,"
    if len(layers) == 1:
        return f"In layer {layers[0]},"
    if layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2:
        return f"In layers {layers[0]} to {layers[-1]},"
    return f"In layers {', '.join(map(str, layers[:-1]))} and {layers[-1]},"
