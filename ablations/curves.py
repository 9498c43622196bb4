"""Curves of ablations/results/: read and checked, measured, and compared. report.py makes tables of it."""

import csv
import json
import re
import sys

import numpy as np
from scipy import stats

FULL = 1000  # steps of an episode that was played to its end
SAME_RUNS = {  # (scale, variant): runs under another name that are of the same setting and count as its own, and why
    ("cpu", "trajsep"): (
        "random_16",
        "16 samples are nearly always all groups that act at once, 13 on average. They have seeds that it has, too: "
        "there are more runs than seeds",
    ),
}
NEEDED = [
    "global_step",
    "charts/episodes",
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/ice_transferred",
    "charts/factory_count",
    "charts/full_episodes",
]


def read(path):
    """A run's columns as float arrays, NaN where a field is blank; bad data ends in a sentence."""
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (UnicodeDecodeError, csv.Error):
        sys.exit(f"{path} is not UTF-8 text: copy it anew from its run.")
    if len(lines) < 3:
        sys.exit(f"{path} has {max(len(lines) - 1, 0)} rows below its header: a curve needs two or more.")
    head, rows = lines[0], []
    if missing := [name for name in NEEDED if name not in head]:
        sys.exit(f"{path}, line 1: there is no column {missing[0]}.")
    for number, cells in enumerate(lines[1:], 2):
        if len(cells) != len(head):
            sys.exit(f"{path}, line {number} has {len(cells)} fields in place of {len(head)}: it is cut or damaged.")
        for name, cell in zip(head, cells, strict=True):
            try:
                float(cell or "nan")
            except ValueError:
                sys.exit(f"{path}, line {number}: {cell!r} in column {name} is not a number.")
        row = {name: float(cell or "nan") for name, cell in zip(head, cells, strict=True)}
        if not row["global_step"] > (rows[-1]["global_step"] if rows else 0) or row["global_step"] == np.inf:
            sys.exit(f"{path}, line {number}: global_step {row['global_step']} is no step after the line before.")
        told = np.isfinite([row[name] for name in NEEDED]).all()
        if not (told or row["charts/episodes"] == 0):
            sys.exit(f"{path}, line {number}: episodes ended, but their number or what they were like is missing.")
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in head}


class Curve:
    def __init__(self, path):
        self.path, self.columns, made = path, read(path), path.with_suffix(".json")
        try:
            self.made = json.loads(made.read_text(encoding="utf-8")) if made.exists() else {}
            self.made["steps"] = int(self.made.get("steps", 0))
        except (ValueError, TypeError, AttributeError):
            sys.exit(f"{made} is not what run.py writes: copy it anew, or remove it.")
        self.step = self.columns["global_step"]
        self.steps = int(self.step[-1])
        self.window = 4096 if self.steps in (53248, 102400) else self.steps / 13

    def sums(self, metric):
        """Of each window: the metric's sum over the episodes that ended there, and their number."""
        window = np.ceil(self.step / self.window - 1e-9).astype(int) - 1
        episodes, size = self.columns["charts/episodes"], round(self.steps / self.window)
        values = np.where(episodes > 0, episodes * self.columns[f"charts/{metric}"], 0)
        return np.bincount(window, values, size), np.bincount(window, episodes, size)

    def by_window(self, metric):
        total, episodes = self.sums(metric)
        known = np.flatnonzero(episodes)
        if not len(known):
            return np.full(len(total), 0.0 if metric == "ice_transferred" else np.nan)
        left = 0 if metric == "ice_transferred" else None
        return np.interp(np.arange(len(total)), known, total[known] / episodes[known], left=left)

    def end(self, metric):
        total, episodes = (part[-2:].sum() for part in self.sums(metric))
        return total / episodes if episodes else self.by_window(metric)[-1]

    def first_full(self):
        rows = np.flatnonzero(self.columns["charts/full_episodes"] > 0)
        return self.step[rows[0]] if len(rows) else np.nan


