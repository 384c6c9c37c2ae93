"""A dispatcher that measures itself: `DISPATCHER_…=… python -m bench.probe FILE` runs `dispatcher run` until SIGTERM, then writes JSON.

How late the event loop is (a timer each 5 ms, against when it was due), the most memory it had, and the most descriptors. SIGUSR1 begins anew
with the loop's lateness: what a start takes is another matter.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from array import array
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop

from dispatcher import log, main
from dispatcher import settings as settings_module

TICK_S = 0.005
LOOK_S = 0.1  # between counts of descriptors


class Probe:
    def __init__(self) -> None:
        self.lags = array("d")
        self.descriptors_max = 0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: self.lags.__delitem__(slice(None)))
        tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._look())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tick(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            due = now() + TICK_S
            await asyncio.sleep(TICK_S)
            self.lags.append(max(0.0, now() - due))

    async def _look(self) -> None:
        while True:
            self.descriptors_max = max(self.descriptors_max, len(os.listdir("/proc/self/fd")))
            await asyncio.sleep(LOOK_S)

    def figures(self) -> dict[str, float]:
        lags = sorted(self.lags)
        return {
            "lag_p50_ms": lags[len(lags) // 2] * 1e3,
            "lag_p99_ms": lags[int(len(lags) * 0.99)] * 1e3,
            "lag_max_ms": lags[-1] * 1e3,
            "rss_max_mb": _rss_max_mb(),
            "descriptors_max": float(self.descriptors_max),
        }


def _rss_max_mb() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


async def run(out: Path) -> None:
    settings = settings_module.load()
    assert settings.database_url is not None
    log.configure(settings)
    probe = Probe()
    async with probe.watching():
        await main.serve(settings, settings.database_url)
    out.write_text(json.dumps(probe.figures()))


if __name__ == "__main__":
    uvloop.run(run(Path(sys.argv[1])))
