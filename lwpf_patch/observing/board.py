"""A file of TensorBoard's that is written at once.

torch's SummaryWriter leaves the writing to a thread: where the disk is full, that thread ends with a traceback on the
terminal, and its error comes out of a later call, or of the one that closes. Importing this imports TensorBoard.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import RecordWriter

_number = itertools.count()


class Board:
    """A file of events.

    Args:
        folder: The folder that TensorBoard reads; it is made if it is not there.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        self._file = (folder / name).open("xb", buffering=0)  # closing it writes nothing, and cannot fail
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, values: dict[str, float], step: int) -> None:
        """Add values by their tags.

        Raises:
            OSError: They cannot be written.
        """
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        data = io.BytesIO()
        RecordWriter(data).write(event.SerializeToString())
        if self._file.write(data.getvalue()) != data.tell():
            raise OSError("a part was written only")
