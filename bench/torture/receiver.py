"""A receiver that writes down every request before it answers: `python -m bench.torture.receiver PORT FILE`.

One line a request: time, path, number of the event, attempt, status that it is given, whether the signature is right. A line is one write()
without a buffer, so that a kill -9 loses none of what was answered. How a path behaves is told by its last word.
"""

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import uvloop

from bench.rig import SECRET
from dispatcher.sink import Behaviour, Received, Sink

BEHAVIOURS = {
    "flaky": Behaviour(delay_s=0.002, fail_rate=0.1),
    "slow": Behaviour(delay_s=0.05, delay_jitter_s=0.2),
    "rejecting": Behaviour(fail_rate=0.3, fail_status=400),
}
NUMBER = re.compile(rb'"number":(\d+)')


async def receive(port: int, path: Path) -> None:
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(got: Received) -> None:
        number = NUMBER.search(got.body)
        words = (
            f"{got.received_at:.6f}", got.path, "0" if number is None else number[1].decode(), got.attempt or 0, got.status or 0,
            int(bool(got.signature_ok)),
        )  # fmt: skip
        os.write(out, (" ".join(map(str, words)) + "\n").encode())

    sink = Sink(secrets=SECRET, on_event=note)
    for kind, behaviour in BEHAVIOURS.items():
        for n in range(10):
            sink.set_behaviour(f"/{n}/{kind}", behaviour)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await sink.start(port=port)
    await ended.wait()
    await sink.stop()


if __name__ == "__main__":
    uvloop.run(receive(int(sys.argv[1]), Path(sys.argv[2])))
