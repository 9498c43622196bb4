"""Plays each run's policy on every task of ablations/trama_lux.py, on the same held-out maps, and prints the matrix.

    python ablations/cross_play.py runs/mixed runs/cave runs/mountain runs/mountain-lean --json cross_play.json

Each cell is the mean return over the maps with its standard error. The last rows compare every run with the
first one, map by map: difference and standard error. If no run that has trained on one task alone beats the
one that has trained on all by more than two standard errors, nothing is gained by knowing the task.
Actions are sampled, as in tools/evaluate.py, and the numbers do not depend on --jobs. The script beside
each model is run as a program: play only runs that you trust.
"""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import load  # noqa: E402


def play(run, task, map_seed):
    """One game on a task's map, in a process of its own: the statistics of the episode."""
    torch.set_num_threads(1)
    script, args, agent = load.load(run)
    args.tasks = [task]
    env, generator, over = script.LuxEnv(args), torch.Generator().manual_seed(map_seed), False
    if hasattr(agent, "generator"):
        agent.generator.manual_seed(map_seed)  # where a policy draws classes by chance
    obs, _ = env.reset(options={"map_seed": map_seed}, seed=map_seed)
    while not over:
        _, action = load.act(agent, obs, generator)
        obs, _, over, _, info = env.step(action.numpy())
    return {name: float(info["episode"][name]) for name in script.EPISODE_STATS}


def mean_and_error(values):
    """Mean and standard error of a list."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def matrix(games, runs, tasks, name="episodic_return"):
    """Rows of (label, (mean, standard error) by task): each run, then each less the first, map by map."""
    values = {key: np.array([stats[name] for stats in found]) for key, found in games.items()}
    rows = [(Path(run).name, [mean_and_error(values[run, task]) for task in tasks]) for run in runs]
    for run in runs[1:]:
        less = [mean_and_error(values[run, task] - values[runs[0], task]) for task in tasks]
        rows.append((f"{Path(run).name} less {Path(runs[0]).name}", less))
    return rows


def show(rows, tasks):
    width = max(len(label) for label, _ in rows)
    lines = [" " * width + "".join(f"{task:>18}" for task in tasks)]
    for label, cells in rows:
        lines.append(f"{label:<{width}}" + "".join(f"{mean:>10.2f} ±{error:>6.2f}" for mean, error in cells))
    return "\n".join(lines)


def cross_play(flags):
    """Play all games, --jobs at a time; print the matrix and write the file."""
    load.refuse_taken(flags.json)
    if flags.episodes < 2 or flags.jobs < 1:
        raise load.Refusal("--episodes must be at least 2, --jobs at least 1.")
    for run in flags.runs:
        script, _, _ = load.load(run)
        if not set(flags.tasks) <= set(getattr(script, "TASKS", ())):
            raise load.Refusal(f"The script of {run} does not know all of the tasks {' '.join(flags.tasks)}.")
    with ProcessPoolExecutor(flags.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pairs = [(run, task) for run in flags.runs for task in flags.tasks]
        games = {pair: [pool.submit(play, *pair, n) for n in range(flags.episodes)] for pair in pairs}
        games = {pair: [game.result() for game in found] for pair, found in games.items()}
    rows = matrix(games, flags.runs, flags.tasks)
    print(f"Return, mean and standard error over {flags.episodes} held-out maps of each task")
    print(show(rows, flags.tasks))
    if flags.json:
        content = {"tasks": flags.tasks, "episodes": flags.episodes, "rows": rows}
        content["games"] = [{"run": str(run), "task": task, "maps": found} for (run, task), found in games.items()]
        flags.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs; the first is the yardstick")
    tasks = ["cave", "mountain", "mountain-lean"]
    parser.add_argument(
        "--tasks", nargs="+", default=tasks, metavar="TASK", help="default: cave mountain mountain-lean"
    )
    parser.add_argument("--episodes", type=int, default=16, metavar="N", help="maps of each task (default: 16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers of each game")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="games at a time (default: cores)"
    )
    try:
        cross_play(parser.parse_args())
    except (load.Refusal, OSError) as error:
        sys.exit(str(error))
