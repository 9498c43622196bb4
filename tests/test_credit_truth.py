"""tools/credit_truth.py: the simulated truth by hand, what the measures make of known errors, and a small run."""

import json
import pickle
import sys
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from luxai_s2.unit import UnitType
from PIL import Image
from test_evaluate import ROOT, make_run, refused, tool, tool_here
from torch.distributions.categorical import Categorical

import ppo_trajsep_lux as parent
from ppo_trajsep_lux import DELIVER, DIG, FACTORY, HEAVY, LIGHT, NO_OP, NUM_ACTIONS

sys.path.insert(0, str(ROOT / "tools"))
import branches  # noqa: E402
import credit_truth  # noqa: E402
import estimates  # noqa: E402
import load  # noqa: E402
import pool_truth  # noqa: E402
import watch  # noqa: E402

GAMMA = 0.99
KEYS = ("slope", "correlation", "rank", "noise", "signs")


class Chance:
    """A policy of fixed logits (NUM_ACTIONS,) for everybody, among what is legal."""

    def __init__(self, logits):
        self.logits = torch.as_tensor(logits, dtype=torch.float32)

    def get_distribution(self, obs):
        return Categorical(logits=self.logits.masked_fill(~obs["action_mask"].bool(), -1e8), validate_args=False)


STILL, ANY = Chance([0.0] + [-1e6] * 7), Chance([0.0] * NUM_ACTIONS)


@pytest.fixture(scope="module")
def scene():
    """A heavy on ice (slot 0), one with 40 ice beside its factory (slot 1): environment, observation, actions."""
    env = parent.LuxEnv(parent.Args(map_size=24, factories_per_team=1, max_units=6))
    env.reset(seed=0)
    state, (factory,) = env.engine.state, env.engine.state.factories["player_0"].values()
    away = np.array([1 if factory.pos.pos[0] < 12 else -1, 0])
    state.board.rubble[:] = 0
    state.board.ice[tuple(factory.pos.pos + 5 * away)] = True
    for steps, ice in ((5, 0), (2, 40)):
        unit = env.engine.add_unit(factory.team, UnitType.HEAVY, factory.pos.pos + steps * away)
        unit.power, unit.cargo.ice = 2000, ice
    obs = env.step(np.zeros((1, env.num_slots), dtype=int))[0]
    assert obs["kind"][0].tolist() == [HEAVY, HEAVY, 0, 0, 0, 0, FACTORY] and obs["action_mask"][0, 0, DIG]
    action = np.zeros(env.num_slots, dtype=int)
    action[:2] = DIG, DELIVER
    return env, obs, action


def content(env):
    """All that an environment is, to compare; without the moves, which copies do not have."""
    state = env.engine.state
    units = {name: unit.state_dict() for name, unit in state.units["player_0"].items()}
    factories = {name: factory.state_dict() for name, factory in state.factories["player_0"].items()}
    board = [state.board.rubble.tolist(), state.board.lichen.tolist(), state.real_env_steps]
    own = [env.ids, env.numbers, env.stats, env.symmetry, [mask.tolist() for mask in env.masks], env.np_random.random]
    return pickle.dumps([units, factories, board, own[:-1], env.np_random.bit_generator.state])


def test_a_copy_steps_as_the_original_and_leaves_it_untouched(scene):
    env, obs, action = scene
    before, moves = content(env), list(env.moves)
    one, other = branches.copy_of(env), branches.copy_of(env)
    assert content(one) == before and one.moves == []
    rng = np.random.default_rng(0)
    for _ in range(30):
        action = np.where(np.array(one.masks), rng.random((1, env.num_slots, NUM_ACTIONS)), -1).argmax(-1)
        results = [each.step(action) for each in (one, other)]
        for key, array in results[0][0].items():
            np.testing.assert_array_equal(array, results[1][0][key], key)
        assert results[0][1:] == results[1][1:]
    assert content(one) == content(other) != before
    assert content(env) == before and len(env.moves) == len(moves)  # neither what they did nor what they drew


