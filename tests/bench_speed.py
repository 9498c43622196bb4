"""Measures speed (not collected by pytest): engine, wrapper, rollout, update, whole training.

    python tests/bench_speed.py                        at the setting of --small
    python tests/bench_speed.py --paper                at the paper's setting (48x48, 4 factories, 200K parameters)
    python tests/bench_speed.py --baseline COMMIT      the script of an older commit beside it, in turn
    python tests/bench_speed.py --official             the engine's own wrapper (SB3Wrapper) as well

The engine is measured at 80 units, 40 a team, in random legal play on 48x48: one game is played and
its actions recorded, then all engines play them again. The rest comes from runs of the script
itself, watched from outside. Processor time for the engine, wall time for the rest. bfloat16 is as
the script chooses it for the machine, for an older commit as well, unless --bf16 or --no-bf16 says.
"""

import argparse
import copy
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch
from luxai_s2.env import LuxAI_S2
from luxai_s2.unit import UnitType
from luxai_s2.wrappers import SB3Wrapper
from luxai_s2.wrappers.controllers import Controller
from luxai_s2_fast import LuxAI_S2 as FastLux

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo_trajsep_lux as script  # noqa: E402

SCRIPT = ROOT / "ppo_trajsep_lux.py"

UNITS, STEPS, MAP_SEED = 80, 200, 5
REPEATS = 3  # of each engine, in turn; the best counts
# what --small stands for, for commits that do not have it
OLD_SMALL = ["--map-size", "32", "--factories-per-team", "2", "--max-units", "30", "--channels", "24"]
WATCH = """
import json, runpy, sys, time
import torch
from torch.distributions.categorical import Categorical
from gymnasium.vector import AsyncVectorEnv
spans, began, state = {"rollout": [], "update": []}, time.time(), {"phase": None}
def sample(self, *a, **k):
    if state["phase"] != "rollout":
        if state["phase"] == "update":
            spans["update"].append(state["last"] - state["start"])
        state.update(phase="rollout", start=time.time())
    return real_sample(self, *a, **k)
def step_wait(self, *a, **k):
    out = real_wait(self, *a, **k)
    state["last"] = time.time()
    return out
def zero_grad(self, *a, **k):
    if state["phase"] == "rollout":
        spans["rollout"].append(state["last"] - state["start"])
        state.update(phase="update", start=time.time())
    return real_zero(self, *a, **k)
def step(self, *a, **k):
    out = real_step(self, *a, **k)
    state["last"] = time.time()
    return out
real_sample, Categorical.sample = Categorical.sample, sample
real_wait, AsyncVectorEnv.step_wait = AsyncVectorEnv.step_wait, step_wait
real_zero, torch.optim.Adam.zero_grad = torch.optim.Adam.zero_grad, zero_grad
real_step, torch.optim.Adam.step = torch.optim.Adam.step, step
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("SPANS " + json.dumps(spans))
"""


