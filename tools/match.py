"""Play two agents against each other: who wins, and how.

A and B are runs (a run's folder, or a model file with its script.py beside it), or programs that speak the official
kit's protocol (a main.py, or a folder with one). Runs play in this program, programs in a process of their own.
Every map is played twice, with sides swapped, and is one that training never draws. Nobody's water is topped up.
The interval takes games as independent: it is rather too wide where player_0 has an advantage.

A side wins if the other has lost all its factories, or by more lichen after step 1,000. A draw: as much lichen on
both sides, or the last factories of both lost in one step. A program that crashes, answers with what the engine
refuses or uses up its time loses, as in the official kit, whose local limits these are; both at once is a draw.
The scripts beside the models, and the programs, are run: play only those that you trust.

    python tools/match.py runs/NAME runs/OTHER
    python tools/match.py runs/NAME other_bot/main.py --map-size 48 --factories 4 --python python3.10
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import asdict
from functools import cache, partial
from itertools import islice
from pathlib import Path

import load
import numpy as np
import submission
from scipy.stats import binomtest

# the original, for its engine with meters; it is the same in all scripts
lux = load.import_script(Path(__file__).parent.parent / "ppo_trajsep_lux.py")
EPISODE_STEPS = lux.EPISODE_STEPS


class Crash(Exception):
    """What a program did in place of an answer."""


class Program:
    """An agent in a process of its own, and its clock."""

    def __init__(self, path, player, flags):
        self.player, (self.limit, self.overage) = player, flags.seconds
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([flags.python, path.name], cwd=path.parent, stdin=pipe, stdout=pipe)
        self.thread = ThreadPoolExecutor(1)  # writing can hang as reading can

    def talk(self, message):
        message |= {"player": self.player, "remainingOverageTime": self.overage}
        self.process.stdin.write(json.dumps(message, default=lambda array: array.tolist()).encode() + b"\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def act(self, message):
        """The answer to a turn's message."""
        start = time.monotonic()
        try:
            answer = self.thread.submit(self.talk, message).result(self.limit + self.overage)
        except TimeoutError:
            raise Crash("used up its time") from None
        except OSError:
            answer = b""
        self.overage -= max(0, time.monotonic() - start - self.limit)
        if not answer:
            raise Crash("ended")
        try:
            orders = json.loads(answer)
            for key, order in orders.items():
                if isinstance(order, list):
                    orders[key] = np.array(order)
                elif key.startswith("unit_"):
                    raise ValueError
            return orders
        except (ValueError, AttributeError):
            raise Crash(f"answered {answer[:80]!r}") from None

    def close(self):
        self.process.kill()
        self.thread.shutdown()
        self.process.communicate()  # closes the pipes


@cache
def load_run(path, map_size):
    script, args, agent = load.load(path, map_size=map_size)
    return script, cache(lambda player: (deepcopy(agent), args.max_units))  # a policy can have a memory


def find_program(path):
    """The main.py that an agent's path means; None if it means a run."""
    path = path / "main.py" if (path / "main.py").is_file() else path
    return path if path.suffix == ".py" and path.is_file() else None


def make_engine(flags):
    factories = dict.fromkeys(("MIN_FACTORIES", "MAX_FACTORIES"), flags.factories)
    return lux.MeteredLux(map_size=flags.map_size, max_episode_length=EPISODE_STEPS, verbose=0, **factories)