def test_the_truth_by_hand(scene):
    """Everybody stands still after the first step: 20 ice dug, or 40 delivered, is all that an action can bring."""
    env, obs, action = scene
    before = content(env)
    returns = branches.branch_returns(STILL, env, obs, action, (1, 24), [0, 1], GAMMA)
    assert content(env) == before and returns.shape == (2, 2, 7, NUM_ACTIONS)
    legal = obs["action_mask"][0].astype(bool)
    free = legal.sum(-1) > 1
    assert free.tolist() == [True, True, False, False, False, False, True]
    assert (np.isfinite(returns) == (legal & free[:, None])).all()
    alive = [0.001, 0.001 * (1 - GAMMA**24) / (1 - GAMMA)]  # the factory's
    for h, base in enumerate(alive):  # the digger gets 0.02 for its own, the other 0.02 and the factory 0.02
        expected = np.full((2, 7, NUM_ACTIONS), base + 0.06)
        expected[:, 0] -= 0.02 * (np.arange(NUM_ACTIONS) != DIG)
        expected[:, 1] -= 0.04 * (np.arange(NUM_ACTIONS) != DELIVER)
        assert np.allclose(returns[h][np.isfinite(returns[h])], expected[np.isfinite(returns[h])], atol=1e-6)
    probs = legal * np.arange(1, 1 + NUM_ACTIONS)
    probs = probs / probs.sum(-1, keepdims=True)
    found = branches.true_advantages(returns[1], probs, action)
    digs, delivers = probs[0, DIG], probs[1, DELIVER]
    assert np.allclose(found["policy"][0][:2], [0.02 * (1 - digs), 0.04 * (1 - delivers)], atol=1e-6)
    assert np.allclose(found["no_op"][0][:2], [0.02, 0.04], atol=1e-6)
    assert np.allclose(found["still"][0][:2], [-0.02 * digs, -0.04 * delivers], atol=1e-6)
    assert np.isnan(found["policy"][0][2:6]).all() and np.abs(found["policy"][1][:2]).max() < 1e-9


def test_branches_share_their_chance(scene):
    """The same first action again gives the same rewards, another seed others; the game's end pays no more."""
    env, _, action = scene
    one, same = branches.futures(ANY, env, [action, action], 24, 2)
    assert one.tolist() == same.tolist() and np.abs(one[1:] - 0.001).max() > 1e-6
    assert branches.futures(ANY, env, [action], 24, 1)[0].tolist() != one.tolist()
    late = branches.copy_of(env)
    (factory,) = late.engine.state.factories["player_0"].values()
    factory.cargo.water = 3
    rewards = branches.futures(STILL, late, [np.zeros_like(action)], 24, 0)[0]
    end = int(np.flatnonzero(np.isclose(rewards, -1))[0])  # the factory is lost
    assert 0 < end < 10 and (rewards[end + 1 :] == 0).all()


# ---- measures


def table(rng, states=200, entities=5, error=0.0):
    """A truth of known numbers: true advantages of standard deviation 2."""
    n = states * entities
    truth = {
        "state": np.repeat(np.arange(states), entities),
        "kind": np.tile([LIGHT, LIGHT, HEAVY, HEAVY, FACTORY], states),
    }
    truth |= {"policy": 2 * rng.standard_normal(n), "policy_error": np.full(n, error), "action": np.ones(n, dtype=int)}
    truth |= {"living": rng.integers(3, 20, n), "long": np.full(n, np.nan), "still": np.zeros(n)}
    truth |= {"near": truth["policy"], "near_error": truth["policy_error"], "inner_error": np.full(n, error**2)}
    return truth | {"no_op": truth["policy"], "no_op_error": truth["policy_error"]}


def verdict(raw, normal=None):
    """What `judge` would have found of one fit, with nothing but estimates in it."""
    nothing = {"explained": 0.5, "gaps": np.ones((1, 4))}
    return {
        "raw": raw,
        "normal": raw if normal is None else normal,
        "parts": {"after_death": [], "before_birth": []},
    } | nothing


