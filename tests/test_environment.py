"""The Lux environment on random legal play: what masks allow happens, and nothing unwanted does."""

import copy
import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from luxai_s2.state import State

import ppo_trajsep_lux as script
from ppo_trajsep_lux import (
    BUILD_HEAVY,
    BUILD_LIGHT,
    DELIVER,
    DIG,
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
    UP,
    WATER,
    Args,
    LuxEnv,
    MapError,
    View,
    action_masks,
    engine_actions,
    entity_rewards,
    make_planes,
    make_vector_env,
    placement_score,
    resolve_collisions,
)

SMALL = Args(map_size=32, factories_per_team=2, max_units=30, augment=False)
SELF = Args(map_size=32, factories_per_team=2, max_units=30, augment=False, opponent="self")


def random_legal(env, rng, weights=None):
    """A random legal action per slot; `weights` (NUM_ACTIONS,) make some more likely."""
    score = rng.random((len(env.players), env.num_slots, script.NUM_ACTIONS)) ** (1 / np.array(weights or [1] * 8))
    return np.where(np.array(env.masks), score, -1).argmax(-1)


def rich_game(args, seed):
    """An environment whose factories have the means to do everything, and live long."""
    env = LuxEnv(args)
    env.engine.collect_stats = True  # the engine's own statistics, to compare with
    env.reset(seed=seed)
    for player in env.players:
        for factory in env.engine.state.factories[player].values():
            factory.cargo.water, factory.cargo.metal, factory.power = 1000, 300, 5000
    return env


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
            assert int(entity.split("_")[1]) == obs["unit_id"][side, slot]


def test_the_engines_own_observation_gives_the_same():
    """A submitted agent is handed that of `State.get_obs`: lists, arrays and whole queues, not live references."""
    env, rng = rich_game(SELF, 2), np.random.default_rng(2)
    obs, views, orders = env._observe(env.engine.state.get_obs(), 0, 0), [None, None], 0
    for _ in range(100):
        handed = State.get_obs(env.engine.state)
        action = random_legal(env, rng)
        for side, player in enumerate(PLAYERS):
            view = views[side] = View(handed, player, env.ids[side], SELF.max_units, views[side])
            np.testing.assert_array_equal(make_planes(view), obs["planes"][side])
            np.testing.assert_array_equal(action_masks(view), env.masks[side])
            theirs, ours = (engine_actions(v, env.masks[side], action[side]) for v in (view, env.views[side]))
            assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in ours)
            orders += len(ours)
        obs, *_ = env.step(action)
    assert orders > 500


