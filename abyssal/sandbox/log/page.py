"""A log as a static page: no scripts, nothing loaded, nothing obeyed of what a sandbox wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from abyssal.sandbox.errors import LogError
from abyssal.sandbox.log.blobs import Blobs
from abyssal.sandbox.log.display import harmless_html as shown
from abyssal.sandbox.log.reader import LogFile, operations

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff }
h1 { font-size: 1.3rem } code, pre { font: 13px/1.45 ui-monospace, monospace }
pre { background: #f4f4f2; padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
      margin: .3rem 0 }
pre.stderr { background: #fbeeee } details { border-top: 1px solid #ddd; padding: .5rem 0 }
summary { cursor: pointer } .what { font-weight: 600 } .bad { color: #a00 } .dim { color: #666 }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } pre { background: #242424 } pre.stderr { background: #3a2424 }
  details { border-color: #333 } .dim { color: #999 } .bad { color: #f88 }
}
"""
# belt and braces: even if a mark slipped through, a browser would load and run nothing
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
LONGEST = 200_000  # letters of a stream on the page; the log has the rest


def page(log: LogFile) -> str:
    """The whole page."""
    name = log.records[0].sandbox if log.records else "an empty log"
    entries = "\n".join(_entry(entry, log.blobs) for entry in operations(log.records))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{shown(name)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Sandbox <code>{shown(name)}</code></h1>{_state(log)}{_facts(log)}\n{entries}\n</body></html>\n"
    )


def _state(log: LogFile) -> str:
    try:
        log.check()
    except LogError as error:
        return f'<p class="bad">{shown(str(error))}</p>'
    torn = "" if log.fault is None else f" A torn tail of {log.fault.size} bytes was never acknowledged."
    return (
        f'<p class="dim">{len(log.records)} records, whole and unchanged; head <code>{log.head[:16]}</code>.{torn}</p>'
    )


def _facts(log: LogFile) -> str:
    """What happened besides operations."""
    kinds = [record for record in log.records if not record.kind.startswith(("op.", "file.", "tty."))]
    lines = "".join(
        f"<li><code>{record.seq}</code> {shown(record.kind)} <span class='dim'>{shown(record.t)}"
        f" {shown(json.dumps(record.res)) if record.res else ''}</span></li>"
        for record in kinds
    )
    return f"<details><summary>{len(kinds)} facts</summary><ul>{lines}</ul></details>"


def _entry(entry: Mapping[str, Any], blobs: Blobs) -> str:
    req, res = entry["req"], entry["res"]
    code = res.get("exit_code")
    bad = res["state"] != "done" or code not in (None, 0)
    ended = "" if code is None else f", exit {code}"
    return (
        f'<details open><summary><code class="dim">{entry["seq"]}</code> <span class="what">{shown(title(req))}</span>'
        f' <span class="{"bad" if bad else "dim"}">{shown(res["state"])}{ended}</span>'
        f' <span class="dim">{shown(entry["t"])} {res.get("duration_ms", "")}{" ms" if "duration_ms" in res else ""}'
        f"</span></summary>{_error(res)}{''.join(_stream(res, name, blobs) for name in ('stdout', 'stderr', 'data'))}"
        "</details>"
    )


def _error(res: Mapping[str, Any]) -> str:
    return f'<p class="bad">{shown(res["error"]["message"])}</p>' if "error" in res else ""


def _stream(res: Mapping[str, Any], name: str, blobs: Blobs) -> str:
    if name not in res or not res[name]["bytes"]:
        return ""
    try:
        kept = blobs.fetch(res[name])
    except LogError as error:
        return f'<p class="bad">{shown(str(error))}</p>'
    if kept.truncated:
        missing = kept.total - len(kept.data)
        text = (
            f"{shown(kept.data[: kept.head])}</pre><p class='dim'>{missing} bytes are not kept</p><pre class='{name}'>"
        )
        return f"<pre class='{name}'>{text}{shown(kept.data[kept.head :])}</pre>"
    rest = f"<p class='dim'>and {len(kept.data) - LONGEST} bytes more</p>" if len(kept.data) > LONGEST else ""
    return f"<pre class='{name}'>{shown(kept.data[:LONGEST])}</pre>{rest}"


def title(req: Mapping[str, Any]) -> str:
    """One line for an operation."""
    if req["op"] != "exec":
        rest = " ".join(str(req[name]) for name in ("path", "to", "of") if name in req)
        return f"{req['op']} {rest}".strip()
    argv: Sequence[str] = req["argv"]
    if len(argv) == 3 and list(argv[:2]) == ["/bin/sh", "-c"]:
        return argv[2]
    return " ".join(argv)