def test_an_oracle_gets_what_it_must():
    """Estimates of 0.5 truth + noise of 3: slope 0.5, correlation 1 / sqrt(10), noise sqrt(1 + 9) / 2."""
    rng = np.random.default_rng(0)
    truth = table(rng)
    raw = 0.5 * truth["policy"] + 3 * rng.standard_normal(1000)
    found = credit_truth.summary(parent, truth, [verdict(raw, raw / 7 + 1)])
    value, interval = found["all"]["value"], found["all"]["interval"]
    expected = {"slope": 0.5, "correlation": 0.1**0.5, "noise": 10**0.5 / 2, "signs": 0.5 + np.arctan(1 / 3) / np.pi}
    expected |= {"correlation_normal": 0.1**0.5, "spread": 10**0.5 / 2, "rank": 6 / np.pi * np.arcsin(0.1**0.5 / 2)}
    for name, number in expected.items():
        low, high = interval[name]
        assert value[name] == pytest.approx(number, abs=0.12) and low < number < high and high - low < 0.5, name
    exact = credit_truth.summary(parent, truth, [verdict(truth["policy"])])
    for group in ("all", "light", "heavy", "factory", "against no-op"):
        assert [exact[group]["value"][key] for key in KEYS] == pytest.approx([1, 1, 1, 0, 1], abs=1e-6)
        assert exact[group]["without_one"] == pytest.approx([1, 1])
    groups = credit_truth.groups_of(parent, truth)
    assert sum(rows.sum() for name, (rows, _) in groups.items() if name[:4] in ("few ", "some", "many")) == 1000


def test_the_truths_own_error_bounds_the_correlation():
    rng = np.random.default_rng(0)
    truth = table(rng, error=1.5)
    exact = truth["policy"].copy()
    truth["policy"] = exact + 1.5 * rng.standard_normal(1000)
    quality = credit_truth.quality(truth["policy_error"], truth["policy"])
    assert quality["ceiling"] == pytest.approx(0.8, abs=0.03) and quality["error"] == pytest.approx(1.5)
    found = credit_truth.summary(parent, truth, [verdict(exact)])["all"]["value"]
    assert found["correlation"] == pytest.approx(quality["ceiling"], abs=0.03)
    assert found["slope"] == pytest.approx(1, abs=0.06) and found["noise"] < 0.15  # the error is taken off
    assert found["spread"] == pytest.approx(1, abs=0.05)  # here as well
    twice = credit_truth.summary(parent, truth, [verdict(exact + 4 * rng.standard_normal(1000))])["all"]["value"]
    assert twice["noise"] == pytest.approx(2, abs=0.15) and twice["std"] == pytest.approx(20**0.5, abs=0.2)
    nothing = credit_truth.measure(np.ones(9) + rng.random(9), np.full(9, 5.0), np.ones(9), rng.random(9), np.ones(9))
    assert np.isnan(nothing["noise"]) and np.isnan(nothing["slope"])  # an error larger than the spread
    assert found["signs"] > 0.95  # only where the truth is two errors from 0: of all, 80% would be right


def test_one_action_that_makes_the_correlation_is_named():
    rng = np.random.default_rng(0)
    truth, estimate = table(rng, states=20), rng.standard_normal(100)
    truth["policy"][7], estimate[7] = 60.0, 30.0
    found = credit_truth.summary(parent, truth, [verdict(estimate)])["all"]
    low, high = found["without_one"]
    assert found["value"]["correlation"] > 0.8 and low < 0.25 and high >= found["value"]["correlation"]
    assert abs(found["value"]["rank"]) < 0.3
    assert credit_truth.quality(truth["policy_error"], truth["policy"])["largest"] > 0.8


