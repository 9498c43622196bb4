"""Unusual use of the fast engine: the same as the stock engine does, or refused with a sentence.

The table of actions is played with and without `validate_action_space`. Where an entry expects a
sentence, the stock engine crashes with an obscure exception, and the fast one has changed nothing.
"""

import copy

import numpy as np
import pytest
from luxai_s2.state import State
from luxai_s2.unit import UnitType
from test_engine import (
    CONFIG,
    ENGINES,
    PLAYERS,
    assert_equal,
    assert_same,
    crowd,
    everything,
    new_games,
    random_actions,
    step_both,
    top_up,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*Casting input x", "ignore:invalid value encountered in cast")

UNIT, OTHER, ENEMY, FACTORY = "unit_8", "unit_9", "unit_10", "factory_0"  # OTHER is heavy
SAME = None
MOVE, TRANSFER, PICK_UP, DIG = (0, 1, 0, 0, 0, 1), (1, 1, 0, 5, 0, 1), (2, 0, 4, 5, 0, 1), (3, 0, 0, 0, 0, 1)


def queue(*rows, dtype=int):
    return np.array(rows, dtype=dtype)


def order(value, name=UNIT):
    return {PLAYERS[0]: {name: value}, PLAYERS[1]: {}}


def with_value(row, **values):
    """A queue of one row with some columns replaced."""
    row = list(row)
    for name, value in values.items():
        row[("kind", "direction", "resource", "amount", "repeat", "n").index(name)] = value
    return order(queue(row))


NO_ROWS = "The order of unit_8 must be an array or a list of rows of 6"
ACTIONS = [  # name, actions, what happens with validation, what happens without
    ("the players in another order", {PLAYERS[1]: {"factory_1": 0}, PLAYERS[0]: {FACTORY: 1}}, SAME, SAME),
    ("a player missing", {PLAYERS[1]: {"factory_1": 0}}, SAME, SAME),
    ("no player", {}, SAME, SAME),
    ("None for a player", {PLAYERS[0]: None, PLAYERS[1]: {}}, SAME, SAME),
    ("a list for a player", {PLAYERS[0]: [UNIT], PLAYERS[1]: {}}, SAME, SAME),
    (
        "a player of neither team",
        {"player_7": {}, **order(queue(MOVE))},
        "no player 'player_7'",
        "no player 'player_7'",
    ),
    ("a list of players", [PLAYERS[0]], "must be a dictionary of players", "must be a dictionary of players"),
    # the form of a queue
    ("a list of lists", order([list(MOVE), list(DIG)]), SAME, SAME),
    ("a list of tuples", order([MOVE, DIG]), SAME, SAME),
    ("a list of arrays", order([np.array(MOVE), np.array(DIG)]), SAME, SAME),
    ("a list of floats", order([np.array(MOVE) * 1.0]), SAME, SAME),
    ("a list of numbers", order(list(MOVE)), SAME, SAME),
    ("a list of short arrays", order([np.array(MOVE)[:5]]), SAME, SAME),
    ("a tuple of arrays", order((np.array(MOVE),)), SAME, SAME),
    ("an empty list", order([]), SAME, SAME),
    ("an empty array", order(np.zeros((0, 6))), SAME, SAME),
    ("an empty flat array", order(np.zeros(0)), SAME, SAME),
    ("20 rows", order(queue(*[DIG] * 20)), SAME, SAME),
    ("21 rows", order(queue(*[DIG] * 21)), SAME, SAME),
    ("a list of 21 rows", order([np.array(DIG)] * 21), SAME, SAME),
    ("a flat array", order(np.array(MOVE)), SAME, SAME),
    ("three axes", order(queue(MOVE)[None]), SAME, SAME),
    ("no axis", order(np.array(3)), NO_ROWS, SAME),
    ("five columns", order(queue(MOVE)[:, :5]), SAME, SAME),
    ("seven columns", order(np.append(queue(MOVE), [[0]], axis=1)), SAME, SAME),
    ("None for a queue", order(None), NO_ROWS, SAME),
    ("a number for a queue", order(3), NO_ROWS, SAME),
    ("a word for a queue", order("dig"), SAME, SAME),
    ("a list of None", order([None]), SAME, SAME),
    ("floats", order(queue(MOVE, dtype=float)), SAME, SAME),
    ("halves", order(queue(MOVE) + 0.5), SAME, SAME),
    ("not a number", order(queue(MOVE) * np.nan), SAME, SAME),
    ("int32", order(queue(MOVE, dtype=np.int32)), SAME, SAME),
    ("uint64", order(queue(MOVE, dtype=np.uint64)), SAME, SAME),
    ("bool", order(queue((0, 1, 0, 0, 0, 1), dtype=bool)), SAME, SAME),
    # ids
    ("an unknown unit", order(queue(MOVE), "unit_99"), SAME, SAME),
    ("an enemy's unit", order(queue(MOVE), ENEMY), SAME, SAME),
    ("an unknown factory", order(1, "factory_99"), SAME, SAME),
    ("an id of nothing", order(1, "banana"), SAME, SAME),
    ("a unit that cannot pay for a queue", order(queue(MOVE), OTHER), SAME, SAME),
    # values of a row
    ("type 6", with_value(MOVE, kind=6), SAME, SAME),
    ("type -1", with_value(MOVE, kind=-1), SAME, SAME),
    ("direction 4", with_value(MOVE, direction=4), SAME, SAME),
    ("direction 5", with_value(MOVE, direction=5), SAME, "direction 5: it must be 0 to 4"),
    ("direction -1", with_value(MOVE, direction=-1), SAME, SAME),
    ("direction -5", with_value(MOVE, direction=-5), SAME, SAME),
    ("direction -6", with_value(MOVE, direction=-6), SAME, "direction -6: it must be 0 to 4"),
    ("transfer to direction 5", with_value(TRANSFER, direction=5), SAME, "direction 5: it must be 0 to 4"),
    (
        "a later row's direction 5",
        order([*[[5, 0, 0, 0, 0, 1]] * 9, [0, 5, 0, 0, 0, 1]]),
        SAME,
        "direction 5: it must be 0",
    ),
    ("dig in direction 5", with_value(DIG, direction=5), SAME, SAME),
    ("transfer of resource 5", with_value(TRANSFER, resource=5), SAME, SAME),
    ("transfer of resource -1", with_value(TRANSFER, resource=-1), SAME, SAME),
    ("pick up resource 5", with_value(PICK_UP, resource=5), SAME, "resource 5: it must be 0 to 4"),
    ("pick up resource -1", with_value(PICK_UP, resource=-1), SAME, "resource -1: it must be 0 to 4"),
    ("amount -5", with_value(TRANSFER, amount=-5), SAME, SAME),
    ("amount 3001", with_value(TRANSFER, amount=3001), SAME, SAME),
    ("amount 3002", with_value(TRANSFER, amount=3002), SAME, SAME),
    ("repeat -1", with_value(DIG, repeat=-1), SAME, SAME),
    ("repeat 9999", with_value(DIG, repeat=9999), SAME, SAME),
    ("repeat 10000", with_value(DIG, repeat=10000), SAME, SAME),
    ("n 0", with_value(DIG, n=0), SAME, SAME),
    ("n -1", with_value(DIG, n=-1), SAME, SAME),
    ("n 9999", with_value(DIG, n=9999), SAME, SAME),
    ("n 10000", with_value(DIG, n=10000), SAME, SAME),
    # a factory's action
    ("factory action 3", order(3, FACTORY), SAME, SAME),
    ("factory action -1", order(-1, FACTORY), SAME, SAME),
    ("factory action 1.0", order(1.0, FACTORY), SAME, SAME),
    ("factory action 1.5", order(1.5, FACTORY), SAME, SAME),
    ("factory action True", order(True, FACTORY), SAME, SAME),
    ("factory action int8", order(np.int8(1), FACTORY), SAME, SAME),
    ("factory action array", order(np.array(1), FACTORY), SAME, SAME),
    ("factory action list", order([1], FACTORY), SAME, SAME),
    ("factory action arrays", order(np.array([1, 1]), FACTORY), SAME, SAME),
    ("factory action word", order("1", FACTORY), SAME, SAME),
    ("factory action None", order(None, FACTORY), SAME, SAME),
]


def prepared(**config):
    """Two games with the units of the table, whose queues are under way, and lichen."""
    games = new_games(1, **config)
    for game in games:
        rng = np.random.default_rng(0)
        centres = [factory.pos.pos for factory in game.state.factories[PLAYERS[0]].values()]
        free = iter(rng.permutation(np.argwhere(game.state.board.factory_occupancy_map == -1)))
        for player, kind, tile in (
            (PLAYERS[0], UnitType.LIGHT, centres[0] - (0, 1)),  # on its factory, to pick up and to transfer
            (PLAYERS[0], UnitType.HEAVY, next(free)),
            (PLAYERS[1], UnitType.LIGHT, next(free)),
            (PLAYERS[1], UnitType.HEAVY, next(free)),
        ):
            game.add_unit(game.state.teams[player], kind, tile).power = 100
        game.state.units[PLAYERS[0]][UNIT].cargo.ice = 40
        game.state.units[PLAYERS[0]][OTHER].power = 9
        under_way = queue((3, 0, 0, 0, 1, 2), (0, 1, 0, 0, 1, 2))
        game.step({PLAYERS[0]: {UNIT: under_way}, PLAYERS[1]: {ENEMY: under_way, "unit_11": under_way}})
        for _ in range(3):
            game.step({player: dict.fromkeys(game.state.factories[player], 2) for player in PLAYERS})
    assert_same(*games)
    return games


@pytest.fixture(scope="module")
def prepared_games():
    return {validate: prepared(validate_action_space=validate) for validate in (True, False)}


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("actions", "validated", "unvalidated"), [case[1:] for case in ACTIONS], ids=[c[0] for c in ACTIONS]
)
def test_unusual_actions(prepared_games, actions, validated, unvalidated, validate):
    stock, fast = copy.deepcopy(prepared_games[validate])
    expected = validated if validate else unvalidated
    if expected is not SAME:
        before = copy.deepcopy(everything(fast))
        with pytest.raises(ValueError) as refusal:
            fast.step(copy.deepcopy(actions))
        sentence = str(refusal.value)
        assert expected in sentence and sentence.endswith(".") and "\n" not in sentence
        assert_equal(before, everything(fast))
        if "player_7" not in sentence or validate:  # without validation the stock engine only prints a traceback
            with pytest.raises((TypeError, KeyError, IndexError, AttributeError, UnboundLocalError)):
                stock.step(copy.deepcopy(actions))
                for _ in range(10):  # when it comes to that row
                    stock.step({player: {} for player in PLAYERS})
        return
    try:
        result = stock.step(copy.deepcopy(actions))
    except Exception as error:
        with pytest.raises(type(error), match=str(error)):
            fast.step(copy.deepcopy(actions))
    else:
        assert_equal(result, fast.step(copy.deepcopy(actions)))
    assert_same(stock, fast)
    for _ in range(4):  # what has been queued is carried out alike
        if stock.agents:
            step_both((stock, fast), {player: {} for player in PLAYERS})


