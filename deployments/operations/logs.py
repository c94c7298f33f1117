"""Logs of every process as lines of one form on the command's standard error: JSON for machines, colours for people.

A replica's own standard error passes through Ray, which prefixes, delays and merges lines and keeps a copy on
disk. So the replicas send their lines to a socket of the command instead. Where there is no command, as on a
cluster, they write to their standard error.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import socket
import socketserver
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import structlog

# Where the replicas find the command's socket; they inherit it.
SOCKET_VARIABLE = "MONOFACET_LOG_SOCKET"
ROOT = "monofacet"
# Lines that may wait for a slow reader; one more is dropped, since a log must not hold up a call.
_WAITING = 10_000

Format = Literal["auto", "json", "console"]


def processors() -> list[Any]:
    """Return what is added to every line, ours and the standard library's alike."""
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]


def formatter(as_json: bool, process: str) -> logging.Formatter:
    """Return the formatter; `process` names the process in each line."""

    def add_process(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["process"] = process
        return event

    renderer: Any = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=processors(),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, add_process, renderer],
    )


def wants_json(form: Format) -> bool:
    """Return whether lines are JSON; `auto` means a terminal reads colours and everything else JSON."""
    return form == "json" or (form == "auto" and not sys.stderr.isatty())


def configure(form: Format, level: str, process: str) -> None:
    """Send this process's lines where they belong; once a process.

    Parameters
    ----------
    form
        As in the settings; the command has settled `auto` before it started any replica.
    level
        Least level that is logged: debug, info, warning or error.
    process
        Its name in each line: `command`, `gateway`, `encoder`.
    """
    structlog.configure(
        processors=[*processors(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    path = os.environ.get(SOCKET_VARIABLE, "")
    writer: logging.Handler = _SocketHandler(path) if path else logging.StreamHandler(sys.stderr)
    writer.setFormatter(logging.Formatter("%(message)s"))
    waiting: queue.Queue[Any] = queue.Queue(_WAITING)
    # Lines are formed where they arise and written by a thread: writing may block, and the event loop must not.
    entrance = _Entrance(waiting)
    entrance.setFormatter(formatter(wants_json(form), process))
    logger = logging.getLogger(ROOT)
    for old in logger.handlers[:]:
        logger.removeHandler(old)
    logger.addHandler(entrance)
    logger.setLevel(level.upper())
    logger.propagate = False
    logging.handlers.QueueListener(waiting, writer).start()


class _Entrance(logging.handlers.QueueHandler):
    """Puts a formed line into the queue, or drops it when the queue is full."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        line = self.format(record)
        return logging.LogRecord(record.name, record.levelno, "", 0, line, None, None)

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return


def _write(line: bytes) -> None:
    # A full disk or a reader that has gone loses the line, and must not end the thread that writes the next ones.
    with suppress(OSError, ValueError):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()


class _SocketHandler(logging.Handler):
    """Writes lines to the command's socket; to standard error once the command is gone."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._socket: socket.socket | None = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket = None

    def emit(self, record: logging.LogRecord) -> None:
        line = (self.format(record) + "\n").encode(errors="replace")
        if self._socket is not None:
            try:
                self._socket.sendall(line)
            except OSError:
                self._socket = None
            else:
                return
        _write(line)


class _Connection(socketserver.StreamRequestHandler):
    """One replica's lines."""

    def handle(self) -> None:
        for line in self.rfile:
            _write(line)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class Collector:
    """The command's socket: prints what the replicas send for as long as it is open.

    Parameters
    ----------
    directory
        Where to make the socket; a short path, since a socket's may have 107 characters.
    """

    def __init__(self, directory: Path) -> None:
        self._path = str(directory / "log")
        self._server = _Server(self._path, _Connection)

    def __enter__(self) -> Collector:
        os.environ[SOCKET_VARIABLE] = self._path
        threading.Thread(target=self._server.serve_forever, name="logs", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.environ.pop(SOCKET_VARIABLE, None)
        self._server.shutdown()
        self._server.server_close()
