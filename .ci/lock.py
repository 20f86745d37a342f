"""Write the lock files from requirements.txt and requirements-dev.txt: `make lock`, after a version there was changed.

    requirements.lock          what runs, and what that brings, with the SHA-256 of every file of each version
    requirements-dev.lock      what `make test` needs beside it, likewise
    requirements-torch.lock    torch and what its CUDA build brings, without hashes: the CPU and the CUDA build of one
                               version are different files. Read as constraints: the CPU build brings none of the rest.

uv resolves once for Linux and macOS, Python 3.11 and newer.
"""

import re
import subprocess
import sys
from pathlib import Path

TORCHS = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
COMPILE = ["-m", "uv", "pip", "compile", "--universal", "--python-version", "3.11", "--generate-hashes", "--no-header"]
COMPILE += ["--no-annotate", "--no-emit-index-url", "--quiet"]


def resolve(source):
    """{package and version: its block of text, with a line a hash} of what a file of requirements comes to."""
    text = subprocess.run([sys.executable, *COMPILE, source], check=True, capture_output=True, text=True).stdout
    return {block.split()[0]: block for block in re.findall(r"^\S.*(?:\n .*)*\n", text, re.M)}


def write(name, source, blocks):
    Path(name).write_text(f"# Written by make lock from {source}; not edited by hand.\n" + "".join(blocks))
    print(f"{name}: {len(blocks)} packages")


runs, everything = resolve("requirements.txt"), resolve("requirements-dev.txt")
torchs = [name for name in everything if TORCHS.match(name)]
rest = {name: block for name, block in everything.items() if name not in torchs}
write("requirements.lock", "requirements.txt", [block for name, block in rest.items() if name in runs])
write("requirements-dev.lock", "requirements-dev.txt", [block for name, block in rest.items() if name not in runs])
write("requirements-torch.lock", "requirements.txt", [everything[name].split(" \\\n")[0] + "\n" for name in torchs])