def test_both_players_orders_are_kept_apart_whatever_their_order():
    """Units that are built in one step have the same ids, whichever player comes first."""
    ids = []
    for players in (PLAYERS, PLAYERS[::-1]):
        for game in new_games(1):
            game.step({player: dict.fromkeys(game.state.factories[player], 0) for player in players})
            ids.append([list(game.state.units[player]) for player in PLAYERS])
    assert ids == [ids[0]] * 4 and ids[0][0]


def test_a_player_that_is_missing_keeps_its_orders():
    games = prepared()
    before = games[1].state.units[PLAYERS[1]][ENEMY].power
    for _ in range(4):
        step_both(games, {PLAYERS[0]: {}})
    assert games[1].state.units[PLAYERS[1]][ENEMY].power < before - 2  # it went on digging and moving


@pytest.mark.parametrize("how", ["set_state", "assigned"])
def test_a_state_made_of_an_observation(how):
    games = new_games(2)
    rng = np.random.default_rng(0)
    for _ in range(10):
        step_both(games, random_actions(games[0], rng))
    for game in games:
        state = State.from_obs(copy.deepcopy(game.state.get_obs()), game.env_cfg)
        if how == "set_state":
            game.set_state(state)
        else:
            game.state = state
        for factory in [factory for team in state.factories.values() for factory in team.values()]:
            factory.cargo.water = 200
    for _ in range(40):
        step_both(games, random_actions(games[0], rng))
    assert games[1].state.board.lichen.any()


