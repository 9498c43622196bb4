"""The methods that separation is compared with: COMA, GPAE, DAE, VDN and difference rewards, by hand-computed cases.

What each entity may see of the others' actions, advantages and targets, deaths under a shared reward,
the branches of the engine; and runs that use older rollouts.
"""

import re
import textwrap
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ablation_scripts import load
from test_network import some_obs
from test_runs import FLAGS
from test_script import curve, read_csv, run, together

import ippo_lux
import ppo_trajsep_lux as parent
from ppo_trajsep_lux import BUILD_LIGHT, DELIVER, DIG, EMPTY, FACTORY, HEAVY, LIGHT, NO_OP, NUM_ACTIONS, PLAYERS

coma, gpae, dae = load("coma_lux"), load("gpae_lux"), load("dae_lux")
vdn, difference = load("vdn_lux"), load("difference_lux")
LEAVE_ONE_OUT = pytest.mark.parametrize("script", [coma, gpae, dae], ids=["coma", "gpae", "dae"])


def source(script, pattern):
    """What stands in the script's main block where the pattern, with one group, matches: exactly once."""
    (found,) = re.findall(pattern, Path(script.__file__).read_text())
    return textwrap.dedent(found)


# ---- a critic that is told what the others do

KINDS = torch.tensor([[LIGHT, HEAVY, LIGHT, EMPTY, HEAVY, FACTORY]] * 2, dtype=torch.int8)
LIVING = (KINDS[0] != EMPTY).tolist()
SLOTS = range(len(LIVING))


def team():
    """Two maps, on which the first unit stands on the factory and one slot is empty."""
    obs = some_obs(batch=2, slots=len(LIVING)) | {"kind": KINDS}
    obs["pixel"] = torch.tensor([[50, 53, 122, 0, 400, 50]] * 2)  # near, near and far
    probs = torch.rand(*KINDS.shape, NUM_ACTIONS).softmax(-1)
    return obs, torch.randint(NUM_ACTIONS, KINDS.shape), probs


def critic(script, agent, obs, action, probs):
    """What the critic says of every entity: (B, K, 1 or NUM_ACTIONS)."""
    if script is gpae:
        return agent.get_value(obs, action, probs)[..., None]
    return agent.get_value(obs, action) if script is coma else agent.get_value(obs, action)[1]


def make_agent(script):
    torch.manual_seed(0)
    return script.Agent(script.Args(channels=8, bf16=False))


@LEAVE_ONE_OUT
def test_an_own_action_moves_no_bit_and_anothers_moves_all(script):
    agent = make_agent(script)
    obs, action, probs = team()
    with torch.no_grad():
        before = critic(script, agent, obs, action, probs)
        for j in SLOTS:
            changed = action.clone()
            changed[:, j] = (action[:, j] + 3) % NUM_ACTIONS
            moved = (critic(script, agent, obs, changed, probs) - before).abs().amax(-1)  # (2, K)
            for i in SLOTS:
                if i == j or not LIVING[j]:
                    assert (moved[:, i] == 0).all(), (i, j)
                elif LIVING[i]:
                    assert (moved[:, i] > 1e-4).all(), (i, j)


@LEAVE_ONE_OUT
def test_the_gradient_of_an_own_action_is_exactly_zero(script):
    agent = make_agent(script)
    obs, action, probs = team()
    acts = []  # what the network makes of each slot's action: (2, K, channels)
    agent.others.act.register_forward_hook(lambda *call: acts.append(call[-1].detach().requires_grad_()) or acts[0])
    output = critic(script, agent, obs, action, probs)
    for i in SLOTS:
        (gradient,) = torch.autograd.grad(output[:, i].sum(), acts[0], retain_graph=True)
        seen = (gradient != 0).any(-1)  # (2, K)
        assert not seen[:, i].any() and not seen[:, ~torch.tensor(LIVING)].any()
        assert not LIVING[i] or (seen.sum(-1) == sum(LIVING) - 1).all()


@LEAVE_ONE_OUT
def test_the_order_of_the_slots_does_not_matter(script):
    agent = make_agent(script)
    obs, action, probs = team()
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    turned = {key: value if key == "planes" else value[:, order] for key, value in obs.items()}
    with torch.no_grad():
        before = critic(script, agent, obs, action, probs)
        after = critic(script, agent, turned, action[:, order], probs[:, order])
        torch.testing.assert_close(after, before[:, order], rtol=0, atol=1e-5)
        others = agent.others.double()
        after = others(turned, action[:, order])
    torch.testing.assert_close(after, others(obs, action)[:, order], rtol=0, atol=1e-14)


