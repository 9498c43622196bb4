"""Measures the engine beside the stock one: the same recorded random play on each in turn, in processor time.

python packages/luxai_s2_fast/bench.py
"""

import copy
import statistics
import time

import luxai_s2.env
import luxai_s2_fast
import numpy as np
from luxai_s2.unit import UnitType

PLAYERS, STEPS, REPEATS = ("player_0", "player_1"), 200, 7
ENGINES = {
    "stock": (luxai_s2.env.LuxAI_S2, {}),
    "stock, validate_action_space=False": (luxai_s2.env.LuxAI_S2, {"validate_action_space": False}),
    "fast": (luxai_s2_fast.LuxAI_S2, {}),
}


def new_game(cls, config, units, lichen):
    """A game with `units` on free tiles and water for all; with `lichen`, on ground that has been cleared."""
    game, rng = cls(map_size=48, MIN_FACTORIES=4, MAX_FACTORIES=4, verbose=0, **config), np.random.default_rng(5)
    game.reset(seed=5)
    game.step({player: {"faction": "AlphaStrike", "bid": 0} for player in PLAYERS})
    for turn in range(8):
        spot = rng.permutation(np.argwhere(game.state.board.valid_spawns_mask))[0]
        game.step({PLAYERS[turn % 2]: {"spawn": spot, "metal": 150, "water": 150}, PLAYERS[1 - turn % 2]: {}})
    board = game.state.board
    for factory in [factory for team in game.state.factories.values() for factory in team.values()]:
        factory.cargo.water = 100_000
        if lichen:
            x, y = np.maximum(factory.pos.pos - 6, 0)
            board.rubble[x : x + 13, y : y + 13] = 0
    for i, tile in enumerate(rng.permutation(np.argwhere(board.factory_occupancy_map == -1))[:units]):
        game.add_unit(game.state.teams[PLAYERS[i % 2]], UnitType.HEAVY if i % 8 < 2 else UnitType.LIGHT, tile)
    return game


def charge(game):
    for unit in [unit for team in game.state.units.values() for unit in team.values()]:
        unit.power = max(unit.power, unit.battery_capacity // 2)


def record(units, lichen):
    """Moves onto tiles that nobody else enters, digging and transfers; the factories water if there is lichen."""
    game, rng, log = new_game(luxai_s2_fast.LuxAI_S2, {}, units, lichen), np.random.default_rng(0), []
    for _ in range(STEPS):
        charge(game)
        state, actions = game.state, {}
        taken = {tuple(unit.pos.pos.tolist()) for team in state.units.values() for unit in team.values()}
        for player in PLAYERS:
            actions[player] = dict.fromkeys(state.factories[player], 2) if lichen else {}
            for name, unit in state.units[player].items():
                direction, kind = int(rng.integers(1, 5)), int(rng.choice([0, 0, 1, 3]))
                target = tuple((unit.pos.pos + luxai_s2.env.move_deltas[direction]).tolist())
                if kind == 0 and target in taken:
                    kind = 3
                taken |= {target} if kind == 0 else set()
                if rng.random() < 0.6 or not unit.action_queue:  # the others go on with what they have
                    actions[player][name] = np.array([(kind, direction * (kind < 2), 0, 10 * (kind == 1), 1, 1)])
                elif unit.action_queue[0].act_type == "move":
                    actions[player][name] = np.zeros((0, 6), dtype=int)
        log.append(copy.deepcopy(actions))
        game.step(actions)
    assert sum(map(len, game.state.units.values())) > 0.9 * units
    return log


def replay(cls, config, units, lichen, log):
    """Milliseconds of processor time a step."""
    game, spent = new_game(cls, config, units, lichen), 0.0
    for actions in copy.deepcopy(log):
        charge(game)
        start = time.process_time()
        game.step(actions)
        spent += time.process_time() - start
    return spent / len(log) * 1e3


print(
    f"Steps a second on 48x48, median of {REPEATS} (lowest to highest), and how many times as fast the fast engine is"
)
for units, lichen in ((80, False), (80, True), (12, False), (12, True)):
    log, spent = record(units, lichen), {name: [] for name in ENGINES}
    for _ in range(REPEATS):
        for name, (cls, config) in ENGINES.items():
            spent[name].append(replay(cls, config, units, lichen, log))
    print(f"{units} units, {'with' if lichen else 'without'} lichen")
    for name, times in spent.items():
        middle, ratio = statistics.median(times), statistics.median(times) / statistics.median(spent["fast"])
        speed = f"{1e3 / middle:5.0f} ({1e3 / max(times):.0f} to {1e3 / min(times):.0f})"
        print(f"  {name:36}{speed:22}{ratio:.1f}", flush=True)
