"""Prints how the classes of a run of ablations/trama_lux.py went along with its tasks, by its progress.csv.

    python ablations/class_curves.py runs/NAME
    python ablations/class_curves.py runs/NAME --picture embeddings.png

By iteration: adjusted Rand index, purity and normalised mutual information of the classes of the stored
trajectories against their tasks, the share of the largest class, codes used, the share of labels that a
clustering kept (in brackets: with random starts), and the predictor's accuracy against the classes.
The picture shows the embeddings of the trajectories in the run's checkpoint, in the two directions in which
they differ most, coloured by task and by class. For it the run's script is run: only of runs that you trust.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import load  # noqa: E402


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


def embeddings(run):
    """Of a checkpoint's trajectories that have a class: embeddings (N, 4), classes (N,), tasks (N,), tasks' names."""
    script, args, _ = load.load(run)
    classes = script.Classes(args)
    classes.load_state_dict(load.read(run / "checkpoint.pt")["classes"][1])
    _, _, embedding, _, label = classes.look()
    known = label >= 0
    return embedding[known].numpy(), label[known].numpy(), classes.task[known].numpy(), list(script.TASKS)


def plane(points):
    """Points (N, d) in the two directions in which they differ most: (N, 2)."""
    points = points - points.mean(0)
    return points @ np.linalg.svd(points, full_matrices=False)[2][:2].T


def draw(run, path):
    """Write the picture of a run's embeddings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points, label, task, names = embeddings(run)
    if len(points) < 3:
        raise load.Refusal(f"{run} has no classes yet: let it train for longer.")
    flat, (figure, axes) = plane(points), plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True)
    for axis, numbers, title in zip(axes, (task, label), ("task", "class"), strict=True):
        for number in np.unique(numbers):
            name = names[number] if title == "task" else str(number)
            axis.scatter(*flat[numbers == number].T, s=12, label=name)
        axis.set_title(f"by {title}"), axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the embeddings")
    flags = parser.parse_args()
    try:
        load.refuse_taken(flags.picture)
        with open(flags.run / "progress.csv") as file:
            print("\n".join(curves(csv.DictReader(file))))
        if flags.picture:
            draw(flags.run, flags.picture)
    except (load.Refusal, OSError) as error:
        sys.exit(str(error))
