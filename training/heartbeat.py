"""No rank waits for one that is gone: heartbeats between the processes of a run, on one machine or several.

Every rank holds a connection to rank 0, sends it a byte every BEAT seconds and gets one back. Rank 0 finds out

    a process that ended      at once: its connection is closed, and it has not said good-bye
    a machine that is lost    after SILENCE: nothing comes any more; so also a rank that is stopped (SIGSTOP)

and tells all others, which find out of rank 0 alike. Each then ends with one line and exit code LOST: from this thread,
for the main one may wait in a collective for good. Nothing is lost by it, a checkpoint is whole or absent.

What does not end a run: a main thread that decodes, computes or writes for minutes, since this one beats beside it; C
code that keeps Python's lock for less than SILENCE; all ranks suspended together, since a pause of this thread's own is
not held against the others. One machine of several that is suspended for longer than SILENCE ends the run.

Each beat costs rank 0 one read and one write: at 1,024 ranks 0.3 % of a core (bench/heartbeat.py).

The process group's own store would not do: its client waits for an answer without a limit (torch 2.13, TCPStore.check
of a server that is stopped), and nobody learns from it who has hung up.
"""

import os
import resource
import secrets
import selectors
import socket
import sys
import threading
import time

from model import UserError

BEAT, SILENCE, POLL = 5.0, 40.0, 0.5  # seconds between beats; without any until a rank counts as lost; between looks
GRACE = 1.0  # seconds in which ranks that end together, for a reason they all know, do so by themselves
CONNECT = 30.0  # seconds in which all ranks, which have met, must have connected
LOST = 75  # exit code: EX_TEMPFAIL of sysexits.h, "the user is invited to retry"
GOOD_BYE, TICK = b"!", b"."
AFTER = "the run ends; --resume goes on from the last checkpoint, with fewer ranks too"


def named(ranks, hosts):
    """[4, 5] -> "ranks 4, 5 on b": of one machine, the first of them that lost one."""
    first = hosts[min(ranks)]
    same = sorted(rank for rank in ranks if hosts[rank] == first)
    more = f", and {len(ranks) - len(same)} on other machines" if len(ranks) > len(same) else ""
    return f"rank{'s' * (len(same) > 1)} {', '.join(map(str, same))} on {first}{more}"


class Heart(threading.Thread):
    """What both ends share. hosts: name of each rank's machine."""

    def __init__(self, hosts):
        super().__init__(name="heartbeat", daemon=True)
        self.hosts, self.left, self.heard, self.gone = hosts, threading.Event(), {}, {}

    def run(self):
        looked = time.monotonic()
        while not self.left.wait(POLL):
            now = time.monotonic()
            if now - looked > POLL + BEAT:  # this process stood still itself
                self.heard = {rank: heard + now - looked for rank, heard in self.heard.items()}
            looked = now
            self.listen(now)
            if text := self.verdict(now):
                self.end(text)

    def verdict(self, now):
        """What to tell when a rank is lost, else None. heard: {rank: when it was last}, gone: {rank: when it hung up}
        of those that this rank listens to."""
        if self.gone and now - min(self.gone.values()) > GRACE:
            return f"{named(self.gone, self.hosts)} ended before the others; {AFTER}"
        silent = {rank: now - heard for rank, heard in self.heard.items() if now - heard > SILENCE}
        if silent:
            return f"nothing was heard of {named(silent, self.hosts)} for {max(silent.values()):.0f} s; {AFTER}"
        return None

    def end(self, text):
        """This process. Not by way of Python's streams: the main thread may hold their locks for good."""
        late = threading.Timer(5, os._exit, [LOST])  # where stderr is a pipe that nobody reads
        late.daemon = True
        late.start()
        self.pass_on(text)
        os.write(2, f"{chr(10) * sys.stdout.isatty()}{text}\n".encode())
        os._exit(LOST)

    def leave(self, good_bye):
        """Beat no more. good_bye: it is the end of the run; else the others end too."""
        if not self.left.is_set():
            self.left.set()
            self.join()
            self.hang_up(good_bye)


