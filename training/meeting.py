"""The ranks of a run find each other, and agree on what they are about to do.

    @together                    around a script's main(): meets before anything is read, ends when another rank does
    join()                       the meeting; None for a process that is alone
    first(what, do)              do() on rank 0 alone; where it is a user's mistake, all end
    check_equal(what, must)      one line that names the rank and machine where something is not as on rank 0

The launcher says who is who (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: deepspeed, torchrun, configs/slurm.sh). Ranks
meet in torch's TCPStore, which the process group then uses too.
"""

import json
import os
import socket
import sys
import time
from datetime import timedelta
from functools import cache, wraps
from typing import NamedTuple

from torch.distributed import DistError, DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from model import UserError
from training import heartbeat
from training.heartbeat import Head, Heart, Limb

JOIN = 600.0  # seconds to wait for all ranks: machines are also started by hand
TOLD = 30.0  # seconds after which, and again each so many, it is told who is missing
READ = 5.0  # seconds that rank 0 waits for the others to have read why the run ends


class Meeting(NamedTuple):
    rank: int
    store: Store  # the process group's
    notes: Store  # a part of it for us
    hosts: list  # name of each rank's machine
    heart: Heart

    def leave(self, good_bye):
        self.heart.leave(good_bye)
        join.cache_clear()


def together(main):
    """main() with the other ranks: once one has ended, so does this one, in one line."""

    @wraps(main)
    def among_others():
        met = join()
        try:
            result = main()
            if met:
                met.leave(good_bye=True)
            return result
        except UserError as error:
            if met and said_already(met, str(error)):
                raise SystemExit(2) from None
            raise
        except RuntimeError as error:
            lost = isinstance(error, DistError) or "gloo/transport" in str(error)
            if met and lost:  # the heart ends this process as soon as it knows the reason
                met.heart.left.wait(heartbeat.GRACE + 8 * heartbeat.POLL)
            raise
        finally:
            if met:
                met.leave(good_bye=False)  # nothing, where main came to its end

    return among_others


def said_already(met, error):
    """Whether another rank of this machine has ended with the same line."""
    try:
        return met.notes.add(f"said on {met.hosts[met.rank]}: {error}", 1) > 1
    except DistError:  # rank 0 is gone
        return False


@cache
def join():
    """Meet all other ranks. UserError that says who did not come, or who came twice."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return None
    rank, host = int(os.environ["RANK"]), socket.gethostname()
    store = open_store(rank, host)
    notes = PrefixStore(f"meeting {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    if notes.add(f"taken {rank}", 1) > 1:
        told = f"found a second one, on {host}, expected another rank"
        raise UserError(f"rank {rank}: {told}; each machine needs its own --node_rank")
    notes.set(f"rank {rank}", json.dumps([host, world]))
    return head(store, notes, world) if rank == 0 else limb(store, notes, rank)


def open_store(rank, host):
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun may have opened it
    if rank == 0:
        heartbeat.make_room(int(os.environ["WORLD_SIZE"]))
    try:
        return TCPStore(address, port, None, opens, timedelta(seconds=JOIN), wait_for_workers=False)
    except DistNetworkError as error:
        if opens:
            why = "taken" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
            told = f"--master_port: found {port} of {host} {why}, expected a free one; choose another"
            raise UserError(f"{told}, or is there a second machine with --node_rank 0?") from None
        told = f"--master_addr: rank {rank} on {host} found nobody at {address}, port {port}, in {JOIN:.0f} s"
        raise UserError(f"{told}; expected rank 0 there: is it started, is the port open?") from None


def head(store, notes, world):
    """Rank 0: wait for all, tell them where its heart is."""
    heart = None
    try:
        hosts = come(notes, world)
        heart = Head(hosts)
        notes.set("met", json.dumps({"hosts": hosts, "port": heart.port, "token": heart.token}))
    except UserError as error:
        notes.set("met", json.dumps({"error": str(error)}))
        await_readers(notes, "met", world)
        raise
    heart.admit()
    return Meeting(0, store, notes, hosts, heart)


def come(notes, world):
    """Names of all ranks' machines, once all are there."""
    missing, began, told = set(range(world)), time.monotonic(), TOLD
    while missing := {rank for rank in missing if not notes.check([f"rank {rank}"])}:
        waited, ranks = time.monotonic() - began, ", ".join(map(str, sorted(missing)[:8]))
        who = f"{len(missing)} of {world} ranks ({ranks}{', …' if len(missing) > 8 else ''})"
        if waited > JOIN:
            told = f"ranks: {who} did not come in {JOIN:.0f} s"
            raise UserError(f"{told}; is every machine started with this --master_addr, and are its ports open?")
        if waited > told:
            print(f"waiting for {who} to start", file=sys.stderr, flush=True)
            told += TOLD
        time.sleep(0.02)
    found = [json.loads(value) for value in notes.multi_get([f"rank {rank}" for rank in range(world)])]
    for rank, (host, theirs) in enumerate(found):
        if theirs != world:
            told = f"found {theirs} on rank {rank} ({host}) and {world} on rank 0 ({found[0][0]})"
            raise UserError(f"number of ranks: {told}; every machine needs the same hostfile")
    return [host for host, _ in found]


