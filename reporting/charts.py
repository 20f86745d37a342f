"""Numbers -> SVG for report.py, by hand: columns out of metrics.jsonl, thinned curves, nice axes. Only numpy.

    columns(rows)            {key: (steps, values)} of every number in the rows, nested objects flattened with "/"
    charts(runs, mark)       HTML figures: one a GROUP for one run, one a key for several runs laid over each other

The page's script reads what hovering needs from data- attributes; the colours are classes (s0 … s7), so no style stands
in the markup and the content policy can forbid it.
"""

import math
import re
from html import escape

import numpy as np

# Title, unit, pattern of the keys; the first group that fits takes a key, what fits none is charted under "other".
# "%" groups are shares: drawn times 100, on an axis from 0 to 100 where they need it.
GROUPS = [
    ("Loss", "", r"^(?!class/).*loss$"),
    ("Accuracy", "%", r"^(?!class/|.*(reward|count|samples)).*(accuracy|correct|reversed|shuffled|blanked)"),
    ("Accuracy of each class", "%", r"^class/"),
    ("Reward", "points", r"^(?!.*(std|spread|share|seconds|_s$)).*(reward|advantage)"),
    ("Reward spread", "standard deviation", r"^(?!.*(zero|share)).*(reward.*(std|spread)|std.*reward|group_std)"),
    ("Groups", "%", r"all_(right|wrong)|variance|zero_std|(^|/)groups?/"),
    ("KL to the reference", "nats a token", r"(^|[/_])kl($|[/_])"),
    ("Completions cut by the limit", "%", r"truncat|(^|[/_])cut|unfinished"),
    ("Completion length", "tokens", r"length"),
    ("Ratio clipped", "%", r"clip_|clipped|capped"),
    ("Ratio to the sampling policy", "", r"(^|[/_])ratio($|[/_])"),
    ("Entropy", "nats a token", r"entropy"),
    ("Gradient norm", "before clipping", r"grad_?norm"),
    ("Learning rate", "", r"(^|[/_])(lr|learning_rate)($|[/_])"),
    ("Sampler against trainer", "gap of log-probs, nats", r"gap|sampler|is_weight"),
    ("Tokens a step", "", r"tokens$"),
    ("Throughput", "a second", r"(per|a)_s(ec|econd)?$|/s$|tok_s"),
    ("Step time", "ms", r"(^|[/_])ms$"),
    ("Time", "seconds", r"second|(^|[/_])time|_s$"),
    ("Waiting for data", "% of the step", r"(^|[/_])wait($|[/_])"),
    ("Memory", "GiB, peak", r"mem|(^|[/_])gib|_gb$"),
]
OTHER = ("Other", "", "")
LOGARITHMIC = {"Loss", "KL to the reference", "Gradient norm", "Sampler against trainer"}
ALWAYS = {"Loss", "Accuracy", "Accuracy of each class", "Reward"}  # drawn even where nothing changes
NOT_CHARTED = {"step", "epoch", "timestamp", "seed", "count", "eval_count", "confusion", "evaluation"}
POINTS = 400  # a curve is thinned to this many; each then stands for a stretch, drawn with its lowest and highest
SMOOTH = 24  # a noisy curve is drawn pale, with its running mean over 1/SMOOTH of its length on top
NOISY = 0.02  # mean distance from the running mean, as a share of the curve's range
COLOURS = 8  # classes s0 ... s7 of the page
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 190, 44, 10, 8, 24  # viewBox units, about pixels


def number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def flat(row: dict, before: str = ""):
    """(key, number or None) of each number and each null in a row, nested objects flattened with "/"."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}/")
        elif value is None or number(value):
            yield before + key, value


def columns(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of metrics.jsonl -> {key: (steps (N,), values (N,))}, sorted; of a step that is there twice the later value.

    A null counts as not finite (JSON has no NaN), but a key that is null throughout is left out: it was not measured.
    """
    found = {}
    for i, row in enumerate(rows):
        step = row.get("step", i)
        if number(step) and math.isfinite(step):
            for key, value in flat(row):
                if not NOT_CHARTED & {*key.split("/")}:
                    found.setdefault(key, {})[step] = value
    result = {}
    for key, points in found.items():
        if any(value is not None for value in points.values()):
            steps = sorted(points)
            values = [math.nan if points[s] is None else points[s] for s in steps]
            result[key] = np.array(steps, float), np.array(values, float)
    return result


