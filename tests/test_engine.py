"""The fast engine against the stock one: the same state after every step of the same random play."""

import copy
from types import SimpleNamespace
from unittest.mock import patch

import luxai_s2.env
import luxai_s2_fast
import numpy as np
import pytest
from luxai_s2.factory import Factory
from luxai_s2.team import Team
from luxai_s2.unit import UnitType
from scipy.ndimage import binary_dilation

PLAYERS = ("player_0", "player_1")
CONFIG = {"map_size": 48, "MIN_FACTORIES": 4, "MAX_FACTORIES": 4, "max_episode_length": 300, "verbose": 0}
ENGINES = (luxai_s2.env.LuxAI_S2, luxai_s2_fast.LuxAI_S2)


def new_game(cls, seed, **config):
    """Factories on random tiles, with the means to build and to water; some ground cleared for lichen."""
    game, rng = cls(**{**CONFIG, **config}), np.random.default_rng(seed)
    game.reset(seed=seed)
    game.step({player: {"faction": "AlphaStrike", "bid": 0} for player in PLAYERS})
    for turn in range(2 * game.state.board.factories_per_team):
        spot = rng.permutation(np.argwhere(game.state.board.valid_spawns_mask))[0]
        game.step({PLAYERS[turn % 2]: {"spawn": spot, "metal": 150, "water": 150}, PLAYERS[1 - turn % 2]: {}})
    for player in PLAYERS:
        for factory in game.state.factories[player].values():
            factory.cargo.water, factory.cargo.metal, factory.power = 60, 400, 4000
            factory.cargo.ice, factory.cargo.ore = 430, 290  # to refine
            if rng.random() < 0.7:
                x, y = np.maximum(factory.pos.pos - rng.integers(2, 9), 0)
                game.state.board.rubble[x : x + 16, y : y + 16] = 0
    return game


def new_games(seed, **config):
    return [new_game(cls, seed, **config) for cls in ENGINES]


def random_actions(game, rng):
    """Well-formed actions of both teams, many of which the engine cannot carry out.

    Most units move or dig; some transfer, pick up, recharge or destroy themselves, with whatever
    amounts, onto whatever there is. Factories build and water whether they can or not.
    """
    actions = {}
    for player in PLAYERS:
        orders = actions[player] = {}
        for unit_id in game.state.units[player]:
            if rng.random() < 0.4:
                kind = rng.choice(6, p=(0.5, 0.13, 0.1, 0.24, 0.01, 0.02))
                queue = [
                    (kind, rng.integers(5), rng.integers(5), rng.integers(200), rng.integers(2), rng.integers(1, 6))
                    for _ in range(rng.integers(3))
                ]
                orders[unit_id] = np.array(queue, dtype=int).reshape(-1, 6)
        for factory_id in game.state.factories[player]:
            if rng.random() < 0.6:
                orders[factory_id] = int(rng.choice(3, p=(0.15, 0.1, 0.75)))
    return actions


def assert_equal(stock, fast, where="result"):
    """The same values in the same containers, in the same order; arrays of the same type."""
    if isinstance(stock, dict):
        assert isinstance(fast, dict) and list(stock) == list(fast), where
        for key in stock:
            assert_equal(stock[key], fast[key], f"{where}[{key!r}]")
    elif isinstance(stock, np.ndarray):
        assert isinstance(fast, np.ndarray) and stock.dtype == fast.dtype, where
        np.testing.assert_array_equal(fast, stock, where)
    elif isinstance(stock, (list, tuple)):
        assert type(stock) is type(fast) and len(stock) == len(fast), where
        for i, (left, right) in enumerate(zip(stock, fast, strict=True)):
            assert_equal(left, right, f"{where}[{i}]")
    else:
        assert stock == fast, f"{where}: {stock!r} and {fast!r}"


