"""Rows of metrics.jsonl -> charts: the coordinates of SVG paths, ticks and legends. Only numpy.

    columns(rows)            {key: (steps, values)} of every number in the rows
    charts(runs, mark)       one run: a chart a GROUP; several laid over each other: a chart a key

assets/report.html draws them. Its script reads what hovering needs from data- attributes, so `Axes` stands there too.
"""

import math
import re

import numpy as np

from reporting.numbers import flatten, is_number, short

# Title, unit, pattern of the keys. The first group that fits takes a key; what fits none is charted under "Other".
# "%" groups are shares: drawn times 100.
GROUPS = [
    ("Loss", "", r"^(?!class/).*loss$"),
    ("Accuracy", "%", r"^(?!class/|reward).*accuracy"),
    ("Accuracy by class", "%", r"^class/"),
    ("Reward", "points", r"^reward(?!.*std)"),
    ("Reward standard deviation", "", r"^(reward|group).*std"),
    ("Zero-variance groups", "% of the groups", r"all_(right|wrong)|variance"),
    ("KL to the reference", "nats a token", r"^kl"),
    ("Truncated completions", "%", r"truncated"),
    ("Completion length", "tokens", r"length"),
    ("Clipped fraction", "% of the tokens", r"^clip|capped"),
    ("Importance ratio", "", r"^ratio$"),
    ("Entropy", "nats a token", r"entropy"),
    ("Gradient norm", "before clipping", r"grad_norm"),
    ("Learning rate", "", r"^(lr|learning_rate)"),
    ("Log-prob gap, sampler to trainer", "nats", r"gap"),
    ("Tokens per step", "", r"tokens$"),
    ("Throughput", "tokens per second", r"per_second"),
    ("Step time", "ms", r"^ms$"),
    ("Time", "seconds", r"seconds"),
    ("Waiting for data", "% of the step", r"^wait"),
    ("Memory", "GiB, peak", r"gib"),
]
OTHER = ("Other", "", "")
LOGARITHMIC = {"Loss", "KL to the reference", "Gradient norm", "Log-prob gap, sampler to trainer"}
ALWAYS_DRAWN = {"Loss", "Accuracy", "Accuracy by class", "Reward"}  # even where nothing changes
NOT_CHARTED = {"step", "epoch", "timestamp", "seed", "count", "eval_count", "confusion", "evaluation"}
COLOURS = 8  # classes s0 ... s7 of the page
POINTS = 400  # a longer curve is thinned to this many means, with a band from the lowest to the highest value
SMOOTH = 24  # a noisy curve is drawn pale, with its running mean over 1/SMOOTH of its length on top
NOISY = 0.02  # mean distance from the running mean, as a share of the curve's range
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 190, 44, 10, 8, 24  # viewBox units, about pixels


def flat(row: dict, prefix: str = ""):
    """(key, number or None) of each number and each null in a row, nested objects flattened with "/"."""
    return ((key, value) for key, value in flatten(row, prefix) if value is None or is_number(value))


