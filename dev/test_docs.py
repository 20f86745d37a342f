"""Run the commands that README.md and docs/ show, as they stand there, on a CPU: `make test-docs`.

Every fenced bash block counts, and every line that begins with "$ " in another one; where the docs show an error after
it, that error is expected. They run in order in a temporary clone, one page after the other. By rule

    released models   become assets/tiny: the same flags, configs and launchers, the tiny model
    long runs         get the flags of SHORT behind their own
    other programs    (OTHER) and packages that are not installed are not run; the table says why
    made-up names     (my_clips, my/train.json, clip.mp4, files shown as "# name.py") are made before

docs/migrating.md's names are typed by tests/test_config.py, which is run. Other python blocks are run as they stand,
and last the notebooks of examples/: their cells in order, !commands by the same rules.

Exit code 1 if any command failed.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*.ipynb"))
EVALUATION = "--eval_samples 4 --eval_controls 0 --max_new_tokens 8 --save_steps 2"
SHORT = {
    "generate.py": "--num_samples 60 --overwrite",
    "train_sft.py": f"--max_steps 2 --overwrite {EVALUATION}",
    "train_grpo.py": f"--max_steps 1 --overwrite --max_completion_length 8 {EVALUATION}",
    "bench/step.py": "--repeats 1 --prompts 1 --batch 2 --shape 8x56x56+40+8",
    "tests/chaos.py": "--kills 1 --files 3 --minutes 0.1",
}
OTHER = ("source", "pip", "sbatch", "vllm", "hf", "docker", "wandb", "tensorboard")
LONG = {"bench/learn.py": "many minutes", "bench/loading.py": "minutes", "quickstart.py": "minutes: make quickstart"}


def commands(page: str):
    """(command, the error shown after it or "") in the order of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == "docs/migrating.md":  # its text is written from the tables that the test walks
        yield "python -m pytest -q tests/test_config.py -k other_trainers", ""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        if language == "python" and not block.startswith("# "):
            yield f"python -c {shlex.quote(block)}", ""
        lines = re.sub(r" *\\\n *", " ", block).splitlines()
        for line, after in zip(lines, [*lines[1:], ""]):
            if language == "bash" or line.startswith("$ "):
                command = re.sub(r"\s+#\s.*", "", line.removeprefix("$ ")).strip()
                if command and not command.startswith("#"):
                    yield command, after if after.startswith("error: ") else ""


def notebook(path: str) -> str:
    """The code cells of a notebook as one program."""
    cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    head = f"import subprocess, sys\nsys.path.insert(0, {str(ROOT / 'dev')!r})\nfrom test_docs import adapted\n"
    code = re.sub(r" *\\\n *", " ", code)
    return head + re.sub(r"(?m)^!(.*)", r'subprocess.run(adapted(f"\1"), check=True)', code)


def why_not(command: str) -> str:
    """Why a command is not run here; "" if it is."""
    program = next(word for word in command.split() if "=" not in word)
    if program in OTHER:
        return "another program"
    for script, reason in LONG.items():
        if script in command:
            return reason
    for tracker in re.findall(r"--report_to (\S+)", command):
        for package in tracker.split(","):
            if not importlib.util.find_spec(package):
                return f"{package} is not installed"
    return ""


def adapted(command: str) -> list[str]:
    """The words of a command as it is run here."""
    if command.startswith("make "):
        return shlex.split(command.replace("make ", "make -n ", 1))
    released = re.search(r"configs/\d+b_", command)
    command = re.sub(r"Qwen/Qwen2\.5-VL-\w+-Instruct", "assets/tiny", command)
    words = shlex.split(command)
    script = next((word for word in words if word.endswith(".py")), "")
    if not (script == "generate.py" and "--from_folder" in words):
        words += SHORT.get(script, "").split()
    else:
        words += ["--overwrite"]
    words += ["--model_id", "assets/tiny"] if released else []
    return [sys.executable if word == "python" else word for word in words]


def prepare(folder: Path) -> None:
    """What the pages' made-up names stand for."""
    for page in PAGES:
        for name, text in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", (ROOT / page).read_text(), re.S):
            (folder / name).write_text(text)
    made = [sys.executable, "generate.py", "--num_samples", "60", "--output_dir", "my", "--split", "0.8"]
    subprocess.run(made, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    records = json.loads((folder / "my/train.json").read_text()) + json.loads((folder / "my/val.json").read_text())
    for record in records:
        label = record["meta"]["label"].lower().replace(" ", "_")
        for name in (label, "class_name"):
            (folder / "my_clips" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "my/videos" / record["video"], folder / "my_clips" / name)
    for name in ("clip.mp4", "my_clips/class_name/one.mp4"):
        shutil.copy(folder / "my/videos" / records[0]["video"], folder / name)


def main() -> int:
    failed, env = 0, os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    with tempfile.TemporaryDirectory(prefix="docs") as scratch:
        folder = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        prepare(folder)
        for page in [*PAGES, *NOTEBOOKS]:
            program = [(f"python -c {shlex.quote(notebook(page))}", "")] if page in NOTEBOOKS else commands(page)
            for command, error in program:
                result, began = why_not(command), time.monotonic()
                if "package is not installed" in error:
                    result, error = ("", error) if result else ("the package is installed here", "")
                if "lora.py merge" in command:  # several pages show it, and it wants a new folder
                    shutil.rmtree(folder / "output/merged", ignore_errors=True)
                if not result or error:
                    words = adapted(command)
                    assignments = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
                    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
                    done = subprocess.run(words, cwd=folder, env=env | assignments, capture_output=True, text=True)
                    right = done.returncode == (2 if error else 0) and error in done.stdout + done.stderr
                    failed += not right
                    result = f"{time.monotonic() - began:.0f} s" if right else f"FAILED, exit code {done.returncode}"
                    if not right:
                        print(f"{done.stdout[-1500:]}{done.stderr[-1500:]}\nran: {shlex.join(words)}")
                print(f"{page:<20} {result:<32} {' '.join(command.split())[:110]}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
