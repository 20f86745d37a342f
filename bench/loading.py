"""How fast clips become Examples: clips per second and CPU time a clip, without and with worker processes.

    python bench/loading.py                          # drawn clips: 64x64 of one second
    python bench/loading.py a.mp4 b.mkv --fps 4      # files of one's own
    python bench/loading.py --peer                   # also qwen-vl-utils with decord, where they are installed

Ours goes from file to token ids, positions and patch rows; the peer from file to resized frames. Both choose the same
frames and sizes. CPU time counts this process and its workers.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from clips import draw_clip, render, write_mp4
from config import VideoArgs
from data import Processor, load_tokenizer
from loader import Samples
from model.loading import ModelConfig

TINY = ROOT / "assets" / "tiny"
SMALL = {"nframes": 8, "resized_height": 56, "resized_width": 56}  # how the tiny model sees a 64x64 clip


def read(processor, workers: int, clips: list[dict]) -> None:
    """Ours, with so many worker processes."""
    records = [{"messages": [{"role": "user", "content": [clip, "Where to?"]}]} for clip in clips]
    for example in Samples(records, processor, False).read(range(len(clips)), workers):
        assert not isinstance(example, tuple), example  # (number, why it cannot be read)


def peer() -> dict:
    """{name: function that reads clips by qwen-vl-utils}, if it can be used here."""
    os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"
    try:
        import decord  # noqa: F401
        from qwen_vl_utils import vision_process
    except (ImportError, RuntimeError, OSError) as error:  # not there, or made for another torch
        print(f"the peer is not usable here: {error}")
        return {}
    del vision_process.VIDEO_READER_BACKENDS["torchvision"]  # which would take over where decord fails
    return {"qwen-vl-utils, decord": lambda clips: [vision_process.fetch_video(clip) for clip in clips]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="videos of one's own, besides the drawn ones")
    parser.add_argument("--fps", type=float, default=2.0, help="frames taken a second of one's own")
    parser.add_argument("--clips", type=int, default=200, help="small clips a round; a tenth as many of the others")
    parser.add_argument("--peer", action="store_true", help="qwen-vl-utils on the same files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = Processor(load_tokenizer(TINY), ModelConfig.from_folder(TINY), VideoArgs(cache_mb=0))
    readers = {f"{workers} workers": partial(read, processor, workers) for workers in (0, 1, 2)}
    readers |= peer() if args.peer else {}
    with tempfile.TemporaryDirectory() as folder:
        rng, drawn = np.random.default_rng(0), [f"{folder}/{i}.mp4" for i in range(16)]
        for path in drawn:
            write_mp4(path, render(draw_clip(rng, "Ascending", 64, 30)))
        sets = {"64x64, 1 s": [{"type": "video", "video": drawn[i % 16]} | SMALL for i in range(args.clips)]}
        for file in args.files:
            clip = {"type": "video", "video": file, "fps": args.fps}
            sets[Path(file).name[:20]] = [clip] * max(1, args.clips // 10)
        print(f"{'files':<20}  {'reader':<26}  clips/s  CPU ms a clip")
        for name, clips in sets.items():
            rounds = {who: [] for who in readers}
            for _ in range(4):
                for who, reader in readers.items():  # they take turns, so that a busy machine slows them alike
                    wall, cpu = time.perf_counter(), sum(os.times()[:4])
                    reader(clips)
                    wall, cpu = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
                    rounds[who].append((len(clips) / wall, 1000 * cpu / len(clips)))
            for who, times in rounds.items():
                rate, cpu = map(statistics.median, zip(*times[1:]))  # the first fills the page cache
                print(f"{name:<20}  {who:<26}  {rate:>7.1f}  {cpu:>13.2f}", flush=True)


if __name__ == "__main__":
    main()