@LEAVE_ONE_OUT
def test_what_the_others_do_by_hand(script):
    """The sum over the others of w[offset] * E[kind, action], entity by entity, at all offsets from -4 to 4."""
    agent = make_agent(script)
    obs, action, _ = team()
    size, kinds = obs["planes"].shape[-1], KINDS[0].tolist()
    where, act = agent.others.where.weight, agent.others.act.weight
    places = set()
    for far in range(81):
        obs["pixel"][:, 1] = obs["pixel"][:, 0] = 300
        obs["pixel"][:, 1] += (far // 9 - 4) * size + far % 9 - 4
        with torch.no_grad():
            answer = agent.others(obs, action)
        for i in SLOTS:
            expected = torch.zeros(len(action), answer.shape[-1])
            for k in (k for k in SLOTS if k != i and LIVING[k]):
                (x, y), (to_x, to_y) = (divmod(obs["pixel"][0, slot].item(), size) for slot in (i, k))
                near = abs(to_x - x) <= 3 and abs(to_y - y) <= 3
                place = 7 * (to_x - x + 3) + to_y - y + 3 if near else 49
                expected += where[place] * act[(kinds[k] - 1) * NUM_ACTIONS + action[:, k]]
                places.add(place)
            torch.testing.assert_close(answer[:, i], expected)
    assert places == set(range(50))


@LEAVE_ONE_OUT
def test_the_critic_knows_the_mean_of_the_living(script):
    agent = make_agent(script)
    obs, action, probs = team()
    living = torch.tensor(LIVING)

    def says(obs, action=action, probs=probs):
        with torch.no_grad():
            if script is dae:
                return torch.cat((agent.get_value(obs, action)[0][..., None], agent.get_value(obs, action)[1]), -1)
            return critic(script, agent, obs, action, probs)

    before = says(obs)
    elsewhere = obs | {"pixel": torch.where(living, obs["pixel"], 333)}  # of the empty slot
    assert torch.equal(says(elsewhere)[:, living], before[:, living])
    more = {key: value if key == "planes" else torch.cat((value, 0 * value), 1) for key, value in obs.items()}
    double = says(more, torch.cat((action, 0 * action), 1), torch.cat((probs, probs), 1))[:, : len(LIVING)]
    torch.testing.assert_close(double[:, living], before[:, living], rtol=1e-5, atol=1e-6)
    moved = obs | {"pixel": torch.where(obs["pixel"] == 400, 450, obs["pixel"])}  # far from all, as it was
    change = (says(moved) - before).abs().amax((0, -1))
    assert (change[living] > 1e-5).all()


def test_gpae_knows_the_kind_whose_policy_it_is():
    agent = make_agent(gpae)
    obs, action, probs = team()
    with torch.no_grad():
        before = agent.get_value(obs, action, probs)
        for kind in (LIGHT, HEAVY, FACTORY):
            agent.own[kind - 1] += 1
            moved = (agent.get_value(obs, action, probs) - before).abs() > 1e-5
            agent.own[kind - 1] -= 1
            assert torch.equal(moved[:, LIVING], (torch.tensor(kind) == KINDS)[:, LIVING])


def test_gpae_sees_the_own_policy_and_nobody_elses():
    agent = make_agent(gpae)
    obs, action, probs = team()
    with torch.no_grad():
        before = agent.get_value(obs, action, probs)
        for j in SLOTS:
            changed = probs.clone()
            changed[:, j] = probs[:, j].roll(1, -1)
            moved = (agent.get_value(obs, action, changed) - before).abs()
            assert (moved[:, j] > 1e-5).all() or not LIVING[j]
            moved[:, j] = 0
            assert (moved == 0).all()


def test_dae_values_are_told_of_no_action():
    agent = make_agent(dae)
    obs, action, _ = team()
    with torch.no_grad():
        values = [agent.get_value(obs, action)[0] for action in (action, (action + 1) % NUM_ACTIONS)]
    assert torch.equal(*values)


# ---- shared rewards: advantages by hand

WHOLE_TEAM = pytest.mark.parametrize("script", [ippo_lux, coma, gpae, dae], ids=["ippo", "coma", "gpae", "dae"])
REWARD, VALUES = torch.tensor([1.0, 2.0]), torch.tensor([[0.5, 0.3], [0.2, 0.4], [1.0, 0.6]])  # of two entities


def cells(script, reward, values, mask=None, dones=None):
    """Trajectories of one environment: reward (T,), values (T + 1, K), mask and dones (T, K)."""
    shape = len(reward), 1, values.shape[-1]
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.reshape(shape)
    dones = torch.zeros(shape, dtype=values.dtype) if dones is None else dones.reshape(shape).to(values.dtype)
    group, free = torch.arange(shape[2]).expand(shape), torch.ones(*shape, NUM_ACTIONS)
    return script.separate_trajectories(reward[:, None, None], dones, values[:, None], group, mask, free, shape[2])


def gae(script, trajectories, *numbers, weights=None):
    """The script's compute_gae: (T, K)."""
    if script is gpae:
        weights = torch.ones_like(trajectories.rewards) if weights is None else weights[:, None]
        return gpae.compute_gae(trajectories, weights, *numbers)[:, 0]
    return script.compute_gae(trajectories, *numbers)[:, 0]


def close(tensor, *rows):
    torch.testing.assert_close(tensor, torch.tensor(rows, dtype=tensor.dtype), rtol=0, atol=1e-6)


def test_gpae_by_hand():
    trajectories = cells(gpae, REWARD, VALUES)
    close(gae(gpae, trajectories, 0.9, 0.5), [1.895, 2.023], [2.7, 2.14])
    weights = torch.tensor([[0.3, 0.3], [0.8, 1.0]])  # of the first step: none, so these are not looked at
    advantages = gae(gpae, trajectories, 0.9, 0.5, weights=weights)
    close(advantages, [1.652, 2.023], [2.7, 2.14])
    names = {"logratio": torch.tensor([1.3, 0.6]).log(), "advantages": advantages[:, 0]}
    names["trajectories"] = gpae.Trajectories(None, None, VALUES[:2, 0], None, None, None)
    close(eval(source(gpae, r'"returns": (.*),\n'), names), 2.152, 1.82)


def test_gpae_at_both_ends_of_lambda():
    trajectories = cells(gpae, REWARD, VALUES)
    close(gae(gpae, trajectories, 0.9, 0.0), [1 + 0.9 * 0.2 - 0.5, 1 + 0.9 * 0.4 - 0.3], [2.7, 2.14])
    whole = [1 + 0.9 * 2 + 0.81 * end - start for end, start in ((1.0, 0.5), (0.6, 0.3))]
    close(gae(gpae, trajectories, 0.9, 1.0), whole, [2.7, 2.14])


def test_gpae_of_one_entity_is_the_parent_to_the_bit():
    torch.manual_seed(0)
    rewards, values, dones = torch.randn(40), torch.randn(41, 1), torch.rand(40, 1) < 0.2
    group, free = torch.zeros(40, 1, 1, dtype=torch.long), torch.ones(40, 1, 1, NUM_ACTIONS)
    per_slot = (rewards[:, None, None], dones[:, None].float(), values[:, None])
    expected = parent.separate_trajectories(*per_slot, group, torch.ones(40, 1, 1, dtype=torch.bool), free, 1)
    trajectories = cells(gpae, rewards, values, dones=dones)
    assert torch.equal(gae(gpae, trajectories, 0.99, 0.95), gae(parent, expected, 0.99, 0.95))


def test_on_policy_gpae_has_the_parents_advantages_and_loss_to_the_bit():
    torch.manual_seed(0)
    nothing = torch.zeros(20, 4)
    mask, dones = torch.rand(20, 4) < 0.8, torch.rand(20, 4) < 0.1
    trajectories = cells(gpae, torch.randn(20), torch.randn(21, 4), mask, dones)
    expected = parent.compute_gae(trajectories, 0.99, 0.95)[:, 0]
    for importance in ("dt", "st", "it", "none"):
        weights = gpae.trace_weights(nothing, importance, 1.05)
        assert torch.equal(weights, torch.ones(20, 4))
        assert torch.equal(gae(gpae, trajectories, 0.99, 0.95, weights=weights), expected)
    ratio = (torch.randn(20, 4) / 3).exp()
    old_ratio, loss = nothing.exp(), parent.policy_loss(ratio, expected, mask, 0.2)
    assert torch.equal(gpae.policy_loss(ratio, old_ratio, expected, mask, 0.2), loss)


def test_gpae_clips_around_the_ratio_at_the_updates_start():
    for ratio, advantage, loss in ((0.7, 1.0, -0.6), (0.55, 1.0, -0.55), (0.3, -1.0, 0.4), (0.7, -1.0, 0.7)):
        arguments = [torch.tensor([value]) for value in (ratio, 0.5, advantage, True)]
        assert gpae.policy_loss(*arguments[:3], arguments[3].bool(), 0.2).item() == pytest.approx(loss)


@pytest.mark.parametrize(
    "importance, ratios, expected",
    [
        ("dt", [1.2, 0.5, 0.9], [0.54, 0.525, 0.54]),
        ("it", [1.2, 0.5, 0.9], [1, 0.5, 0.9]),
        ("st", [1.2, 0.5, 0.9], [0.54, 0.54, 0.54]),
        ("none", [1.2, 0.5, 0.9], [1, 1, 1]),
        ("dt", [0.9, 1.5], [0.945, 1]),
        ("st", [0.9, 1.5], [1, 1]),
    ],
)
def test_truncated_importance_ratios(importance, ratios, expected):
    close(gpae.trace_weights(torch.tensor(ratios).log(), importance, 1.05), *expected)


def test_a_forced_or_empty_slot_weighs_nothing():
    """One map, two policies: what has one legal action, or nobody to take it, has a ratio of exactly 1."""
    obs, action, _ = team()
    obs["action_mask"][:, :3], obs["action_mask"][:, 0] = 1, 0
    obs["action_mask"][:, 0, DIG], action[:, 0] = 1, DIG
    torch.manual_seed(1)
    agents = [gpae.Agent(gpae.Args(channels=8, bf16=False)) for _ in range(2)]
    for agent in agents:
        torch.nn.init.normal_(agent.actor_head.weight)
    with torch.no_grad():
        logprobs = [agent.get_distribution(obs).log_prob(action) for agent in agents]
    names = {"current": logprobs[0], "entity_logprobs": logprobs[1], "entity_mask": obs["kind"] != EMPTY}
    logratio = eval(source(gpae, r" logratio = (.* \* entity_mask)\n"), names)
    assert (logprobs[0][:, 3] != logprobs[1][:, 3]).all() and (logratio[:, [0, 3]] == 0).all()
    assert (logratio[:, [1, 2]].abs() > 1e-3).all()


def test_coma_by_hand():
    q, probs = torch.zeros(2, NUM_ACTIONS), torch.zeros(2, NUM_ACTIONS)
    q[:, :2], probs[:, :2] = torch.tensor([1.0, 3.0]), torch.tensor([0.25, 0.75])
    q[:, 2] = -1e3  # illegal: never taken
    advantages = coma.counterfactual_advantage(q, probs, torch.tensor([0, 1]))
    close(advantages, -1.5, 0.5)
    assert (advantages * probs[0, :2]).sum() == 0
    forced = torch.nn.functional.one_hot(torch.tensor(1), NUM_ACTIONS).float()
    assert coma.counterfactual_advantage(q[0], forced, torch.tensor(1)) == 0


def test_dae_by_hand():
    trajectories = cells(dae, REWARD, VALUES)
    advantages, expected = gae(dae, trajectories, 0.9, 0.5), torch.tensor([[1.0], [2.0]]).expand(2, 2)
    alive = torch.zeros(2, 2)
    shaped = dae.difference_advantages(advantages, alive, expected, 0.5, 0.9, 0.5)
    close(advantages - shaped, [0.725, 0.725], [1.0, 1.0])
    close(shaped[:, 0], 1.17, 1.7)
    assert torch.equal(dae.difference_advantages(advantages, alive, expected, 0.0, 0.9, 0.5), advantages)
    ended = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # of the first: what its slot's next owner expects is not its own
    close(advantages - dae.difference_advantages(advantages, ended, expected, 0.5, 0.9, 0.5), [0.5, 0.725], [1.0, 1.0])


@WHOLE_TEAM
def test_all_are_paid_the_teams_reward(script):
    rewards, mask = torch.tensor([[12.0, 24.0, 99.0]]), torch.tensor([[True, True, False]])  # 99: of an empty slot
    assert script.team_reward(rewards, mask, 1 / 12).tolist() == [[pytest.approx(3)]]
    assert script.team_reward(rewards, mask, 0).tolist() == [[18]]


@WHOLE_TEAM
def test_who_dies_bootstraps_from_the_living_and_who_is_born_begins_anew(script):
    """Slot 0 dies in step 0, is empty in step 1 and has a newborn in step 2, in which the episode ends."""
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    dones = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]])
    values = torch.tensor([[5.0, 1.0, 2.0], [70.0, 3.0, 6.0], [8.0, 4.0, 7.0], [90.0, 91.0, 92.0]])
    trajectories = cells(script, torch.tensor([10.0, 20.0, 30.0]), values, mask, dones)
    advantages = gae(script, trajectories, 0.5, 0.5)
    assert trajectories.active[:, 0].equal(mask)
    assert advantages[:, 0].tolist() == [10 + 0.5 * (3 + 6) / 2 - 5, 0, 30 - 8]
    last = 30 - 4  # of slot 1
    middle = 20 + 0.5 * 4 - 3 + 0.25 * last
    assert advantages[:, 1].tolist() == [10 + 0.5 * 3 - 1 + 0.25 * middle, middle, last]


