"""What several GPUs bring, and which settings to take: measured, modelled, chosen.

    python bench/scale.py run --gpus 1 2 --out bench/scale.json       the real scripts, the same work on each GPU
    python bench/scale.py model                                       the model against what was measured, then further
    python bench/scale.py choose --model 32B --frames 64 --gpus 16 --memory 80

run measures (scaling.py), model and choose reckon (stepcost.py): fitted at one GPU only, what they say of more is a
prediction, checked against every measured row. Measured rows and assumptions lie in bench/scale.json; a figure that was
not measured says so. The last line of each command is one JSON object.
"""

import argparse
import json
import math
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path

import scaling
from stepcost import PACK_TOKENS, Costs, Setting
from workloads import NAMED, SIZES, Workload, model_config

from config import cli
from model import UserError
from training.forecast import TIGHT
from training.memory import GIB, total

FILE = Path(__file__).with_name("scale.json")
FURTHER = 8, 64, 1024  # GPUs
PARTS = "sampling", "compute", "traffic", "waiting", "rest"
BATCHES = 1, 2, 4, 8, 16, 32


# -- The file


def read(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--measured: {path} cannot be read ({error.strerror}); expected a file like {FILE}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--measured: {path} is not JSON ({error}); expected a file like {FILE}") from None


def keep(rows, path):
    """Put rows that were measured into the file, in place of former ones of the same run."""
    told = read(path if Path(path).exists() else FILE)
    same = lambda row: [row[name] for name in ("gpu", "work", "model", "workload", "gpus", "flags")]
    new = [row for row in rows if "ms" in row]
    told["rows"] = [row for row in told["rows"] if same(row) not in map(same, new)] + new
    Path(path).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def costs_of(told, gpu=None):
    """The model of one kind of GPU: the named one, else that of most GPUs measured."""
    known = {row["gpu"] for row in told["rows"]}
    if gpu is None:
        gpu = max(known, key=lambda kind: max(row["gpus"] for row in told["rows"] if row["gpu"] == kind))
    if gpu not in known:
        raise UserError(f"--gpu: found {gpu!r}, measured were {sorted(known)}")
    return Costs([row for row in told["rows"] if row["gpu"] == gpu], told, gpu)


def setting_of(row):
    """What a measured row ran."""
    names = {field.name: field.type for field in fields(Setting)}
    words = iter(row["flags"].replace("=", " ").split())
    given = {name.removeprefix("--"): next(words) for name in words}
    known = {name: value for name, value in given.items() if name in names}
    more = {name: value == "True" if names[name] is bool else int(value) for name, value in known.items()}
    kind = "grpo" if row["group"] else "sft"
    settled = {name: row[name] for name in ("model", "gpus", "batch", "group", "rank", "gradient_checkpointing")}
    return Setting(**settled | more, kind=kind, work=NAMED[row["workload"]])


# -- model


def check(costs):
    """[row with what the model says of it]; fitted: whether the model was made from it."""
    found = []
    for row in costs.rows:
        setting = setting_of(row)
        says, fitted = costs.step(setting), row["work"] == "sft" and row["gpus"] == 1 and not row["flags"]
        if row["gpus"] == 1:  # what the model itself says
            says = {"seconds": says["seconds"] - says["rest"]}
        off = says["seconds"] / (row["ms"] / 1000) - 1
        found.append({"work": row["work"], "gpus": row["gpus"], "flags": row["flags"], "measured": row["ms"] / 1000})
        found[-1] |= {"model": says["seconds"], "off": off, "fitted": fitted}
    return sorted(found, key=lambda row: (row["work"], row["gpus"]))


def further(costs):
    """[{work, lengths, gpus, efficiency, shares}] for the work of each row of one GPU, on more of them."""
    found = []
    for row in (row for row in costs.rows if row["gpus"] == 1 and not row["flags"]):
        one = setting_of(row)
        kinds = [("", one, False, False)]
        if one.group:
            kinds.append(("measured lengths", one, True, False))
        if one.group and one.batch > 1:
            halves = replace(one, prompts_at_once=one.batch // 2)
            kinds += [("in two units, own", halves, True, False), ("in two units, shared", halves, True, True)]
        for told, setting, like, shared in kinds:
            alone = costs.step(setting, like, shared)["seconds"]
            for gpus in (1, 2, 4, *FURTHER):
                says = costs.step(replace(setting, gpus=gpus), like, shared)
                head = {"work": row["work"], "lengths": told, "gpus": gpus}
                found.append(head | {"efficiency": alone / says["seconds"]} | says)
    return found


def show_model(args):
    told = read(args.measured)
    costs = costs_of(told, args.gpu)
    checked = check(costs)
    print(f"{costs.gpu}, {costs.size}: a step as measured and as the model says. fitted: the model is made from it; on")
    print("more GPUs and of GRPO on one (there without the rest, which is what is off): predictions")
    print(f"{'work':<8}{'GPUs':>5}{'measured s':>12}{'model s':>10}{'off':>8}")
    for row in checked:
        cells = f"{row['work']:<8}{row['gpus']:>5}{row['measured']:12.3f}{row['model']:10.3f}{row['off']:+8.1%}"
        print(f"{cells}  {'fitted' if row['fitted'] else row['flags']}")
    missing = sorted({1, 2, 4} - {row["gpus"] for row in checked})
    most = max(row["gpus"] for row in checked)
    print(f"not measured: {' and '.join(f'{n} GPUs' for n in missing) or 'nothing of 1, 2 and 4 GPUs'}")
    print(f"what follows for more than {most} GPU{'s' * (most > 1)} is a prediction that no machine has borne out")
    rows = further(costs)
    heads = "".join(f"{part:>10}" for part in PARTS)
    print(f"{'work':<8}{'completions':<22}{'GPUs':>5}{'s a step':>10}{'scaling':>9}{heads}")
    for row in rows:
        shares = "".join(f"{row[part] / row['seconds']:10.2%}" for part in PARTS)
        head = f"{row['work']:<8}{row['lengths'] or 'full length':<22}{row['gpus']:>5}"
        print(f"{head}{row['seconds']:10.3f}{row['efficiency']:9.1%}{shares}")
    print("\n".join(assumptions(costs)))
    print(json.dumps({"bench": "scale model", "gpu": costs.gpu, "check": checked, "further": rows}))


def assumptions(costs):
    """What the figures rest on, a line each."""
    row = next(row for row in costs.rows if row["work"] == "sft" and row["gpus"] == 1)
    of = f"the SFT step on {row['machine']}, {row['date']}"
    yield f"rate       {costs.rate / 1e12:.0f} TFLOP/s: {of}; all sizes and lengths alike"
    decoded = "measured" if costs.decoding_measured else "as on another GPU, not measured on this one"
    step = f"{1e3 * costs.base:.2f} ms + {1e6 * costs.slope:.1f} us a row at {costs.size}"
    yield f"decoding   {step}, {decoded}; other sizes by their bytes"
    for name in ("inside", "between", "host"):
        link, source = getattr(costs.cluster, name), costs.assumed["links"][name]["source"]
        source = "measured, all_gather by itself" if name == "inside" and costs.linked else source
        yield f"{name:<10} {link.rate / 1e9:.0f} GB/s a GPU, {1e6 * link.seconds:.0f} us a hop: {source}"
    spread = [f"{work} up to {max(found):.3f} of the median" for work, found in costs.spread.items() if len(found) > 1]
    yield f"spread     of one GPU's steps, each GPU's by itself: {', '.join(spread) or 'not measured, taken as none'}"
    rest = ", ".join(f"{work} {1e3 * seconds:.0f} ms" for work, seconds in costs.rest.items() if abs(seconds) > 1e-9)
    yield f"rest       what one GPU took beyond the model, the same on more: {rest or 'none'}"
    yield f"lengths    {costs.lengths['source']}"
    least = costs.assumed["least"]
    told = f"{1e3 * least['captured']:.2f} ms a block, {1e3 * least['launched']:.2f} without CUDA graphs"
    yield f"small      a step's pass takes at least {told}: {least['source']}"
    told = costs.assumed["host_memory"]
    yield f"optimizer  offloaded: {told['rate'] / 1e9:.0f} GB/s of host memory a GPU, {told['source']}"
    yield f"hosts      of {costs.cluster.per_host} GPUs, a network card for each GPU; traffic does not slow computing"


# -- choose


def workload(args):
    """One sample of so many frames and pixels, with R's text."""
    h, w = (int(n) for n in args.size.split("x"))
    return Workload((args.frames // 2, h // 28 * 2, w // 28 * 2), NAMED["R"].prompt, args.completion)


def candidates(args, work, per_host):
    """Settings in question; of each all batches, from small to large."""
    heads = model_config(args.model).num_attention_heads
    shared = [n for n in range(1, min(args.gpus, per_host) + 1) if args.gpus % n == 0 and heads % n == 0]
    group = 8 if args.work == "grpo" else 0
    yes_no = False, True
    for sequence, recompute, parted, weights, optimizer in product(shared, (True, False), yes_no, yes_no, yes_no):
        if (sequence > 1 and group) or (weights and not parted) or (parted and not recompute):
            continue
        if parted and not weights and args.gpus == 1:
            continue
        settled = Setting(args.model, args.work, work, args.gpus, 1, group, args.lora_rank, recompute)
        yield replace(settled, offload_optimizer=optimizer, partition_weights=parted, offload_weights=weights,
                      sequence_parallel=sequence)  # fmt: skip


def choose(args):
    """[(clips a second, GiB, Setting, seconds)] of what fits, best first, and the smallest of what does not."""
    costs = costs_of(read(args.measured), args.gpu)
    room, fits, least = TIGHT * args.memory, [], (float("inf"), None)
    for each in candidates(args, workload(args), costs.cluster.per_host):
        for batch in [args.batch] if args.batch else BATCHES:
            s = replace(each, batch=batch)
            gib = total(costs.memory(s)) / GIB
            least = min(least, (gib, s), key=lambda pair: pair[0])
            if gib > room:
                break
            says = costs.step(s)
            fits.append((s.gpus / s.sequence_parallel * batch / says["seconds"], gib, s, says))
    # within half a percent: what asks for least, then what takes least
    rank = lambda found: (-round(math.log(found[0]) / 0.005), len(flags_of(found[2]).split()), found[1])
    return costs, sorted(fits, key=rank), least


def flags_of(s):
    """A setting as the script's flags."""
    tokens = s.batch * (s.work.prompt_tokens + max(1, s.group) * s.work.completion)
    size = s.batch * max(1, s.group)
    found = f"--per_device_train_batch_size {size} --pack_tokens {tokens if s.kind == 'sft' else PACK_TOKENS}"
    for name in ("gradient_checkpointing", "offload_optimizer", "partition_weights", "offload_weights"):
        found += f" --{name} True" * getattr(s, name)
    return found + f" --sequence_parallel {s.sequence_parallel}" * (s.sequence_parallel > 1)


def show_choose(args):
    costs, fits, (least, smallest) = choose(args)
    where = f"{args.gpus} GPU{'s' * (args.gpus > 1)} of {args.memory:g} GiB"
    if not fits:
        told = f"{args.model} with {args.frames} frames of {args.size} needs at least {least / TIGHT:.0f} GiB a card"
        with_ = flags_of(smallest).replace("--", "")
        raise UserError(f"choose: {told} ({with_}), found {where}; take more or larger cards, or fewer frames")
    s = fits[0][2]
    tokens = s.work.prompt_tokens + s.work.completion
    clip = f"{args.frames} frames of {args.size}"
    print(f"{args.work} of {args.model}, rank {s.rank}, clips of {clip}: {tokens:,} tokens with their answer")
    print(f"on {where}, by the rates of {costs.gpu}")
    print(f"{'clips/s':>8}{'s a step':>10}{'GiB':>7}" + "".join(f"{part:>10}" for part in PARTS[:4]) + "  settings")
    shown = {}
    for found in fits:  # the best batch of each way
        shown.setdefault(flags_of(replace(found[2], batch=1)), found)
    for rate, gib, s, says in list(shown.values())[: args.show]:
        cells = "".join(f"{says[part] / says['seconds']:10.1%}" for part in PARTS[:4])
        print(f"{rate:8.2f}{says['seconds']:10.2f}{gib:7.1f}{cells}  {flags_of(s)}")
    rate, gib, s, says = fits[0]
    print(f"take: deepspeed train_{args.work}.py {flags_of(s)} --lora_rank {s.rank}")
    print(f"      {gib:.1f} GiB a card by the plan, which may fill {TIGHT:.0%} of it", end="")
    print(f"; {costs.host_memory(s) / GIB:.0f} GiB of memory a host" if costs.host_memory(s) else "")
    print("\n".join(assumptions(costs)))
    best = asdict(s) | {"clips_s": rate, "gib": gib} | says
    print(json.dumps({"bench": "scale choose", "gpu": costs.gpu, "memory": args.memory, "best": best}))


# -- Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{self.prog.split()[-1]}: {message}; see --help")


def measured(args):
    rows = scaling.run(args)
    if args.out:
        keep(rows, args.out)
    print(json.dumps({"bench": "scale", "rows": rows}))
    if not any("ms" in row for row in rows):
        raise UserError("run: nothing was measured; the table says why")


def arguments():
    parser = Parser(prog="scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    run = commands.add_parser("run", help="measure the real scripts on so many GPUs of this machine")
    run.set_defaults(do=measured)
    cuda = scaling.torch.cuda.is_available()
    run.add_argument("--gpus", nargs="+", type=count, default=[1, 2], help="GPUs, or CPU ranks where there are none")
    run.add_argument("--work", nargs="+", choices=scaling.KINDS, default=["sft", "grpo"], help="sft: 8 clips a GPU; "
                     "grpo, grpo8: one and 8 prompts a GPU x 8 completions")  # fmt: skip
    run.add_argument("--model", choices=[*SIZES, "tiny"], default="3B" if cuda else "tiny")
    run.add_argument("--workload", choices=NAMED, default="R" if cuda else "E", help="see bench/workloads.py")
    run.add_argument("--warmup", type=count, default=6 if cuda else 2, help="steps before the timed ones")
    run.add_argument("--steps", type=count, default=10 if cuda else 5, help="timed steps")
    run.add_argument("--traced", type=count, default=2, help="steps under the profiler, after those")
    run.add_argument("--limit", type=count, default=120, help="seconds for each run; then it is ended and told")
    run.add_argument("--workers", type=count, default=12 if cuda else 1, help="threads a GPU that decode clips")
    run.add_argument("--flags", default="", help='more flags of the scripts: --flags "--partition_weights True"')
    run.add_argument("--folder", help="where checkpoint, clips and runs go; else a new one in the temporary folder")
    run.add_argument("--out", help="a file like bench/scale.json that the rows are put into")
    model = commands.add_parser("model", help="the model against what was measured, and for more GPUs")
    model.set_defaults(do=show_model)
    choose = commands.add_parser("choose", help="which settings for a model, clips and a cluster")
    choose.set_defaults(do=show_choose)
    for each in (model, choose):
        each.add_argument("--measured", default=FILE, help="measured rows and assumptions; else bench/scale.json")
        each.add_argument("--gpu", help="the measured GPU to reckon with; else the one of which most were measured")
    choose.add_argument("--work", choices=["sft", "grpo"], default="sft")
    choose.add_argument("--model", choices=SIZES, default="3B")
    choose.add_argument("--frames", type=count, default=16)
    choose.add_argument("--size", type=size, default="252x420", help="HEIGHTxWIDTH of a frame in pixels")
    choose.add_argument("--completion", type=count, default=256, help="tokens of an answer")
    choose.add_argument("--gpus", type=count, default=1, help="in all, 8 a host")
    choose.add_argument("--memory", type=float, default=80, help="GiB of a card")
    choose.add_argument("--batch", type=count, help="samples or prompts a GPU; else the best of 1 to 32")
    choose.add_argument("--lora_rank", type=count, default=16)
    choose.add_argument("--show", type=count, default=6, help="ways that are listed")
    return parser


def count(text):
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a count above 0")
    return int(text)


def size(text):
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) >= 28 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}, expected HEIGHTxWIDTH such as 252x420, at least 28 each")
    return text


def main():
    args = arguments().parse_args()
    args.do(args)


if __name__ == "__main__":
    cli(main)
