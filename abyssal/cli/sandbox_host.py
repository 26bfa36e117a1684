"""`abyssal sandbox doctor` and `install`: what this host can run, and what it needs for more."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from abyssal.base.errors import InputError

Home = Annotated[Path | None, typer.Option(help="Folder of this host's edge; default below ABYSSAL_HOME.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Engines = Annotated[list[str] | None, typer.Option("--engine", help="Only this engine; may be repeated.")]
Unsafe = Annotated[bool, typer.Option(help="Also the engine `process`, which isolates nothing; for tests.")]


def doctor(engine: Engines = None, home: Home = None, allow_unsafe: Unsafe = False, json_out: Json = False) -> None:
    """Start something real in every engine of this host, and say what works and what is missing."""
    from abyssal.sandbox.api import SUBSTRATES
    from abyssal.sandbox.engines.registry import installed
    from abyssal.sandbox.http.daemon import edge_home
    from abyssal.sandbox.placement import Placement
    from abyssal.sandbox.shapes import plain

    folder = edge_home(home)
    folder.mkdir(parents=True, exist_ok=True)
    placement = Placement(
        installed(folder / "engines", allow_unsafe=allow_unsafe, names=engine or ()), folder / "probes.json"
    )

    async def work() -> dict[str, Any]:
        found = {each.name: await placement.probe(each, again=True) for each in placement.engines}
        return {
            "engines": [
                {"name": engine.name, "substrates": list(engine.substrates), "features": sorted(engine.features),
                 **plain(found[engine.name])}
                for engine in placement.engines
            ],
            "substrates": {
                name: next((engine.name for engine in placement.engines
                            if name in engine.substrates and found[engine.name].ok), None)
                for name in SUBSTRATES
            },
        }  # fmt: skip

    report = asyncio.run(work())
    if json_out:
        print(json.dumps(report))
        return
    for name, chosen in report["substrates"].items():
        print(f"{name:10s} {chosen or 'nothing on this host can run it'}")
    for found in report["engines"]:
        print(f"  {found['name']:12s} {'works' if found['ok'] else 'does not work'}: {found['detail']}")
        if found["placed"]:
            print(f"  {'':12s} boundary {found['placed']['boundary']}, acceleration {found['placed']['accel']}")
            for missing in found["placed"]["degraded"]:
                print(f"  {'':12s} missing: {missing}")
        if found["remedy"]:
            print(f"  {'':12s} remedy: {found['remedy']}")
    if any(found["remedy"].startswith("apt-get") for found in report["engines"]):
        print("all packages at once, as root: abyssal sandbox install")


def install(engine: Engines = None) -> None:
    """Install the Debian packages that engines lack, as root; exit 1 if some could not be had."""
    from abyssal.sandbox import packages
    from abyssal.sandbox.errors import Unsupported

    for name in engine or ():
        if name not in packages.NEEDS:
            raise InputError(f"no packages are known for engine {name!r}: choose from {', '.join(packages.NEEDS)}")
    lacking = [name for name in engine or packages.NEEDS if packages.missing(name)]
    if lacking:
        packages.refresh()
    failed = False
    for name in lacking:
        try:
            print(f"{name}: installed {' '.join(packages.install(name)) or 'nothing, another engine had it done'}")
        except Unsupported as error:
            failed = True
            print(f"abyssal: {error}", file=sys.stderr)
    if not lacking:
        print("nothing is missing")
    raise typer.Exit(failed)