def test_ranks_are_within_kinds():
    """An estimate that only knows that heavies matter more than lights orders nothing within a kind."""
    rng = np.random.default_rng(0)
    truth = table(rng)
    kinds = 10.0 * (truth["kind"] == HEAVY)
    truth["policy"] = truth["policy"] + kinds
    found = credit_truth.summary(parent, truth, [verdict(kinds + rng.standard_normal(1000))])["all"]["value"]
    assert found["correlation"] > 0.8 and abs(found["rank"]) < 0.1
    ranks = credit_truth.ranks_within(np.array([1, 2, 1, 1, 2]), np.array([5.0, -1, 9, 7, 3]))
    assert ranks == pytest.approx([-1 / 3, -1 / 4, 1 / 3, 0, 1 / 4])


def test_errors_that_entities_share_do_not_widen_the_spread_among_them(scene):
    """Seeds that move the returns of all entities alike are no error of the differences among these."""
    _, obs, action = scene
    legal = obs["action_mask"][0].astype(bool)
    legal &= legal.sum(-1, keepdims=True) > 1  # the others have no choice
    rng, shape = np.random.default_rng(0), (200, *legal.shape)
    probs = legal / legal.sum(-1, keepdims=True).clip(1)
    together = np.where(legal, 0, np.nan) + np.zeros(shape)
    together[:, [0, 1, 6], action[[0, 1, 6]]] += rng.standard_normal((200, 1))
    apart = np.where(legal, 0, np.nan) + np.zeros(shape)
    apart[:, [0, 1, 6], action[[0, 1, 6]]] += rng.standard_normal((200, 3))
    legal_shares = 1 - 1 / legal.sum(-1)[[0, 1, 6]]
    found = [branches.true_advantages(x, probs, action)["inner_error"] for x in (together, apart)]
    assert found[0] == pytest.approx(legal_shares.var(ddof=1) / 200, rel=0.3)
    assert found[1] == pytest.approx((legal_shares**2).mean() / 200, rel=0.3) and found[1] > 5 * found[0]


def test_the_share_of_a_variance_by_hand():
    """Three games; advantages 1, 3 and 2, 6 and 0, 0, of which 0, 1 and 0, 2 and 0, 0 are from older ones' rewards."""
    whole, part = np.array([[1.0, 3], [2, 6], [0, 0]]), np.array([[0.0, 1], [0, 2], [0, 0]])
    rows = [(g, 2, p.sum(), w.sum(), p @ w, w @ w) for g, (w, p) in enumerate(zip(whole, part, strict=True))]
    one = verdict(np.ones(50)) | {"parts": {"after_death": [], "before_birth": rows}}
    found = credit_truth.summary(parent, table(np.random.default_rng(0), states=10), [one])["all"]
    expected = np.cov(part.ravel(), whole.ravel())[0, 1] / whole.var(ddof=1)
    assert found["value"]["before_birth"] == pytest.approx(expected) and found["before_birth_cases"] == 3
    assert np.isfinite(found["interval"]["before_birth"]).all() and np.isnan(found["value"]["after_death"])


# ---- rollouts and estimators


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A run of nobody's training; a rollout in which many units are made to stand still."""
    settings = {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "factories_per_team": 2}
    run = make_run(tmp_path_factory.mktemp("truth") / "run", **settings)
    script, args, agent = load.load(run)
    game = load.import_script(ROOT / "ablations" / "difference_lux.py")
    games = branches.Games(game, estimates.settings(game, args, {}), agent, 0)
    games.scatter(100)
    return run, args, games.rollout(32, forced=0.5, kept=[(3, 0), (31, 1)])


def estimator(name, args):
    file, changed = estimates.ESTIMATORS[name]
    script = load.import_script(ROOT / file)
    its_args = estimates.settings(script, args, changed)
    torch.manual_seed(0)
    agent = None if name in estimates.NO_CRITIC else script.Agent(its_args).requires_grad_(False)
    return estimates.Estimator(name, script, its_args, agent)


