"""How far one training step leads through the files: python dev/walk.py sft|grpo [--fast]

Prints the functions of this repository in the order in which step 2 of a short run on a CPU first enters them in the
main thread, a line for each jump into another file, and counts. The model takes the plain forms of its operations;
--fast: those that it takes on a CPU otherwise.
"""

import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FLAGS = ["--max_steps", "3", "--eval_data_path", "none", "--overwrite"]
GROUPS = ["--model_ckpt", "none", "--per_device_train_batch_size", "16", "--num_generations", "4"]


def visits(calls: list) -> list[tuple[str, list[str]]]:
    """[(file, function)] as entered -> [(file, its functions)], each function once, a new entry at every jump."""
    walk, seen = [], set()
    for file, function in calls:
        if (file, function) not in seen:
            seen.add((file, function))
            if not walk or walk[-1][0] != file:
                walk.append((file, []))
            walk[-1][1].append(function)
    return walk


def main() -> None:
    import generate
    import model.ops
    import trainer

    if "--fast" not in sys.argv:
        model.ops.fast_forms = lambda tensor: {}
    kind, calls, main_thread = sys.argv[1], [], threading.get_ident()
    loop = __import__(f"train_{kind}")

    def profile(frame, event, _):
        path, name = frame.f_code.co_filename, frame.f_code.co_qualname.split(".<locals>.<")[0]
        ours = path.startswith(f"{ROOT}/") and "/.venv/" not in path and path != __file__ and not name.startswith("<")
        if event == "call" and ours and threading.get_ident() == main_thread:
            calls.append((path[len(str(ROOT)) + 1 :], name))

    step, steps = trainer.Log.step, []

    def log_step(*args, **kwargs):
        result = step(*args, **kwargs)
        steps.append(None)
        sys.setprofile(profile if len(steps) == 1 else None)
        return result

    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["generate.py", "--output_dir", f"{folder}/data", "--num_samples", "60"]
        generate.main()
        data = ["--data_path", f"{folder}/data/train.json", "--output_dir", f"{folder}/run"]
        sys.argv = [f"train_{kind}.py", *FLAGS, *data, *(GROUPS if kind == "grpo" else [])]
        trainer.Log.step = log_step
        loop.main()
    walk = visits(calls)
    for file, functions in walk:
        print(f"{file}: {', '.join(functions)}")
    count = sum(len(functions) for _, functions in walk)
    print(f"{kind}: {count} functions in {len({file for file, _ in walk})} files, {len(walk) - 1} jumps")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("sft", "grpo"):
        sys.exit(__doc__)
    main()
