"""The official replay format, which the official viewer opens."""

import json
from copy import deepcopy


class Tape:
    """The official replay of a game: what the engine is told and what it answers, as luxai_runner keeps it."""

    def __init__(self, engine):
        self.engine, self._reset, self._step = engine, engine.reset, engine.step
        engine.reset, engine.step = self.reset, self.step

    def reset(self, seed=None):
        answer = self._reset(seed=seed)
        self.last = self.engine.state.get_compressed_obs()
        self.replay = {"metadata": {"seed": seed, "players": {}}, "observations": [deepcopy(self.last)]}
        self.replay |= {"actions": [], "rewards": [], "dones": []}
        return answer

    def step(self, actions):
        self.replay["actions"].append(deepcopy(actions))
        obs, rewards, dones, *rest = self._step(actions)
        self.replay["observations"].append(self.engine.state.get_change_obs(self.last))
        self.replay["rewards"].append(rewards)
        self.replay["dones"].append(dones)
        self.last = obs["player_0"]
        return obs, rewards, dones, *rest

    def __deepcopy__(self, memo):
        """A game that is played on apart from the recorded one is not recorded, and does not copy what is."""
        return object.__new__(Tape)

    def write(self, path):
        with open(path, "x") as file:
            json.dump(self.replay, file, separators=(",", ":"), default=lambda x: x.tolist())