def test_statistics():
    games = new_games(3, collect_stats=True)
    crowd(games, units=40)
    rng = np.random.default_rng(0)
    for _ in range(60):
        step_both(games, random_actions(games[0], rng))  # which compares them
        top_up(*games)
    generation = games[1].state.stats[PLAYERS[0]]["generation"]
    assert generation["lichen"] > 0 and min(generation["power"].values()) > 0


@pytest.mark.parametrize("spread", [0, 1, 5])
def test_how_much_lichen_spreads(spread):
    games = new_games(2, map_size=24, MIN_FACTORIES=1, MAX_FACTORIES=1, MIN_LICHEN_TO_SPREAD=spread)
    rng = np.random.default_rng(0)
    for game in games:
        game.state.board.rubble[rng.random((24, 24)) < 0.5] = 0
        rng = np.random.default_rng(0)
    for _ in range(12):
        for game in games:
            for factory in (factory for team in game.state.factories.values() for factory in team.values()):
                factory.cargo.water = 100
        step_both(games, {player: dict.fromkeys(games[0].state.factories[player], 2) for player in PLAYERS})
    assert games[1].state.board.lichen.any()


@pytest.mark.parametrize(
    "config",
    [
        {"map_size": 16, "MIN_FACTORIES": 1, "MAX_FACTORIES": 1},
        {"UNIT_ACTION_QUEUE_SIZE": 1},
        {"POWER_LOSS_FACTOR": 0.9, "MAX_LICHEN_PER_TILE": 4, "POWER_PER_CONNECTED_LICHEN_TILE": 3},
        {"CYCLE_LENGTH": 7, "DAY_LENGTH": 2, "FACTORY_WATER_CONSUMPTION": 2, "LICHEN_WATERING_COST_FACTOR": 3},
    ],
)
def test_other_settings(config):
    games, rng = new_games(5, **config), np.random.default_rng(0)
    crowd(games, units=20)
    for _ in range(40):
        if games[0].agents:
            step_both(games, random_actions(games[0], rng))


