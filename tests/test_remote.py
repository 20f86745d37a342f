"""Addresses in a dataset: refused, unless asked for; then public hosts only, within size and time. Against a server
that misbehaves in each way, on this machine, which the resolver is made to call public."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_video import ramp, write_clip

from config import VideoArgs
from dataset import places, remote
from dataset.places import Places
from model import UserError

PUBLIC = "93.184.215.14"  # an address of example.org; nothing is ever sent there
PRIVATE = """127.0.0.1 127.8.8.8 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1 198.18.0.1
224.0.0.1 240.0.0.1 255.255.255.255 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 ff02::1 ::ffff:127.0.0.1
::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 2002:7f00:1:: 2001:0:7f00:1:: 2001:db8::1""".split()


class Server(BaseHTTPRequestHandler):
    seen: list = []
    clip = b""

    def do_GET(self):
        Server.seen.append((self.headers["Host"], self.path, dict(self.headers)))
        try:
            getattr(self, "send" + self.path.partition("?")[0].replace("/", "_").replace(".", "_"))()
        except (BrokenPipeError, ConnectionResetError):  # we were cut off
            pass

    def head(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send_clip_mp4(self):
        self.head(Content_Length=len(self.clip))
        self.wfile.write(self.clip)

    def send_large(self):
        self.head(Content_Length=10**10)

    def send_endless(self):
        self.head()
        while True:
            self.wfile.write(b"x" * 2**16)

    def send_drip(self):
        self.head(Content_Length=1000)
        for _ in range(1000):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def send_drip_header(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(1000):
            self.wfile.write(b"X-A: b\r\n")
            self.wfile.flush()
            time.sleep(0.05)

    def send_silent(self):
        time.sleep(30)

    def send_cut(self):
        self.head(Content_Length=1000)
        self.wfile.write(b"x" * 500)

    def send_to_private(self):
        self.head(302, Location="http://inside.test:1/secret")

    def send_to_metadata(self):
        self.head(302, Location="http://169.254.169.254/latest/meta-data/")

    def send_to_file(self):
        self.head(302, Location="file:///etc/passwd")

    def send_round(self):
        self.head(302, Location="/round")

    def send_gone(self):
        self.head(404, Content_Length=0)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Its port. Hosts called *.example are public as the resolver has it, and connections to PUBLIC come here."""
    Server.seen = []
    Server.clip = open(write_clip(tmp_path / "served.mp4", ramp(8)), "rb").read()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    names = {"inside.test": ["127.0.0.1"], "both.test": [PUBLIC, "10.0.0.1"]}
    def look_up(host, port, **_):
        found = names.get(host, [PUBLIC] if host.endswith(".example") else [host])
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    def connect(place, timeout):
        assert remote.is_public(place[0]), f"a connection to {place}"  # the one thing that must never happen
        made = socket.socket()
        made.settimeout(timeout)
        made.connect(("127.0.0.1", http.server_port))
        return made

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    yield http.server_port
    http.shutdown()
    http.server_close()


def args(tmp_path, **changes):
    return VideoArgs(allow_remote_files=True, remote_folder=str(tmp_path / "kept"), remote_max_mb=1, **changes)


def refused(tmp_path, path, **changes):
    with pytest.raises(UserError) as caught:
        Places(args(tmp_path, **changes)).locate(path, "sample 3")
    assert not list((tmp_path / "kept").glob("*")) and not list((tmp_path / "kept").glob(".*"))  # nothing left lying
    assert str(caught.value).startswith("sample 3: ") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("address", PRIVATE)
def test_no_private_address_is_public(address):
    assert not remote.is_public(address)


def test_public_addresses_are():
    assert all(map(remote.is_public, ["8.8.8.8", PUBLIC, "2606:4700::1111", "::ffff:8.8.8.8"]))


def test_without_the_flag_nothing_is_fetched(tmp_path, server):
    found = Places(VideoArgs())
    for path in ("http://a.example/clip.mp4", "https://a.example/x", "HTTP://a.example/x", "ftp://a/b"):
        with pytest.raises(UserError, match="is a web address; download it first, or --allow_remote_files True"):
            found.locate(path, "a")
    for path in ("ftp://a.example/x", "s3://a/b", "gopher://a", "concat://a"):
        assert "is a web address" in refused(tmp_path, path)
    assert not Server.seen


def test_a_public_file_is_fetched_once(tmp_path, server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not asked
    found = Places(args(tmp_path))
    path = found.locate("http://a.example/clip.mp4?x=../../y", "a")
    assert open(path, "rb").read() == Server.clip and path.startswith(str(tmp_path / "kept"))
    assert found.locate("http://a.example/clip.mp4?x=../../y", "a") == path and len(Server.seen) == 1
    host, _, headers = Server.seen[0]
    assert host == "a.example" and headers["Accept-Encoding"] == "identity" and "Authorization" not in headers
    with pytest.raises(UserError, match="no file"):  # a name that only looks like one
        found.locate("a.example/clip.mp4", "a")


def test_private_hosts_are_refused_wherever_they_come_up(tmp_path, server):
    assert "inside.test is 127.0.0.1, which is no public address" in refused(tmp_path, "http://inside.test/clip.mp4")
    assert "both.test is 10.0.0.1" in refused(tmp_path, "http://both.test/clip.mp4")
    assert "no public address" in refused(tmp_path, "http://169.254.169.254/latest/meta-data/")
    assert "no public address" in refused(tmp_path, "https://127.0.0.1/clip.mp4")
    assert not Server.seen
    assert "inside.test is 127.0.0.1" in refused(tmp_path, "http://a.example/to_private")
    assert "169.254.169.254" in refused(tmp_path, "http://a.example/to_metadata")
    assert "file:///etc/passwd" in refused(tmp_path, "http://a.example/to_file")
    assert "redirects" in refused(tmp_path, "http://a.example/round")


def test_a_name_that_changes_its_meaning(tmp_path, server, monkeypatch):
    """DNS rebinding: public when looked at, private a moment later. It is looked up once, and that is what is used."""
    answers = iter([PUBLIC, "127.0.0.1", "127.0.0.1"])

    def look_up(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    Places(args(tmp_path)).locate("http://a.example/clip.mp4", "a")  # the fixture asserts where the connection goes
    assert next(answers) == "127.0.0.1"


def test_limits(tmp_path, server):
    assert "10000000000 bytes, above 1048576" in refused(tmp_path, "http://a.example/large")
    assert "more than 1048576 bytes" in refused(tmp_path, "http://a.example/endless")
    assert "500 more expected" in refused(tmp_path, "http://a.example/cut")
    assert "404" in refused(tmp_path, "http://a.example/gone")
    for path in ("drip", "drip_header", "silent"):
        began = time.monotonic()
        told = refused(tmp_path, f"http://a.example/{path}", remote_seconds=0.5)
        assert "longer than 0.5 seconds" in told and time.monotonic() - began < 10


def test_no_addresses_at_all(tmp_path, server):
    for path in ("http://", "http://[::1", "http://a..example/", "http://" + "a" * 300 + ".example/", "https://:80/x"):
        assert "was not fetched" in refused(tmp_path, path)
    assert not places.ADDRESS.match("videos/a:b.mp4")
