"""The Lux environment on random legal play: what masks allow happens, and nothing unwanted does."""

import copy
import io
import types
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from luxai_s2.actions import DigAction, MoveAction
from luxai_s2.map.position import Position
from luxai_s2.state import State

import ppo_trajsep_lux as script
from ppo_trajsep_lux import (
    BUILD_HEAVY,
    BUILD_LIGHT,
    DELIVER,
    DIG,
    DOWN,
    EMPTY,
    EPISODE_STATS,
    FACTORY,
    HEAVY,
    LEFT,
    LIGHT,
    NO_OP,
    NUM_EVAL_MAPS,
    PICK_UP,
    PLAYERS,
    RIGHT,
    UP,
    WATER,
    Args,
    LuxEnv,
    Refusal,
    View,
    action_masks,
    assign_slots,
    choose_spot,
    draw_maps,
    engine_actions,
    entity_rewards,
    look,
    make_worker_env,
    observe,
    placement_score,
    resolve_collisions,
)

SMALL = Args(map_size=32, factories_per_team=2, max_units=30, augment=False)
SELF = Args(map_size=32, factories_per_team=2, max_units=30, augment=False, opponent="self")


def random_legal(env, rng, weights=None):
    """A random legal action per slot; `weights` (NUM_ACTIONS,) make some more likely."""
    score = rng.random((len(env.players), env.num_slots, script.NUM_ACTIONS)) ** (1 / np.array(weights or [1] * 8))
    return np.where(np.array(env.masks), score, -1).argmax(-1)


def rich_game(args, seed, env_class=LuxEnv, collect_stats=True):
    """An environment whose factories have the means to do everything, and live long."""
    env = env_class(args)
    env.engine.collect_stats = collect_stats  # the engine's own statistics, to compare with
    env.reset(seed=seed)
    for player in env.players:
        for factory in env.engine.state.factories[player].values():
            factory.cargo.water, factory.cargo.metal, factory.power = 1000, 300, 5000
    return env


def watch_losses(engine):
    """The list to which the engine will add (team, tile) of every unit that it destroys."""
    lost, destroy_unit = [], engine.destroy_unit

    def destroy(unit):
        lost.append((unit.team.agent, tuple(unit.pos.pos.tolist())))
        destroy_unit(unit)

    engine.destroy_unit = destroy
    return lost


def friendly(lost, state):
    """Those of the units lost in a step whose tile saw no enemy, destroyed or alive."""
    seen = {*lost} | {(p, tuple(unit.pos.pos.tolist())) for p in PLAYERS for unit in state.units[p].values()}
    return [(team, tile) for team, tile in lost if (PLAYERS[team == PLAYERS[0]], tile) not in seen]


def lichen_by_factory(board):
    """How much lichen each of the four factories has."""
    return np.array([board.lichen[board.lichen_strains == strain].sum() for strain in range(4)])


def assert_same(one, other):
    """Two steps' results, or two resets': the same observations, rewards, flags and infos."""
    assert one[0].keys() == other[0].keys() and one[1:] == other[1:]
    for key in one[0]:
        np.testing.assert_array_equal(one[0][key], other[0][key], key)


def test_gymnasium_checker():
    for args in (SMALL, SELF):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it dislikes rewards without bounds
            check_env(LuxEnv(args), skip_render_check=True)


def test_observations_are_fresh_and_bounded():
    for args in (SMALL, SELF):
        env, rng = rich_game(args, 0), np.random.default_rng(0)
        before, _, _, _, _ = env.step(random_legal(env, rng))
        kept = copy.deepcopy(before)
        for _ in range(200):
            obs, _, over, _, _ = env.step(random_legal(env, rng))
            assert env.observation_space.contains(obs)
            assert obs["planes"].min() >= 0 and obs["planes"].max() <= 4
            assert not over
        for key in before:
            np.testing.assert_array_equal(before[key], kept[key])
        assert obs["planes"].shape == (len(env.players), 18, 32, 32)
        assert np.isfinite(obs["planes"].astype(np.float32)).all()


def test_planes_show_the_state_from_the_players_own_side():
    env, rng = rich_game(SELF, 1), np.random.default_rng(1)
    for _ in range(60):
        obs, *_ = env.step(random_legal(env, rng))
    state, planes = env.engine.state, obs["planes"].astype(np.float32)
    for side, (player, enemy) in enumerate((PLAYERS, PLAYERS[::-1])):
        np.testing.assert_allclose(planes[side, 0], state.board.rubble / 100, atol=1e-3)
        np.testing.assert_array_equal(planes[side, 1], state.board.ice)
        assert planes[side, 5].sum() == 9 * len(state.factories[player])
        np.testing.assert_array_equal(planes[side, 6], planes[1 - side, 5])
        for unit in state.units[player].values():
            tile = tuple(unit.pos.pos)
            assert planes[side, 12 if unit.is_heavy() else 11][tile] == 1
            assert planes[1 - side, 13][tile] == (1 if unit.is_heavy() else 0.5)
            assert planes[side, 14][tile] ** 2 == pytest.approx(unit.power / unit.battery_capacity, abs=2e-3)
        assert (planes[side, 2] == 0).sum() == 9 * len(state.factories[player])
        corner = min(
            np.maximum(np.abs(factory.pos.pos) - 1, 0).sum() for factory in state.factories[player].values()
        )  # steps from tile (0, 0) to the nearest own factory
        assert planes[side, 2, 0, 0] == pytest.approx(min(corner / 10, 2), abs=1e-3)
        assert planes[side, 11:13].sum() == len(state.units[player])
        assert len(state.units[enemy]) > 0
        for slot in np.flatnonzero(obs["kind"][side] != EMPTY):
            entity = env.ids[side][slot]
            x, y = divmod(int(obs["pixel"][side, slot]), 32)
            owner = state.factories[player] if obs["kind"][side, slot] == FACTORY else state.units[player]
            assert tuple(owner[entity].pos.pos) == (x, y)
            number = owner[entity].num_id if obs["kind"][side, slot] == FACTORY else env.numbers[side][entity]
            assert number == obs["unit_id"][side, slot]