def test_warnings_are_those_of_the_stock_engine(capsys):
    outputs, rng = [], np.random.default_rng(0)
    games = new_games(6, verbose=3)
    crowd(games, units=10)
    capsys.readouterr()
    for _ in range(6):
        actions = random_actions(games[0], rng)
        for game in games:
            game.step(copy.deepcopy(actions))
            # sorted, because the units of a collision are printed in the order of a set
            outputs.append("".join(sorted(capsys.readouterr().out)))
    assert outputs[::2] == outputs[1::2] and "".join(outputs).count("I") > 5  # for Invalid


BIDS = {player: {"faction": "AlphaStrike", "bid": 0} for player in PLAYERS}
BEGINNINGS = [  # name, the first steps, the sentence
    ("a bid missing", [{PLAYERS[0]: BIDS[PLAYERS[0]]}], "the bid of player_1 is missing"),
    ("None as a bid", [{**BIDS, PLAYERS[1]: None}], SAME),
    ("an unknown faction", [{**BIDS, PLAYERS[1]: {"faction": "Banana", "bid": 0}}], SAME),
    ("a bid beyond what there is", [{**BIDS, PLAYERS[1]: {"faction": "MotherMars", "bid": 10**6}}], SAME),
    ("a negative bid", [{**BIDS, PLAYERS[1]: {"faction": "MotherMars", "bid": -20}}], SAME),
    ("a bid of a stranger", [{**BIDS, "player_7": BIDS[PLAYERS[0]]}], "no player 'player_7'"),
    ("a player missing as factories are placed", [BIDS, {PLAYERS[1]: {}}], SAME),
    ("None as a placement", [BIDS, {PLAYERS[0]: None, PLAYERS[1]: {}}], SAME),
    ("nobody", [BIDS, {}], SAME),
    *[
        (
            f"a factory at {spot} with {water} water",
            [BIDS, {PLAYERS[turn]: {"spawn": spot, "metal": 150, "water": water}, PLAYERS[1 - turn]: {}}],
            SAME,
        )
        for spot, water, turn in (
            ((0, 0), 1, 0),
            ((99, 0), 1, 0),
            ((20, 20), -1, 0),
            ((20, 20), 10**6, 0),
            ((20, 20), 1, 1),
        )
    ],
]


