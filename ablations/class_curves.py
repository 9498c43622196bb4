"""Prints how the classes of a run of ablations/trama_lux.py went along with its tasks, by its progress.csv.

    python ablations/class_curves.py runs/NAME
    python ablations/class_curves.py runs/NAME --picture embeddings.png
    python ablations/class_curves.py runs/NAME --games 16

By iteration: adjusted Rand index, purity and normalised mutual information of the classes of the stored
trajectories against their tasks, the share of the largest class, codes used, the share of labels that a
clustering kept (in brackets: with random starts), and the predictor's accuracy against the classes.
The picture shows the embeddings of the trajectories in the run's checkpoint, in the two directions in which
they differ most, coloured by task and by class. --games plays the first 160 steps of N games of each of the
run's tasks on held-out maps; printed by steps since the reset: how often the class that an entity takes is that
of its trajectory, which is known after these steps, and how often the commonest task of that class, among the
stored trajectories, is the game's. For both the run's script is run: only of runs that you trust.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch

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


def read_classes(run):
    """The run's script, settings and policy, and the classes in its checkpoint."""
    script, args, agent = load.load(run)
    classes = script.Classes(args)
    classes.load_state_dict(load.read(run / "checkpoint.pt")["classes"][1])
    return script, args, agent, classes


def embeddings(run):
    """Of a checkpoint's trajectories that have a class: embeddings (N, 4), classes (N,), tasks (N,), tasks' names."""
    script, _, _, classes = read_classes(run)
    _, _, embedding, _, label = classes.look()
    known = label >= 0
    return embedding[known].numpy(), label[known].numpy(), classes.task[known].numpy(), list(script.TASKS)


def play(script, args, agent, classes, task, number):
    """The first 160 steps of a game: told (T, K), the class that each entity takes, -1 without one; and its own."""
    args.tasks, states, told, over = [task], [], [], False
    env, generator = script.LuxEnv(args), torch.Generator().manual_seed(number)
    obs, _ = env.reset(options={"map_seed": 1000 + number}, seed=number)
    while len(told) < script.HORIZON and not over:
        if len(told) % script.STRIDE == 0:
            states.append(obs["planes"][0, : script.STATE_SIZE].astype(np.float32).mean((1, 2)))
        seen = {key: torch.from_numpy(value) for key, value in obs.items()}
        seen |= agent.classify(seen)
        told.append(np.where(obs["kind"][0] == script.EMPTY, -1, seen["klass"][0].numpy()))
        probs = agent.get_distribution(seen).probs
        action = probs.flatten(0, 1).multinomial(1, generator=generator).view(probs.shape[:2])
        obs, _, over, _, _ = env.step(action.numpy())
    place = int(classes.place[0])  # that of the trajectory which the run was in
    classes.states[place, : len(states)], classes.count[place] = torch.from_numpy(np.stack(states)), len(states)
    return np.stack(told), int(classes.look()[4][place])


def accuracy(run, games):
    """The lines of the table of accuracies by steps since the reset."""
    script, args, agent, classes = read_classes(run)
    label, names = classes.look()[4], list(script.TASKS)
    if args.class_source != "predictor" or not (label >= 0).any():
        raise load.Refusal(f"{run} has no predicted classes: --games is for runs that have.")
    table = np.zeros((args.num_classes, len(names)))
    np.add.at(table, (label[label >= 0].numpy(), classes.task[label >= 0].numpy()), 1)
    meaning, pairs = table.argmax(1), [(task, number) for task in args.tasks for number in range(games)]
    played = [(names.index(task), *play(script, args, agent, classes, task, number)) for task, number in pairs]
    counts = np.bincount([own for _, _, own in played])
    yield f"{'steps':>10}{'class':>8}{'task':>8}   of {len(played)} games; the commonest class has {counts.max()}"
    for first, end in ((0, 1), (1, 8), (8, 16), (16, 32), (32, 64), (64, 128), (128, 160)):
        told = [(number, own, now[now >= 0]) for number, told, own in played for now in told[first:end]]
        if told:  # a game has lasted so long
            by_class = np.concatenate([now == own for _, own, now in told])
            by_task = np.concatenate([meaning[now] == number for number, _, now in told])
            yield f"{first:>4} to {end - 1:>3}{by_class.mean():>8.2f}{by_task.mean():>8.2f}"


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
    parser.add_argument(
        "--games", type=int, default=0, metavar="N", help="print the accuracy by step in N games a task"
    )
    flags = parser.parse_args()
    try:
        load.refuse_taken(flags.picture)
        with open(flags.run / "progress.csv") as file:
            print("\n".join(curves(csv.DictReader(file))))
        if flags.picture:
            draw(flags.run, flags.picture)
        if flags.games > 0:
            torch.set_num_threads(1)
            print("\n" + "\n".join(accuracy(flags.run, flags.games)))
    except (load.Refusal, OSError) as error:
        sys.exit(str(error))