def test_planes_of_stocks_lichen_and_clocks():
    """The factories' stocks and the units' ice are set by hand; the lichen is what the engine let grow in 60 steps."""
    env, rng = rich_game(SELF, 1), np.random.default_rng(1)
    for _ in range(60):
        env.step(random_legal(env, rng))
    state, stocks = env.engine.state, [(750, 150, 30, 100), (9000, 700, 600, 5000), (0, 30, 90, 1700), (27, 300, 0, 0)]
    shown = [(0.5, 0.5, 0.2, 0.1), (2**0.5, 2, 2, 2), (0, 0.1, 0.6, 1.7), (0.3 / 10**0.5, 1, 0, 0)]  # power: a root
    factories = [factory for player in PLAYERS for factory in state.factories[player].values()]
    for factory, (power, water, metal, ice) in zip(factories, stocks, strict=True):
        factory.power, factory.cargo.water, factory.cargo.metal, factory.cargo.ice = power, water, metal, ice
    units = [[*state.units[player].values()] for player in PLAYERS]
    for unit in sum(units, []):
        unit.cargo.ice = 30
    planes = env._observe(state.get_obs(), *np.zeros((2, 2, env.num_slots)))["planes"].astype(np.float32)
    for side, seen in enumerate(planes):
        own = np.isin(state.board.lichen_strains, [factory.num_id for factory in factories[2 * side : 2 * side + 2]])
        for plane, whose in ((3, own), (4, ~own)):
            assert (state.board.lichen * whose).any()
            np.testing.assert_allclose(seen[plane], state.board.lichen * whose / 100, atol=1e-3)
        expected = np.zeros((4, 32, 32))
        for factory, numbers in list(zip(factories, shown, strict=True))[2 * side : 2 * side + 2]:
            x, y = factory.pos.pos
            expected[:, x - 1 : x + 2, y - 1 : y + 2] = np.reshape(numbers, (4, 1, 1))
        np.testing.assert_allclose(seen[7:11], expected, atol=2e-3)
        carried = np.zeros((32, 32))
        for unit in units[side]:
            carried[tuple(unit.pos.pos)] = 0.03 if unit.is_heavy() else 0.3
        assert {0, 0.03, 0.3} == {*carried.flat}
        np.testing.assert_allclose(seen[15], carried, atol=1e-3)
        np.testing.assert_allclose(seen[16], 0.2, atol=1e-3)  # ten steps into the second day
        np.testing.assert_allclose(seen[17], 0.06, atol=1e-3)


def test_the_engines_own_observation_gives_the_same():
    """A submitted agent is handed that of `State.get_obs`: lists, arrays and whole queues, not live references."""
    env, rng = rich_game(SELF, 2), np.random.default_rng(2)
    obs, views, orders = env._observe(env.engine.state.get_obs(), 0, 0), [None, None], 0
    for _ in range(100):
        handed = State.get_obs(env.engine.state)
        action = random_legal(env, rng)
        for side, player in enumerate(PLAYERS):
            view = View(handed, player, env.ids[side], env.numbers[side], SELF.max_units, views[side])
            views[side] = view
            np.testing.assert_array_equal(action_masks(view), env.masks[side])
            for key, value in observe(view, env.masks[side], 0).items():
                np.testing.assert_array_equal(value, obs[key][side], key)
            theirs, ours = (engine_actions(v, env.masks[side], action[side]) for v in (view, env.views[side]))
            assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in ours)
            orders += len(ours)
        obs, *_ = env.step(action)
    assert orders > 500


