"""Tables and curves of a figure, from the CSV files under ablations/results/ alone.

    python ablations/report.py baselines [--scale cpu]
    python ablations/report.py claims        the paper's rankings, pair by pair, from all figures' files

Writes results/<scale>/<figure>.png and .md and prints the table. A number is the mean over seeds
of a seed's mean over the episodes that ended in the last 8,192 environment steps, +- the standard
deviation over seeds; curves are means over windows of 4,096 steps. Welch's t-test and Cohen's d
(pooled standard deviation) compare with the first variant. A missing run is shown as missing. The
dashed line is the untrained policy, where results/<scale>/untrained/ holds its `--evaluate` tables.
"""

import argparse
import csv
import re
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from scipy.stats import ttest_ind

sys.path.insert(0, str(Path(__file__).resolve().parent))
from run import FIGURES, ROOT, SCALES  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

WINDOW, FINAL = 4096, 8192  # environment steps
METRICS = {
    "ice_transferred": "ice",
    "episodic_length": "length",
    "episodic_return": "return",
    "factory_count": "factory count",
    "factories_alive": "factories alive",
}
CLAIMS = (  # variants as the paper ranks them, best first
    ("Fig. 8", "trajsep", "global_critic", "own_reward_0", "mappo"),
    ("Fig. 8", "global", "mappo"),
    ("Fig. 4", "trajsep", "groups_16", "groups_8", "groups_4", "groups_2", "groups_1"),
    ("Fig. 3", "trajsep", "units_only", "two_trajectories", "groups_1", "global"),
    ("Fig. 9", "trajsep", "own_reward_75", "own_reward_50", "own_reward_25", "own_reward_0"),
    ("Fig. 6", "trajsep", "top_advantage_1", "top_abs_advantage_1", "top_return_1", "random_1"),
    ("Fig. 5", "trajsep", "closest_heavy", "closest_factory", "quadrant"),
    ("Fig. 7", "trajsep", "random_16", "random_8", "random_4", "random_2", "random_1"),
    ("Fig. 10", "trajsep", "ippo"),
    ("Fig. 10", "trajsep", "mappo"),
)
VERDICTS = {  # by (the same order here, p below 0.05)
    (True, True): "holds",
    (True, False): "the same order, p above 0.05",
    (False, False): "not seen, p above 0.05",
    (False, True): "the other way round",
}


def read(path):
    """A run's columns as float arrays, NaN where a field is blank."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}


def episode_mean(run, metric, rows):
    """Mean of a metric over the episodes that ended in the given rows (bool mask); NaN if none did."""
    count = np.where(rows, run["charts/episodes"], 0)
    return np.nansum(count * run[f"charts/{metric}"]) / count.sum() if count.sum() else np.nan


def windows(run, metric):
    """(end of each window, mean of the episodes that ended in it), without windows in which none did."""
    step = run["global_step"]
    ends = np.arange(WINDOW, step[-1] + WINDOW, WINDOW)
    means = np.array([episode_mean(run, metric, (step > end - WINDOW) & (step <= end)) for end in ends])
    return ends[~np.isnan(means)], means[~np.isnan(means)]


def final(run, metric):
    return episode_mean(run, metric, run["global_step"] > run["global_step"][-1] - FINAL)


def reached(runs, share):
    """End of the first window in which this share of all runs' episodes lasted 1,000 steps, or 'never'."""
    steps = runs[0]["global_step"]
    for end in np.arange(WINDOW, steps[-1] + WINDOW, WINDOW):
        full = episodes = 0
        for run in runs:
            rows = (run["global_step"] > end - WINDOW) & (run["global_step"] <= end)
            count = np.where(rows, run["charts/episodes"], 0)
            episodes += count.sum()
            full += np.nansum(count * run["charts/full_episodes"])
        if episodes and full / episodes >= share:
            return f"{end:,.0f}"
    return "never"


def first_full(run):
    rows = np.flatnonzero(run["charts/full_episodes"] > 0)
    return f"{run['global_step'][rows[0]]:,.0f}" if len(rows) else "never"


def spread(values):
    digits = 1 if abs(np.mean(values)) < 1000 else 0
    std = f" +- {np.std(values, ddof=1):,.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):,.{digits}f}{std}"


def against(values, reference):
    """Welch's t-test and Cohen's d of `values` against `reference`."""
    if min(len(values), len(reference)) < 2:
        return "too few seeds"
    pooled = np.sqrt((np.var(values, ddof=1) + np.var(reference, ddof=1)) / 2)
    p = ttest_ind(reference, values, equal_var=False).pvalue
    return f"p = {p:.2g}, d = {(np.mean(reference) - np.mean(values)) / pooled:.1f}" if pooled else "no variance"


