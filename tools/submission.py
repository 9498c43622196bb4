"""Plays Lux AI Season 2 with the policy beside it (script.py, model.pt): an agent as the official kit wants it.

    luxai-s2 main.py main.py

Reads a line of JSON a turn and answers with one; `agent_fn` is the same as a function. It needs Python 3.10 or
later and what script.py imports. The competition's own image (Python 3.7, torch 1.11) cannot load it.
"""

import importlib.util
import json
import sys
import traceback
from argparse import Namespace
from functools import cache
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent
GREEDY = False  # whether to take the likeliest action; else actions are sampled, as in training
BID = {"faction": "AlphaStrike", "bid": 0}


class Player:
    """One side of one game, played by a script's own functions on the engine's whole observations.

    `policy` gives the network and its number of unit slots: a function, because bids and placements need neither.
    """

    def __init__(self, script, policy, player, seed, greedy=False):
        self.script, self.policy, self.player, self.greedy = script, policy, player, greedy
        self.generator = torch.Generator().manual_seed(seed)
        self.ids, self.numbers, self.view = None, {}, None  # from one turn to the next, see `assign_slots`

    def act(self, obs):
        """What to tell the engine: a bid, then factories when it is this side's turn, then orders."""
        if not obs["teams"]:
            return BID
        if obs["real_env_steps"] < 0:
            return self.place(obs, obs["teams"][self.player])
        agent, max_units = self.policy()
        if self.ids is None:
            self.ids = [None] * max_units + list(obs["factories"][self.player])
        self.ids = self.script.assign_slots(self.ids, self.numbers, obs, self.player, max_units)
        self.view = self.script.View(obs, self.player, self.ids, self.numbers, max_units, self.view)
        mask = self.script.action_masks(self.view)
        seen = {key: value[None, None] for key, value in self.script.observe(self.view, mask, symmetry=0).items()}
        with torch.inference_mode():
            probs = agent.get_distribution(self.script.to_tensors(seen, "cpu")).probs[0]  # (num_slots, NUM_ACTIONS)
        action = probs.argmax(-1) if self.greedy else probs.multinomial(1, generator=self.generator)[:, 0]
        return self.script.engine_actions(self.view, mask, action.numpy())

    def place(self, obs, team):
        turn = (obs["real_env_steps"] % 2 == 0) == team["place_first"]  # the number of these steps is even
        spot = self.script.choose_spot(obs, self.player) if turn and team["factories_to_place"] else None
        if spot is None:
            return {}
        return {"spawn": spot, "metal": min(150, team["metal"]), "water": min(150, team["water"])}


def merge(board, news):
    """Put into the board what a turn brings: whole layers, or tiles that changed as {"x,y": value}."""
    for name, layer in news.items():
        if isinstance(layer, dict):
            for tile, value in layer.items():
                x, y = tile.split(",")
                board[name][int(x), int(y)] = value
        else:
            board[name] = np.array(layer)


@cache
def load_script():
    spec = importlib.util.spec_from_file_location("script", FOLDER / "script.py")
    script = sys.modules["script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@cache
def load_policy():
    """The network and its number of unit slots."""
    torch.set_num_threads(1)
    saved = torch.load(FOLDER / "model.pt", map_location="cpu", weights_only=True)
    args = load_script().Args(**saved["args"])
    args.bf16 = False  # slow where the processor does not have it, and it can play anywhere
    agent = load_script().Agent(args)
    agent.load_state_dict(saved["model"])
    return agent.eval(), args.max_units


boards, players, said = {}, {}, set()  # by player; and the errors that were reported


def agent_fn(observation, configuration=None):
    """The answer to an observation of the kit; an error is reported once and never ends the game."""
    answer, player = BID if observation.step == 0 else {}, observation.player
    try:
        obs = json.loads(observation.obs) if isinstance(observation.obs, str) else observation.obs
        if observation.step == 0:
            boards[player] = {}
            players.pop(player, None)
        merge(boards[player], obs["board"])
        if player not in players:
            players[player] = Player(load_script(), load_policy, player, int(player == "player_1"), GREEDY)
        orders = players[player].act({**obs, "board": boards[player]})
        answer = {key: order.tolist() if hasattr(order, "tolist") else order for key, order in orders.items()}
    except Exception:
        error = traceback.format_exc()
        if error not in said:
            print(f"{player}, step {observation.step}: no orders, because of\n{error}", file=sys.stderr, flush=True)
        said.add(error)
    return answer


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not come between the answers
    for line in sys.stdin:
        print(json.dumps(agent_fn(Namespace(**json.loads(line)))), file=answers, flush=True)
