"""Tries the classes of ablations/trama_lux.py on games of a trained policy, without training one that is told them.

    python ablations/class_trial.py runs/NAME --games 20

The run's policy plays the first 160 steps of games of each task. On these trajectories the VQ-VAE is trained
and clustered as in 40 iterations of a run, by each coverage loss and with four seeds; that is, always on the
same trajectories, of a policy that stays as it is. Printed by seed: adjusted Rand index against the tasks
after the first clustering and after the last, codes used, and the mean share of labels that the later
clusterings kept, from the last centroids and with random starts. With --stored nobody plays: the trajectories
are the newest N of each environment that are in the run's checkpoint and whole. The run's script is run as a program.
"""

import argparse
import sys
from pathlib import Path

import class_curves  # which says where the tools are
import load
import numpy as np
import torch
import trama_lux


def play(script, args, agent, task, number):
    """Every eighth state of the first 160 steps of one game on a held-out map: (T, 16)."""
    args.tasks, states = [task], []
    env, generator = script.LuxEnv(args), torch.Generator().manual_seed(number)
    obs, _ = env.reset(options={"map_seed": 1000 + number}, seed=number)
    for step in range(trama_lux.HORIZON):
        if step % trama_lux.STRIDE == 0:
            states.append(obs["planes"][0, : trama_lux.STATE_SIZE].astype(np.float32).mean((1, 2)))
        _, action = load.act(agent, obs, generator)
        obs, _, over, _, _ = env.step(action.numpy())
        if over:
            break
    return torch.from_numpy(np.stack(states))


def stored(run, number):
    """The newest whole trajectories of each environment in a run's checkpoint, as (task, states (T, 16))."""
    _, _, _, classes = class_curves.read_classes(run)
    games = []
    for now in classes.place.tolist():
        first = now - now % classes.places
        for place in (first + (now - n) % classes.places for n in range(1, min(number, classes.places - 1) + 1)):
            if classes.count[place] == trama_lux.NUM_POINTS:
                games.append((int(classes.task[place]), classes.states[place]))
    return games


def trial(games, num_classes, coverage, seed):
    """Rand index after the first and the last clustering, codes used, mean shares of labels kept (own, random)."""
    torch.manual_seed(seed)
    trama_lux.NUM_STORED = len(games)  # all of them
    classes = trama_lux.Classes(trama_lux.Args(num_envs=1, num_classes=num_classes, coverage=coverage))
    free = [place for place in range(len(classes.count)) if place not in classes.place.tolist()]
    for place, (task, states) in zip(free, games, strict=True):
        classes.states[place, : len(states)], classes.count[place], classes.task[place] = states, len(states), task
    optimizer, rng = torch.optim.Adam(classes.parameters()), torch.Generator().manual_seed(seed)
    found, shares = [], []
    for iteration in range(1, 41):
        classes.fit(optimizer, 32 if iteration <= 8 else 8, rng)
        share = classes.cluster(seed, iteration)
        _, valid, _, index, label = classes.look()
        if iteration % trama_lux.CLUSTER_EVERY == 0:
            table = np.zeros((num_classes, len(trama_lux.TASKS)))
            np.add.at(table, (label[label >= 0].numpy(), classes.task[label >= 0].numpy()), 1)
            found.append(class_curves.agreement(table)[0])
            shares.append([float(x) for x in share])
    return found[0], found[-1], len(index[valid].unique()), *np.mean(shares[1:], 0)


def main(flags):
    if flags.stored is not None and flags.stored < 1:
        raise load.Refusal(f"--stored must be at least 1, got {flags.stored}.")
    if not 8 <= flags.games <= 80:
        raise load.Refusal(f"--games must be between 8 and 80, got {flags.games}.")
    torch.set_num_threads(1)
    script, args, agent = load.load(flags.run)
    if flags.stored:
        games = stored(flags.run, flags.stored)
        if len(games) < 24:
            raise load.Refusal(
                f"{flags.run} has stored {len(games)} whole trajectories, a trial needs 24: train longer."
            )
    else:
        tasks = [(list(trama_lux.TASKS).index(task), task) for task in flags.tasks]
        games = [(number, play(script, args, agent, task, n)) for number, task in tasks for n in range(flags.games)]
    print(f"{len(games)} games of {flags.run}; by seed: first and last Rand index, codes, kept (random)")
    for num_classes in (3, 4):
        for coverage in ("tk", "t", "none"):
            rows = [trial(games, num_classes, coverage, seed) for seed in range(4)]
            cells = ["{:.2f} {:.2f} {:>4} {:.2f} ({:.2f})".format(*row) for row in rows]
            print(f"{num_classes} classes, {coverage:<5}" + " | ".join(cells), flush=True)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, whose script knows the tasks")
    parser.add_argument(
        "--games", type=int, default=20, metavar="N", help="games of each task (default: 20, at most 80)"
    )
    parser.add_argument("--stored", type=int, metavar="N", help="play none: take the newest N of each environment")
    tasks = ["cave", "mountain", "mountain-lean"]
    parser.add_argument(
        "--tasks", nargs="+", default=tasks, metavar="TASK", help="default: cave mountain mountain-lean"
    )
    try:
        main(parser.parse_args())
    except (load.Refusal, OSError) as error:
        sys.exit(str(error))
