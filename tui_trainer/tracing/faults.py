"""What is said of things that went wrong."""

from __future__ import annotations


def skipped_text(scale: float) -> str:
    """What to say of a step that a GradScaler skipped."""
    return f"GradScaler skipped the step: gradients are not finite at loss scale {scale:g}"


def describe(fault: BaseException) -> str:
    """An exception in one line, with the place of ours where it happened."""
    text = str(fault).strip().splitlines()
    trace = fault.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        file = trace.tb_frame.f_code.co_filename.rpartition("/")[2]
        where = f" ({file}:{trace.tb_lineno})"
    return f"{type(fault).__name__}: {text[0] if text else ''}{where}"
