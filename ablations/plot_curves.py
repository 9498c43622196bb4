"""Plot learning curves from the CSV files of runs: mean over seeds with a band of one standard deviation.

    python ablations/plot_curves.py OUT.png LABEL=FOLDER [LABEL=FOLDER ...] [--untrained LENGTH ICE]

Each FOLDER holds one progress.csv per seed, under any name ending in .csv. Episodes end at their
own times, so a curve is the mean of the episodes that ended in a window of 4,096 steps.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

WINDOW = 4096  # environment steps
METRICS = {"charts/episodic_length": "episode length (steps)", "charts/ice_transferred": "ice transferred per episode"}


def read_run(path, metric):
    """Windowed means of one run: steps (w,) and values (w,), NaN where no episode ended."""
    with open(path) as file:
        rows = [(int(row["global_step"]), float(row[metric] or "nan")) for row in csv.DictReader(file)]
    steps, values = np.array(rows).T
    windows = np.ceil(steps / WINDOW).astype(int)
    means = []
    for window in range(1, windows.max() + 1):
        ended = values[(windows == window) & ~np.isnan(values)]
        means.append(ended.mean() if len(ended) else np.nan)
    return np.arange(1, windows.max() + 1) * WINDOW, np.array(means)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--untrained", nargs=2, type=float, metavar=("LENGTH", "ICE"))
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(METRICS), figsize=(11, 4))
    for i, run in enumerate(args.runs):
        label, _, folder = run.partition("=")
        paths = sorted(Path(folder).glob("*.csv"))
        if not paths:
            sys.exit(f"There are no CSV files in {folder}: give LABEL=FOLDER with a folder of progress.csv files.")
        for axis, metric in zip(axes, METRICS, strict=True):
            curves = [read_run(path, metric) for path in paths]
            longest = max(len(steps) for steps, _ in curves)
            table = np.full((len(curves), longest), np.nan)
            for row, (_, values) in zip(table, curves, strict=True):
                row[: len(values)] = values
            some = ~np.isnan(table).all(0)
            steps = np.arange(1, longest + 1)[some] * WINDOW
            mean, std = np.nanmean(table[:, some], 0), np.nanstd(table[:, some], 0)
            axis.plot(steps, mean, color=f"C{i}", label=f"{label} ({len(paths)} seeds)")
            axis.fill_between(steps, mean - std, mean + std, color=f"C{i}", alpha=0.2)
            for _, values in curves:
                known = ~np.isnan(values)
                x = np.arange(1, len(values) + 1)[known] * WINDOW
                axis.plot(x, values[known], color=f"C{i}", alpha=0.35, linewidth=0.8)
    levels = zip(METRICS.values(), args.untrained or (None, None), strict=True)
    for axis, (title, level) in zip(axes, levels, strict=True):
        if level is not None:
            axis.axhline(level, color="grey", linestyle="--", label="untrained policy")
        axis.set(xlabel="environment steps", ylabel=title, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
