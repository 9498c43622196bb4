"""What makes each baseline the algorithm of its name, by hand-computed cases."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import ippo_lux
import mappo_lux
import ppo_global_lux
import ppo_trajsep_lux
from ppo_trajsep_lux import FACTORY, HEAVY, LIGHT, NUM_ACTIONS, NUM_PLANES

# Three slots over four steps, one environment: slot 0 lives to the end, slot 1 dies in step 1, and
# slot 2, a factory, is there throughout; all end with the episode, in step 3.
MASK = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1]], dtype=torch.bool)[:, None]  # (T, 1, K)
DONES = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.float32)[:, None]
REWARDS = torch.tensor([[1.0, 2.0, 6.0], [0.0, -3.0, 0.0], [4.0, 9.0, 0.0], [0.0, 9.0, 2.0]])[:, None]  # 9: of nobody
ACTIONS = torch.ones(4, 1, 3, NUM_ACTIONS)
ACTIONS[0, 0, 0, 1:] = 0  # slot 0 has no choice in step 0
GAMMA, LAMBDA = 0.9, 0.8
NARROW = ppo_trajsep_lux.Args(channels=16, bf16=False)


ROOT = Path(ppo_trajsep_lux.__file__).parent
COPIES = [
    path for path in (*ROOT.glob("*_lux.py"), *ROOT.glob("ablations/*_lux.py")) if "# Parent: " in path.read_text()
]


def names_in(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Name)]


def sections_of_names(path):
    """In which sections of the main block each name is given a value, and in which it is read.

    And the first once more without the variables of comprehensions, which are nobody else's.
    """
    text, given, read, outside = path.read_text(), *(defaultdict(set) for _ in range(3))
    banners = [(n, m[1]) for n, line in enumerate(text.split("\n"), 1) if (m := re.match(r"^ +# ---- (.+)$", line))]
    block, inner = ast.parse(text).body[-1], set()
    for node in ast.walk(block):
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            variables = {name.id for part in node.generators for name in names_in(part.target)}
            inner |= {name for name in names_in(node) if name.id in variables}
    for node in names_in(block):
        section = [name for line, name in banners if line <= node.lineno][-1:]
        (given if isinstance(node.ctx, ast.Store) else read)[node.id].update(section)
        outside[node.id].update(section if isinstance(node.ctx, ast.Store) and node not in inner else [])
    return given, read, outside


@pytest.mark.parametrize("path", COPIES, ids=lambda path: path.stem)
def test_no_copy_gives_another_meaning_to_a_name_that_lasts(path):
    """A name that is set before the first iteration and read in every iteration, as `best` is by the saving."""
    original, read, parents = sections_of_names(ROOT / "ppo_trajsep_lux.py")
    given = sections_of_names(path)[-1]
    before = {"setup", "start, or go on", "storage", "the run's folder"}
    lasting = {name for name, where in original.items() if where & before and read[name] - before}
    assert {"best", "recent", "rows", "steps", "obs"} <= lasting
    assert not {name for name in lasting if given[name] - parents[name]}


def trajectories(script, values, team_scale=0.0):
    """The rollout above by the script's own trajectories."""
    if script is mappo_lux:
        reward = script.team_reward(REWARDS, MASK, team_scale)
        return script.separate_trajectories(reward, DONES, values, MASK, ACTIONS)
    group = script.group_index(torch.zeros(4, 1, 3, dtype=torch.int32))
    rewards = script.team_reward(REWARDS, MASK, team_scale) if script is ippo_lux else REWARDS
    return script.separate_trajectories(rewards, DONES, values, group, MASK, ACTIONS, int(group.max()) + 1)


def gae(rewards, values, dones):
    """By the definition: the discounted sum of TD errors up to the first done."""
    out = []
    for t in range(len(rewards)):
        total, weight = 0.0, 1.0
        for i in range(t, len(rewards)):
            total += weight * (rewards[i] + GAMMA * values[i + 1] * (1 - dones[i]) - values[i])
            if dones[i]:
                break
            weight *= GAMMA * LAMBDA
        out.append(total)
    return out


def some_obs(size=24, batch=2):
    torch.manual_seed(0)
    return {
        "planes": torch.rand(batch, NUM_PLANES, size, size),
        "pixel": torch.tensor([[2 * size + 3, 10 * size + 10, 20 * size + 4]]).repeat(batch, 1),
        "kind": torch.tensor([[LIGHT, HEAVY, FACTORY]], dtype=torch.int8).repeat(batch, 1),
        "unit_id": torch.arange(3, dtype=torch.int32).repeat(batch, 1),
        "action_mask": torch.ones(batch, 3, NUM_ACTIONS, dtype=torch.int8),
    }


# ---- what IPPO and MAPPO are paid

PAY = [(0.0, [3.0, -1.0, 2.0, 1.0]), (1 / 12, [0.75, -0.25, 1 / 3, 1 / 6])]  # of the team's 9, -3, 4, 2


