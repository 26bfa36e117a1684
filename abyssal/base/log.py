"""Where log lines go and what they look like; only the command line calls this."""

from __future__ import annotations

import logging
import sys


def configure(level: str = "info", *, as_json: bool | None = None) -> None:
    """Write the package's log to stderr, one event a line.

    Args:
        level: debug, info, warning or error.
        as_json: JSON lines; None for JSON unless a person reads the terminal.
    """
    import structlog

    as_json = not sys.stderr.isatty() if as_json is None else as_json
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if not as_json:
        renderer = structlog.dev.ConsoleRenderer()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso"),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    logger = logging.getLogger("abyssal")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