def crowd(engine, lichen):
    """Put 40 units of each team on free tiles; with `lichen`, clear ground around the factories."""
    rng, state = np.random.default_rng(MAP_SEED), engine.state
    tiles = iter(rng.permutation(np.argwhere(state.board.factory_occupancy_map == -1)))
    for player in script.PLAYERS:
        for factory in state.factories[player].values():
            factory.cargo.water += 100_000
            if lichen:
                x, y = np.maximum(factory.pos.pos - 6, 0)
                state.board.rubble[x : x + 13, y : y + 13] = 0
        for i in range(UNITS // 2):
            kind = UnitType.HEAVY if i % 4 == 0 else UnitType.LIGHT
            unit = engine.add_unit(state.teams[player], kind, next(tiles))
            unit.power = unit.battery_capacity


def new_env(engine=None):
    """Both sides by the script's environment on one map, on another engine if one is given."""
    env = script.LuxEnv(script.Args(opponent="self", max_units=UNITS, augment=False))
    env.engine = engine or env.engine
    env.reset(options={"map_seed": MAP_SEED})
    return env


def play(lichen):
    """Random legal play of both sides: (the engine's actions, milliseconds a step of each part)."""
    env, rng, log, spent = new_env(), np.random.default_rng(0), [], Counter()
    crowd(env.engine, lichen)
    obs = env.engine.state.get_obs()
    for side, player in enumerate(script.PLAYERS):
        env.ids[side] = script.assign_slots(env.ids[side], env.numbers[side], obs, player, UNITS)
    nothing = np.zeros((2, env.num_slots), np.float32)
    env.views = [None, None]
    env._observe(obs, nothing, nothing)

    def timed(owner, name, part):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            spent[part] += time.process_time() - start
            return result

        return patch.object(owner, name, call)

    engine_step = env.engine.step
    env.engine.step = lambda actions: log.append(actions) or engine_step(actions)
    parts = [(script.View, "__init__"), (script, "action_masks"), (script, "observe"), (script, "engine_actions")]
    with ExitStack() as stack:
        for owner, name in parts:
            stack.enter_context(timed(owner, name, "features, masks and orders"))
        stack.enter_context(timed(env.engine, "step", "engine"))
        stack.enter_context(timed(env, "step", "all"))
        for _ in range(STEPS):
            mask = np.array(env.masks)
            mask[:, UNITS:, script.WATER] &= lichen
            env.step((rng.random(mask.shape) * mask).argmax(-1))
    return log, {part: seconds / STEPS * 1e3 for part, seconds in spent.items()}


def replay(cls, log, lichen, wrap=lambda engine: engine, **config):
    """Steps per second of an engine that plays recorded actions, in a wrapper."""
    engine = cls(map_size=48, MIN_FACTORIES=4, MAX_FACTORIES=4, max_episode_length=1000, verbose=0, **config)
    new_env(engine)
    crowd(engine, lichen)
    actions, wrapped = copy.deepcopy(log), wrap(engine)
    start = time.process_time()
    for action in actions:
        wrapped.step(action)
    return len(log) / (time.process_time() - start)


class Recorded(Controller):
    """The engine's wrapper asks a controller for each team's actions; these are the engine's already."""

    def action_to_lux_action(self, agent, obs, action):
        return action


class GymLux(LuxAI_S2, gym.Env):
    """The stock engine as gymnasium 1 wants it before it lets the engine's wrapper take it."""


def bench_engine(official):
    print(f"Engine and wrapper, 48x48, {UNITS} units, random legal play of both sides, one process")
    engines = {
        "stock engine": (LuxAI_S2, {}),
        "... without validation": (LuxAI_S2, {"validate_action_space": False}),
        "fast engine": (FastLux, {}),
    }
    if official:
        engines["stock in its wrapper"] = GymLux, {"wrap": lambda e: SB3Wrapper(e, controller=Recorded(None))}
    for lichen in (False, True):
        log, spent = play(lichen)
        speed = dict.fromkeys(engines, 0.0)
        for _ in range(REPEATS):
            for name, (cls, config) in engines.items():
                speed[name] = max(speed[name], replay(cls, log, lichen, **config))
        print(f"  {'with' if lichen else 'without'} lichen")
        for name, steps in speed.items():
            print(f"    {name:23} {steps:7.0f} steps/s   {steps / speed['stock engine']:.1f} x stock")
        side, wrapper = spent["features, masks and orders"] / 2, spent["all"] - spent["engine"]
        print(f"    features, masks, orders {side:7.2f} ms   {side / spent['engine']:.2f} x the engine's part, a side")
        print(f"    all else than engine    {wrapper:7.2f} ms   {wrapper / spent['engine']:.2f} x, both sides")
        print(f"    wrapper                 {1e3 / spent['all']:7.0f} steps/s   both sides")


def bench_training(path, flags, iterations, name):
    """Run a script for some iterations and print its phases; (rollout, update, whole) seconds an iteration."""
    with tempfile.TemporaryDirectory() as folder:
        batch = script.Args().num_envs * script.Args().num_steps
        flags = [*flags, "--total-timesteps", str(batch * iterations), "--run-name", "bench"]
        flags += ["--num-steps", str(script.Args().num_steps), "--num-minibatches", str(script.Args().num_minibatches)]
        watch = Path(folder) / "watch.py"
        watch.write_text(WATCH)
        command = [sys.executable, str(watch), str(path), *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        spans = next(line for line in done.stdout.splitlines() if line.startswith("SPANS "))
        spans = {key: np.array(value) for key, value in json.loads(spans[6:]).items()}
        with open(Path(folder) / "runs/bench/progress.csv") as file:
            seconds = np.diff([float(row["charts/seconds"]) for row in csv.DictReader(file)])
    rollout, update, whole = np.median(spans["rollout"][1:]), np.median(spans["update"][1:]), np.median(seconds)
    print(f"  {name}")
    print(f"    rollout with inference  {batch / rollout:7.0f} steps/s   {rollout / whole:4.0%} of an iteration")
    print(f"    update                  {batch / update:7.0f} steps/s   {update / whole:4.0%} of an iteration")
    print(f"    training                {batch / whole:7.0f} steps/s")
    return rollout, update, whole


def bench_environments(args, steps=300):
    """Print how fast the environments alone are: random legal play in their processes, no network."""
    modes = {"copy": False, "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    envs = gym.vector.AsyncVectorEnv([lambda: script.make_worker_env(args)] * args.num_envs, **modes)
    rng, obs = np.random.default_rng(0), envs.reset(seed=list(range(args.num_envs)))[0]
    seconds = 0.0
    for _ in range(steps):
        mask = obs["action_mask"]
        action = (rng.random(mask.shape) * mask).argmax(-1)
        start = time.time()
        obs = envs.step(action.reshape(envs.action_space.shape))[0]
        seconds += time.time() - start
    envs.close()
    print(f"    environments alone      {steps * args.num_envs / seconds:7.0f} steps/s   random legal play, no network")


def bench_passes(args):
    """Seconds of the bare forward and backward passes of one update: the same network, batch and minibatches."""
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    agent, maps = script.Agent(args).to(device), args.batch_size // args.num_minibatches
    planes = torch.rand(maps, script.NUM_PLANES, args.map_size, args.map_size).half().to(device)
    pixel = torch.randint(args.map_size**2, (maps, args.max_units + args.factories_per_team)).to(device)
    times = []
    for _ in range(4):
        start = time.time()
        for _ in range(args.num_minibatches):
            obs = {"planes": planes, "pixel": pixel, "kind": torch.ones_like(pixel)}
            features = [agent.entity_features(trunk, obs) for trunk in (agent.actor, agent.critic)]
            (features[0].sum() + features[1].sum()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.time() - start) * args.update_epochs)
    return np.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="the paper's setting")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=script.computes_in_bf16(),
        help="convolutions in bfloat16",
    )
    parser.add_argument("--baseline", metavar="COMMIT", help="an older commit to measure in the same run")
    parser.add_argument("--official", action="store_true", help="measure SB3Wrapper, without a controller's work")
    parser.add_argument("--rounds", type=int, default=1, help="with --baseline: how often both commits train, in turn")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--skip-engine", action="store_true")
    args = parser.parse_args()
    if args.iterations < 3:
        parser.error(f"--iterations must be at least 3, the first warms up; got {args.iterations}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(
        f"{os.cpu_count()} cores, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS')}, torch {torch.__version__}, {gpu}"
    )
    if not args.skip_engine:
        bench_engine(args.official)
    small, bf16 = [] if args.paper else ["--small"], ["--bf16" if args.bf16 else "--no-bf16"]
    settings = replace(script.Args() if args.paper else script.SMALL, bf16=args.bf16)
    print(f"Training: {' '.join(small + bf16)}")
    with tempfile.TemporaryDirectory() as folder:
        runs = {"this commit": (SCRIPT, small + bf16)}
        if args.baseline:
            show = ["git", "-C", str(ROOT), "show", f"{args.baseline}:{SCRIPT.name}"]
            source, path = (
                subprocess.run(show, capture_output=True, text=True, check=True).stdout,
                Path(folder) / "old.py",
            )
            path.write_text(source)
            old_small = small if "    small: bool" in source else OLD_SMALL
            runs[args.baseline] = path, (old_small if small else []) + bf16
        times = {name: [] for name in runs}  # (rollout, update, whole) of each round
        for _ in range(args.rounds):
            for name, (path, flags) in runs.items():
                times[name].append(bench_training(path, flags, args.iterations, name))
    best = {name: np.min(rounds, axis=0) for name, rounds in times.items()}
    bench_environments(settings)
    passes = bench_passes(settings)
    ratio = best["this commit"][1] / passes
    print(f"    update                  {ratio:.2f} x the bare forward and backward passes ({passes:.2f} s)")
    if args.baseline:
        rollout, update, whole = best[args.baseline] / best["this commit"]
        print(f"  rollout {rollout:.2f} x, update {update:.2f} x, training {whole:.2f} x as fast as {args.baseline}")


if __name__ == "__main__":
    main()