def find_maps(flags):
    """The seeds of the maps to play, one for two games: the first that have ice."""
    engine = make_engine(flags)
    boards = ((seed, engine.reset(seed=seed)[0]["player_0"]["board"]) for seed in range(lux.NUM_EVAL_MAPS))
    return list(islice((seed for seed, board in boards if board["ice"].any()), (flags.games + 1) // 2))


def play(flags, maps, number):
    """Play one game, which is the same whatever else is played; what happened, as JSON has it."""
    map_seed, sides, programs = maps[number // 2], {}, {}
    players = dict(zip(lux.PLAYERS, "BA" if number % 2 else "AB", strict=True))
    for i, (player, name) in enumerate(players.items()):
        if program := find_program(flags.agents[name]):
            sides[player] = programs[player] = Program(program, player, flags)
        else:
            script, policy = load_run(flags.agents[name], flags.map_size)
            sides[player] = submission.Player(script, partial(policy, player), player, 2 * map_seed + i)

    engine, ice, crashes = make_engine(flags), dict.fromkeys(players, 0), {}
    obs = news = engine.reset(seed=map_seed)[0][lux.PLAYERS[0]]
    rewards, over, info = dict.fromkeys(players, 0), False, {"env_cfg": asdict(engine.env_cfg)}
    try:
        while not over and not crashes:
            orders = {}
            for player, side in sides.items():
                message = {"obs": news, "step": engine.env_steps, "reward": float(rewards[player]), "info": info}
                try:
                    orders[player] = side.act(message if player in programs else obs)
                except Crash as error:
                    crashes[player] = error
            if crashes:
                break
            before, info = obs, {}
            observations, rewards, terminations, failed, _ = engine.step(orders)
            obs, over = observations[lux.PLAYERS[0]], terminations[lux.PLAYERS[0]]
            if programs:
                news = engine.state.get_change_obs(before)
            for player in players:
                if failed[player] and (obs["factories"].get(player) or obs["real_env_steps"] <= 0):
                    crashes[player] = "gave orders that the engine refuses"
                    continue
                own = obs["teams"][player]["factory_strains"]
                ice[player] += sum(engine.meters["ice_received"][f"factory_{strain}"] for strain in own)
    finally:
        for program in programs.values():
            program.close()

    crash = "; ".join(f"{flags.agents[players[p]]} {what}" for p, what in crashes.items())
    if crashes:
        crash, rewards = f"{crash} at step {engine.env_steps}", {player: -(player in crashes) for player in players}
    best = [name for player, name in players.items() if rewards[player] == max(rewards.values())]
    winner = best[0] if len(best) == 1 else None
    end = "lichen" if all(obs["factories"].values()) else "elimination"
    end = ("crash" if crash else end) if winner else "draw"
    steps = max(obs["real_env_steps"], 0)
    game = {"map_seed": map_seed, **players, "winner": winner, "end": end, "crash": crash or None, "steps": steps}
    for player, name in players.items():
        own = np.isin(obs["board"]["lichen_strains"], obs["teams"].get(player, {}).get("factory_strains", []))
        lichen, factories = int(obs["board"]["lichen"][own].sum()), len(obs["factories"].get(player, {}))
        game[name] = {"lichen": lichen, "ice_delivered": int(ice[player]), "factories": factories}
    return game


def report(flags, games):
    """The table of a match as text, and who won how often."""

    def wins(*ends):
        return [sum(game["winner"] == name and game["end"] in ends for game in games) for name in "AB"]

    won = wins("elimination", "lichen", "crash")
    rows = {"games won": won, "... by elimination": wins("elimination"), "... by lichen": wins("lichen")}
    rows["... by a crash of the other"] = wins("crash")
    first = [game for game in games if game["player_0"] == game["winner"]]
    rows["... as player_0"] = [sum(game["winner"] == n for game in first) for n in "AB"]
    for key in ("lichen", "ice_delivered", "factories"):
        means = [np.mean([game[name][key] for game in games]) for name in "AB"]
        rows[f"{key.replace('_', ' ')}, mean"] = [f"{mean:,.1f}" for mean in means]
    draws, decided, steps = len(games) - sum(won), sum(won), np.mean([game["steps"] for game in games])
    table = f"| {len(games)} games | A: {flags.agents['A']} | B: {flags.agents['B']} |\n|---|---|---|\n"
    table += "".join(f"| {words} | {a} | {b} |\n" for words, (a, b) in rows.items())
    table += f"\nMap size {flags.map_size}, factories per team {flags.factories}, mean length {steps:,.0f} steps; "
    table += f"{draws} draws."
    share = []
    if decided:
        share = [won[0] / decided, *map(float, binomtest(won[0], decided).proportion_ci(0.95))]
        words = "A won {:.0%} (95% interval: {:.0%} to {:.0%}).".format(*share)
        table += f" Of the {decided} games that were decided, {words}"
    return table, {"won": dict(zip("AB", won, strict=True)), "draws": draws, "share_of_decided": share}


def match(flags):
    """Play all games, --jobs at a time; print the table and write the file."""
    for name, low, high in (("games", 1, 10_000), ("map_size", 24, 64), ("factories", 1, 10), ("jobs", 1, 1000)):
        if not low <= getattr(flags, name) <= high:
            words = f"must be between {low} and {high}, got {getattr(flags, name)}."
            raise load.Refusal(f"--{name.replace('_', '-')} {words}")
    if flags.json and (flags.json.exists() or not flags.json.absolute().parent.is_dir()):
        raise load.Refusal(f"{flags.json} exists already, or its folder does not: give --json another name.")
    flags.python = os.path.abspath(shutil.which(flags.python) or flags.python)  # programs start in their own folders
    for path in flags.agents.values():
        if not find_program(path):
            load_run(path, flags.map_size)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: lux.leave(128 + n, "Stopped; nothing was written."))

    maps, games, spawn = find_maps(flags), [], multiprocessing.get_context("spawn")
    quiet = signal.signal, (signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C the main process says what there is to say
    with ProcessPoolExecutor(min(flags.jobs, flags.games), spawn, *quiet) as pool:
        for number, game in enumerate(pool.map(partial(play, flags, maps), range(flags.games)), start=1):
            games.append(game)
            how = f"{game['winner']} wins by {game['end']}" if game["winner"] else "a draw"
            crash = f"; {game['crash']}" if game["crash"] else ""
            print(f"game {number}, map {game['map_seed']}, {game['steps']} steps: {how}{crash}", flush=True)
    table, figures = report(flags, games)
    print(f"\n{table}")
    if flags.json:
        content = {name: str(path) for name, path in flags.agents.items()}
        content |= {"map_size": flags.map_size, "factories": flags.factories, **figures, "games": games}
        with open(flags.json, "x") as file:
            json.dump(content, file, indent=2)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("a", metavar="A", type=Path, help="a run or a program")
    parser.add_argument("b", metavar="B", type=Path, help="its opponent, likewise")
    parser.add_argument("--games", type=int, default=50, help="how many (default: 50)", metavar="N")
    parser.add_argument("--map-size", type=int, default=32, help="in tiles (default: 32)", metavar="N")
    parser.add_argument("--factories", type=int, default=2, help="that each team places (default: 2)", metavar="N")
    parser.add_argument("--jobs", type=int, default=1, help="games at a time (default: 1)", metavar="N")
    parser.add_argument("--json", type=Path, help="write the figures of each game", metavar="FILE")
    parser.add_argument("--python", default=sys.executable, help="what starts programs (default: this Python)")
    limits, words = ("TURN", "GAME"), "a program's time for a turn, and the overage of a game (default: 9 600)"
    parser.add_argument("--seconds", type=float, nargs=2, default=(9, 600), help=words, metavar=limits)
    flags = parser.parse_args()
    flags.agents = {"A": flags.a, "B": flags.b}
    try:
        match(flags)
    except (load.Refusal, OSError, BrokenProcessPool) as error:
        sys.exit(str(error))