MEASURES = {  # how a run is measured, and the limits of what is measured
    "ice of the run": (lambda curve: curve.by_window("ice_transferred").mean(), 0, np.inf),
    "ice at the end": (lambda curve: curve.end("ice_transferred"), 0, np.inf),
    "first full episode": (lambda curve: np.nan_to_num(curve.first_full(), nan=curve.steps), 0, np.inf),
    "length at the end": (lambda curve: curve.end("episodic_length"), 0, FULL),
    "return at the end": (lambda curve: curve.end("episodic_return"), -np.inf, np.inf),
    "factory count at the end": (lambda curve: curve.end("factory_count"), 0, np.inf),
}


def load(folder):
    """The curves of one variant by seed, all of one length."""
    curves = {}
    for path in sorted(folder.glob("*.csv")):
        if not re.fullmatch(r"seed\d+", path.stem):
            sys.exit(f"{path} is no seedN.csv: rename or remove it.")
        curves[path.stem[4:]] = Curve(path)
    longest = max((curve.steps for curve in curves.values()), default=0)
    for curve in curves.values():
        if curve.steps != (steps := max(curve.made["steps"], longest)):
            sys.exit(f"{curve.path} ends at step {curve.steps:,} of {steps:,}: the run is not finished.")
    return dict(sorted(curves.items(), key=lambda item: int(item[0])))


def runs_of(results, scale, name):
    """All runs of a setting: its own, and those under another name."""
    curves = load(results / scale / name)
    if (scale, name) in SAME_RUNS:
        other = SAME_RUNS[scale, name][0]
        curves |= {f"{other} {seed}": curve for seed, curve in load(results / scale / other).items()}
    return curves


def measure(curves, name):
    return np.array([MEASURES[name][0](curve) for curve in curves.values()])


def interval(values, low=-np.inf, high=np.inf):
    """95% interval of the mean (report.METHOD says how), within the limits of what is measured."""
    if np.isnan(values).any() or len(values) < 2:
        return np.nan, np.nan
    ends = np.mean(values) + stats.sem(values) * stats.t.ppf([0.025, 0.975], len(values) - 1)
    return tuple(np.clip(ends, low, high))


def middle_mean(values):
    return stats.trim_mean(values, 0.25)


RATIOS = np.geomspace(1e-4, 1e4, 8001)
RATIOS = np.concatenate([-RATIOS[::-1], [0], RATIOS])


def welch(first, second, ratios=1.0):
    """p of Welch's test of the second against `ratios` times the first."""
    one, two = ratios**2 * first.var(ddof=1) / len(first), second.var(ddof=1) / len(second)
    apart = np.abs(second.mean() - ratios * first.mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        df = (one + two) ** 2 / (one**2 / (len(first) - 1) + two**2 / (len(second) - 1))
        return np.where(one + two > 0, 2 * stats.t.sf(apart / np.sqrt(one + two), df), apart == 0)


def compare(first, second):
    """Ratio of the means with its interval (report.METHOD), Welch's p, Cohen's d; None where there are too few runs."""
    if min(len(first), len(second)) < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.divide(second.mean(), first.mean())
        d = np.divide(first.mean() - second.mean(), np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2))
    told = RATIOS[welch(first, second, RATIOS) < 0.05]  # apart; the rest can lie on both sides of it
    below, above = told[told < ratio].max(initial=-np.inf), told[told > ratio].min(initial=np.inf)
    likely = [*RATIOS[np.searchsorted(RATIOS, below, "right") : np.searchsorted(RATIOS, above)], ratio]
    low = max(min(likely), 0.0) if min(*first, *second) >= 0 else min(likely)
    high = max(likely) if max(likely) < RATIOS[-1] else np.inf
    return {"ratio": ratio, "low": low, "high": high, "p": float(welch(first, second)), "d": d}


def holm(p_values):
    """Holm's correction for as many tests as there are."""
    order, corrected, largest = np.argsort(p_values), np.empty(len(p_values)), 0.0
    for rank, i in enumerate(order):
        largest = corrected[i] = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
    return corrected