def test_gpae_cancels_what_an_independent_agent_earns():
    """Two agents that do not meet: averaged over the other's next state and action, each has its own one-step error."""
    rng, discount, two = np.random.default_rng(0), 0.9, range(2)
    pay, policy, moves = rng.normal(size=(2, 2, 2)), rng.dirichlet([1, 1], (2, 2)), rng.dirichlet([1, 1], (2, 2, 2))
    worth = np.zeros((2, 2))  # of each agent's state under its policy, of its own pay alone
    for i in two:
        chain = np.einsum("sa,sat->st", policy[i], moves[i])
        worth[i] = np.linalg.solve(np.eye(2) - discount * chain, (policy[i] * pay[i]).sum(-1))
    q = pay[1] + discount * moves[1] @ worth[1]  # (state, action) of the other
    for s, a, s_next, t, b in product(two, repeat=5):  # agent 0: s, a; agent 1: t, b
        values = [[worth[0, s] + q[t, b]] * 4, [worth[0, s_next] + q[t_, b_] for t_, b_ in product(two, two)]]
        chance = [moves[1, t, b, t_] * policy[1, t_, b_] for t_, b_ in product(two, two)]
        reward = torch.tensor([pay[0, s, a] + pay[1, t, b]])
        advantages = gae(gpae, cells(gpae, reward, torch.tensor(values)), discount, 0.0)[0]
        own_error = pay[0, s, a] + discount * worth[0, s_next] - worth[0, s]
        assert advantages.numpy() @ chance == pytest.approx(own_error, abs=1e-12)