def everything(game):
    """What a game holds, in dictionaries and arrays.

    Where lichen would grow is asked for in every fifth step only: in the others the fast engine has
    to remember the map until it needs it.
    """
    state, board = game.state, game.state.board
    factories = {name: factory for team in state.factories.values() for name, factory in team.items()}
    asked = factories if game.env_steps % 5 == 0 else {}
    return {
        "observation": state.get_obs(),
        "factory_occupancy_map": board.factory_occupancy_map,
        "units_map": dict(sorted((tile, sorted(u.unit_id for u in units)) for tile, units in board.units_map.items())),
        "factory_map": {tile: (f.unit_id, f is factories[f.unit_id]) for tile, f in board.factory_map.items()},
        "waiting": {name: len(factory.action_queue) for name, factory in factories.items()},
        "grow": {name: sorted(factory.grow_lichen_positions) for name, factory in asked.items()},
        "connected": {name: sorted(factory.connected_lichen_positions) for name, factory in asked.items()},
        "stats": state.stats,
        "steps": (game.env_steps, state.env_steps),
        "agents": game.agents,
    }


def assert_same(stock, fast):
    assert_equal(everything(stock), everything(fast), "state")


def step_both(games, actions):
    """One step of both games, with the same results; returns that of the stock engine."""
    results = [game.step(copy.deepcopy(actions)) for game in games]
    assert_equal(*results)
    assert_same(*games)
    return results[0]


def top_up(*games):
    """Whoever runs dry gets a little, but for two factories, which may die."""
    for game in games:
        for player in PLAYERS:
            for name, factory in game.state.factories[player].items():
                if factory.cargo.water < 5 and name not in ("factory_0", "factory_1"):
                    factory.cargo.water += 6


@pytest.mark.parametrize("seed", range(1, 6))
def test_same_state_after_every_step(seed):
    games = new_games(seed, validate_action_space=seed == 1)  # that makes the stock engine slow
    board, rng = games[0].state.board, np.random.default_rng(seed)
    kinds, most_lichen, deaths, rewards = set(), 0, 0, set()
    for step in range(300):
        if step == 150:  # close to the most that a tile holds
            for game in games:
                game.state.board.lichen[game.state.board.lichen > 0] = 99
        actions = random_actions(games[0], rng)
        units = sum(len(units) for units in games[0].state.units.values())
        result = step_both(games, actions)
        rewards.update(result[1].values())
        most_lichen = max(most_lichen, (board.lichen > 0).sum())
        deaths += sum(len(units) for units in games[0].state.units.values()) < units
        kinds.update(
            a.act_type for team in games[0].state.units.values() for u in team.values() for a in u.action_queue
        )
        top_up(*games)
    assert step == 299 and not games[1].agents and most_lichen > 20 and deaths > 0 and len(rewards) > 10
    assert kinds == {"move", "transfer", "pickup", "dig", "self_destruct", "recharge"}
    assert any(len(factories) < 4 for factories in games[0].state.factories.values())


@pytest.mark.parametrize("short", [0, 1])
def test_watering_is_judged_by_the_cost_of_the_step_before(short):
    """A factory whose water is exactly what watering cost in the step before, and one with a unit less."""
    waters = []
    for game in new_games(3):
        factory = next(iter(game.state.factories[PLAYERS[0]].values()))
        x, y = factory.pos.pos
        game.state.board.rubble[x - 4 : x + 5, y - 4 : y + 5] = 0
        idle = {player: {} for player in PLAYERS}
        for _ in range(25):
            factory.cargo.water = 100
            game.step({**idle, PLAYERS[0]: {factory.unit_id: 2}})
        cost = factory.water_cost(game.env_cfg)
        assert cost > 1
        # rubble makes the ground smaller and this step's cost lower, but the engine looks at the last one first
        game.state.board.rubble[x - 4 : x + 5, y + 2 : y + 5] = 10
        factory.cargo.water = cost - short
        lichen = game.state.board.lichen.sum()
        game.step({**idle, PLAYERS[0]: {factory.unit_id: 2}})
        assert (game.state.board.lichen.sum() > lichen) == (short == 0)
        waters.append(factory.cargo.water)
    assert waters[0] == waters[1]


