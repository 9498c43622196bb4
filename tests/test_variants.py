"""What makes each baseline the algorithm of its name, by hand-computed cases."""

import numpy as np
import pytest
import torch

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


def trajectories(script, values, group):
    return script.separate_trajectories(REWARDS, DONES, values, group, MASK, ACTIONS, int(group.max()) + 1)


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


def test_mappo_all_entities_of_a_step_share_one_advantage():
    values = torch.tensor([0.5, -1.0, 2.0, 0.3, 7.0]).reshape(5, 1, 1)
    cells = trajectories(mappo_lux, values, mappo_lux.group_index(torch.zeros(4, 1, 3, dtype=torch.int32)))
    assert cells.rewards.flatten().tolist() == [3.0, -1.0, 2.0, 1.0]  # the team's 9, -3, 4, 2 by who acted
    assert cells.dones.flatten().tolist() == [0, 0, 0, 1]  # the episode's, not slot 1's
    advantages = mappo_lux.compute_gae(cells, GAMMA, LAMBDA)
    assert advantages.shape == (4, 1, 1)
    expected = gae([3.0, -1.0, 2.0, 1.0], values.flatten().tolist(), [0, 0, 0, 1])
    np.testing.assert_allclose(advantages.flatten(), expected, rtol=1e-5)
    # in the loss, every entity with a choice has a ratio of its own, and that one advantage
    assert cells.choice[:, 0].tolist() == [[False, True, True], [True] * 3, [True, False, True], [True, False, True]]
    ratio = torch.linspace(0.9, 1.1, 12).reshape(4, 1, 3).requires_grad_()
    mappo_lux.policy_loss(ratio, advantages, cells.choice, 0.5).backward()
    share = -advantages.expand(4, 1, 3) * cells.choice / cells.choice.sum()
    torch.testing.assert_close(ratio.grad, share)


def test_ippo_has_shares_of_the_team_reward_and_own_values_and_dones():
    values = torch.arange(15.0).reshape(5, 1, 3)
    cells = trajectories(ippo_lux, values, ippo_lux.group_index(torch.zeros(4, 1, 3, dtype=torch.int32)))
    assert cells.rewards[:, 0].tolist() == [[3, 3, 3], [-1, -1, -1], [2, 0, 2], [1, 0, 1]]
    assert cells.dones[:, 0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert cells.values[1, 0].tolist() == [3, 4, 5] and cells.next_values[1, 0].tolist() == [6, 0, 8]
    advantages = ippo_lux.compute_gae(cells, GAMMA, LAMBDA)
    np.testing.assert_allclose(advantages[:2, 0, 1], gae([3, -1], [1, 4, 7], [0, 1]), rtol=1e-5)
    np.testing.assert_allclose(advantages[:, 0, 0], gae([3, -1, 2, 1], [0, 3, 6, 9, 12], [0, 0, 0, 1]), rtol=1e-5)


def test_global_has_the_team_reward_and_the_episodes_done():
    values = torch.tensor([0.5, -1.0, 2.0, 0.3, 7.0]).reshape(5, 1, 1)
    cells = trajectories(ppo_global_lux, values, ppo_global_lux.group_index(torch.zeros(4, 1, 3, dtype=torch.int32)))
    assert cells.rewards.flatten().tolist() == [9, -3, 4, 2]
    assert cells.dones.flatten().tolist() == [0, 0, 0, 1]
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


@pytest.mark.parametrize("script", [ippo_lux, mappo_lux])
def test_broadcast_rewards_add_up_to_the_teams(script):
    group = script.group_index(torch.zeros(4, 1, 3, dtype=torch.int32))
    cells = trajectories(script, torch.zeros(5, 1, 3 if script is ippo_lux else 1), group)
    given = (cells.rewards * MASK).sum(-1).flatten()
    torch.testing.assert_close(given, (REWARDS * MASK).sum(-1).flatten())


def test_how_far_each_critic_sees():
    """A far corner of the map changes the value of an entity, unless the critic is local."""
    for script, sees in ((ppo_trajsep_lux, True), (ippo_lux, False), (mappo_lux, True), (ppo_global_lux, True)):
        torch.manual_seed(0)
        agent, obs = script.Agent(16, 1, "none"), some_obs()
        before = agent.get_value(obs)
        assert before.shape == ((2, 1) if script in (mappo_lux, ppo_global_lux) else (2, 3))
        obs["planes"][:, :, -3:, -3:] += 1.0  # more than ten tiles away from the first two entities
        change = (agent.get_value(obs) - before).abs()[:, :2]
        assert (change.min() > 1e-6) if sees else (change.max() == 0), script.__name__
        obs["planes"][:, :, 2, 5] += 1.0  # two tiles from the first entity: every critic sees that
        assert ((agent.get_value(obs) - before).abs()[:, 0] > 1e-6).all()


def test_actors_are_the_same():
    """Only critics and rewards differ: with the same weights, the same actions."""
    torch.manual_seed(0)
    weights, obs = ppo_trajsep_lux.Agent(16, 1, "none").state_dict(), some_obs()
    logits = []
    for script in (ppo_trajsep_lux, ippo_lux, mappo_lux, ppo_global_lux):
        agent = script.Agent(16, 1, "none")
        agent.load_state_dict({k: v for k, v in weights.items() if not k.startswith("critic_head")}, strict=False)
        logits.append(agent.get_distribution(obs).logits)
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other)


def test_whole_map_value_is_linear_in_the_mean_of_the_features():
    torch.manual_seed(0)
    agent, obs = mappo_lux.Agent(8, 1, "none"), some_obs(batch=1)
    value = agent.get_value(obs)
    single = []
    for tile in range(24 * 24):  # the value is the mean of what the head makes of each tile
        at = {**obs, "pixel": torch.tensor([[tile]])}
        single.append(agent.critic_head(agent.critic_pixel(agent.entity_features(agent.critic, at))).item())
    assert value.item() == pytest.approx(np.mean(single), abs=1e-4)
    assert np.std(single) > 1e-3
