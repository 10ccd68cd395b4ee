"""What TensorBoard shows of a comparison beside each run."""

import io
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from egtrain.checkpoint import write_atomically
from egtrain.sharpness.metrics import metric_of
from egtrain.sharpness.records import MeasuredRun
from egtrain.sharpness.results import NAME


def scalars_of(runs: Iterable[MeasuredRun]) -> dict[int, dict[str, float]]:
    """Return TensorBoard's scalars of one run directory, by step and tag."""
    found: dict[int, dict[str, float]] = {}
    for run in runs:
        for checkpoint in run.checkpoints:
            tags = found.setdefault(checkpoint.step, {})
            for metric, record in checkpoint.records.items():
                for number in metric_of(metric).numbers(record):
                    if number.tag is not None:
                        tags[f"{NAME}/{number.tag}"] = number.value
    return found


def write_tensorboard(
    folder: Path, scalars: Mapping[int, Mapping[str, float]], images: Mapping[str, bytes]
) -> None:
    """Write scalars by step and tag, and PNG images by tag at the last step, as the one event file
    of a folder.

    The folder is a run of its own for TensorBoard, so that the files of the training stay as they
    are.

    Raises:
        EgtrainError: it could not be written.
    """
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    records = RecordWriter(content)
    now = time.time()
    records.write(event_pb2.Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for step, values in sorted(scalars.items()):
        summary = summary_pb2.Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        records.write(
            event_pb2.Event(wall_time=now, step=step, summary=summary).SerializeToString()
        )
    for tag, png in images.items():
        # A PNG's width and height stand at bytes 16 to 24.
        width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
        image = summary_pb2.Summary.Image(
            height=height, width=width, colorspace=4, encoded_image_string=png
        )
        summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, image=image)])
        records.write(
            event_pb2.Event(wall_time=now, step=max(scalars), summary=summary).SerializeToString()
        )
    write_atomically(folder / f"events.out.tfevents.0000000000.{NAME}", content.getvalue())
