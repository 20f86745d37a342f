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
HEAD = "# Written by make lock from {source}; not edited by hand.\n"


def resolve(source):
    """The blocks of text, a package each (its version, then a line a hash), that a file of requirements comes to."""
    found = subprocess.run([sys.executable, *COMPILE, source], check=True, capture_output=True, text=True).stdout
    return re.findall(r"^\S.*(?:\n .*)*\n", found, re.M)


def main():
    everything = resolve("requirements-dev.txt")
    runs = {re.match(r"\S+", block)[0] for block in resolve("requirements.txt")}
    torchs = [block for block in everything if TORCHS.match(block)]
    rest = [block for block in everything if block not in torchs]
    first = [block for block in rest if re.match(r"\S+", block)[0] in runs]
    files = {"requirements.lock": first, "requirements-dev.lock": [block for block in rest if block not in first]}
    files["requirements-torch.lock"] = [block.split(" \\\n")[0] + "\n" for block in torchs]
    for name, blocks in files.items():
        source = "requirements-dev.txt" if "dev" in name else "requirements.txt"
        Path(name).write_text(HEAD.format(source=source) + "".join(blocks), encoding="utf-8")
        print(f"{name}: {len(blocks)} packages")


if __name__ == "__main__":
    main()
