"""TensorBoard event files without TensorFlow: scalars and the hparams dashboard."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoard:
    """Adds one event file to a trial's folder."""

    def __init__(self, folder: Path):
        self._writer = EventFileWriter(str(folder))

    def start(self, step: int) -> None:
        """Has readers drop what earlier files of the folder hold of ``step`` and beyond; comes before any scalars."""
        self._add(session_log=SessionLog(status=SessionLog.START), step=step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])
        self._add(summary=summary, step=step)

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Flat hyper-parameters (dotted keys) of the session that this folder is."""
        start = plugin_data_pb2.SessionStartInfo()
        for key, value in values.items():
            if isinstance(value, bool):
                start.hparams[key].bool_value = value
            elif isinstance(value, int | float):
                start.hparams[key].number_value = value
            else:
                start.hparams[key].string_value = str(value)
        self._plugin(metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start))
        end = plugin_data_pb2.SessionEndInfo(status=1)  # STATUS_SUCCESS
        self._plugin(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end))

    def _plugin(self, tag: str, data: plugin_data_pb2.HParamsPluginData) -> None:
        value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data))
        self._add(summary=Summary(value=[value]))

    def _add(self, **content: Any) -> None:
        self._writer.add_event(Event(wall_time=time.time(), **content))

    def flush(self) -> None:
        """Returns when everything added so far is in the file."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
