"""What heartbeats cost rank 0: its end of a run of many ranks, the others' beats sent by one process.

python bench/heartbeat.py 1024
"""

import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.heartbeat import BEAT, TICK, Head, make_room

SECONDS = 20.0


def others(port: int, token: str, world: int) -> None:
    """All other ranks: each sends its beat every BEAT seconds, spread evenly, and reads the answer."""
    lines = []
    for rank in range(1, world):
        lines.append(socket.create_connection(("127.0.0.1", port)))
        lines[-1].sendall(f"{token}{rank:032}".encode())
    began, beats = time.monotonic(), 0
    while time.monotonic() < began + SECONDS + 5:
        due = int((time.monotonic() - began) / BEAT * len(lines))
        for number in range(beats, due):
            lines[number % len(lines)].sendall(TICK)
        beats = due
        time.sleep(0.05)
    os._exit(0)


def main() -> None:
    world = int(sys.argv[1])
    make_room(world)
    head = Head(["here"] * world)
    if os.fork() == 0:
        others(head.port, head.token, world)
    began = time.monotonic()
    head.admit()
    admitted = time.monotonic() - began
    time.sleep(1)
    began, before = time.monotonic(), time.process_time()
    time.sleep(SECONDS)
    share = (time.process_time() - before) / (time.monotonic() - began)
    silent = max(time.monotonic() - heard for heard in head.heard.values())
    told = f"{share:.2%} of a core for {world / BEAT:.0f} beats a second, longest silence {silent:.1f} s"
    print(f"{world} ranks: connected in {admitted:.2f} s; {told}")
    os._exit(0)


if __name__ == "__main__":
    main()