@pytest.mark.parametrize("opponent", ["idle", "self"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_joint_play_is_legal_and_harmless(opponent, seed, capfd):
    """No warning of the engine, no friendly loss, no slot with two entities, rewards that add up."""
    args = Args(map_size=32, factories_per_team=2, max_units=30, augment=False, opponent=opponent)
    env, rng = rich_game(args, seed), np.random.default_rng(seed)
    env.engine.env_cfg.verbose = 3  # the engine prints every action that it does not carry out
    for _ in range(350):
        state, kinds, ids = env.engine.state, [k.copy() for k in env.kinds], [list(i) for i in env.ids]
        # all that the team's terms need, from the engine's state before the step
        ice_before = [sum(u.cargo.ice for u in state.units[p].values()) for p in env.players]
        rubble_before = state.board.rubble.copy()
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
            if len(env.players) == 1:  # the board's rubble tells whose digging it was
                cleared = np.maximum(rubble_before - state.board.rubble, 0)[state.board.ice > 0].sum()
                terms += args.reward_rubble_cleared * cleared
                assert obs["reward"][side].sum() == pytest.approx(terms, abs=1e-4)
                if not lost.any():
                    ice = sum(u.cargo.ice for u in state.units[player].values())
                    assert ice == ice_before[side] + dug - delivered
        assert reward == pytest.approx(obs["reward"].sum(), abs=1e-4)
        if over:
            break
    printed = capfd.readouterr().out
    if opponent == "idle":
        assert printed == ""
        assert env.stats[0]["friendly_losses"] == 0
        assert env.stats[0]["units_lost"] == 0
    else:  # the two sides may collide with each other
        assert "Invalid" not in printed and "doesn't have enough" not in printed and "insufficient" not in printed
        assert sum(stats["friendly_losses"] for stats in env.stats) == 0
    for side, player in enumerate(env.players):
        engine = env.engine.state.stats[player]
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
        goes_on = np.isin(view.queued, choices) & mask[view.slot, view.queued]
        if goes_on.any():
            unit = np.flatnonzero(goes_on)[0]
            action = np.zeros(env.num_slots, dtype=int)
            action[view.slot[unit]] = view.queued[unit]
            assert view.ids[view.slot[unit]] not in engine_actions(view, mask, action)
            action[view.slot[unit]] = NO_OP
            assert len(engine_actions(view, mask, action)[view.ids[view.slot[unit]]]) == 0  # cancelled
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
    def stopped(pos, target, newborn=()):
        return resolve_collisions(np.array(pos), np.array(target), np.array(newborn, dtype=int)).tolist()

    assert stopped([1, 2], [2, 1]) == [False, False]  # a swap
    assert stopped([1, 2], [2, 2]) == [True, False]  # onto a parked unit
    assert stopped([1, 3], [2, 2]) == [False, True]  # two movers, the first goes
    assert stopped([1], [2], [2]) == [True]  # onto a newborn
    assert stopped([1, 2, 3, 4], [2, 3, 4, 4]) == [True, True, True, False]  # a queue behind a parked unit
    assert stopped([1, 2, 3], [2, 3, 1]) == [False, False, False]  # a ring
    assert stopped([], []) == []


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
        reward_factory_alive=0.5,
        reward_unit_lost=-0.25,
        reward_factory_lost=-0.125,
    )
    rewards = entity_rewards(args, kind, lost, n, n, n, n)
    assert rewards.tolist() == [111, 222 - 0.25, 3000.5, 4000 - 0.125, 0]


def test_ice_pays_as_in_the_paper():
    assert SMALL.reward_ice_dug + SMALL.reward_ice_delivered + SMALL.reward_ice_received == pytest.approx(0.002)


def test_water_mask_bounds_the_engine_cost():
    env = rich_game(SMALL, 0)
    watering = np.zeros((1, env.num_slots), dtype=int)
    watering[0, SMALL.max_units :] = WATER
    env.engine.state.board.rubble[:] = 0
    most = 0
    for step in range(120):
        factories = list(env.engine.state.factories[PLAYERS[0]].values())
        tiles = env.views[0].most_lichen
        for factory, count in zip(factories, tiles, strict=True):
            assert factory.water_cost(env.engine.env_cfg) <= np.ceil((12 + 5 * count) / 10)
        env.step(watering if step % 40 < 30 else np.zeros_like(watering))
        for slot, factory in enumerate(factories, start=SMALL.max_units):
            mask = action_masks(View(env.engine.state.get_obs(), PLAYERS[0], env.ids[0], SMALL.max_units, env.views[0]))
            if mask[slot, WATER]:
                assert factory.cargo.water > factory.water_cost(env.engine.env_cfg)
        most = max(most, int(tiles.max()))
    assert most > 12  # lichen has spread beyond the tiles around the factory


def test_watering_is_masked_without_water_or_ground():
    env = rich_game(SMALL, 0)
    board, factories = env.engine.state.board, list(env.engine.state.factories[PLAYERS[0]].values())

    def allowed():
        view = View(env.engine.state.get_obs(), PLAYERS[0], env.ids[0], SMALL.max_units)
        return action_masks(view)[SMALL.max_units :, WATER].tolist()

    board.rubble[:] = 0
    assert allowed() == [True, True]
    factories[0].cargo.water = 2  # twelve tiles cost 2, which would leave nothing for upkeep
    assert allowed() == [False, True]
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


def test_training_maps_differ_between_seeds_and_from_evaluation(monkeypatch):
    drawn = {}
    for seed in (1, 2, 3):
        drawn[seed] = []
        for env_seed in np.random.SeedSequence(seed).generate_state(8):
            env = LuxEnv(SMALL)
            monkeypatch.setattr(env, "_start_game", lambda map_seed, seed=seed: drawn[seed].append(map_seed))
            with pytest.raises(MapError):
                env.reset(seed=int(env_seed))
    assert all(len(set(maps)) == 800 and min(maps) >= NUM_EVAL_MAPS for maps in drawn.values())
    assert len(set(drawn[1]) | set(drawn[2]) | set(drawn[3])) == 2400


def test_map_without_room_is_one_sentence():
    with pytest.raises(MapError, match="raise --map-size or lower --factories-per-team"):
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


def test_evaluation_maps_are_played_in_turn():
    env = LuxEnv(SMALL, map_seeds=[5, 9])
    for seed in (5, 9):
        env.reset()
        assert env.engine.state.seed == seed


def test_same_step_reset_keeps_the_last_rewards():
    """What the training loop stores adds up to the episode's statistics."""
    envs = make_vector_env(Args(map_size=24, factories_per_team=1, max_units=16), [None, None])
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