def crowd(games, units=160):
    for game in games:
        rng = np.random.default_rng(0)
        for tile in rng.permutation(np.argwhere(game.state.board.factory_occupancy_map == -1))[:units]:
            player = PLAYERS[int(rng.integers(2))]
            kind = UnitType.HEAVY if rng.random() < 0.3 else UnitType.LIGHT
            unit = game.add_unit(game.state.teams[player], kind, tile)
            unit.power = int(rng.integers(20, 150))


def test_a_crowd_of_units_collides_alike():
    games = new_games(11, validate_action_space=False)
    crowd(games)
    rng, before = np.random.default_rng(1), sum(len(units) for units in games[0].state.units.values())
    for _ in range(60):
        step_both(games, random_actions(games[0], rng))
        top_up(*games)
    assert sum(len(units) for units in games[0].state.units.values()) < before - 20


@pytest.mark.parametrize("aside", [(7, 0), (0, 7)])
def test_lichen_that_touches_that_of_another_factory(aside):
    """Two neighbours' lichen meets; then one factory is cut off from its own, which the other's must not connect."""
    games = new_games(4)
    for game in games:
        board = game.state.board
        board.rubble[:], board.ice[:], board.ore[:] = 0, 0, 0
        board.valid_spawns_mask[:] = 1
        taken = board.factory_occupancy_map != -1
        dx, dy = np.add(aside, 11)
        corners = [(x, y) for x in range(49 - dx) for y in range(49 - dy) if not taken[x : x + dx, y : y + dy].any()]
        x, y = np.add(corners[0], 5)
        left, right = (game.add_factory(game.state.teams[PLAYERS[0]], np.add((x, y), far)) for far in ((0, 0), aside))

    def water(steps):
        for _ in range(steps):
            for game in games:
                for factories in game.state.factories.values():
                    for factory in factories.values():
                        factory.cargo.water = 100
            step_both(games, {player: dict.fromkeys(games[0].state.factories[player], 2) for player in PLAYERS})

    water(60)
    ring = np.zeros((48, 48), dtype=bool)
    x, y = np.add((x, y), aside)
    ring[x - 2 : x + 3, y - 2 : y + 3] = True  # the right factory's 12 tiles, and its own nine
    for game in games:
        board = game.state.board
        bare = ring & (board.factory_occupancy_map == -1)
        board.rubble[bare], board.lichen[bare], board.lichen_strains[bare] = 50, 0, -1
    strains = games[0].state.board.lichen_strains
    lost, kept = strains == right.num_id, strains == left.num_id
    assert (binary_dilation(kept) & lost).any()  # they touch
    before = games[0].state.board.lichen[lost].copy()
    water(1)
    assert (games[0].state.board.lichen[lost] == before - 1).all()


