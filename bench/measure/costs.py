"""What a compiled pipeline's runs cost, all calls within a step together: MACs and memory from its report."""

from __future__ import annotations

from harmonica_rt.report import Report, theoretical_speedup


def theoretical(report: Report) -> float:
    """MACs of the full run / MACs with the schedule, over the plans of all contexts.

    Raises:
        ValueError: no call was made yet, or MACs could not be counted.
    """
    if not report.plans:
        raise ValueError("theoretical speed-up: expected a report after a run, got one without a plan")
    if uncounted := next((plan.uncounted for plan in report.plans if not plan.macs), None):
        raise ValueError(f"theoretical speed-up: expected counted MACs, got none: {uncounted}")
    return theoretical_speedup([report])


def slot_bytes(report: Report) -> int:
    """Bytes of the values held between steps, over the plans of all contexts."""
    return sum(plan.slot_bytes for plan in report.plans)