def await_readers(notes, what, world):
    """Rank 0, before it ends, and the store with it."""
    end = time.monotonic() + READ
    while notes.add(f"{what} read", 0) < world - 1 and time.monotonic() < end:
        time.sleep(0.02)


def limb(store, notes, rank):
    try:
        met = json.loads(notes.get("met"))
    except (DistNetworkError, DistStoreError):
        raise UserError("rank 0 ended, or did not meet all; see what it wrote") from None
    if "error" in met:
        notes.add("met read", 1)
        raise UserError(met["error"])
    try:
        heart = Limb(met["hosts"], rank, os.environ["MASTER_ADDR"], met["port"], met["token"])
    except OSError as error:
        place = f"{os.environ['MASTER_ADDR']}, port {met['port']}"
        told = f"rank {rank} on {met['hosts'][rank]} found no way to rank 0 at {place} ({error})"
        raise UserError(f"{told}; the machines of a run reach each other on every port") from None
    return Meeting(rank, store, notes, met["hosts"], heart)


def first(what, do):
    """do() on rank 0, before the others go on: its result there, None on them. Its UserError ends all of them."""
    met = join()
    if met is None:
        return do()
    if met.rank:
        if error := json.loads(met.notes.get(what)):
            met.notes.add(f"{what} read", 1)
            end_with(error)
        return None
    try:
        result = do()
    except UserError as error:
        met.notes.set(what, json.dumps(str(error)))
        await_readers(met.notes, what, len(met.hosts))
        raise
    met.notes.set(what, "null")
    return result


# Equal?


def check_equal(what, must, may=()):
    """Compare with the other ranks. must, may: {name: JSON} of this rank; every rank calls it, `what` is new each time.

    UserError where one of `must` differs, on one rank of each machine; returns lines on what of `may` does.
    """
    met = join()
    if met is None:
        return []
    met.notes.set(f"{what} {met.rank}", json.dumps([must, dict(may)]))
    if met.rank == 0:
        keys = [f"{what} {rank}" for rank in range(len(met.hosts))]
        met.notes.wait(keys, timedelta(seconds=JOIN))
        met.notes.set(what, json.dumps(compare([json.loads(value) for value in met.notes.multi_get(keys)], met.hosts)))
    wrong, notes = json.loads(met.notes.get(what))
    if wrong and met.rank == 0:
        await_readers(met.notes, what, len(met.hosts))
    elif wrong:
        met.notes.add(f"{what} read", 1)
    if wrong:
        end_with(wrong)
    return notes


def end_with(error):
    """UserError on one rank of each machine: one line there is enough."""
    if os.environ["LOCAL_RANK"] != "0":
        raise SystemExit(2)
    raise UserError(error)


def compare(ranks, hosts):
    """ranks: [(must, may)] of each. (the first thing that differs and must not, or None; lines on the others)"""
    wrong, notes = None, {}
    for rank, sides in enumerate(ranks):
        for side, (mine, theirs) in enumerate(zip(ranks[0], sides, strict=True)):
            for name in [key for key in mine | theirs if mine.get(key) != theirs.get(key)]:
                found = f"{theirs.get(name)} on rank {rank} ({hosts[rank]}), {mine.get(name)} on rank 0 ({hosts[0]})"
                if side == 0:
                    wrong = wrong or f"{name}: found {found}; expected the same on every machine"
                else:
                    notes.setdefault((name, hosts[rank]), f"{name}: {found}")
    return wrong, list(notes.values())
