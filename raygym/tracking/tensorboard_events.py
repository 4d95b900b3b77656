"""A run's rows as TensorBoard's event files, written by TensorBoard itself: PyTorch's writer imports all of PyTorch."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from raygym.histogram import Histogram
from raygym.run_row import Row


class TensorBoardEvents:
    """One file, of which a row is on disk as soon as `show` has returned."""

    def __init__(self, folder: Path) -> None:
        """Begin a file in the folder, beside those of earlier starts. Raises OSError."""
        self._writer: Any = EventFileWriter(str(folder))

    def show(self, step: int, row: Row) -> None:
        """Numbers and histograms of a step; TensorBoard has nothing for the rest. Raises OSError."""
        values = [
            Summary.Value(tag=name, histo=_histogram(value))
            if isinstance(value, Histogram)
            else Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if value is not None and not isinstance(value, str)
        ]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """End the file. Raises OSError."""
        self._writer.close()


def _histogram(histogram: Histogram) -> HistogramProto:
    return HistogramProto(
        min=histogram.low,
        max=histogram.high,
        num=sum(histogram.counts),
        sum=histogram.total,
        sum_squares=histogram.squares,
        bucket_limit=[*histogram.edges, sys.float_info.max],
        bucket=list(histogram.counts),
    )
