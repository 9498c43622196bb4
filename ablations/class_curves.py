"""Prints how the classes of a run of ablations/trama_lux.py went along with its tasks, by its progress.csv.

    python ablations/class_curves.py runs/NAME

By iteration: adjusted Rand index, purity and normalised mutual information of the classes of the stored
trajectories against their tasks, the share of the largest class, codes used, the share of labels that a
clustering kept (in brackets: with random starts), and the predictor's accuracy against the classes.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np


def agreement(table):
    """Adjusted Rand index, purity and normalised mutual information of a table of counts (classes, tasks)."""
    table = np.asarray(table, dtype=float)
    total, classes, tasks = table.sum(), table.sum(1), table.sum(0)
    same, ours, theirs, pairs = ((n * (n - 1)).sum() for n in (table, classes, tasks, total))
    chance = ours * theirs / pairs
    most = (ours + theirs) / 2
    share, expected = table / total, np.outer(classes, tasks) / total**2
    information = (share[share > 0] * np.log(share[share > 0] / expected[share > 0])).sum()
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (classes / total, tasks / total)]
    rand = (same - chance) / (most - chance) if most > chance else 0.0
    return rand, table.max(1).sum() / total, information / np.mean(entropies) if any(entropies) else 0.0


def count_table(row):
    """Counts (classes, tasks) in a row of progress.csv, whose columns classes/TASK_NUMBER hold them."""
    cells = [name.removeprefix("classes/").rpartition("_") for name in row if name.startswith("classes/")]
    cells = [(task, int(number)) for task, _, number in cells if number.isdigit()]
    tasks, classes = ({cell[i]: None for cell in cells} for i in (0, 1))
    return [[float(row[f"classes/{task}_{k}"] or 0) for task in tasks] for k in classes]


def curves(rows):
    """The lines of the table, one for each iteration in which trajectories had classes."""
    yield f"{'step':>8}{'rand':>7}{'purity':>8}{'nmi':>7}{'largest':>9}{'codes':>7}{'kept':>15}{'accuracy':>10}"
    for row in rows:
        table = np.array(count_table(row))
        if table.sum() > 1:
            rand, purity, information = agreement(table)
            kept = [row[f"classes/{name}"] for name in ("kept", "kept_random")]
            kept = "{:.2f} ({:.2f})".format(*map(float, kept)) if all(kept) else ""
            line = f"{row['global_step']:>8}{rand:>7.2f}{purity:>8.2f}{information:>7.2f}"
            line += f"{table.sum(1).max() / table.sum():>9.2f}{float(row['classes/codes_used']):>7.0f}{kept:>15}"
            yield line + f"{float(row['classes/accuracy']):>10.2f}"


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    try:
        with open(parser.parse_args().run / "progress.csv") as file:
            print("\n".join(curves(csv.DictReader(file))))
    except OSError as error:
        sys.exit(str(error))
