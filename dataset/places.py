"""Where the files lie that a record names. A dataset is not trusted: its names do not lead out of the user's folders.

    a relative name   in image_folder, or else in videos/ beside the dataset, then beside the dataset; then from here
    any name          must end, links followed, within one of these folders, unless allow_outside_files
    data:…;base64,…   is the file itself
    an address        is refused, unless allow_remote_files: dataset/remote.py fetches it
"""

import base64
import os
import re
import tempfile
import threading
from hashlib import blake2b
from pathlib import Path

from dataset.batch import Vanished
from dataset.remote import fetch
from model import UserError

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def media_folders(args) -> list[str]:
    """Where relative names of clips are looked up: image_folder, or else the dataset's videos/ and its own folder."""
    if args.image_folder:
        return [args.image_folder, ""]
    paths = [getattr(args, name, None) for name in ("data_path", "eval_data_path")]
    parents = list(dict.fromkeys(Path(path).parent for path in paths if path))
    return [str(folder) for parent in parents for folder in (parent / "videos", parent)] + [""]


class InlineFiles:
    """Clips that stand inside their records as data:…;base64,… addresses, as files; gone when the process ends."""

    def __init__(self):
        self.folder, self.lock = None, threading.Lock()

    def file(self, address: str, where: str) -> str:
        """The file with the bytes of `address`, written once however often it is asked for."""
        head, _, text = address.partition(",")
        suffix = re.sub(r"\W", "", head.partition("/")[2].partition(";")[0])
        name = f"{blake2b(address.encode(), digest_size=16).hexdigest()}.{suffix}"
        with self.lock:  # threads share the folder
            self.folder = self.folder or tempfile.TemporaryDirectory(prefix="inline_clips_")
            path = Path(self.folder.name) / name
            if not path.exists():
                try:
                    path.write_bytes(base64.b64decode(text, validate=True))
                except ValueError as error:
                    message = f"{where}: {address[:40]}… is not base64 ({error})"
                    raise UserError(f"{message}; encode the file again") from None
        return str(path)


inline = InlineFiles()


class Places:
    """args: a config.VideoArgs. Threads may share it."""

    def __init__(self, args):
        self.args, self.folders = args, media_folders(args)
        self.there = [folder for folder in self.folders if folder and os.path.isdir(folder)]
        self.roots = [os.path.realpath(folder) for folder in self.folders]
        self.inside: set[str] = set()  # found to lie within the folders; at most as many as names were asked for
        if getattr(args, "video", None):  # of infer.py: the file on the command line is the user's own choice
            self.allow(args.video)

    def allow(self, path: str) -> None:
        """This file, or all in this folder, may be read."""
        self.roots.append(os.path.realpath(path))

    def locate(self, path: str, name: str) -> str:
        """The file that record `name` means by path. UserError when there is none, or it may not be read."""
        if path.startswith("data:"):
            return inline.file(path, name)
        if address := ADDRESS.match(path):
            if address[1].lower() not in ("http", "https") or not self.args.allow_remote_files:
                can = "--allow_remote_files True fetches http and https"
                raise UserError(f"{name}: {path[:200]} is a web address; download it first, or {can}")
            return fetch(path, name, self.args)
        tried = [os.path.join(folder, path) for folder in self.folders]  # join keeps an absolute path as it is
        for candidate in tried:
            if os.path.exists(candidate):
                self.check(candidate, name)
                return candidate
        gone = [folder for folder in self.there if not os.path.isdir(folder)]
        if gone:
            told = f"{gone[0]}: this folder of clips was there at the start and is gone"
            raise Vanished(f"{told}; bring it back (is a disk mounted?), then --resume from the last checkpoint")
        raise UserError(f"{name}: no file {path}; looked for {', '.join(dict.fromkeys(tried))}; check image_folder")

    def check(self, path: str, name: str) -> None:
        """UserError when a file lies outside the folders."""
        if path in self.inside or self.args.allow_outside_files:
            return
        real = os.path.realpath(path)
        if not any(os.path.commonpath([real, root]) == root for root in self.roots):
            to = "" if real == os.path.abspath(path) else f" leads to {real}, which"
            told = f"{name}: {path}{to} lies outside {self.folders[0] or 'the current folder'}"
            raise UserError(f"{told}; set image_folder to a folder that holds it, or --allow_outside_files True")
        self.inside.add(path)