# ---- VDN


def test_the_joint_q_reaches_everybody_who_lives():
    agent = make_agent(vdn)
    obs = some_obs(batch=1, slots=3) | {"kind": torch.tensor([[LIGHT, EMPTY, FACTORY]], dtype=torch.int8)}
    q = agent.get_q(obs)[..., NO_OP]
    q.retain_grad()
    mb = {"entity_mask": obs["kind"] != EMPTY, "returns": torch.tensor([10.0])}
    eval(source(vdn, r" loss = (.*)\n"), {"q": q, "mb": mb}).backward()
    both = q[0, 0].item() + q[0, 2].item() - 10
    assert q.grad[0].tolist() == [pytest.approx(both), 0, pytest.approx(both)]


def test_q_lambda_by_hand():
    rewards, best = torch.tensor([[1.0], [2.0]]), torch.tensor([[5.0], [3.0], [4.0]])
    last = 2 + 0.9 * 4
    close(vdn.lambda_returns(rewards, torch.zeros(2, 1), best, 0.9, 0.5), [1 + 0.9 * (0.5 * 3 + 0.5 * last)], [last])
    ended = torch.tensor([[1.0], [0.0]])
    close(vdn.lambda_returns(rewards, ended, best, 0.9, 0.5), [1.0], [last])


