"""A process that writes a log as fast as it can and says which records are durable; tests kill it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from abyssal.sandbox.log.writer import Log


async def main(folder: Path) -> None:
    log = Log(folder, "box")

    async def one(number: int) -> None:
        count = 0
        while True:
            record = await log.append("op.intent", op_id=f"{number}/{count}", req={"text": "x" * (count * 37 % 3000)})
            sys.stdout.write(f"{record.seq} {record.hash}\n")
            sys.stdout.flush()
            count += 1

    await asyncio.gather(*(one(number) for number in range(4)))


asyncio.run(main(Path(sys.argv[1])))