def receive(connection):
    """Bytes that came; b"" where the other end has hung up, None where nothing came."""
    try:
        return connection.recv(4096)
    except BlockingIOError:
        return None
    except OSError:  # reset, unreachable
        return b""


def send(connection, data):
    try:
        connection.send(data)
    except OSError:  # receive() will tell, or silence
        pass


def make_room(world):
    """Let rank 0 hold as many connections as the store, heartbeats and collectives of so many ranks may need; a shell's
    usual limit is 1,024 files."""
    enough = 4 * world + 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < enough:
        most = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


class Head(Heart):
    """Rank 0's. A port of its own, open until all have connected who know the token."""

    def __init__(self, hosts):
        super().__init__(hosts)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self.server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=len(hosts))
        self.port, self.token = self.server.getsockname()[1], secrets.token_hex(16)
        self.selector = selectors.DefaultSelector()

    def admit(self):
        """Wait for all to connect, then begin."""
        missing, began = set(range(1, len(self.hosts))), time.monotonic()
        while missing:
            try:
                self.server.settimeout(max(0.1, began + CONNECT - time.monotonic()))
                connection, _ = self.server.accept()
                connection.settimeout(2)
                hello = connection.recv(64).decode("ascii", "replace")
            except TimeoutError:
                if time.monotonic() < began + CONNECT:
                    continue  # a stranger
                raise UserError(f"{named(missing, self.hosts)} came and went again; see what it wrote") from None
            except OSError:
                continue
            rank = int(hello[32:]) if len(hello) == 64 and hello[:32] == self.token else 0
            if rank in missing:
                missing.remove(rank)
                connection.setblocking(False)
                self.selector.register(connection, selectors.EVENT_READ, rank)
                self.heard[rank] = time.monotonic()
            else:
                connection.close()
        self.server.close()
        self.start()

    def listen(self, now):
        for key, _ in self.selector.select(0):
            data = receive(key.fileobj)
            if data and not data.endswith(GOOD_BYE):
                self.heard[key.data] = now
                send(key.fileobj, TICK)
            elif data is not None:
                self.selector.unregister(key.fileobj)
                key.fileobj.close()
                del self.heard[key.data]
                if not data:
                    self.gone[key.data] = now

    def pass_on(self, text):
        """Tell all, and wait until they have read it: what is unread is lost where a process ends."""
        for key in list(self.selector.get_map().values()):
            send(key.fileobj, text.encode())
        end = time.monotonic() + 2
        while self.selector.get_map() and time.monotonic() < end:
            self.listen(time.monotonic())
            time.sleep(0.01)

    def hang_up(self, good_bye):
        """At the end of a run wait for all to say good-bye: they may still need this process."""
        while good_bye and self.selector.get_map() and not self.verdict(time.monotonic()):
            self.listen(time.monotonic())
            time.sleep(0.01)
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()


class Limb(Heart):
    """Any other rank's."""

    def __init__(self, hosts, rank, address, port, token):
        super().__init__(hosts)
        self.connection = socket.create_connection((address, port), CONNECT)
        self.connection.sendall(f"{token}{rank:032}".encode())
        self.connection.setblocking(False)
        self.heard, self.beaten = {0: time.monotonic()}, 0.0
        self.start()

    def listen(self, now):
        if now - self.beaten >= BEAT:
            send(self.connection, TICK)
            self.beaten = now
        data = receive(self.connection)
        if data == b"":
            self.gone.setdefault(0, now)
        elif data and (text := data.strip(TICK)):
            self.end(text.decode())
        elif data:
            self.heard[0] = now

    def pass_on(self, text):
        pass

    def hang_up(self, good_bye):
        if good_bye:
            send(self.connection, GOOD_BYE)
            self.connection.settimeout(2 * POLL)  # until it is heard, for what is unread may get lost by closing
            while receive(self.connection):
                pass
        self.connection.close()
