"""What the readers of an ONNX file accept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skipvit_fx.errors import ExportError

Target = Literal["ascend", "onnxruntime"]

LAYER_NORM_OPSET = 17
"""First opset with an operator LayerNormalization."""


@dataclass(frozen=True)
class Profile:
    """One kind of reader.

    Attributes:
        name: as in ``export_onnx(..., target=name)``.
        opsets: the lowest and the highest opset that it accepts.
        opset: the default opset to write.
        ir_version: the IR version of the file; 8 is ONNX 1.12.
        fixed_batch: whether the batch size is fixed by default.
        spelled_out_norms: whether LayerNorm is written as its parts even if the opset has it.
    """

    name: str
    opsets: tuple[int, int]
    opset: int
    ir_version: int
    fixed_batch: bool
    spelled_out_norms: bool

    def check_opset(self, opset: int | None) -> int:
        """The opset to write.

        Raises:
            ExportError: it is outside the profile.
        """
        low, high = self.opsets
        if opset is None:
            return self.opset
        if not isinstance(opset, int) or not low <= opset <= high:
            raise ExportError(
                f"opset {opset!r} is outside the profile {self.name!r}, which is for {low} to {high}",
                hint=f"leave opset out to get {self.opset}",
            )
        return opset


PROFILES: dict[str, Profile] = {
    "ascend": Profile("ascend", (11, 16), 13, 8, fixed_batch=True, spelled_out_norms=True),
    "onnxruntime": Profile(
        "onnxruntime", (11, 18), 18, 8, fixed_batch=False, spelled_out_norms=False
    ),
}


def profile_of(target: str | None) -> Profile:
    """The profile of a target; ``None`` is onnxruntime.

    Raises:
        ExportError: there is no such target.
    """
    found = PROFILES.get(target or "onnxruntime")
    if found is None:
        raise ExportError(
            f"there is no export target {target!r}", hint=f"known targets: {', '.join(PROFILES)}"
        )
    return found