def table(variants, data):
    """Two Markdown tables: the final numbers, and when episodes last 1,000 steps."""
    head = ["variant", "seeds", *METRICS.values(), "ice: against the first", "return: against the first", "paper's ice"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    reference = {metric: [final(run, metric) for run in data[variants[0].name].values()] for metric in METRICS}
    for variant in variants:
        runs = list(data[variant.name].values())
        if not runs:
            lines.append(f"| {variant.label} | missing |" + " |" * (len(head) - 2))
            continue
        values = {metric: [final(run, metric) for run in runs] for metric in METRICS}
        cells = [variant.label, " ".join(map(str, data[variant.name]))]
        cells += [spread(values[metric]) for metric in METRICS]
        for metric in ("ice_transferred", "episodic_return"):
            cells.append("" if variant == variants[0] else against(values[metric], reference[metric]))
        lines.append("| " + " | ".join([*cells, variant.paper_ice]) + " |")
    lines += [
        "",
        "| variant | 10% of episodes last 1,000 steps | 95% | first such episode, by seed |",
        "|---|---|---|---|",
    ]
    for variant in variants:
        runs = data[variant.name]
        if runs:
            by_seed = "; ".join(f"{seed}: {first_full(run)}" for seed, run in runs.items())
            shares = [reached(list(runs.values()), share) for share in (0.1, 0.95)]
            lines.append(f"| {variant.label} | {shares[0]} | {shares[1]} | {by_seed} |")
    return "\n".join(lines) + "\n"


def claims(variants, data):
    """A Markdown table of each claim that one variant brings in more ice than the next, and what came out."""
    head = ["figure", "claim: more ice with", "than with", "paper: second / first", "here", "Welch's p", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for figure, *names in CLAIMS:
        for pair in pairwise(names):
            labels = [variants[name].label for name in pair]
            paper = [re.search(r"[\d,]+", variants[name].paper_ice) for name in pair]
            ratio = ""
            if all(paper):
                first, second = (int(number.group().replace(",", "")) for number in paper)
                ratio = f"{second / first:.2f}"
            ice = [[final(run, "ice_transferred") for run in data[name].values()] for name in pair]
            if min(map(len, ice)) < 2:
                lines.append("| " + " | ".join([figure, *labels, ratio, "", "", "missing"]) + " |")
                continue
            means, p = [np.mean(values) for values in ice], ttest_ind(*ice, equal_var=False).pvalue
            verdict = VERDICTS[means[0] > means[1], p < 0.05]
            lines.append(
                "| " + " | ".join([figure, *labels, ratio, f"{means[1] / means[0]:.2f}", f"{p:.2g}", verdict]) + " |"
            )
    return "\n".join(lines) + "\n"


def untrained(folder, metric):
    """Mean over the seeds of an untrained policy's `--evaluate` table (sampled actions); None without one."""
    values = []
    for path in sorted((folder / "untrained").glob("seed*_eval.txt")):
        rows = [[cell.strip() for cell in line.split("|")] for line in path.read_text().splitlines() if "|" in line]
        sampled = next(row for row in rows if row[1] == "sampled")
        values.append(float(sampled[rows[0].index(metric)].split()[0].replace(",", "")))
    return np.mean(values) if values else None


def plot(variants, data, path):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for i, variant in enumerate(variants):
        runs = list(data[variant.name].values())
        for axis, metric in zip(axes, ("episodic_length", "ice_transferred"), strict=True):
            if not runs:
                axis.plot([], [], color=f"C{i}", label=f"{variant.label} (missing)")
                continue
            grid = np.arange(WINDOW, runs[0]["global_step"][-1] + 1, WINDOW)
            curves = np.array([np.interp(grid, *windows(run, metric)) for run in runs])
            mean, std = curves.mean(0), curves.std(0)
            axis.plot(grid, mean, color=f"C{i}", label=f"{variant.label} ({len(runs)} seed{'s' * (len(runs) > 1)})")
            axis.fill_between(grid, mean - std, mean + std, color=f"C{i}", alpha=0.2)
    levels = {
        "episode length (steps)": untrained(path.parent, "episodic_length"),
        "ice transferred per episode": untrained(path.parent, "ice_transferred"),
    }
    for axis, title in zip(axes, levels, strict=True):
        if levels[title] is not None:
            axis.axhline(levels[title], color="grey", linestyle="--", label="untrained policy")
        axis.set(xlabel="environment steps", ylabel=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = 4 if max(map(len, labels)) < 50 else 3
    figure.legend(handles, labels, loc="lower center", ncol=columns, fontsize=8)
    figure.tight_layout(rect=(0, max(0.1, 0.05 * -(-len(labels) // columns)), 1, 1))
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "claims"])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--results", type=Path, default=ROOT / "ablations/results")
    args = parser.parse_args()
    figures = FIGURES if args.figure == "claims" else [args.figure]
    folder, variants = args.results / args.scale, {v.name: v for figure in figures for v in FIGURES[figure]}
    data = {
        name: {int(path.stem[4:]): read(path) for path in sorted((folder / name).glob("seed*.csv"))}
        for name in variants
    }
    first = next(iter(variants))
    if not data[first]:
        sys.exit(f"{folder / first} holds no seedN.csv: run `python ablations/run.py {figures[0]}` first.")
    if args.figure == "claims":
        text = claims(variants, data)
    else:
        text = table(list(variants.values()), data)
        plot(list(variants.values()), data, folder / f"{args.figure}.png")
    (folder / f"{args.figure}.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