@pytest.mark.parametrize("script", [ippo_lux, mappo_lux])
def test_team_reward(script):
    assert script.Args().team_scale == 1 / 12
    for scale, pay in [*PAY, (1.0, [9, -3, 4, 2])]:
        paid = script.team_reward(REWARDS, MASK, scale)
        assert paid.shape == (4, 1, 1)
        torch.testing.assert_close(paid.flatten(), torch.tensor(pay, dtype=torch.float32))
    shares = script.team_reward(REWARDS, MASK, 0.0) * MASK
    torch.testing.assert_close(shares.sum(-1), (REWARDS * MASK).sum(-1))  # equal shares add up to the team's
    assert script.team_reward(REWARDS, torch.zeros_like(MASK), 0.0).tolist() == [[[0.0]]] * 4  # nobody: no 0 / 0


@pytest.mark.parametrize("script", [ippo_lux, mappo_lux])
def test_a_birth_does_not_change_the_pay_unless_it_is_shared(script):
    one, two = torch.tensor([[6.0, 0.0]]), torch.tensor([[True, False], [True, True]])
    assert script.team_reward(one, two, 1 / 12).flatten().tolist() == [0.5, 0.5]
    assert script.team_reward(one, two, 0.0).flatten().tolist() == [6.0, 3.0]


# ---- MAPPO


@pytest.mark.parametrize("scale, pay", PAY)
def test_mappo_all_entities_of_a_step_share_one_advantage(scale, pay):
    values = torch.tensor([0.5, -1.0, 2.0, 0.3, 7.0]).reshape(5, 1, 1)
    cells = trajectories(mappo_lux, values, scale)
    torch.testing.assert_close(cells.rewards.flatten(), torch.tensor(pay))
    assert cells.dones.flatten().tolist() == [0, 0, 0, 1]  # the episode's, not slot 1's
    torch.testing.assert_close(cells.next_values.flatten(), torch.tensor([-1.0, 2.0, 0.3, 0.0]))
    assert cells.active.shape == (4, 1, 1) and cells.active.all()
    advantages = mappo_lux.compute_gae(cells, GAMMA, LAMBDA)
    assert advantages.shape == (4, 1, 1)
    expected = gae(pay, values.flatten().tolist(), [0, 0, 0, 1])
    np.testing.assert_allclose(advantages.flatten(), expected, rtol=1e-5)
    # in the loss, every entity with a choice has a ratio of its own, and that one advantage
    assert cells.choice[:, 0].tolist() == [[False, True, True], [True] * 3, [True, False, True], [True, False, True]]
    ratio = torch.linspace(0.9, 1.1, 12).reshape(4, 1, 3).requires_grad_()
    mappo_lux.policy_loss(ratio, advantages, cells.choice, 0.5).backward()
    share = -advantages.expand(4, 1, 3) * cells.choice / cells.choice.sum()
    torch.testing.assert_close(ratio.grad, share)


# ---- IPPO


