"""What waits in a container of the pool: a Python that serves one call. Its text is sent into the container."""

import atexit
import json
import os
import sys


def _exactly(size: int) -> bytes:
    parts = []
    while size:
        part = os.read(0, size)
        if not part:
            sys.exit(0)  # never called
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def serve() -> dict[str, object]:
    """Wait for a call, and be it; returns the names that its source has made."""
    os.write(1, b"\x06")
    call = json.loads(_exactly(int(_exactly(8), 16)))
    os.environ.update(call["env"])
    os.chdir(call["cwd"])
    names: dict[str, object] = {"__name__": "__main__", "__builtins__": __builtins__}
    if call["kind"] == "source":
        sys.argv = ["-c", *call["arguments"]]
        exec(compile(call["source"], "<call>", "exec"), names)
        return names
    import importlib

    function = getattr(importlib.import_module(call["module"]), call["function"])
    print(json.dumps(function(*call["arguments"])))
    return names


def end(names: dict[str, object]) -> None:
    """What Python does at its end for others to see; to take itself apart costs more than a call."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    names.clear()  # files that were left open are written
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os._exit(0)


if __name__ == "__main__":
    end(serve())
