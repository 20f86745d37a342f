"""How far one training step leads through the files: python dev/walk.py sft|grpo

Prints the functions of this repository in the order in which step 2 of a short run on a CPU first enters them in the
main thread, a line for each jump into another file, and counts. The model takes the plain forms of its operations.
"""

import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FLAGS = ["--max_steps", "3", "--eval_data_path", "none", "--dataloader_num_workers", "1"]
GROUPS = ["--model_ckpt", "none", "--per_device_train_batch_size", "16", "--num_generations", "4"]


def main(kind: str) -> None:
    import generate
    import model.ops
    import trainer

    model.ops.FAST = False
    loop, step, steps, walk, seen = __import__(f"train_{kind}"), trainer.Log.step, [], [], set()

    def enter(frame, event, _):
        path, name = frame.f_code.co_filename, frame.f_code.co_qualname.split(".<locals>.<")[0]
        ours = path.startswith(f"{ROOT}/") and "/.venv/" not in path and path != __file__ and not name.startswith("<")
        first = event == "call" and ours and (path, name) not in seen
        if first and threading.current_thread() is threading.main_thread():
            seen.add((path, name))
            if not walk or walk[-1][0] != path:
                walk.append((path, []))  # a jump
            walk[-1][1].append(name)

    def log_step(*args, **kwargs):
        step(*args, **kwargs)
        steps.append(None)
        sys.setprofile(enter if len(steps) == 1 else None)

    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["generate.py", "--output_dir", f"{folder}/data", "--num_samples", "60"]
        generate.main()
        data = ["--data_path", f"{folder}/data/train.json", "--output_dir", f"{folder}/run"]
        sys.argv = [f"train_{kind}.py", *FLAGS, *data, *(GROUPS if kind == "grpo" else [])]
        trainer.Log.step = log_step
        loop.main()
    for path, functions in walk:
        print(f"{path[len(str(ROOT)) + 1 :]}: {', '.join(functions)}")
    print(f"{kind}: {len(seen)} functions in {len({path for path, _ in walk})} files, {len(walk) - 1} jumps")


if __name__ == "__main__":
    main(sys.argv[1]) if sys.argv[1:2] in (["sft"], ["grpo"]) else sys.exit(__doc__)