def test_rollouts(played):
    _, _, rollout = played
    seen, paid = rollout["seen"], rollout["paid"]
    assert seen["planes"].shape[:2] == (33, 2) and paid["rewards"].shape == (32, 2, 18)
    assert len(rollout["stood"]) > 5 and len(rollout["spared"]) > 5
    for name in ("stood", "spared"):
        for where in rollout[name]:
            assert (seen["action"][where] == NO_OP) == (name == "stood") and seen["kind"][where] in (LIGHT, HEAVY)
            assert seen["action_mask"][where].sum() > 1
    for (t, b), env, obs, action in rollout["states"]:
        assert (obs["pixel"][0] == seen["pixel"][t, b].numpy()).all() and (action == seen["action"][t, b]).all()
        reward = env.step(action.numpy()[None])[0]["reward"][0]
        assert np.allclose(reward, paid["rewards"][t, b])
    assert [where for where, *_ in rollout["states"]] == [(3, 0), (31, 1)]
    games = rollout["games"]
    assert games.shape == (32, 2) and not {*games[:, 0]} & {*games[:, 1]}
    over = (paid["dones"].bool() | (seen["kind"][:-1] == 0)).all(-1).numpy()
    assert ((games[1:] != games[:-1]) == over[:-1]).all()


def test_mappo_has_no_gap(played):
    _, args, rollout = played
    for name in ("MAPPO", "one global trajectory", "IPPO", "COMA"):
        raw, normal, *_ = estimator(name, args).advantages(rollout)
        gaps = [raw[t, b, [i for i in range(18) if i != slot]] - raw[t, b, slot] for t, b, slot in rollout["stood"]]
        assert all((gap == 0).all() for gap in gaps) == (name in ("MAPPO", "one global trajectory"))
        assert torch.isfinite(normal).all()


def test_own_rewards_are_discounted_sums(played):
    _, args, rollout = played
    raw, *_ = estimator("own rewards, no critic", args).advantages(rollout)
    less, *_ = estimator("own rewards less their mean", args).advantages(rollout)
    rewards, dones = rollout["paid"]["rewards"], rollout["paid"]["dones"]
    mask, total = rollout["seen"]["kind"][:-1] > 0, torch.zeros(2, 18)
    for t in reversed(range(32)):
        total = mask[t] * (rewards[t] + GAMMA * (1 - dones[t]) * total)
        assert torch.allclose(raw[t], total, atol=1e-6)
    choice = mask & (rollout["seen"]["action_mask"][:-1].sum(-1) > 1)
    assert torch.allclose(raw - less, raw[choice].mean(), atol=1e-6) and raw[choice].mean().abs() > 1e-4


def test_what_a_share_pays_is_in_units_of_the_team(played):
    """With values of zero IPPO's advantage is the team's later reward, whatever the share."""
    _, args, rollout = played
    whole = []
    for share in (1 / 12, 1 / 3):
        ippo = estimator("IPPO", args)
        ippo.args.team_scale, ippo.args.gae_lambda = share, 0.0
        ippo = estimates.Estimator("IPPO", ippo.script, ippo.args, None)
        whole.append(ippo.advantages(rollout)[0])
    assert torch.allclose(*whole, atol=1e-5)
    mask = rollout["seen"]["kind"][:-1] > 0
    team = (rollout["paid"]["rewards"] * mask).sum(-1, keepdim=True)
    assert torch.allclose(whole[0], mask * team, atol=1e-5) and team.abs().max() > 0.001


def test_the_critics_of_an_untrained_run_are_fitted(played):
    """Whatever the run's own learning rate was: a run that must not learn has one of nearly 0."""
    _, args, _ = played
    args = replace(args, learning_rate=1e-12)
    script = load.import_script(ROOT / "mappo_lux.py")
    assert estimates.settings(script, args, {}).learning_rate == script.Args().learning_rate > 1e-4