def group_of(key: str) -> tuple[str, str, str]:
    return next((group for group in GROUPS if re.search(group[2], key.lower())), OTHER)


def short(value: float) -> str:
    """A number for people: four digits, thousands as 12.3k."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    text = f"{value:.4g}"
    return re.sub(r"e([+-])0*", r"e\1", text).replace("e+", "e")


def percent(share) -> str:
    return f"{100 * share:.1f} %" if number(share) and math.isfinite(share) else "–"


def thin(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(N,) -> mean, lowest, highest, middle index, (n,) each, n <= POINTS; NaN where a stretch has no finite value."""
    size = -(-len(y) // POINTS)
    if size == 1:
        return y, y, y, np.arange(len(y))
    pad = np.concatenate([y, np.full(-len(y) % size, np.nan)]).reshape(-1, size)
    good = np.isfinite(pad)
    count = good.sum(1)
    mean = np.where(good, pad, 0).sum(1) / np.where(count, count, np.nan)
    low, high = np.where(good, pad, np.inf).min(1), np.where(good, pad, -np.inf).max(1)
    middle = np.minimum(np.arange(len(pad)) * size + size // 2, len(y) - 1)
    return mean, np.where(count, low, np.nan), np.where(count, high, np.nan), middle


def running_mean(y: np.ndarray) -> np.ndarray:
    """(n,) -> (n,): the mean of the finite values around each, fewer at the ends; NaN stays NaN."""
    good, width = np.isfinite(y), max(1, len(y) // SMOOTH) | 1
    total = np.convolve(np.where(good, y, 0), np.ones(width), "same")
    return np.where(good, total / np.maximum(np.convolve(good, np.ones(width), "same"), 1), np.nan)


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

    def svg(self, mark: float | None) -> str:
        """Grid, labels, and a dashed line at the step `mark`."""
        parts = []
        for v in (log_ticks(self.y0, self.y1) if self.log else ticks(self.y0, self.y1)):
            y = self.y(v)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(v)}</text>')
        for v in ticks(self.x0, self.x1, 5):
            if v == int(v):
                anchor = "end" if self.x(v) > WIDTH - RIGHT - 12 else "middle"
                parts.append(f'<text x="{self.x(v):.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{short(v)}</text>')
        if mark is not None and self.x0 <= mark <= self.x1:
            parts.append(f'<path class="mark" d="M{self.x(mark):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        return "".join(parts)


def path(points) -> str:
    """(x, y) pairs -> the d of a path; None breaks the line, a point alone becomes a dot."""
    parts, pen = [], "M"
    for k, point in enumerate(points):
        if point is None:
            pen = "M"
            continue
        alone = pen == "M" and (k + 1 == len(points) or points[k + 1] is None)
        parts.append(f"{pen}{point[0]:.1f} {point[1]:.1f}" + ("h0" if alone else ""))
        pen = "L"
    return "".join(parts)


def curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: int) -> tuple[str, str]:
    """(SVG of one curve, what hovering needs as data- attributes)."""
    mean, low, high, middle = thin(y)
    x = x[middle]
    pairs = [(a, b) if math.isfinite(b) else None for a, b in zip(axes.x(x), axes.y(mean), strict=True)]
    shown = np.isfinite(mean)
    svg = []
    if len(mean) < len(y):
        xs, top, bottom = axes.x(x[shown]), axes.y(high[shown]), axes.y(low[shown])
        edge = [f"{a:.1f} {b:.1f}" for a, b in zip(np.r_[xs, xs[::-1]], np.r_[top, bottom[::-1]], strict=True)]
        svg.append(f'<path class="band s{colour}" d="M{"L".join(edge)}Z"/>')
    steady = running_mean(mean)
    distance = np.abs(mean - steady)[shown]
    if len(mean) > 2 * SMOOTH and distance.mean() > NOISY * np.ptp(mean[shown]) > 0:
        smooth = [(a, b) if math.isfinite(b) else None for a, b in zip(axes.x(x), axes.y(steady), strict=True)]
        svg.append(f'<path class="line pale s{colour}" d="{path(pairs)}"/>')
        svg.append(f'<path class="line s{colour}" d="{path(smooth)}"/>')
    else:
        svg.append(f'<path class="line s{colour}" d="{path(pairs)}"/>')
    if len(mean) <= 25:
        svg.append(f'<path class="dots s{colour}" d="{"".join(f"M{p[0]:.1f} {p[1]:.1f}h0" for p in pairs if p)}"/>')
    points = " ".join(f"{a:.6g},{b:.5g}" for a, b in zip(x[shown], mean[shown], strict=True))
    return "".join(svg), f'data-points="{points}"'


def label(key: str) -> str:
    """A key as a legend word: 'eval/accuracy' -> 'eval accuracy', 'class/Ascending' -> 'Ascending'."""
    return key.removeprefix("class/").replace("/", " ").replace("_", " ").strip()


def in_percent(unit: str, y: np.ndarray) -> np.ndarray:
    """Shares as percentages, where the unit says so; what is beyond 1 is one already."""
    return y * 100 if unit.startswith("%") and np.nanmax(np.abs(y), initial=0) <= 1 else y


def figure(title: str, unit: str, series: list, span: tuple[float, float], mark: float | None = None) -> str:
    """One chart of [(name, steps, values, colour)]. Its legend tells the last values, or those at the pointer."""
    series = [(name, x, in_percent(unit, y), colour) for name, x, y, colour in series]
    lost = sum(int((~np.isfinite(y)).sum()) for _, _, y, _ in series)
    finite = [y[np.isfinite(y)] for _, _, y, _ in series]
    axes = Axes(title, unit, span, np.concatenate(finite))
    curves, legend = [], []
    for (name, x, y, colour), good in zip(series, finite, strict=True):
        svg, data = curve(axes, x, y, colour)
        curves.append(svg + f'<circle class="dot s{colour}" r="3.5"/>')
        last = short(good[-1]) if len(good) else "not finite"
        legend.append(f'<li class="s{colour}" {data}><span>{escape(name)}</span> <b>{last}</b></li>')
    notes = [unit] * bool(unit) + ["log scale"] * axes.log
    notes += [f'<em class="bad">{lost} value{"s" * (lost > 1)} not finite</em>'] * bool(lost)
    ends = [f"{name} ends at {short(good[-1])}" for (name, *_), good in zip(series, finite, strict=True) if len(good)]
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3> <small>{", ".join(notes)}</small>'
        f'<output></output></figcaption><ul class="legend">{"".join(legend)}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" data-box="{axes.box}" role="img" tabindex="0" '
        f'aria-label="{escape(title)} by step: {escape("; ".join(ends))}">{axes.svg(mark)}{"".join(curves)}'
        f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg></figure>'
    )


def charts(runs: list[tuple[str, dict]], mark: float | None = None) -> str:
    """[(run's name, columns(...))] -> figures in the order of GROUPS; [] -> "". mark: step of the best checkpoint."""
    keys = list(dict.fromkeys(key for _, found in runs for key in found))
    if not keys:
        return ""
    ends = [(x[0], x[-1]) for _, found in runs for x, _ in found.values()]
    span = float(min(first for first, _ in ends)), float(max(last for _, last in ends))
    figures, constant = [], []
    for group in [*GROUPS, OTHER]:
        mine = [key for key in keys if group_of(key) is group]
        same = [key for key in mine if len({v for _, found in runs for v in found.get(key, ((), ()))[1]}) == 1]
        if group is OTHER or (mine == same and group[0] not in ALWAYS):
            constant += same
            mine = [key for key in mine if key not in same]
        if len(runs) > 1 or group is OTHER:
            figures += [one_key(runs, key, group, len(mine) > 1, span, mark) for key in mine]
            continue
        for start in range(0, len(mine), COLOURS):
            series = [(label(key), *runs[0][1][key], k) for k, key in enumerate(mine[start : start + COLOURS])]
            figures.append(figure(group[0], group[1], series, span, mark))
    told = [f"{label(key)} {short(next(found[key][1][0] for _, found in runs if key in found))}" for key in constant]
    told = f'<p class="soft">The same at every step: {escape(", ".join(told))}.</p>' if told else ""
    return f'<div class="charts">{"".join(figures)}</div>{told}'


def one_key(runs, key: str, group, crowded: bool, span, mark) -> str:
    """The chart of one key over all runs, a colour each."""
    series = [(name, *found[key], k % COLOURS) for k, (name, found) in enumerate(runs) if key in found]
    if len(runs) == 1:
        series = [(label(key), *series[0][1:])]
    title = label(key).capitalize() if group is OTHER else group[0] + (f": {label(key)}" if crowded else "")
    return figure(title, group[1], series, span, mark)