def test_the_greedy_action_or_a_random_legal_one():
    agent, obs = make_agent(vdn), some_obs(batch=1, slots=1)
    obs["action_mask"][0, 0] = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1])
    agent.epsilon = 0.4
    probs, best = agent.get_distribution(obs).probs[0, 0], agent.get_q(obs)[0, 0].argmax()
    expected = 0.1 * obs["action_mask"][0, 0].float()
    expected[best] += 0.6
    torch.testing.assert_close(probs, expected)


# ---- difference rewards


SETTINGS = {"one": {}, "queue": {"default": "queue"}, "two": {"coalition": 2}}


@pytest.fixture(scope="module", params=["idle", "self"])
def game(request):
    """A game of the parent's and those of SETTINGS in lockstep, by step and side.

    Each row is the view and the actions before a step, the team's reward in a branch with the same
    actions and in one in which the factory does nothing, and each game's reward and difference.
    """
    flags = {"map_size": 24, "factories_per_team": 1, "max_units": 8, "augment": False, "opponent": request.param}
    envs = {"parent": parent.LuxEnv(parent.Args(**flags))}
    envs |= {name: difference.LuxEnv(difference.Args(**flags, **more)) for name, more in SETTINGS.items()}
    for env in envs.values():
        env.reset(seed=3)
        env.engine.state.board.ice[::2] = True  # much to dig, close to home
    env, rng, rows = envs["one"], np.random.default_rng(0), []
    eager = 0.5 * (np.arange(NUM_ACTIONS) == DIG) + (np.arange(NUM_ACTIONS) == DELIVER)
    for _ in range(90):
        score = rng.random((len(env.players), env.num_slots, NUM_ACTIONS)) + eager
        action = np.where(np.array(env.masks), score, -1).argmax(-1)
        views, teams, orders = env.views, [], {player: {} for player in PLAYERS}
        for side, player in enumerate(env.players):
            orders[player] = difference.engine_actions(views[side], env.masks[side], action[side])
        for side, same in enumerate(action):
            idle = np.where(np.arange(env.num_slots) == env.num_slots - 1, NO_OP, same)
            teams.append([env.team_reward(side, choice, orders) for choice in (same, idle)])
        after = {name: each.step(action)[0] for name, each in envs.items()}
        for name, obs in after.items():
            for key, array in after["parent"].items():
                np.testing.assert_array_equal(obs[key], array, err_msg=f"{name}: {key}")
        for side, view in enumerate(views):
            paid = {name: obs["difference"][side] for name, obs in after.items() if name != "parent"}
            rows.append((view, action[side], teams[side], after["parent"]["reward"][side], paid))
    return rows