def test_critics_are_fitted(played):
    """Each of them comes closer to the targets of a rollout that it sees ten times, and the actor stays."""
    _, args, rollout = played
    for name in ("separation", "MAPPO", "GPAE 0.5", "COMA", "DAE 0.25", "differences"):
        before = estimator(name, args)
        after = estimates.fit(before.script, before.args, [rollout] * 10, 0)
        actors = [
            {key: x for key, x in agent.state_dict().items() if "actor" in key} for agent in (before.agent, after)
        ]
        assert all(torch.equal(x, actors[1][key]) for key, x in actors[0].items())
        losses = []
        for agent in (before.agent, after):
            one = estimates.Estimator(name, before.script, before.args, agent)
            _, _, returns, trajectories, said = one.advantages(rollout)
            new = before.script.value_loss(trajectories.values, None, returns, trajectories.active)
            if "expected" in said:
                seen = {key: x[:-1].flatten(0, 1) for key, x in rollout["seen"].items()}
                paid = estimates.look(one.script, agent, seen, seen["action"], seen["probs"])["paid"]
                active = trajectories.active.flatten(0, 1)
                losses.append(one.script.value_loss(paid, None, trajectories.rewards.flatten(0, 1), active))
            losses.append(new)
        half = len(losses) // 2
        assert all(late < early for early, late in zip(losses[:half], losses[half:], strict=True)), name


def test_what_comes_after_a_death_and_from_before_a_birth(played):
    """A unit that lives for steps 2 to 4 beside one that is always there; rewards of the team after and before."""
    _, args, rollout = played
    kind = torch.zeros(10, 1, 18, dtype=torch.int8)
    kind[:, 0, 17], kind[2:5, 0, 0], kind[:, 0, 1] = FACTORY, LIGHT, HEAVY
    seen = {key: value[:10, :1].clone() for key, value in rollout["seen"].items()} | {"kind": kind}
    seen["action_mask"] = (kind > 0)[..., None].expand(10, 1, 18, NUM_ACTIONS)
    paid = {key: torch.zeros(9, 1, 18) for key in rollout["paid"]}
    paid["dones"][4, 0, 0] = 1
    paid["rewards"][3, 0, 0], paid["rewards"][3, 0, 1], paid["rewards"][7, 0, 1] = 1.0, 2.0, 4.0
    made = {"seen": seen, "paid": paid}
    cases = estimates.deaths_and_births(parent, made)
    ((b, slot, cells, after),), ((_, born, first, older),) = cases["after_death"], cases["before_birth"]
    assert (b, slot, cells, born, first) == (0, 0, slice(2, 5), 0, slice(2, 5))
    assert after.nonzero()[:, 0].unique().tolist() == [5, 6, 7, 8]
    assert older.nonzero()[:, 1].unique().tolist() == [1, 17] and older.nonzero()[:, 0].min() == 2
    for name, shared in (("one global trajectory", 1), ("own rewards, no critic", 0), (estimates.NO_CRITIC[1], 0)):
        one = estimator(name, args)
        one.args.gae_lambda = 1.0
        if shared:
            one.agent.get_value = lambda obs: torch.zeros(len(obs["kind"]), 1)
        raw, _, _, _, said = one.advantages(made)
        lost = (raw[:, 0] - one.without(made, said, 0, after))[cells, slot]
        old = (raw[:, 0] - one.without(made, said, 0, older))[cells, slot]
        assert torch.allclose(lost, shared * 4 * GAMMA ** torch.tensor([5.0, 4.0, 3.0]))
        assert torch.allclose(old - lost, shared * 2 * torch.tensor([GAMMA, 1.0, 0.0]), atol=1e-6)
        assert torch.allclose(raw[cells, 0, slot] + one.mean - old, torch.tensor([GAMMA, 1.0, 0.0]), atol=1e-6)


# ---- the program

FAST = {
    "states": 3,
    "seeds": 2,
    "steps": 4,
    "near_steps": 2,
    "long_states": 1,
    "long_steps": 6,
    "rollouts": 1,
    "fits": 2,
}
FAST |= {"gap_events": 3, "seed": 0, "best": False, "script": None, "take_truth": None}


