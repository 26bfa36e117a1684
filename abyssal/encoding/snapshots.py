"""What differs between the snapshots: the text that an effort puts before the prompt (encoding.md 4)."""

from __future__ import annotations

from typing import Literal, get_args

Snapshot = Literal["april", "0731"]
Effort = Literal["low", "high", "max"]
SNAPSHOTS: tuple[Snapshot, ...] = get_args(Snapshot)
EFFORTS: tuple[Effort, ...] = get_args(Effort)

_ABSOLUTE_MAXIMUM = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause,"
    " rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered"
    " alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND_MAXIMUM = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose"
    " the problem into its most fundamental components, trace every causal chain to its root, and resolve the"
    " underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain"
    " that no assumption remains unchecked and no error remains undiscovered.\n\n"
)

# an effort that a snapshot does not know renders as its default does: nothing
EFFORT_TEXT: dict[Snapshot, dict[Effort | None, str]] = {
    "april": {None: "", "low": "", "high": "", "max": _ABSOLUTE_MAXIMUM},
    "0731": {None: "", "low": "", "high": _ABSOLUTE_MAXIMUM, "max": _BEYOND_MAXIMUM},
}
