"""Run the commands that README.md and docs/ show, as they stand there, on a CPU: `make test-docs`.

Fenced bash and python blocks count, lines that begin with "$ " in another one, and the notebooks of examples/.
They run in order in a temporary clone, one page after the other. By rule

    released models   become assets/tiny: the same flags, configs and launchers, the tiny model
    long runs         get the flags of SHORT behind their own
    other programs    (NOT_RUN) and packages that are not installed are not run
    made-up names     (my_clips, my/train.json, clip.mp4, files shown as "# name.py") are made before

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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVALUATION = "--eval_samples 4 --eval_controls 0 --max_new_tokens 8 --save_steps 2"
SHORT = {
    "generate.py": "--num_samples 60 --overwrite",
    "train_sft.py": f"--max_steps 2 --overwrite {EVALUATION}",
    "train_grpo.py": f"--max_steps 1 --overwrite --max_completion_length 8 {EVALUATION}",
    "bench/step.py": "--repeats 1 --prompts 1 --batch 2 --shape 8x56x56+40+8",
    "tests/chaos.py": "--kills 1 --files 3 --minutes 0.1",
}
NOT_RUN = "source pip sbatch vllm hf docker wandb tensorboard bench/learn.py bench/loading.py quickstart.py".split()


def commands(page: Path) -> list[str]:
    """In the order of a page. A notebook is one command: its code cells as one program."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        code = re.sub(r" *\\\n *", " ", "\n".join("".join(cell["source"]) for cell in cells))
        head = f"import subprocess, sys\nsys.path.insert(0, {str(ROOT / 'dev')!r})\nfrom test_docs import adapted\n"
        code = head + re.sub(r"(?m)^!(.*)", r'subprocess.run(adapted(f"\1"), check=True)', code)
        return [f"python -c {shlex.quote(code)}"]
    result = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        if language == "python" and not block.startswith("# "):
            result.append(f"python -c {shlex.quote(block)}")
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            if (language == "bash" and line and not line.startswith("#")) or line.startswith("$ "):
                result.append(re.sub(r"\s+#\s.*", "", line.removeprefix("$ ")).strip())
    return result


def is_run(command: str) -> bool:
    trackers = re.findall(r"--report_to (\S+)", command)
    packages = [package for names in trackers for package in names.split(",")]
    other = set(NOT_RUN) & {word for word in command.split()[:2] if "=" not in word}
    return not other and all(importlib.util.find_spec(package) for package in packages)


def adapted(command: str) -> list[str]:
    """The words of a command as it is run here."""
    released = re.search(r"configs/\d+b_", command)
    command = re.sub(r"Qwen/Qwen2\.5-VL-\w+-Instruct", "assets/tiny", command)
    words = shlex.split(command.replace("make ", "make -n ", 1) if command.startswith("make ") else command)
    script = next((word for word in words if word in SHORT), "")
    words += ["--overwrite"] if "--from_folder" in words else SHORT.get(script, "").split()
    words += ["--model_id", "assets/tiny"] if released else []
    if "merge" in words:  # several pages show it, and it wants a new folder
        shutil.rmtree("output/merged", ignore_errors=True)
    return ["env", *(sys.executable if word == "python" else word for word in words)]


def prepare() -> None:
    """What the pages' made-up names stand for."""
    for page in PAGES:
        for name, text in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            Path(name).write_text(text)
    made = [sys.executable, "generate.py", "--num_samples", "60", "--output_dir", "my", "--split", "0.8"]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    for record in json.loads(Path("my/train.json").read_text()) + json.loads(Path("my/val.json").read_text()):
        video = f"my/videos/{record['video']}"
        for name in (record["meta"]["label"].lower().replace(" ", "_"), "class_name"):
            Path("my_clips", name).mkdir(parents=True, exist_ok=True)
            shutil.copy(video, f"my_clips/{name}")
    for name in ("clip.mp4", "my_clips/class_name/one.mp4"):
        shutil.copy(video, name)


def main() -> int:
    failed, env = 0, os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    with tempfile.TemporaryDirectory(prefix="docs") as scratch:
        subprocess.run(["git", "clone", "-q", ROOT, scratch], check=True)
        os.chdir(scratch)
        prepare()
        for page in [*PAGES, *sorted((ROOT / "examples").glob("*.ipynb"))]:
            for command in commands(page):
                result, began = "not run", time.monotonic()
                if is_run(command):
                    done = subprocess.run(adapted(command), env=env, capture_output=True, text=True)
                    failed += done.returncode != 0
                    result = f"FAILED, {done.returncode}" if done.returncode else f"{time.monotonic() - began:.0f} s"
                    print(f"{done.stdout[-1500:]}{done.stderr[-1500:]}" if done.returncode else "", end="")
                print(f"{page.name:<20} {result:<12} {' '.join(command.split())[:110]}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