def test_a_small_run(tmp_path, monkeypatch, capsys):
    small = {"num_envs": 2, "num_steps": 12, "num_minibatches": 2, "factories_per_team": 2}
    run = make_run(tmp_path / "run", **small)
    files = {"json": tmp_path / "truth.json", "picture": tmp_path / "truth.png"}
    monkeypatch.setattr(branches.Games, "scatter", lambda games, steps: None)  # all from a game's start
    credit_truth.credit_truth(Namespace(run=run, **FAST, **files))
    out, found = capsys.readouterr().out, json.loads(files["json"].read_text())
    assert list(found["estimators"]) == list(estimates.ESTIMATORS) and found["flags"]["fits"] == 2
    state = np.array(found["truth"]["state"])
    assert len(state) >= 6 and found["quality"]["all"]["actions"] == len(state) and {*state} == {0, 1, 2}
    assert found["quality"]["long"]["actions"] == (state == 0).sum() and found["events"] >= 3
    for name, groups in found["estimators"].items():
        fits, value = 1 if name in estimates.NO_CRITIC else 2, groups["all"]["value"]
        assert np.array([one["raw"] for one in found["estimates"][name]]).shape == (fits, len(state))
        assert len(groups["all"]["fits"]) == fits and -1 <= value["correlation"] <= 1 and name in out
        assert (value["explained"] == 0) == (name in estimates.NO_CRITIC)
    raw = {name: np.array(one[0]["raw"]) for name, one in found["estimates"].items()}
    alike = {name: all(np.ptp(x[state == n]) < 1e-6 for n in range(3)) for name, x in raw.items()}
    assert [name for name in alike if alike[name]] == ["MAPPO", "one global trajectory"]
    assert found["estimators"]["MAPPO"]["all"]["value"]["gap_raw"] == 0
    assert found["estimates"]["separation"][0]["raw"] != found["estimates"]["separation"][1]["raw"]
    with Image.open(files["picture"]) as image:
        assert image.size[0] > 1000
    with pytest.raises(load.Refusal, match="exists already"):
        credit_truth.credit_truth(Namespace(run=run, **FAST, **files))

    # once more with that truth, one critic fitted on two rollouts; then both as one
    monkeypatch.setattr(credit_truth, "collect_truth", None)
    again = {"json": tmp_path / "again.json", "picture": None, "run": run}
    changed = FAST | {"take_truth": files["json"], "rollouts": 2, "fits": 1}
    credit_truth.credit_truth(Namespace(**changed, **again))
    second = json.loads(again["json"].read_text())
    assert second["truth"] == found["truth"]
    renamed = make_run(tmp_path / "renamed", **small, seed=3, run_name="renamed", resume=True, cuda=False)
    credit_truth.credit_truth(Namespace(**changed, **again | {"json": None, "run": renamed}))
    for name in ("own rewards, no critic", "separation"):
        raw = [one["estimates"][name][0]["raw"] for one in (second, found)]
        assert (raw[0] == raw[1]) == (name in estimates.NO_CRITIC)
    with pytest.raises(load.Refusal, match="has --seeds 2: give the same"):
        credit_truth.credit_truth(Namespace(**changed | {"seeds": 3}, **again | {"json": None}))
    other = make_run(tmp_path / "other", num_envs=2, num_steps=32, num_minibatches=2, factories_per_team=2, channels=16)
    with pytest.raises(load.Refusal, match="is of another policy"):
        credit_truth.credit_truth(Namespace(**changed, **again | {"json": None, "run": other}))
    pool = {"files": [files["json"], again["json"]], "json": tmp_path / "pool.json", "picture": None}
    pool_truth.pool_truth(Namespace(**pool))
    both = json.loads(pool["json"].read_text())
    assert both["quality"]["all"]["actions"] == 2 * len(state) and both["events"] == found["events"] + second["events"]
    assert len({*both["truth"]["state"]}) == 6  # the same states twice are two each
    one, two = (x["estimators"]["own rewards, no critic"]["all"] for x in (found, both))
    for key in ("std", "correlation", "noise", "gap_raw", "spread", "before_birth"):
        assert two["value"][key] == pytest.approx(one["value"][key], rel=1e-4), key  # files have six digits
    assert two["before_birth_cases"] == 2 * one["before_birth_cases"]
    (fit,), several = both["estimates"]["COMA"], [x["estimates"]["COMA"][0] for x in (found, second)]
    assert fit["raw"] == several[0]["raw"] + several[1]["raw"]
    assert fit["explained"] == pytest.approx(np.mean([x["explained"] for x in several]), rel=1e-5)


