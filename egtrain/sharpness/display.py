"""The display of `plot-sharpness`: a line for each metric, and one bar with the time left."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TextIO

from egtrain.formatting import counted
from egtrain.progress import Bar, Progress
from egtrain.sharpness.metric import GRADIENT_COST, PASS_COST, PRODUCT_COST
from egtrain.sharpness.records import Record

Counts = tuple[int, int, int]
"""Hessian-vector products, gradients and evaluations."""


class MeasureDisplay:
    """Shows how far the measuring is; a context manager, which gives the terminal back.

    Args:
        stream: where to; standard output if None.
        silent: show nothing, on ranks other than the first.
    """

    def __init__(self, stream: TextIO | None = None, silent: bool = False) -> None:
        self._progress = Progress(stream, silent=silent)
        self._closing = ExitStack()
        self._bar: Bar | None = None
        self._done = 0.0

    def __enter__(self) -> Self:
        self._closing.enter_context(self._progress)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.close()

    def start(self, costs: Sequence[float], stored: int) -> None:
        """Take the costs of what is to be measured, and how many measurements are stored
        already.
        """
        missing = counted(len(costs), "measurement")
        text = f"{missing} to make" if costs else "nothing left to measure"
        self._progress.message(f"{text}{f', {stored} stored already' if stored else ''}")
        if costs:
            self._bar = self._closing.enter_context(self._progress.bar("measuring", sum(costs)))
            self._bar.update(0.0)

    def begin(self, label: str, metric: str, cost: float, counts: Callable[[], Counts]) -> None:
        """Take the beginning of a metric; `counts` tells what was computed of it so far."""

        def look() -> tuple[float, str]:
            products, gradients, evaluations = counts()
            made = PRODUCT_COST * products + GRADIENT_COST * gradients + PASS_COST * evaluations
            so_far = f", {counted(products, 'product')}" if products else ""
            return self._done + min(cost, made), f"{label}: {metric}{so_far}"

        if self._bar is not None:
            self._bar.watch(look)

    def finish(self, label: str, metric: str, cost: float, record: Record) -> None:
        """Take a finished metric."""
        amounts = {
            "product": record.products,
            "gradient": record.gradients,
            "evaluation": record.evaluations,
        }
        work = [counted(amount, name) for name, amount in amounts.items() if amount]
        self._progress.message(", ".join([f"{label}: {metric}", *work, f"{record.seconds:.1f} s"]))
        self._done += cost
        if self._bar is not None:
            self._bar.update(self._done)
