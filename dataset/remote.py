"""An http or https address -> a file in remote_folder; only with --allow_remote_files.

A dataset is not trusted, so neither are its addresses: every connection, those of redirects included, goes to an IP
address that was looked up once, found to be public, and is the one connected to. What is too large or too slow is given
up. Proxies, cookies and passwords of the environment are not used.
"""

import hashlib
import ipaddress
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from model import UserError

CONNECT_SECONDS = 10.0
MAX_REDIRECTS = 5
PIECE = 2**16  # bytes
# Networks that Python calls global, but which lead to IPv4 addresses written inside them (RFC 6052, 3056, 4380)
WRAPPED = [ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet: not private, loopback, link-local, reserved or multicast."""
    ip = ipaddress.ip_address(address.partition("%")[0])  # fe80::1%eth0
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast and not any(ip.version == 6 and ip in net for net in WRAPPED)


class Refused(Exception):
    """A host that is not public, or a file above the limits."""


def connect(host: str, port: int, open_sockets: list) -> socket.socket:
    """A connection to a public address of host. Refused when one of its addresses is not public, or none answers."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Refused(f"{host} is not found ({error})") from None
    addresses = [place[0] for *_, place in found]
    for address in addresses:
        if not is_public(address):
            raise Refused(f"{host} is {address}, which is no public address")
    for address in addresses:  # those that were looked at, not the name: it might mean another one by now
        try:
            made = socket.create_connection((address, port), CONNECT_SECONDS)
        except OSError as error:
            why = error
            continue
        open_sockets.append(made.dup())
        return made
    raise Refused(f"{host} does not answer ({why})")


class Public(HTTPAdapter):
    """Connects to public addresses only, and can be cut off from outside. One for each download."""

    def __init__(self):
        self.sockets: list[socket.socket] = []  # each connection once more, to cut it with
        super().__init__()

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, **kwargs)
        sockets = self.sockets

        class Plain(HTTPConnection):
            def _new_conn(self):
                return connect(self.host, self.port, sockets)

        class Secure(HTTPSConnection):
            def _new_conn(self):
                return connect(self.host, self.port, sockets)

        pools = {"http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": Plain})}
        pools["https"] = type("SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": Secure})
        self.poolmanager.pool_classes_by_scheme = pools

    def cut(self):
        for made in self.sockets:
            try:
                made.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other side was quicker
                pass


def fetch(url: str, name: str, args) -> str:
    """The file that url names, downloaded unless it was before. UserError for what is refused or does not come."""
    folder = Path(args.remote_folder)
    path = folder / hashlib.sha256(url.encode()).hexdigest()
    if path.exists():
        return str(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
            try:
                download(url, file, args)
                os.replace(file.name, path)  # several threads or ranks may fetch it: each brings the whole file
            finally:
                Path(file.name).unlink(missing_ok=True)
    except (requests.RequestException, HTTPError, Refused, ValueError) as error:  # ValueError: no address at all
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{name}: {url[:200]} was not fetched: {reason}; download it yourself") from None
    except OSError as error:
        told = f"{name}: {url[:200]}: {folder} cannot be written ({error.strerror})"
        raise UserError(f"{told}; set remote_folder") from None
    return str(path)


def download(url: str, file, args) -> None:
    """Write the file behind url. Raises what requests and urllib3 raise, or Refused."""
    limit, end = args.remote_max_mb * 2**20, time.monotonic() + args.remote_seconds
    adapter = Public()
    timer = threading.Timer(args.remote_seconds, adapter.cut)  # a server may send a byte now and then, also of a header
    timer.daemon = True
    try:
        with requests.Session() as session:
            session.trust_env, session.max_redirects = False, MAX_REDIRECTS
            session.mount("http://", adapter)
            session.mount("https://", adapter)
            timer.start()
            plain = {"Accept-Encoding": "identity"}  # nothing is unpacked
            times = (CONNECT_SECONDS, args.remote_seconds)
            with session.get(url, headers=plain, stream=True, timeout=times) as answer:
                answer.raise_for_status()
                copy(answer, file, limit)
        if time.monotonic() >= end:
            raise Refused(f"it takes longer than {args.remote_seconds:g} seconds (remote_seconds)")
    except (requests.RequestException, HTTPError):
        if time.monotonic() < end:
            raise
        raise Refused(f"it takes longer than {args.remote_seconds:g} seconds (remote_seconds)") from None
    finally:
        timer.cancel()
        for made in adapter.sockets:
            made.close()


def copy(answer, file, limit: int) -> None:
    """The body of an answer; Refused when it has more than limit bytes. urllib3 raises when it breaks off."""
    told, size = answer.headers.get("Content-Length"), 0
    if told is not None and told.isdigit() and int(told) > limit:
        raise Refused(f"it has {told} bytes, above {limit} (remote_max_mb)")
    while piece := answer.raw.read1(PIECE):
        size += len(piece)
        if size > limit:
            raise Refused(f"it has more than {limit} bytes (remote_max_mb)")
        file.write(piece)
    file.flush()