def test_branches_change_nothing_but_what_they_are_asked_to(game):
    """The game itself goes on as the parent's (see `game`), and the same actions again give the same reward."""
    built = 0
    for _, action, (same, idle), reward, paid in game:
        assert same == reward.sum()
        assert idle == same  # a factory's action earns nothing at once, so it is paid its own reward
        assert all(differences[8] == reward[8] for differences in paid.values())
        built += action[8] != NO_OP
    assert built > 10


@pytest.mark.parametrize("game", ["idle"], indirect=True)
def test_differences_are_own_rewards_but_delivering_counts_twice(game):
    dug, delivered = 0, 0
    for view, action, _, reward, paid in game:
        for slot in range(8):
            twice = action[slot] == DELIVER and slot in view.units["slot"]
            assert paid["one"][slot] == pytest.approx((1 + twice) * reward[slot], abs=1e-6)
            dug += action[slot] == DIG and reward[slot] > 0
            delivered += twice and reward[slot] > 0
    assert dug > 50 and delivered > 5


@pytest.mark.parametrize("game", ["idle"], indirect=True)
def test_what_a_queue_would_have_done_anyway_is_no_difference(game):
    went_on = 0
    for view, action, _, reward, paid in game:
        for unit in view.units:
            slot, queued = unit["slot"], unit["queued"]
            if queued == action[slot]:
                assert paid["queue"][slot] == 0
                went_on += reward[slot] > 0
            elif queued <= NO_OP:
                assert paid["queue"][slot] == paid["one"][slot]
    assert went_on > 30


@pytest.mark.parametrize("game", ["idle"], indirect=True)
def test_a_coalition_shares_its_difference(game):
    shared = 0
    for view, _, _, _, paid in game:
        for slots in difference.coalitions(view.units, 2):
            assert paid["two"][slots].sum() == pytest.approx(paid["one"][slots].sum(), abs=1e-6)
            assert len(set(paid["two"][slots])) == 1
            shared += len(slots) == 2 and len(set(paid["one"][slots])) == 2
    assert shared > 20


def test_coalitions_are_of_neighbours():
    units = np.zeros(6, difference.UNIT_ROW)
    units["slot"], units["pos"][:, 0] = [0, 2, 3, 4, 6, 7], [10, 30, 11, 31, 33, 12]
    for size, expected in (
        (1, [[0], [2], [3], [4], [6], [7]]),
        (2, [[0, 3], [2, 4], [6, 7]]),
        (4, [[0, 3, 7, 2], [4, 6]]),
    ):
        assert [slots.tolist() for slots in difference.coalitions(units, size)] == expected


