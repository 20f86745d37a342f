"""The tables of figures in README.md and docs/, made from the files that hold the figures.

    python dev/figures.py            write the tables anew
    python dev/figures.py --check    exit code 1 where a page says something else (a test runs it)

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`; of figures in sentences it says which page lacks
them. docs/figures/learn.json is what bench/learn.py measured; docs/figures/speed.json has the last lines of
bench/step.py's runs.
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md", "docs/gpus.md")
PARTS = ("rollout", "reference", "update")  # of a GRPO step
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 10: 2.26}  # 97.5 %, by the number of seeds
LEARN = json.loads((ROOT / "docs/figures/learn.json").read_text())
SPEED = json.loads((ROOT / "docs/figures/speed.json").read_text())

NAMES = {
    "cot": "chains of thought (the quickstart)", "again": "the same at e1aeb47, AMD EPYC, torch 2.13",
    "plain": "plain answers", "int8": "chains, base in int8",
    "fp8": "chains, base in fp8", "nf4": "chains, base in nf4", "format": "reward `format` alone, 40 steps",
    "beta0": "plain, 40 steps, beta 0", "beta0.02": "plain, 40 steps, beta 0.02 (the default)",
    "beta1": "plain, 40 steps, beta 1", "beta10": "plain, 40 steps, beta 10",
}  # fmt: skip
FAR = {
    "speed": "speed 3.2-4.5 px a frame (trained: 1.5-2.8)", "radius": "radius 2-3 or 22-26 px (4-20)",
    "ball": "orange and cyan balls (six others)", "background": "dark balls on light (light on dark)",
}  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def mean(values: list[float], sign: str = "") -> str:
    """Of shares: the mean in percent, and half of Student's 95 % interval over seeds."""
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.mean(values):{sign}.1f} ± {100 * half:.1f}"


def column(run: str, stage: str, key: str) -> list[float]:
    return [rows[stage][key] for _, rows in sorted(LEARN["runs"][run]["seeds"].items())]


def learn() -> str:
    cells = [
        ("SFT", "greedy"),
        ("SFT", "sampled"),
        ("start of GRPO", "sampled"),
        ("GRPO", "sampled"),
        ("GRPO", "greedy"),
    ]
    rows = []
    for run, name in NAMES.items():
        count = len(LEARN["runs"][run]["seeds"])
        rows.append([name, str(count), *(mean(column(run, *cell)) for cell in cells)])
    return table(["run", "seeds", *map(", ".join, cells)], rows)


def low_bit() -> str:
    rows = []
    for run in ("int8", "fp8", "nf4"):
        cells = []
        for stage, key in (("SFT", "greedy"), ("GRPO", "sampled"), ("GRPO", "greedy")):
            pairs = zip(column(run, stage, key), column("cot", stage, key), strict=True)
            cells.append(mean([low - full for low, full in pairs], "+"))
        rows.append([run, *cells])
    return table(["base", "after SFT, greedy", "after GRPO, sampled", "after GRPO, greedy"], rows)


def far() -> str:
    rows = [[name, *(mean(column("plain", stage, key)) for stage in ("SFT", "GRPO"))] for key, name in FAR.items()]
    return table(["outside the training range", "SFT", "early SFT, then GRPO"], rows)


def speed() -> str:
    rows = []
    for run in SPEED:
        command = f"`bench/step.py {' '.join(run['argv'])}`"
        for row in (row for row in run["results"] if row["work"].split()[-1] not in PARTS):
            unit, value = ("ms", 1000 * row["seconds"]) if row["seconds"] < 0.1 else ("s", row["seconds"])
            memory, over = f"{row['gib']:.1f} ({row['device_gib']:.1f})", f"{row['seconds'] / row['floor']:.1f} x"
            how = f"{command}, {run['commit']}" if row is run["results"][0] else ""
            rows.append([run["model"], row["work"], f"{value:.3g} {unit}", memory, over, how])
    return table(["model", "work", "median", "peak GiB (of the device)", "above its floor", "how, commit"], rows)