def test_pooled_shares_do_not_hold_what_runs_differ_by():
    rng, rows = np.random.default_rng(0), []
    numbers = [rng.normal(size=(2, 50)), rng.normal(size=(2, 80)) + 9]  # part and whole of two measurements
    for part, whole in numbers:
        halves = [slice(0, 20), slice(20, None)]  # two games
        sums = [(len(w), p.sum(), w.sum(), p @ w, w @ w) for p, w in ((part[h], whole[h]) for h in halves)]
        rows += pool_truth.centred([(7, *row) for row in sums])
    n, part, whole, product, square = np.array(rows)[:, 1:].sum(0)
    p, w = np.concatenate([x - x.mean(1, keepdims=True) for x in numbers], axis=1)
    assert n == 130 and {row[0] for row in rows} == {7}
    assert [part, whole] == pytest.approx([0, 0], abs=1e-9)
    assert [product, square] == pytest.approx([p @ w, w @ w])
    assert pool_truth.centred([]) == []


def test_the_committed_table_is_of_the_committed_files(capsys):
    folder = ROOT / "ablations/results/truth"
    names = sorted(folder.glob("trained-*.json"))
    command = f"python tools/pool_truth.py {' '.join(path.name for path in names)} --picture trained.png"
    assert command in (ROOT / "ablations/TRUTH.md").read_text()
    pool_truth.pool_truth(Namespace(files=names, json=None, picture=None))
    assert capsys.readouterr().out == (folder / "trained.md").read_text()


def test_what_cannot_be_pooled(tmp_path):
    files = [tmp_path / f"{n}.json" for n in range(4)]
    rows = dict.fromkeys(("state", "rollout", "t", "b", "slot", "kind", "action", "living"), [1])
    flags = {"steps": 24, "near_steps": 8, "long_steps": 100}
    good = {"truth": rows, "flags": flags, "args": {"seed": 1, "gamma": 0.99}, "estimates": {"MAPPO": []}}
    for file, changed in zip(files, ({}, {"args": {"gamma": 0.9}}, {"flags": flags | {"steps": 9}}, 0), strict=True):
        file.write_text(json.dumps(good | changed if changed != 0 else 7))
    for file, words in zip(files[1:], ("other settings", "other numbers of steps", "is not what --json"), strict=True):
        refused(tool_here("pool_truth.py", files[0], file, cwd=tmp_path), words)
    files[3].write_text(json.dumps(good | {"estimates": {"MAPPO": {"raw": [[1]]}}}))
    refused(tool("pool_truth.py", files[0], files[3], cwd=tmp_path), "measure again")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--states", 0), "--states must be from 1"),
        (("--seeds", 1), "--seeds must be from 2"),
        (("--steps", 30, "--long-steps", 20), "--long-steps must be from 30"),
        (("--json", "no/such/file"), "folder that does not exist"),
    ],
)
def test_flags_that_cannot_be(played, tmp_path, flags, words):
    refused(tool_here("credit_truth.py", played[0], *flags, cwd=tmp_path), words)


def test_a_policy_with_a_memory_is_refused(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    loaded = load.load(run)
    loaded[2].hidden = torch.zeros(1, 1, 4)
    monkeypatch.setattr(load, "load", lambda *given: loaded)
    with pytest.raises(load.Refusal, match="has a policy with a memory"):
        credit_truth.credit_truth(Namespace(run=run, **FAST, json=None, picture=None))
    usual = {"output": tmp_path / "x.html", "gif": None, "replay": None, "map_size": None, "map_seed": 0, "steps": 5}
    with pytest.raises(load.Refusal, match="has a policy with a memory"):
        watch.watch(Namespace(run=run, best=False, script=None, truth=1, **usual))


def test_self_play_is_refused(tmp_path):
    refused(tool("credit_truth.py", make_run(tmp_path / "run", opponent="self")), "idle opponent only")