def test_nobody_acts_no_branches(monkeypatch):
    env = difference.LuxEnv(difference.Args(map_size=24, factories_per_team=1, max_units=8))
    env.reset(seed=3)
    build = np.full((1, 9), NO_OP)
    build[0, 8] = BUILD_LIGHT
    env.step(build), env.step(np.full((1, 9), NO_OP))
    monkeypatch.setattr(difference.LuxEnv, "team_reward", None)
    env.step(np.full((1, 9), NO_OP))
    assert len(env.views[0].units) == 1
    with pytest.raises(TypeError):
        env.step(np.full((1, 9), parent.UP))
    env.game = env.game  # to go on, the same steps are played without branches


def test_decoupled_rewards():
    differences, rewards = torch.tensor([[4.0, 0.0, 9.0]]), torch.tensor([[2.0, 6.0, 9.0]])  # 9: of an empty slot
    mask = torch.tensor([[True, True, False]])
    close(difference.decoupled_rewards(differences, rewards, mask, 0.9), [3.6 + 0.4, 0.4, 0.0])
    close(difference.decoupled_rewards(differences, rewards, mask, 0.0), [4.0, 4.0, 0.0])
    team = torch.tensor([10.0, 20.0])
    for second, expected in ((3.0, 1), (1.0, -1)):
        pay = torch.tensor([[2.0, 9.0], [second, 9.0]])
        mask = torch.tensor([[True, False], [True, False]])
        assert difference.team_correlation(pay, team, mask) == pytest.approx(expected)


@pytest.mark.parametrize("correlation, said", [(-0.126, "-0.13"), (0.0, ""), (float("nan"), "")])
def test_rewards_that_go_against_the_teams_are_warned_of(capsys, correlation, said):
    lines = source(difference, r"(        if correlation < 0:\n(?: {12}.*\n)+)")
    exec(lines, {"correlation": correlation, "iteration": 7})
    out = capsys.readouterr().out
    assert ("Warning: in iteration 7" in out and said in out and "--own-reward" in out) if said else out == ""


# ---- runs: each script's first is in test_runs.py

RUNS = {"gpae": (gpae, "--gae-lambda 0.5"), "reuse": (gpae, "--reuse 2"), "difference": (difference, "--coalition 2")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of each run of two iterations; and of one that was killed in its second and then went on."""
    folder = tmp_path_factory.mktemp("rivals")
    text, anchor = Path(gpae.__file__).read_text(), "                optimizer.step()\n"
    assert text.count(anchor) == 1
    cut = folder / Path(gpae.__file__).name
    cut.write_text(text.replace(anchor, f"                if iteration == 2: os.kill(os.getpid(), 9)\n{anchor}"))

    def start(name):
        script, flags = RUNS[name]
        (folder / name).mkdir()
        run(folder / name, f"{FLAGS} {flags}", Path(script.__file__))

    def resume():
        (folder / "resumed").mkdir()
        flags = f"{FLAGS} {RUNS['reuse'][1]} --resume"
        assert run(folder / "resumed", flags, cut, check=False).returncode == -9
        assert len(read_csv(folder / "resumed/runs/test/progress.csv")) == 1
        run(folder / "resumed", flags, Path(gpae.__file__))

    together(resume, *[partial(start, name) for name in RUNS])
    return {name: folder / name / "runs/test" for name in ("resumed", *RUNS)}


def test_traces_are_whole_until_older_rollouts_are_used(runs):
    weights = {name: [float(row["charts/trace_weight"]) for row in curve(runs[name])] for name in ("gpae", "reuse")}
    assert weights["gpae"] == [1, 1] and weights["reuse"][0] == 1 and 0.5 < weights["reuse"][1] < 1


def test_difference_rewards_say_how_they_go_along_with_the_teams(runs):
    assert all(-1 <= float(row["charts/reward_correlation"]) <= 1 for row in curve(runs["difference"]))


def test_a_run_that_uses_older_rollouts_goes_on_to_the_bit(runs):
    whole, resumed = runs["reuse"], runs["resumed"]
    assert curve(whole) == curve(resumed) and len(curve(whole)) == 2
    a, b = (torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (whole, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