def test_where_lichen_grows_on_any_map():
    """Random small maps, also such as no game leads to: lichen in pieces, beside other factories, under rubble."""
    rng, sizes = np.random.default_rng(0), set()
    for trial in range(500):
        size = int(rng.integers(7, 13))
        occupied = np.full((size, size), -1)
        factories = []
        for number in range(3):
            x, y = rng.integers(1, size - 1, 2)
            if (occupied[x - 1 : x + 2, y - 1 : y + 2] == -1).all():
                occupied[x - 1 : x + 2, y - 1 : y + 2] = number
                factories.append((number, np.array((x, y))))
        density = rng.random()
        strains = np.where(rng.random((size, size)) < density, rng.integers(0, 3, (size, size)), -1)
        if trial % 2:  # in larger pieces
            strains = strains[np.ix_(np.arange(size) // 3, np.arange(size) // 3)]
        strains[occupied != -1] = -1
        board = SimpleNamespace(
            rubble=np.where(rng.random((size, size)) < 0.2 * rng.random(), 7, 0),
            ice=(rng.random((size, size)) < 0.05).astype(int),
            ore=(rng.random((size, size)) < 0.05).astype(int),
            lichen=np.where(strains == -1, 0, rng.integers(1, 5, (size, size))),
            lichen_strains=strains,
            factory_occupancy_map=occupied,
        )
        setting = SimpleNamespace(MIN_LICHEN_TO_SPREAD=int(rng.integers(0, 5)))
        for number, centre in factories:
            found = []
            for cls in (Factory, luxai_s2_fast.FastFactory):
                factory = cls(Team(0, PLAYERS[0]), f"factory_{number}", number)
                factory.pos.pos = centre
                factory.cache_water_info(board, setting)
                found.append((factory.grow_lichen_positions, factory.connected_lichen_positions))
            assert found[0] == found[1]
            sizes.add((len(found[0][0]), len(found[0][1])))
    assert len(sizes) > 100


GROUND, UNITS, GAME = luxai_s2_fast.Ground, luxai_s2_fast.FastUnit, luxai_s2_fast.LuxAI_S2
FAULTS = {  # what to put in the place of what, to see that these comparisons would notice
    "lichen that is cut off gives power": (GROUND, "connected", property(lambda self: self.lichen_strains != -1)),
    "lichen spreads late": (GROUND, "rich", property(lambda self: self.lichen > self.min_lichen_to_spread)),
    "lichen grows beside that of others": (GROUND, "bordered_owner", property(lambda self: np.full((50, 50), -1))),
    "lichen grows on ice": (GROUND, "free", property(lambda s: (s.rubble <= 0) & (s.factory_occupancy_map == -1))),
    "where lichen grows is kept for ever": (
        *(luxai_s2_fast.FastFactory, "keep"),
        lambda self, ground: vars(self).setdefault("ground", ground),
    ),
    "an enemy's factory may be entered": (
        *(GAME, "possible_moves"),
        lambda self, wanted: [move for move in wanted if setattr(move[1], "power_cost", 1) is None],
    ),
    "a queue of one row is all that is seen": (
        *(UNITS, "state_dict"),
        lambda self: {
            **super(UNITS, self).state_dict(),
            "action_queue": [a.state_dict() for a in self.action_queue[:1]],
        },
    ),
    "units meet and nobody dies": (
        *(luxai_s2.env.LuxAI_S2, "_handle_movement_actions"),
        lambda self, actions: [unit.repeat_action(action) for unit, action in actions["move"]],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_noticed(fault):
    games, rng = new_games(11, validate_action_space=False), np.random.default_rng(0)
    crowd(games, units=80)
    for game in games:  # much lichen
        game.state.board.rubble[:] = 0
        for factory in [factory for team in game.state.factories.values() for factory in team.values()]:
            factory.cargo.water = 5000
    owner, name, wrong = FAULTS[fault]
    with pytest.raises(Exception) as noticed:
        for _ in range(150):
            actions = random_actions(games[0], rng)
            for player, factories in games[0].state.factories.items():
                actions[player].update(dict.fromkeys(factories, 2))
            stock = games[0].step(copy.deepcopy(actions))
            with patch.object(owner, name, wrong):
                fast = games[1].step(actions)
                assert_equal(stock, fast)
                assert_same(*games)
    assert noticed.type in (AssertionError, KeyError, IndexError), noticed


HOOKS = (
    *("_handle_dig_actions", "_handle_self_destruct_actions", "_handle_factory_build_actions"),
    *("_handle_movement_actions", "_handle_recharge_actions", "_handle_factory_water_actions"),
    *("_handle_transfer_actions", "_handle_pickup_actions"),
    *("add_unit", "destroy_unit", "add_factory", "destroy_factory"),
)


def with_hooks(cls, calls):
    """A subclass that writes down each call of the methods that a user may override, and of what."""

    def of_what(arg):
        if isinstance(arg, dict):
            return {kind: [entity.unit_id for entity, _ in pairs] for kind, pairs in arg.items() if pairs}
        return getattr(arg, "unit_id", str(arg))

    def hook(name):
        def call(self, *args, **kwargs):
            calls.append((name, *[of_what(arg) for arg in (*args, *kwargs.values())]))
            return getattr(cls, name)(self, *args, **kwargs)

        return call

    return type("Hooked", (cls,), {name: hook(name) for name in HOOKS})


def test_what_a_subclass_overrides_is_called_as_the_stock_engine_calls_it():
    logs = ([], [])
    games = [new_game(with_hooks(cls, log), 2) for cls, log in zip(ENGINES, logs, strict=True)]
    crowd(games, units=60)
    rng, names = np.random.default_rng(0), set()
    for _ in range(80):
        actions = random_actions(games[0], rng)
        for log in logs:
            log.clear()
        for game in games:
            game.step(copy.deepcopy(actions))
        for log in logs:  # the order in which the stock engine buries the dead is that of a set
            dead = [i for i, call in enumerate(log) if call[0] == "destroy_unit"]
            for i, call in zip(dead, sorted(log[i] for i in dead), strict=True):
                log[i] = call
        assert logs[0] == logs[1]
        names.update(call[0] for call in logs[1])
        assert {call[0] for call in logs[1]} >= set(HOOKS[:8])
    assert names == set(HOOKS) - {"add_factory"}  # that was when the games began
    for log, game in zip(logs, games, strict=True):
        log.clear()
        game.add_factory(game.state.teams[PLAYERS[0]], np.argwhere(game.state.board.valid_spawns_mask)[0])
    assert logs[0] == logs[1] and len(logs[0]) == 1


def test_a_deep_copy_is_a_game_of_its_own():
    games = new_games(6)
    crowd(games, units=40)
    rng = np.random.default_rng(0)
    for _ in range(20):
        step_both(games, random_actions(games[0], rng))
    before = copy.deepcopy(everything(games[1]))
    copies = [games[0], copy.deepcopy(games[1])]
    for _ in range(20):
        step_both(copies, random_actions(copies[0], rng))
    assert_equal(before, everything(games[1]))
    assert games[1].env_steps == copies[1].env_steps - 20


def test_an_observation_stays_as_it_was():
    game, rng = new_game(ENGINES[1], 7), np.random.default_rng(0)
    crowd([game], units=40)
    for _ in range(30):
        obs = game.step(random_actions(game, rng))[0][PLAYERS[0]]
        kept = copy.deepcopy(obs)
        game.step(random_actions(game, rng))
        assert_equal(kept, obs)


def test_the_usual_orders_take_the_fast_way():
    """Arrays, lists of arrays, both players or one: never through the stock engine's step."""
    for validate in (True, False):
        game, rng = new_game(ENGINES[1], 8, validate_action_space=validate), np.random.default_rng(0)
        crowd([game], units=40)
        with patch.object(luxai_s2.env.LuxAI_S2, "step", side_effect=AssertionError("the slow way")):
            for step in range(40):
                actions = random_actions(game, rng)
                if step % 4 == 1:
                    actions = dict(reversed(actions.items()))
                if step % 4 == 2:
                    del actions[PLAYERS[1]]
                if step % 4 == 3:
                    actions = {
                        player: {
                            name: list(o) if isinstance(o, np.ndarray) else np.int64(o) for name, o in orders.items()
                        }
                        for player, orders in actions.items()
                    }
                game.step(actions)


def test_a_unit_that_is_put_elsewhere_by_hand_is_there():
    """The engine keeps positions as Python's integers and makes the array when asked."""
    game = new_game(ENGINES[1], 9)
    unit = game.add_unit(game.state.teams[PLAYERS[0]], UnitType.LIGHT, np.array([3, 4]))
    assert unit.pos.pos.tolist() == [3, 4] == game.state.get_obs()["units"][PLAYERS[0]][unit.unit_id]["pos"].tolist()
    unit.pos.pos = np.array([7, 8])
    assert (unit.pos.x, unit.pos.y, unit.pos.pos.tolist()) == (7, 8, [7, 8])
    with pytest.raises(ValueError, match="read-only"):  # else it would stay where it was, without a word
        unit.pos.pos[0] = 5