def gain(run: str, key: str) -> str:
    """GRPO minus SFT, paired by seed."""
    pairs = zip(column(run, "GRPO", key), column(run, "SFT", key), strict=True)
    return mean([grpo - sft for grpo, sft in pairs], "+")


def spread(stage: str, key: str, digits: int = 1) -> str:
    """The least and the most of the seeds that README names, in percent."""
    values = column("again", stage, key)
    return " to ".join(f"{round(100 * value, digits):g}" for value in (min(values), max(values)))


def measured(work: str, *words: str, model: str = "3b") -> tuple[str, str]:
    """Seconds and GiB of a row of speed.json; `words` are in its command."""
    fits = lambda run: run["model"] == model and {*words} <= {*run["argv"]}
    row = next(row for run in SPEED if fits(run) for row in run["results"] if row["work"] == work)
    return f"{row['seconds']:#.{3 if row['seconds'] >= 1 else 2}g}", f"{row['gib']:.1f}"


def sentences() -> dict[str, list[str]]:
    """{page: what it must say, line breaks aside}"""
    start, sampled, greedy = spread("start of GRPO", "sampled", 0), spread("GRPO", "sampled"), spread("GRPO", "greedy")
    sft = f"{spread('SFT', 'sampled')} % sampled, {spread('SFT', 'greedy')} % greedy"
    far = [f"{gain('plain', key)} on {word}" for key, word in zip(FAR, ("speed", "size", "colours", "backgrounds"))]
    kept, less = measured("sft R 8", "prefill"), measured("sft R 8", "--recompute")
    fast = measured("sft R 8", "--recompute", "--peer")
    readme = [measured(work) for work in ("sft long768 1", "grpo R 1 x 8", "grpo R 8 x 8")]
    small, large = measured("sft R 1", model="7b"), measured("grpo R 1 x 8", model="72b")
    return {
        "README.md": [
            f"right {start} % of the time when sampled, GRPO reaches {sampled} % sampled and {greedy} % greedy. "
            f"So does SFT to its end: {sft}.",
            *(f"| {seconds} s, {gib} GiB |" for seconds, gib in [kept, *readme]), f"{fast[0]} s, {less[1]} GiB |",
            f"(kept: {measured('sft S 5')[0]} s)",
        ],
        "docs/results.md": [
            f"is {gain('cot', 'sampled')} points sampled and {gain('cot', 'greedy')} greedy with chains of thought, "
            f"{gain('plain', 'sampled')} sampled with plain answers", f"{', '.join(far)}.",
        ],
        "docs/gpus.md": [
            f"{kept[0]} s and {kept[1]} GiB when everything is kept, {fast[0]} s and {less[1]} GiB when all is",
            f"in {small[0]} s with the allocator held to 15 GiB ({small[1]} used",
            f"SFT within 23 GiB ({measured('sft R 1', model='32b')[1]} used",
            f"GRPO within 28 ({measured('grpo R 1 x 8', model='32b')[1]} used",
            f"{measured('sft R 1', model='72b')[1]} GiB in SFT (r=64) and {large[1]} in GRPO (r=16, {large[0]} s)",
        ],
    }  # fmt: skip


def main() -> int:
    code = 0
    for page in PAGES:
        text = (ROOT / page).read_text()
        block = re.compile(r"(<!-- figures: (\w+) -->\n).*?(\n<!-- end -->)", re.S)
        new = block.sub(lambda match: match[1] + globals()[match[2]]() + match[3], text)
        if new != text and "--check" in sys.argv:
            print(f"{page}: its tables are not those of docs/figures; python dev/figures.py writes them")
            code = 1
        elif new != text:
            (ROOT / page).write_text(new)
        for sentence in sentences()[page]:
            if sentence not in " ".join(new.split()):
                print(f"{page} does not say: {sentence}")
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