@pytest.mark.parametrize(("steps", "sentence"), [case[1:] for case in BEGINNINGS], ids=[case[0] for case in BEGINNINGS])
def test_how_a_game_begins(steps, sentence):
    games = [cls(**CONFIG) for cls in ENGINES]
    assert_equal(*[game.reset(seed=2) for game in games])
    for i, actions in enumerate(steps):
        try:
            result = games[0].step(copy.deepcopy(actions))
        except Exception as error:
            with pytest.raises(ValueError, match=sentence or str(error)):
                games[1].step(copy.deepcopy(actions))
            assert i == len(steps) - 1
            if sentence:
                return
        else:
            assert_equal(result, games[1].step(copy.deepcopy(actions)))
        assert_same(*games)
    assert not sentence


def test_a_game_without_bids():
    games = [cls(**CONFIG, BIDDING_SYSTEM=False) for cls in ENGINES]
    assert_equal(*[game.reset(seed=2) for game in games])
    spots = np.argwhere(games[0].state.board.valid_spawns_mask)[::97][:8]
    step_both(games, {p: {"faction": "AlphaStrike", "spawns": spots[i::2]} for i, p in enumerate(PLAYERS)})
    rng = np.random.default_rng(0)
    for _ in range(30):
        step_both(games, random_actions(games[0], rng))


def test_a_step_without_a_game_is_refused():
    idle = {player: {} for player in PLAYERS}
    with pytest.raises(RuntimeError, match="call reset\\(\\) before step\\(\\)"):
        ENGINES[1](**CONFIG).step(BIDS)
    games = new_games(1, max_episode_length=3)
    for _ in range(3):
        result = step_both(games, idle)
    assert result[2] == dict.fromkeys(PLAYERS, True) and result[3] == dict.fromkeys(PLAYERS, False)
    before = copy.deepcopy(everything(games[1]))
    with pytest.raises(RuntimeError, match="call reset\\(\\) before step\\(\\), also after a game's end"):
        games[1].step(idle)
    assert_equal(before, everything(games[1]))
    assert_equal(*[game.reset(seed=3) for game in games])
    assert_equal(*[game.step(copy.deepcopy(BIDS)) for game in games])


def test_a_team_that_loses_all_factories_has_failed():
    games = new_games(1)
    for game in games:
        for factory in game.state.factories[PLAYERS[1]].values():
            factory.cargo.water = factory.cargo.ice = 0
    result = step_both(games, {player: {} for player in PLAYERS})
    assert result[1:4] == (
        {PLAYERS[0]: 0, PLAYERS[1]: -1000},
        dict.fromkeys(PLAYERS, True),
        {PLAYERS[0]: False, PLAYERS[1]: True},
    )
