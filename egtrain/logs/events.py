"""A run's TensorBoard event files; a resumed run cuts them and goes on."""

import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from egtrain.logs.growing_file import GrowingFile


class Events:
    """Event files in one folder: one for each process that trained the run, ordered by name.

    TensorBoard names a run by its folder in the log directory: files in the run directory itself
    give `resnet-eg`, not `resnet-eg/tensorboard`.

    `SummaryWriter` is not used: its thread ends with a traceback when the disk is full, it cannot
    sync, and the names of its files after a quick restart have no certain order.
    """

    def __init__(self, folder: Path, resume_step: int, warn: Callable[[str], None]) -> None:
        # Slow to import, and not everyone wants events.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session_log, self._summary = (
            event_pb2.Event,
            event_pb2.SessionLog,
            summary_pb2.Summary,
        )
        self._trial = os.fsencode(folder.resolve().name).decode(errors="replace")
        self.described: dict[str, int] = {}
        """The last step of each tag that is no curve, earlier files included."""
        folder.mkdir(exist_ok=True)
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        numbers = [path.name.split(".")[3] for path in earlier]
        for path in earlier:
            if resume_step:
                self._cut_after(path, resume_step)
            else:
                path.unlink()
        # Readers sort by name. The number is the time, but above the numbers of earlier files.
        number = max(
            int(time.time()), *(int(number) + 1 for number in numbers if number.isdigit()), 0
        )
        self.file = GrowingFile(folder / f"events.out.tfevents.{number:010d}.egtrain", warn)
        self._records = RecordWriter(self.file)
        self._add(self._event(file_version="brain.Event:2"))
        if resume_step:
            # For a running TensorBoard that has read what was cut off.
            restart = self._session_log(status=self._session_log.START)
            self._add(self._event(step=resume_step + 1, session_log=restart))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of a step, by tag."""
        summary = self._summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        self._add(self._event(step=step, summary=summary))

    def image(self, tag: str, png: bytes, step: int) -> None:
        """Write a picture."""
        # A PNG's width and height are in bytes 16 to 24.
        width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
        image = self._summary.Image(
            width=width, height=height, colorspace=4, encoded_image_string=png
        )
        value = self._summary.Value(tag=tag, image=image)
        self._add(self._event(step=step, summary=self._summary(value=[value])))

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text, unless the tag has one."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        if tag not in self.described:
            self._describe(text_pb(tag, text), step)

    def hyperparameters(
        self, values: Mapping[str, object], final_metrics: Mapping[str, float], step: int
    ) -> None:
        """Write the run's row in the table of hyperparameters, unless this step has one.

        There is no experiment record: with one, TensorBoard shows only the columns of the first
        run; without any, it finds those of all runs.
        """
        from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        if self.described.get(SESSION_START_INFO_TAG) == step:
            return
        self.scalars({f"final/{name}": value for name, value in final_metrics.items()}, step)
        plain = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in values.items()
            if value is not None
        }
        self._describe(hparams_pb(plain, trial_id=self._trial), step)

    def _describe(self, summary: Any, step: int) -> None:
        # Where TensorFlow is installed, TensorBoard's helpers return its class of summaries.
        summary = self._summary.FromString(summary.SerializeToString())
        self.described |= {value.tag: step for value in summary.value}
        self._add(self._event(step=step, summary=summary))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def _cut_after(self, path: Path, step: int) -> None:
        """Cut an earlier file before its first event of a later step, or its first torn one."""
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        data = path.read_bytes()
        kept = 0
        # A record is its length (8 bytes), a checksum of that (4), an event, and a checksum of the
        # event (4).
        while kept + 16 <= len(data):
            length, checksum = struct.unpack_from("<QI", data, kept)
            end = kept + 16 + length
            if end > len(data) or checksum != masked_crc32c(data[kept : kept + 8]):
                break
            try:
                event = self._event.FromString(data[kept + 12 : end - 4])
            except Exception:  # protobuf's DecodeError, from a package without types
                break
            if event.step > step:
                break
            self.described |= {
                value.tag: event.step for value in event.summary.value if value.HasField("metadata")
            }
            kept = end
        if kept < len(data):
            os.truncate(path, kept)