@pytest.mark.parametrize("scale, pay", PAY)
def test_ippo_pays_the_team_reward_to_every_entity_that_acts(scale, pay):
    values = torch.arange(15.0).reshape(5, 1, 3)
    cells = trajectories(ippo_lux, values, scale)
    torch.testing.assert_close(cells.rewards, torch.tensor(pay).reshape(4, 1, 1) * MASK)
    assert cells.dones[:, 0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert cells.values[1, 0].tolist() == [3, 4, 5]
    assert cells.next_values[:, 0].tolist() == [[3, 4, 5], [6, 7, 8], [9, 0, 11], [0, 0, 0]]  # 7: of 6 and 8
    advantages = ippo_lux.compute_gae(cells, GAMMA, LAMBDA)[:, 0]
    np.testing.assert_allclose(advantages[:, 0], gae(pay, [0, 3, 6, 9, 12], [0, 0, 0, 1]), rtol=1e-5)
    assert advantages[2:, 1].tolist() == [0, 0]


def test_ippo_a_death_bootstraps_from_those_who_live_on():
    """Slot 1 dies in step 0 and has a newborn in step 2; slot 3 has one in step 1; the episode ends in step 3."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], *[[1, 1, 1, 1]] * 3], dtype=torch.bool)[:, None]
    dones = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])[:, None]
    # 99 and 77 are of nobody, or of the next episode
    own = torch.tensor([[24.0, 12, 0, 99], [0, 99, 72, 0], [12, 12, 0, 0], [0, 0, 0, 12], [99] * 4])[:, None]
    team = [3.0, 6.0, 2.0, 1.0]
    values = torch.tensor(
        [[0.5, 0.4, 0.3, 77], [1, 77, 2, 1000], [0.2, 0.6, 0.7, 0.9], [1.1, 0.8, 0.3, 0.1], [77] * 4, [77] * 4]
    )[:, None]
    group = ippo_lux.group_index(torch.zeros(5, 1, 4, dtype=torch.int32))
    reward = ippo_lux.team_reward(own, mask, 1 / 12)
    cells = ippo_lux.separate_trajectories(reward, dones, values, group, mask, torch.ones(5, 1, 4, NUM_ACTIONS), 4)
    advantages = ippo_lux.compute_gae(cells, GAMMA, LAMBDA)[:, 0]

    # the dead: the mean of the others' next values, without that of the newborn in slot 3, and no trace
    assert advantages[0, 1].item() == pytest.approx(3 + GAMMA * (1 + 2) / 2 - 0.4)
    assert advantages[1, 1].item() == 0  # the slot is empty
    # its newborn starts anew, and bootstraps nothing at the episode's end
    last = 1 - 0.8
    assert advantages[3, 1].item() == pytest.approx(last)
    assert advantages[2, 1].item() == pytest.approx(2 + GAMMA * 0.8 - 0.6 + GAMMA * LAMBDA * last)
    for slot in (0, 2):  # who lives on has values and a trace of its own
        expected = gae(team, values[:, 0, slot].tolist(), [0, 0, 0, 1])
        np.testing.assert_allclose(advantages[:4, slot], expected, rtol=1e-5)
    np.testing.assert_allclose(advantages[1:4, 3], gae(team[1:], values[1:, 0, 3].tolist(), [0, 0, 1]), rtol=1e-5)


# ---- one global trajectory


def test_global_has_the_team_reward_and_the_episodes_done():
    values = torch.tensor([0.5, -1.0, 2.0, 0.3, 7.0]).reshape(5, 1, 1)
    cells = trajectories(ppo_global_lux, values)
    assert cells.rewards.flatten().tolist() == [9, -3, 4, 2]
    assert cells.dones.flatten().tolist() == [0, 0, 0, 1] and cells.next_values[3].item() == 0
    expected = gae([9, -3, 4, 2], values.flatten().tolist(), [0, 0, 0, 1])
    np.testing.assert_allclose(ppo_global_lux.compute_gae(cells, GAMMA, LAMBDA).flatten(), expected, rtol=1e-5)


def test_global_ratio_is_the_product_over_entities():
    old, new = torch.randn(5, 3), torch.randn(5, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    members = (ppo_global_lux.group_index(torch.arange(15).reshape(5, 3)), mask, 1)
    ratio = (ppo_global_lux.group_sum(new, *members) - ppo_global_lux.group_sum(old, *members)).exp()
    assert ratio.shape == (5, 1)
    product = torch.where(mask, (new - old).exp(), 1.0).prod(-1, keepdim=True)
    torch.testing.assert_close(ratio, product)


# ---- the networks


def test_how_far_each_critic_sees():
    """A far corner of the map changes the value of an entity, unless the critic is local."""
    for script, sees in ((ppo_trajsep_lux, True), (ippo_lux, False), (mappo_lux, True), (ppo_global_lux, True)):
        torch.manual_seed(0)
        agent, obs = script.Agent(NARROW), some_obs()
        before = agent.get_value(obs)
        assert before.shape == ((2, 1) if script in (mappo_lux, ppo_global_lux) else (2, 3))
        obs["planes"][:, :, -3:, -3:] += 1.0  # more than ten tiles away from the first two entities
        change = (agent.get_value(obs) - before).abs()[:, :2]
        assert (change.min() > 1e-6) if sees else (change.max() == 0), script.__name__
        obs["planes"][:, :, 2, 5] += 1.0  # two tiles from the first entity: every critic sees that
        assert ((agent.get_value(obs) - before).abs()[:, 0] > 1e-6).all()
        obs["pixel"][:, 0] = 20 * 24 + 2
        before = agent.get_value(obs)
        obs["planes"][:, :, 2, 20] += 1.0  # far, but x and y are those of the entity, swapped
        change = (agent.get_value(obs) - before).abs()[:, 0]
        assert (change.min() > 1e-6) if sees else (change.max() == 0), script.__name__


def test_gradients_of_a_residual_block_are_those_of_its_numbers():
    torch.manual_seed(0)
    local, whole = ippo_lux.ResidualBlock(4, local=True), ippo_lux.ResidualBlock(4, local=False)
    for block in (local, whole, ppo_trajsep_lux.ResidualBlock(4)):
        planes = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(block.double(), planes)


def test_actors_are_the_same():
    """Only critics and rewards differ: with the same weights, the same actions."""
    torch.manual_seed(0)
    weights, obs = ppo_trajsep_lux.Agent(NARROW).state_dict(), some_obs()
    logits = []
    for script in (ppo_trajsep_lux, ippo_lux, mappo_lux, ppo_global_lux):
        agent = script.Agent(NARROW)
        agent.load_state_dict({k: v for k, v in weights.items() if not k.startswith("critic_head")}, strict=False)
        logits.append(agent.get_distribution(obs).logits)
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other)


@pytest.mark.parametrize("script", [mappo_lux, ppo_global_lux])
def test_whole_map_value_is_linear_in_the_mean_of_the_features(script):
    torch.manual_seed(0)
    agent, obs = script.Agent(NARROW), some_obs(batch=1)
    value = agent.get_value(obs)
    everywhere = {**obs, "pixel": torch.arange(24 * 24)[None]}
    features = nn.functional.leaky_relu(agent.critic_pixel(agent.entity_features(agent.critic, everywhere)))
    single = agent.critic_head(features)  # the value is the mean of what the head makes of each tile
    torch.testing.assert_close(value, single.mean(0, keepdim=True))
    assert single.std() > 1e-3