def columns(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of metrics.jsonl -> {key: (steps (N,), values (N,))}, sorted. Of a step written twice the later row counts.

    A null is not finite (JSON has no NaN). A key that is null throughout is left out: it was not measured.
    """
    points = {}
    for row in rows:
        step = row.get("step")
        if is_number(step) and math.isfinite(step):
            for key, value in flat(row):
                if not NOT_CHARTED & {*key.split("/")}:
                    points.setdefault(key, {})[step] = value
    result = {}
    for key, value_at in points.items():
        if any(value is not None for value in value_at.values()):
            steps = sorted(value_at)
            values = [math.nan if value_at[step] is None else value_at[step] for step in steps]
            result[key] = np.array(steps, float), np.array(values, float)
    return result


def group_of(key: str) -> tuple[str, str, str]:
    return next((group for group in GROUPS if re.search(group[2], key)), OTHER)


def label(key: str) -> str:
    """A key as a legend: 'reward/accuracy' -> 'reward accuracy', 'class/Ascending' -> 'Ascending'."""
    return key.removeprefix("class/").replace("/", " ").replace("_", " ").strip()


def thin(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(N,) -> mean, lowest, highest, middle index, (n,) each, n <= POINTS; NaN where a stretch has no finite value."""
    size = -(-len(y) // POINTS)
    if size == 1:
        return y, y, y, np.arange(len(y))
    stretches = np.concatenate([y, np.full(-len(y) % size, np.nan)]).reshape(-1, size)
    finite = np.isfinite(stretches)
    count = np.where(finite.any(1), finite.sum(1), np.nan)
    mean = np.where(finite, stretches, 0).sum(1) / count
    low, high = np.where(finite, stretches, np.inf).min(1), np.where(finite, stretches, -np.inf).max(1)
    middle = np.minimum(np.arange(len(stretches)) * size + size // 2, len(y) - 1)
    return mean, np.where(np.isnan(count), np.nan, low), np.where(np.isnan(count), np.nan, high), middle


def running_mean(y: np.ndarray) -> np.ndarray:
    """(n,) -> (n,): the mean of the finite values around each, fewer at the ends; NaN stays NaN."""
    finite, window = np.isfinite(y), np.ones(max(1, len(y) // SMOOTH) | 1)
    total, count = (np.convolve(values, window, "same") for values in (np.where(finite, y, 0), finite))
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 4)
    return [10.0**p for p in powers[::every] if low <= 10.0**p <= high]


class Axes:
    """From data to the picture's coordinates. The page's script repeats `x` and `y` from the `box` attribute.

    span: first and last step, the same in all charts of a page; ys: the finite values of all curves.
    """

    def __init__(self, title: str, unit: str, span: tuple[float, float], ys: np.ndarray):
        self.x0, self.x1 = span[0], span[1] + (span[0] == span[1])
        low, high = (float(ys.min()), float(ys.max())) if len(ys) else (0.0, 1.0)
        self.log = title in LOGARITHMIC and low > 0 and high / low > 30
        if not self.log:
            if low > 0 and low < 0.6 * high:
                low = 0.0
            pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
            low, high = (low if low == 0 else low - pad), high + pad
            if unit.startswith("%"):
                low, high = max(low, 0.0), (100.0 if high > 50 else high)
        self.y0, self.y1 = low, high

    def x(self, value):
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value):
        low, high, value = (np.log(v) if self.log else v for v in (self.y0, self.y1, value))
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    @property
    def box(self) -> str:
        return " ".join(f"{v:.10g}" for v in (self.x0, self.x1, self.y0, self.y1, int(self.log)))

    def ticks(self) -> dict:
        """Where the grid's lines and the labels stand."""
        values = log_ticks(self.y0, self.y1) if self.log else ticks(self.y0, self.y1)
        steps = [v for v in ticks(self.x0, self.x1, 5) if v == int(v)]
        return {
            "y_ticks": [(round(float(self.y(v)), 1), short(v)) for v in values],
            "x_ticks": [(round(self.x(v), 1), short(v)) for v in steps],
        }


def line(axes: Axes, x: np.ndarray, y: np.ndarray) -> str:
    """The d of a path: broken where y is NaN; a point alone becomes a dot."""
    d, pen = [], "M"
    for k, (px, py) in enumerate(zip(axes.x(x), axes.y(y), strict=True)):
        if math.isnan(py):
            pen = "M"
            continue
        alone = pen == "M" and (k + 1 == len(y) or math.isnan(y[k + 1]))
        d.append(f"{pen}{px:.1f} {py:.1f}" + ("h0" if alone else ""))
        pen = "L"
    return "".join(d)


def curve(axes: Axes, x: np.ndarray, y: np.ndarray) -> tuple[list[tuple[str, str]], str]:
    """([(class, d)] of the paths of one curve, its points as "step,value …" for hovering)."""
    mean, low, high, middle = thin(np.where(np.isfinite(y), y, np.nan))
    x, shown = x[middle], np.isfinite(mean)
    paths = []
    if len(mean) < len(y):
        outline = line(axes, np.r_[x[shown], x[shown][::-1]], np.r_[high[shown], low[shown][::-1]])
        paths.append(("band", f"{outline}Z"))
    smooth = running_mean(mean)
    distance = np.abs(mean - smooth)[shown]
    if len(mean) > 2 * SMOOTH and distance.mean() > NOISY * np.ptp(mean[shown]) > 0:
        paths += [("line pale", line(axes, x, mean)), ("line", line(axes, x, smooth))]
    else:
        paths.append(("line", line(axes, x, mean)))
    points = list(zip(x[shown], mean[shown], strict=True))
    if len(mean) <= 25:
        paths.append(("dots", "".join(f"M{axes.x(a):.1f} {axes.y(b):.1f}h0" for a, b in points)))
    return paths, " ".join(f"{a:.6g},{b:.5g}" for a, b in points)


def in_percent(unit: str, y: np.ndarray) -> np.ndarray:
    """Shares as percentages, where the unit says so; what is beyond 1 is one already."""
    return y * 100 if unit.startswith("%") and np.nanmax(np.abs(y), initial=0) <= 1 else y


def chart(title: str, unit: str, series: list, span: tuple[float, float], mark: float | None) -> dict:
    """One chart of [(name, (steps, values), colour)]. Its legend shows the last values, or those at the pointer."""
    series = [(name, x, in_percent(unit, y), colour) for name, (x, y), colour in series]
    finite = [y[np.isfinite(y)] for _, _, y, _ in series]
    axes = Axes(title, unit, span, np.concatenate(finite))
    curves = []
    for (name, x, y, colour), good in zip(series, finite, strict=True):
        paths, points = curve(axes, x, y)
        last = short(good[-1]) if len(good) else "not finite"
        curves.append({"name": name, "colour": colour, "paths": paths, "points": points, "last": last})
    return {
        "title": title,
        "unit": ", ".join([unit] * bool(unit) + ["log scale"] * axes.log),
        "missing": sum(len(y) for _, _, y, _ in series) - sum(map(len, finite)),
        "curves": curves,
        "box": axes.box,
        "mark": None if mark is None else round(axes.x(mark), 1),
        **axes.ticks(),
    }


def charts(runs: list[tuple[str, dict]], mark: float | None = None) -> tuple[list[dict], list[str]]:
    """[(run's name, columns(...))] -> (charts in the order of GROUPS, "key value" of what never changes).

    mark: step of the best checkpoint.
    """
    keys = list(dict.fromkeys(key for _, data in runs for key in data))
    steps = [data[key][0] for _, data in runs for key in data]
    if not keys:
        return [], []
    span = float(min(x[0] for x in steps)), float(max(x[-1] for x in steps))
    result, constant = [], {}
    for group in [*GROUPS, OTHER]:
        title, unit, _ = group
        mine = [key for key in keys if group_of(key) is group]
        values = {key: np.unique([v for _, data in runs if key in data for v in data[key][1]]) for key in mine}
        same = {key: v[0] for key, v in values.items() if len(v) == 1 and np.isfinite(v[0])}
        if title not in ALWAYS_DRAWN and (group is OTHER or len(same) == len(mine)):
            constant |= same
            mine = [key for key in mine if key not in same]
        if len(runs) == 1 and group is not OTHER:
            series = [(label(key), runs[0][1][key], k % COLOURS) for k, key in enumerate(mine)]
            result += [chart(title, unit, series[k : k + COLOURS], span, mark) for k in range(0, len(series), COLOURS)]
            continue
        for key in mine:
            series = [(name, data[key], k % COLOURS) for k, (name, data) in enumerate(runs) if key in data]
            if len(runs) == 1:
                series = [(label(key), runs[0][1][key], 0)]
            own = label(key).capitalize() if group is OTHER else title + f": {label(key)}" * (len(mine) > 1)
            result.append(chart(own, unit, series, span, mark))
    return result, [f"{label(key)} {short(value)}" for key, value in constant.items()]
