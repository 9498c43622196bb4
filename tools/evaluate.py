"""Play a trained policy on fixed maps and print what it did: a mean over maps, each played once.

Training never draws these maps, and the numbers do not depend on --jobs. `lichen_gained` is what the own
factories gained in all steps, `lichen` what they have when the game ends: each side's. Actions are sampled, as
in training. With --greedy the likeliest action is taken, and the team can stand still: what is done once in a
while, as building a unit, may never be the single likeliest action. A run's first policy brought 22,267 ice and
lived 1,000 steps with sampled actions, 0 ice and 151 steps with greedy ones.
The script beside the model is run as a program: play only runs that you trust.

    python tools/evaluate.py runs/NAME
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import load
import numpy as np
import torch


def play(map_seed, where, greedy):
    """Play one map in a process of its own; the statistics of the episode."""
    script, args, agent = load.load(**where)
    generator = torch.Generator().manual_seed(map_seed)
    env = script.make_worker_env(args)
    try:
        obs, _ = env.reset(options={"map_seed": map_seed}, seed=map_seed)
    except script.Refusal as error:
        raise load.Refusal(str(error)) from None
    own, gained, over = np.concatenate([view.factories["id"] for view in env.views]), 0, False
    while not over:
        _, action = load.act(agent, obs, generator, greedy)
        obs, _, over, _, info = env.step(action.numpy())
        gained += sum(env.engine.meters["lichen_gained"][f"factory_{number}"] for number in own)
    stats = {name: float(info["episode"][name]) for name in script.EPISODE_STATS}
    lichen = {"lichen_gained": gained, "lichen": env.engine.lichen()[own].sum()}
    return stats | {name: float(value) / len(env.views) for name, value in lichen.items()}


def evaluate(flags):
    """Play all maps, --jobs at a time; print the table and write the file."""
    load.refuse_taken(flags.json)
    where = {name: getattr(flags, name) for name in ("run", "best", "script", "map_size")}
    script, args, _ = load.load(**where)
    if not 1 <= flags.episodes <= script.NUM_EVAL_MAPS:
        raise load.Refusal(f"--episodes must be between 1 and {script.NUM_EVAL_MAPS}, got {flags.episodes}.")
    if flags.jobs < 1:
        raise load.Refusal(f"--jobs must be at least 1, got {flags.jobs}.")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: script.leave(128 + n, "Stopped; nothing was written."))

    jobs, spawn = min(flags.jobs, flags.episodes), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        games = [pool.submit(play, map_seed, where, flags.greedy) for map_seed in range(flags.episodes)]
        try:
            for count, game in enumerate(as_completed(games), start=1):
                game.result()
                if sys.stderr.isatty():
                    print(f"\r{count} of {flags.episodes} maps", end="\r", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    maps = [game.result() for game in games]
    mean = {name: float(np.mean([stats[name] for stats in maps])) for name in maps[0]}
    std = {name: float(np.std([stats[name] for stats in maps])) for name in maps[0]}
    how = "the likeliest" if flags.greedy else "sampled"
    where = f"maps 0 to {flags.episodes - 1} of {args.map_size}x{args.map_size}"
    print(f"{flags.run}: {where}, actions {how}; mean and standard deviation over maps")
    for name in mean:
        print(f"{name:<18}{mean[name]:>12,.2f} +- {std[name]:,.2f}")
    if flags.json:
        content = {"run": str(flags.run), "best": flags.best, "greedy": flags.greedy, "args": asdict(args)}
        content |= {"mean": mean, "std": std, "maps": [{"map_seed": n, **stats} for n, stats in enumerate(maps)]}
        with open(flags.json, "x") as file:
            json.dump(content, file, indent=2)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    load.add_arguments(parser)
    parser.add_argument("--episodes", type=int, default=16, help="play maps 0 to N - 1 (default: 16)", metavar="N")
    parser.add_argument("--map-size", type=int, help="another map size than the run's", metavar="N")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest action; see above")
    parser.add_argument("--json", type=Path, help="write settings and the numbers of each map", metavar="FILE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="maps at a time (default: cores)", metavar="N")
    try:
        evaluate(parser.parse_args())
    except (load.Refusal, OSError, BrokenProcessPool) as error:
        sys.exit(str(error))