@pytest.mark.parametrize("opponent", ["idle", "self"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_joint_play_is_legal_and_harmless(opponent, seed, capfd):
    """No warning of the engine, no friendly loss, no slot with two entities, rewards that add up."""
    args = Args(map_size=32, factories_per_team=2, max_units=30, augment=False, opponent=opponent, reward_lichen=0.01)
    env, rng = rich_game(args, seed), np.random.default_rng(seed)
    env.engine.env_cfg.verbose = 3  # the engine prints every action that it does not carry out
    all_lost, grown = watch_losses(env.engine), 0
    for _ in range(350):
        lost_before = len(all_lost)
        state, kinds, ids = env.engine.state, [k.copy() for k in env.kinds], [list(i) for i in env.ids]
        # all that the team's terms need, from the engine's state before the step
        ice_before = [sum(u.cargo.ice for u in state.units[p].values()) for p in env.players]
        rubble_before, lichen_before = state.board.rubble.copy(), lichen_by_factory(state.board)
        dug_before = [sum(state.stats[p]["generation"]["ice"].values()) for p in env.players]
        moved_before = [state.stats[p]["transfer"]["ice"] for p in env.players]
        obs, reward, over, _, info = env.step(random_legal(env, rng, [1, 1, 1, 1, 1, 4, 4, 1]))
        for side, player in enumerate(env.players):
            living = [entity for entity in env.ids[side] if entity is not None]
            assert len(set(living)) == len(living)
            assert set(living) == set(state.units[player]) | set(state.factories[player])
            for slot, entity in enumerate(env.ids[side]):  # a slot changes hands only through empty
                assert entity is None or ids[side][slot] in (None, entity)
            lost = np.array([e is not None and e not in living for e in ids[side]])
            np.testing.assert_array_equal(obs["done"][side].astype(bool), lost | (over & (kinds[side] != EMPTY)))
            is_unit = (kinds[side] == LIGHT) | (kinds[side] == HEAVY)
            dug = sum(state.stats[player]["generation"]["ice"].values()) - dug_before[side]
            # no unit-to-unit transfers here, so the engine's count is that of deliveries
            delivered = state.stats[player]["transfer"]["ice"] - moved_before[side]
            terms = args.reward_ice_dug * dug
            terms += (args.reward_ice_delivered + args.reward_ice_received) * delivered
            terms += args.reward_factory_alive * len(state.factories[player])
            terms += args.reward_factory_lost * (lost & (kinds[side] == FACTORY)).sum()
            terms += args.reward_unit_lost * (lost & is_unit).sum()
            gained = np.maximum(lichen_by_factory(state.board) - lichen_before, 0)[state.teams[player].factory_strains]
            terms += args.reward_lichen * gained.sum()
            grown += gained.sum()
            if len(env.players) == 1:  # the board's rubble tells whose digging it was
                cleared = np.maximum(rubble_before - state.board.rubble, 0)[state.board.ice > 0].sum()
                terms += args.reward_rubble_cleared * cleared
                assert obs["reward"][side].sum() == pytest.approx(terms, abs=1e-4)
                if not lost.any():
                    ice = sum(u.cargo.ice for u in state.units[player].values())
                    assert ice == ice_before[side] + dug - delivered
        assert reward == pytest.approx(obs["reward"].sum(), abs=1e-4)
        assert not friendly(all_lost[lost_before:], env.engine.state)
        if over:
            break
    assert grown > 0
    printed = capfd.readouterr().out
    if opponent == "idle":
        assert printed == ""
        assert all_lost == []
    else:  # the two sides may collide with each other
        assert "Invalid" not in printed and "doesn't have enough" not in printed and "insufficient" not in printed
    for side, player in enumerate(env.players):
        engine = env.engine.state.stats[player]
        assert env.stats[side]["units_lost"] == sum(team == player for team, _ in all_lost)
        assert env.stats[side]["ice_transferred"] == engine["transfer"]["ice"] > 0
        assert env.stats[side]["ice_dug"] == sum(engine["generation"]["ice"].values()) > 0
        assert env.stats[side]["units_built"] == sum(engine["generation"]["built"].values()) > 0


def effect(before, after, entity, action, player):
    """Whether `action` of `entity` shows in the engine's state."""
    if entity.startswith("factory"):
        old, new = before.factories[player][entity], after.factories[player][entity]
        if action == WATER:
            return (after.board.lichen_strains == new.num_id).sum() > 0
        return old.cargo.metal - new.cargo.metal == (10 if action == BUILD_LIGHT else 100)
    old, new = before.units[player][entity], after.units[player][entity]
    if UP <= action <= LEFT:
        return tuple(new.pos.pos - old.pos.pos) == tuple(script.DELTAS[action])
    if action == DIG:
        tile = tuple(old.pos.pos)
        less_rubble = after.board.rubble[tile] < before.board.rubble[tile]
        return less_rubble or new.cargo.ice > old.cargo.ice or after.board.lichen[tile] < before.board.lichen[tile] - 1
    if action == DELIVER:
        return old.cargo.ice > 0 and new.cargo.ice == 0
    assert action == PICK_UP
    return new.power > old.power


@pytest.mark.parametrize("opponent", ["idle", "self"])
def test_every_allowed_action_takes_effect(opponent):
    """At many moments, each legal action of each entity alone, on a copy of the game."""
    args = Args(map_size=32, factories_per_team=2, max_units=12, augment=False, opponent=opponent)
    seen = set()
    for seed in (0, 1):
        env, rng = rich_game(args, seed), np.random.default_rng(seed)
        for step in range(240):
            _, _, over, _, _ = env.step(random_legal(env, rng, [1, 1, 1, 1, 1, 4, 4, 1]))
            if over:
                break
            if step % 6:
                continue
            for side, player in enumerate(env.players):
                view, mask = env.views[side], env.masks[side]
                tiles = {tuple(unit.pos.pos) for p in PLAYERS for unit in env.engine.state.units[p].values()}
                for slot, action in zip(*np.nonzero(mask), strict=True):
                    entity = view.ids[slot]
                    if action == NO_OP or (action != DELIVER and rng.random() > 0.25):
                        continue
                    if env.kinds[side][slot] != FACTORY and UP <= action <= LEFT:
                        here = env.engine.state.units[player][entity].pos.pos
                        if tuple(here + script.DELTAS[action]) in tiles:
                            continue  # a unit is parked there, which may itself move: no mask can tell
                    game = copy.deepcopy(env.engine)
                    for units in game.state.units.values():  # all others idle: no queues
                        for name, unit in units.items():
                            unit.action_queue = unit.action_queue if name == entity else []
                    before = copy.deepcopy(game.state)
                    single = np.zeros(env.num_slots, dtype=int)
                    single[slot] = action
                    orders = engine_actions(view, mask, single)
                    orders = {name: order for name, order in orders.items() if name == entity}
                    game.step({**{p: {} for p in PLAYERS}, player: orders})
                    assert effect(before, game.state, entity, action, player), (entity, action)
                    seen.add((int(env.kinds[side][slot]), int(action)))
    units = {(kind, action) for kind in (LIGHT, HEAVY) for action in range(UP, PICK_UP + 1)}
    assert units | {(FACTORY, BUILD_LIGHT), (FACTORY, BUILD_HEAVY), (FACTORY, WATER)} <= seen


def test_masked_out_actions_become_no_ops():
    env, twin = rich_game(SMALL, 3), rich_game(SMALL, 3)
    rng = np.random.default_rng(3)
    for _ in range(60):
        legal = random_legal(env, rng)
        illegal = rng.integers(0, 8, legal.shape)
        masked = np.where(np.take_along_axis(np.array(env.masks), illegal[..., None], -1)[..., 0], illegal, NO_OP)
        one, other = env.step(illegal)[0], twin.step(masked)[0]
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("choices", [range(UP, LEFT + 1), [DIG]], ids=["moves", "dig"])
def test_a_repeated_choice_is_sent_once(choices):
    env, rng = rich_game(SMALL, 0), np.random.default_rng(0)
    for _ in range(300):
        env.step(random_legal(env, rng))
        view, mask = env.views[0], env.masks[0]
        goes_on = np.isin(view.units["queued"], choices) & mask[view.units["slot"], view.units["queued"]]
        for unit in view.units[goes_on][:1]:
            action = np.zeros(env.num_slots, dtype=int)
            action[unit["slot"]] = unit["queued"]
            assert view.ids[unit["slot"]] not in engine_actions(view, mask, action)
            action[unit["slot"]] = NO_OP
            assert len(engine_actions(view, mask, action)[view.ids[unit["slot"]]]) == 0  # cancelled
            return
    pytest.fail("no unit ever went on with its queue")


def test_an_augmented_game_is_the_same_game():
    args = Args(map_size=32, factories_per_team=2, max_units=30)
    plain, turned, rng, seen = rich_game(SMALL, 4), rich_game(args, 4), np.random.default_rng(4), set()
    tiles = np.argwhere(np.ones((32, 32)))
    for _ in range(100):
        action = random_legal(plain, rng)
        shown = action.copy()
        shown[:, :30] = script.TURNED[turned.symmetry][action[:, :30]]
        one, other = plain.step(action)[0], turned.step(shown)[0]
        symmetry = turned.symmetry
        seen.add(symmetry)
        at = script.turn_tiles(tiles, symmetry, 32)
        left, right = (obs["planes"][0].astype(np.float32) for obs in (one, other))
        np.testing.assert_array_equal(left[:, tiles[:, 0], tiles[:, 1]], right[:, at[:, 0], at[:, 1]])
        for key in ("kind", "unit_id", "reward", "done"):
            np.testing.assert_array_equal(one[key], other[key])
        for slot in np.flatnonzero(one["kind"][0]):
            here = np.array(divmod(int(one["pixel"][0, slot]), 32))
            shown_here = np.array(divmod(int(other["pixel"][0, slot]), 32))
            np.testing.assert_array_equal(script.turn_tiles(here[None], symmetry, 32)[0], shown_here)
            for action in range(script.NUM_ACTIONS):
                becomes = script.TURNED[symmetry][action] if slot < 30 else action
                assert one["action_mask"][0, slot, action] == other["action_mask"][0, slot, becomes]
                if slot < 30 and UP <= action <= LEFT:  # the tile that it leads to is the turned one
                    goal = script.turn_tiles((here + script.DELTAS[action])[None], symmetry, 32)[0]
                    np.testing.assert_array_equal(shown_here + script.DELTAS[becomes], goal)
    assert seen == set(range(8))


def test_resolve_collisions():
    def stopped(pos, target, newborn=()):  # by columns of one row of the map
        tiles = [np.array([(x, 9) for x in columns], dtype=int).reshape(-1, 2) for columns in (pos, target, newborn)]
        return resolve_collisions(*tiles).tolist()

    assert stopped([1, 2], [2, 1]) == [False, False]  # a swap
    assert stopped([1, 2], [2, 2]) == [True, False]  # onto a parked unit
    assert stopped([1, 3], [2, 2]) == [False, True]  # two movers, the first goes
    assert stopped([1], [2], [2]) == [True]  # onto a newborn
    assert stopped([1, 2, 3, 4], [2, 3, 4, 4]) == [True, True, True, False]  # a queue behind a parked unit
    assert stopped([1, 2, 3], [2, 3, 1]) == [False, False, False]  # a ring
    assert stopped([], []) == []


def test_look():
    layer = np.arange(1, 10).reshape(3, 3)
    tiles = np.argwhere(layer)
    np.testing.assert_array_equal(look(layer, tiles, 0), layer.ravel())  # every tile of the map
    for off in (-4, -1, 3, 6):  # off the map to the left, right, top or bottom, or by a corner
        outside = np.array([[(off, y) for y in range(3)], [(x, off) for x in range(3)], [(off, off)] * 3])
        np.testing.assert_array_equal(look(layer, outside, -7), np.full((3, 3), -7))
    mixed = np.array([[(0, 0), (-1, 0)], [(2, 3), (2, 2)]])
    assert look(layer, mixed, 0).tolist() == [[1, 0], [0, 9]]
    assert look(layer > 8, mixed, False).tolist() == [[False, False], [False, True]]


def slots_after(ids, numbers, units, factories=("factory_0",)):
    """`assign_slots` with two slots for units, when these are alive after the step."""
    obs = {"units": {"player_0": dict.fromkeys(units)}, "factories": {"player_0": dict.fromkeys(factories)}}
    return assign_slots(ids, numbers, obs, "player_0", 2)


def test_assign_slots():
    ids, numbers = [None, None, "factory_0"], {}
    one = slots_after(ids, numbers, ["unit_2"])
    assert one == ["unit_2", None, "factory_0"] and ids == [None, None, "factory_0"]
    two = slots_after(one, numbers, ["unit_5"])  # the first one dies; its slot is not free yet
    assert two == [None, "unit_5", "factory_0"]
    three = slots_after(two, numbers, ["unit_5", "unit_9"])  # a unit keeps its slot, the newborn takes the free one
    assert three == ["unit_9", "unit_5", "factory_0"]
    assert slots_after(three, numbers, ["unit_9"], []) == ["unit_9", None, None]
    assert numbers == {"unit_2": 2, "unit_5": 3, "unit_9": 4}  # after the factories of both sides, 0 and 1


@pytest.mark.parametrize("args", [SMALL, SELF], ids=["idle", "self"])
def test_each_side_numbers_its_units_as_if_it_alone_built(args):
    """With an idle opponent these are the engine's numbers; in self-play the other side's units leave no gaps."""
    env, rng, seen = rich_game(args, 0), np.random.default_rng(0), [{} for _ in PLAYERS]
    for _ in range(60):
        env.step(random_legal(env, rng))
        for side, player in enumerate(env.players):
            seen[side] |= dict.fromkeys(env.engine.state.units[player])  # in the order in which they are built
            units = env.views[side].units
            assert [env.numbers[side][env.ids[side][slot]] for slot in units["slot"]] == units["id"].tolist()
    for side in range(len(env.players)):
        assert len(seen[side]) > 6
        assert env.numbers[side] == {unit_id: number for number, unit_id in enumerate(seen[side], start=4)}
        if args is SMALL:
            assert [f"unit_{number}" for number in env.numbers[side].values()] == list(seen[side])


def test_building_is_masked_when_slots_run_out():
    args = Args(map_size=32, factories_per_team=2, max_units=3, augment=False)
    env, rng = rich_game(args, 0), np.random.default_rng(0)
    for _ in range(120):
        free = sum(entity is None for entity in env.ids[0][:3])
        builders = env.masks[0][3:, BUILD_LIGHT : BUILD_HEAVY + 1].any(-1).sum()
        assert builders <= free
        env.step(random_legal(env, rng))
    assert env.stats[0]["units_built"] == 3


def test_idle_opponent_outlives_the_episode():
    env = LuxEnv(SMALL)
    env.reset(seed=0)
    for factory in env.engine.state.factories[PLAYERS[0]].values():
        factory.cargo.water = 2000
    over, steps = False, 0
    while not over:
        obs, _, over, truncated, info = env.step(np.zeros((1, env.num_slots), dtype=int))
        steps += 1
    assert steps == 1000 and not truncated
    assert obs["done"].sum() == 2  # both factories, by the end of the episode
    assert info["episode"]["episodic_length"] == 1000
    assert info["episode"]["factory_count"] == 2000 and info["episode"]["factories_alive"] == 2.0
    assert set(info["episode"]) == set(EPISODE_STATS)


def test_untended_factories_die_and_say_so():
    env = LuxEnv(SMALL)
    env.reset(seed=0)
    over, steps, total = False, 0, 0.0
    while not over:
        obs, reward, over, _, info = env.step(np.zeros((1, env.num_slots), dtype=int))
        steps, total = steps + 1, total + reward
    assert steps == 151
    expected = 2 * (150 * SMALL.reward_factory_alive + SMALL.reward_factory_lost)
    assert total == pytest.approx(expected, abs=1e-4) == info["episode"]["episodic_return"]


def test_a_unit_that_dies_has_its_done_flag_before_its_slot_is_taken():
    env = rich_game(Args(map_size=32, factories_per_team=2, max_units=2, augment=False), 0)
    action = np.zeros((1, env.num_slots), dtype=int)
    action[0, 2:] = BUILD_LIGHT
    env.step(action)
    first = env.ids[0][0]
    unit = env.engine.state.units[PLAYERS[0]][first]
    # Kill it inside the engine's step, in which the other factory wants to build as well.
    env.engine.state.board.units_map[f"{unit.pos.x},{unit.pos.y}"].remove(unit)
    env.engine.destroy_unit(unit)
    obs, *_ = env.step(np.zeros((1, env.num_slots), dtype=int))
    assert obs["done"][0].tolist() == [1, 0, 0, 0] and env.ids[0][0] is None
    assert obs["reward"][0, 0] == pytest.approx(SMALL.reward_unit_lost)
    obs, *_ = env.step(action)
    assert env.ids[0][0] not in (None, first) and obs["done"][0, 0] == 0


def test_entity_rewards():
    kind = np.array([LIGHT, HEAVY, FACTORY, FACTORY, EMPTY])
    lost = np.array([False, True, False, True, False])
    n = np.arange(1, 6)
    args = Args(
        reward_ice_dug=1,
        reward_ice_delivered=10,
        reward_rubble_cleared=100,
        reward_ice_received=1000,
        reward_lichen=10000,
        reward_factory_alive=0.5,
        reward_unit_lost=-0.25,
        reward_factory_lost=-0.125,
    )
    rewards = entity_rewards(args, kind, lost, n, n, n, n, n)
    assert rewards.tolist() == [111, 222 - 0.25, 33000.5, 44000 - 0.125, 0]


def test_ice_pays_as_in_the_paper():
    assert SMALL.reward_ice_dug + SMALL.reward_ice_delivered + SMALL.reward_ice_received == pytest.approx(0.002)


def view_now(env, previous=None):
    """The first side's view of the engine's state as it is."""
    obs = env.engine.state.get_obs()
    return View(obs, PLAYERS[0], env.ids[0], env.numbers[0], env.args.max_units, previous)


def now(env, previous=None):
    """The first side's masks, by the engine's state as it is."""
    return action_masks(view_now(env, previous))


def lone_unit(kind):
    """A game, its only unit and the tile on which it is put, far from the factories of a map of bare ground."""
    env = rich_game(SMALL, 0)
    build = np.zeros((1, env.num_slots), dtype=int)
    build[0, SMALL.max_units] = BUILD_LIGHT if kind == LIGHT else BUILD_HEAVY
    env.step(build)
    state = env.engine.state
    state.board.rubble[:], state.board.ice[:], state.board.ore[:] = 0, 0, 0
    centres = np.array([factory.pos.pos for player in PLAYERS for factory in state.factories[player].values()])
    tiles = np.argwhere(np.ones((24, 24))) + 4
    away = np.abs(tiles[:, None] - centres).max(-1).min(1)
    assert away.max() > 5  # four bare tiles in every direction
    (unit,) = state.units[PLAYERS[0]].values()
    unit.pos = Position(tiles[away.argmax()])
    return env, unit, tuple(unit.pos.pos)


@pytest.mark.parametrize("action, metal, power", [(BUILD_LIGHT, 10, 50), (BUILD_HEAVY, 100, 500)])
def test_a_factory_builds_from_the_exact_cost_on(action, metal, power):
    env = rich_game(SMALL, 0)
    factory = next(iter(env.engine.state.factories[PLAYERS[0]].values()))
    for stock, legal in (((metal, power), True), ((metal - 1, power), False), ((metal, power - 1), False)):
        factory.cargo.metal, factory.power = stock
        assert now(env)[SMALL.max_units, action] == legal


@pytest.mark.parametrize("kind, update, dig, move, rough", [(LIGHT, 1, 5, 1, 4), (HEAVY, 10, 60, 20, 80)])
def test_a_unit_acts_from_the_exact_power_on(kind, update, dig, move, rough):
    """The cost of an update of its queue and of the action itself; what its queue goes on with needs no update."""
    env, unit, (x, y) = lone_unit(kind)
    env.engine.state.board.rubble[x, y], env.engine.state.board.rubble[x + 1, y] = 1, 60

    def least(action, power):
        """Whether it is legal with that power, and with one less it is not."""
        unit.power = power
        enough = now(env)[0, action]
        unit.power = power - 1
        return enough and not now(env)[0, action]

    assert least(DIG, update + dig)
    for direction, cost in ((UP, move), (RIGHT, rough), (DOWN, move), (LEFT, move)):
        assert least(direction, update + cost)
    unit.action_queue = [DigAction(n=5)]
    assert least(DIG, dig) and least(UP, update + move)
    unit.action_queue = [MoveAction(UP, n=5)]
    assert least(UP, move) and least(DOWN, update + move) and least(DIG, update + dig)


def test_lichen_of_the_other_side_may_be_dug():
    env, unit, tile = lone_unit(LIGHT)
    board, factories = env.engine.state.board, env.engine.state.factories
    assert not now(env)[0, DIG]
    for player in PLAYERS:
        for factory in factories[player].values():
            board.lichen[tile], board.lichen_strains[tile] = 10, factory.num_id
            assert now(env)[0, DIG] == (player == PLAYERS[1])


@pytest.mark.parametrize("kind, action, power", [(LIGHT, DIG, 17), (LIGHT, UP, 5), (HEAVY, DIG, 200), (HEAVY, UP, 80)])
def test_a_queue_leaves_the_power_that_cancels_it(kind, action, power):
    """`power` is two updates of the queue and three digs, or steps onto bare ground; one less lasts for two."""
    env, unit, tile = lone_unit(kind)
    env.engine.state.board.rubble[tile] = 1
    choice = np.zeros(env.num_slots, dtype=int)
    choice[0] = action
    for enough, times in ((power, 3), (power - 1, 2)):
        unit.power = enough
        order = engine_actions(view_now(env), now(env), choice)[unit.unit_id]
        assert order.tolist() == [[3, 0, 0, 0, 0, times] if action == DIG else [0, 1, 0, 0, 0, times]]


def test_water_mask_bounds_the_engine_cost():
    env = rich_game(SMALL, 0)
    watering = np.zeros((1, env.num_slots), dtype=int)
    watering[0, SMALL.max_units :] = WATER
    env.engine.state.board.rubble[:] = 0
    most = 0
    for step in range(120):
        factories = list(env.engine.state.factories[PLAYERS[0]].values())
        tiles = env.views[0].most_lichen_tiles[SMALL.max_units :]
        for factory, count in zip(factories, tiles, strict=True):
            assert factory.water_cost(env.engine.env_cfg) <= np.ceil((12 + 5 * count) / 10)
        env.step(watering if step % 40 < 30 else np.zeros_like(watering))
        for slot, factory in enumerate(factories, start=SMALL.max_units):
            if now(env, env.views[0])[slot, WATER]:
                assert factory.cargo.water > factory.water_cost(env.engine.env_cfg)
        most = max(most, int(tiles.max()))
    assert most > 12  # lichen has spread beyond the tiles around the factory


def test_watering_is_masked_without_water_or_ground():
    env = rich_game(SMALL, 0)
    board, factories = env.engine.state.board, list(env.engine.state.factories[PLAYERS[0]].values())

    def allowed():
        return now(env)[SMALL.max_units :, WATER].tolist()

    board.rubble[:] = 0
    assert allowed() == [True, True]
    factories[0].cargo.water = 2  # twelve tiles cost 2, which would leave nothing for upkeep
    assert allowed() == [False, True]
    factories[0].cargo.water = 3
    assert allowed() == [True, True]
    board.lichen_strains[:3, 0] = factories[0].num_id  # and three tiles with lichen, 3
    assert allowed() == [False, True]
    factories[0].cargo.water = 4
    assert allowed() == [True, True]
    factories[0].cargo.water = 2
    x, y = factories[1].pos.pos
    board.rubble[x - 2 : x + 3, y - 2 : y + 3] = 1  # no bare tile around it
    assert allowed() == [False, False]


# ---- maps and placement


def test_placement_is_near_ice_and_spread():
    near, chance = [], []
    for seed in range(6):
        env = LuxEnv(Args(map_size=48, factories_per_team=4))
        env.reset(seed=seed)
        ice = np.argwhere(env.engine.state.board.ice > 0)
        for player in PLAYERS:
            centres = np.array([f.pos.pos for f in env.engine.state.factories[player].values()])
            assert len(centres) == 4
            near += [np.abs(ice - centre).sum(1).min() for centre in centres]
        chance += [np.abs(ice - tile).sum(1).min() for tile in np.random.default_rng(seed).integers(0, 48, (50, 2))]
    assert np.mean(near) < 3.5 < np.mean(chance)


def test_placement_score_prefers_clear_ice_and_dislikes_own_factories():
    def score(ice=(), rubble=0, own=()):
        board = {"rubble": np.zeros((24, 24)), "ice": np.zeros((24, 24))}
        for tile in ice:
            board["ice"][tile], board["rubble"][tile] = 1, rubble
        factories = {"player_0": {str(tile): {"pos": np.array(tile)} for tile in own}}
        return placement_score({"board": board, "factories": factories}, "player_0")[8, 10]

    assert score(ice=[(10, 10)]) > score() and score(ice=[(10, 10), (8, 12)]) > score(ice=[(10, 10)])
    assert score(ice=[(10, 10)]) > score(ice=[(10, 10)], rubble=80) > score()
    assert score(ice=[(10, 10)]) > score(ice=[(13, 10)])
    assert score(ice=[(10, 10)]) > score(ice=[(10, 10)], own=[(6, 6)])


def test_choose_spot_takes_the_best_tile_that_is_allowed():
    env = LuxEnv(SMALL)
    env.reset(seed=0)
    obs = env.engine.state.get_obs()
    score = placement_score(obs, PLAYERS[0])
    first, second = np.argsort(score.ravel())[[-1, -2]]
    for allowed, expected in (([first, second, 0], first), ([second, 0], second), ([], None)):
        board = {**obs["board"], "valid_spawns_mask": np.isin(np.arange(32 * 32), allowed).reshape(32, 32)}
        spot = choose_spot({**obs, "board": board}, PLAYERS[0])
        assert (None if spot is None else 32 * spot[0] + spot[1]) == expected


def test_training_maps_differ_between_seeds_and_from_evaluation(monkeypatch):
    drawn = {}
    for seed in (1, 2, 3):
        drawn[seed] = []
        for env_seed in np.random.SeedSequence(seed).generate_state(8):
            env = LuxEnv(SMALL)
            monkeypatch.setattr(env, "_start_game", lambda map_seed, seed=seed: drawn[seed].append(map_seed))
            with pytest.raises(Refusal):
                env.reset(seed=int(env_seed))
    assert all(len(set(maps)) == 800 and min(maps) >= NUM_EVAL_MAPS for maps in drawn.values())
    assert len(set(drawn[1]) | set(drawn[2]) | set(drawn[3])) == 2400


def test_both_sides_begin_with_the_same_metal():
    env = LuxEnv(SMALL)
    env.reset(seed=0)
    for player, water in zip(PLAYERS, (150, 1150), strict=True):  # the idle opponent has enough for the episode
        cargo = [factory.cargo for factory in env.engine.state.factories[player].values()]
        assert [(stock.metal, stock.water) for stock in cargo] == [(150, water)] * 2


def test_a_map_without_ice_is_turned_down(monkeypatch):
    env = LuxEnv(SMALL)
    reset, seeds = env.engine.reset, []

    def dry(seed):
        """Maps of even seeds have no ice."""
        obs, info = reset(seed=seed)
        obs[PLAYERS[0]]["board"]["ice"] *= seed % 2
        seeds.append(seed)
        return obs, info

    monkeypatch.setattr(env.engine, "reset", dry)
    for map_seed in (0, 2, 4):
        seeds.clear()
        env.reset(options={"map_seed": map_seed})
        assert seeds[0] == map_seed and [seed % 2 for seed in seeds] == [0] * (len(seeds) - 1) + [1]
        assert env.engine.state.seed == seeds[-1]


def test_map_without_room_is_one_sentence():
    sentence = "^100 maps lacked ice or room: raise --map-size or lower --factories-per-team.$"
    with pytest.raises(Refusal, match=sentence):
        LuxEnv(Args(map_size=24, factories_per_team=10)).reset(seed=0)


def test_bad_luck_with_maps_does_not_end_a_run_that_has_begun(monkeypatch):
    env = LuxEnv(SMALL)
    env.reset(seed=0)
    start_game, draws = env._start_game, []
    monkeypatch.setattr(
        env, "_start_game", lambda seed: draws.append(seed) or (start_game(seed) if len(draws) > 150 else None)
    )
    env.reset()
    assert len(set(draws)) == 151 and env.engine.state.seed == draws[-1]


def test_the_map_of_a_seed_is_played():
    env = LuxEnv(SMALL)
    for seed in (5, 0):
        env.reset(options={"map_seed": seed})
        assert env.engine.state.seed == seed
    env.reset()
    assert env.engine.state.seed >= NUM_EVAL_MAPS


def test_a_map_of_a_seed_that_will_not_do_is_followed_by_other_evaluation_maps():
    drawn = [next(maps) for maps in [draw_maps(np.random.default_rng(0), 7)] * 200]
    assert drawn[0] == 7 and max(drawn) < NUM_EVAL_MAPS and len(set(drawn)) > 190
    assert next(draw_maps(np.random.default_rng(0))) >= NUM_EVAL_MAPS
    again = draw_maps(np.random.default_rng(1), 7)
    assert [next(again) for _ in drawn] == drawn  # by the seed alone


# ---- the same game again


@pytest.mark.parametrize("opponent", ["idle", "self"])
def test_a_game_goes_on_in_another_environment(opponent):
    """`game`, saved and loaded, leads a fresh environment to the same step, from which both play the same."""
    args, rng = Args(map_size=24, factories_per_team=1, max_units=16, opponent=opponent), np.random.default_rng(0)
    env, symmetries = LuxEnv(args), set()
    thrifty = [1, 1, 1, 0.1, 1, 1, 1, 1]  # seldom water, which would end the game soon
    env.reset(seed=3)
    for _ in range(30):  # of another episode, which the game does not hold
        env.step(random_legal(env, rng, thrifty))
    env.reset()
    for steps in (0, 40, 20):  # right after the reset; later; and again, from a game that was itself continued
        for _ in range(steps):
            env.step(random_legal(env, rng, thrifty))
        twin, file = LuxEnv(args), io.BytesIO()
        torch.save(env.game, file)
        file.seek(0)
        twin.game = torch.load(file, weights_only=True)
        assert twin.stats == env.stats and twin.numbers == env.numbers
        for _ in range(20):
            action = random_legal(env, rng, thrifty)
            symmetries.add(env.symmetry)
            assert_same(env.step(action), twin.step(action))
        env, past = twin, env
    assert len(env.numbers[0]) > 1 and len(symmetries) == 8
    assert_same(past.reset(), env.reset())  # and the next episode is the same


def on_the_stock_engine():
    """The script with its one import of the fast engine replaced, as a module."""
    path, line = Path(script.__file__), "from luxai_s2_fast import LuxAI_S2"
    source, module = path.read_text(), types.ModuleType("stock_lux")
    assert source.count(line) == 1
    exec(compile(source.replace(line, "from luxai_s2.env import LuxAI_S2"), path, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("opponent", ["idle", "self"])
def test_the_environment_on_the_stock_engine_is_the_same(opponent):
    """Every observation, reward and flag of random legal play, past an episode's end."""
    stock = on_the_stock_engine()
    assert stock.MeteredLux.__mro__[1].__module__ == "luxai_s2.env"
    args = Args(map_size=32, factories_per_team=2, max_units=30, opponent=opponent)
    envs = [rich_game(args, 1, cls, collect_stats=False) for cls in (LuxEnv, stock.LuxEnv)]
    rng, built, ends = np.random.default_rng(1), 0, 0
    for step in range(260):
        action = random_legal(envs[0], rng, [1, 1, 1, 1, 1, 4, 4, 1])
        one, other = [env.step(action) for env in envs]
        assert_same(one, other)
        built = max(built, len(envs[0].numbers[0]))
        if step == 180:
            for env in envs:  # no water: the episode ends soon
                for factory in env.engine.state.factories[PLAYERS[0]].values():
                    factory.cargo.water, factory.cargo.ice = 3, 0
        if one[2]:
            ends += 1
            assert_same(*[env.reset() for env in envs])
    assert built > 10 and ends == 1


def test_same_step_reset_keeps_the_last_rewards():
    """What the training loop stores adds up to the episode's statistics."""
    args = Args(map_size=24, factories_per_team=1, max_units=16)
    modes = {"copy": False, "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    envs = gym.vector.AsyncVectorEnv([lambda: make_worker_env(args)] * 2, **modes)
    envs.reset(seed=[11, 12])
    total, ended, rng = np.zeros(2), 0, np.random.default_rng(0)
    while ended < 4:
        obs, _, over, _, infos = envs.step(rng.integers(0, 8, envs.action_space.shape))
        reward = obs["reward"].sum((1, 2))
        for i in np.flatnonzero(over):
            reward[i] = infos["final_obs"][i]["reward"].sum()
            assert infos["final_obs"][i]["done"].sum() == (infos["final_obs"][i]["done"] > 0).sum() >= 1
            assert obs["done"][i].sum() == 0
            total[i] += reward[i]
            assert total[i] == pytest.approx(infos["final_info"]["episode"]["episodic_return"][i], abs=1e-3)
            reward[i], total[i], ended = 0, 0, ended + 1
        total += reward
    envs.close()
