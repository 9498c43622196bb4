"""Trajectory separation on hand-made rollouts: groups, GAE, losses and the paper's golden examples."""

import numpy as np
import pytest
import torch

from ppo_trajsep_lux import (
    compute_gae,
    group_index,
    group_sum,
    masked_mean,
    normalize,
    policy_loss,
    separate_trajectories,
    value_loss,
)

GAMMA, LAMBDA = 0.9, 0.8


def separate(rewards, dones, values, mask, group=None, actions=2, total_groups=None):
    """One environment: arguments (T, K) and values (T + 1, K) as nested lists."""
    rewards, dones, mask = (torch.tensor(x, dtype=torch.float32)[:, None] for x in (rewards, dones, mask))
    values = torch.tensor(values, dtype=torch.float32)[:, None]
    group = torch.arange(mask.shape[-1]).expand(mask.shape) if group is None else torch.tensor(group)[:, None]
    action_mask = torch.ones(*mask.shape, actions)
    return separate_trajectories(
        rewards, dones, values, group, mask.bool(), action_mask, total_groups or int(group.max()) + 1
    )


def advantages(*args, **kwargs):
    return compute_gae(separate(*args, **kwargs), GAMMA, LAMBDA)[:, 0]


# ---- the paper's golden examples


def test_policy_loss_of_figure_1():
    nan = float("nan")
    cells = torch.tensor([[0.67, nan, 1.50], [nan, -1.33, 2.50], [-4.00, 5.60, 3.00], [-5, nan, 4.00]])
    mask = ~cells.isnan()
    advantage = torch.where(mask, cells, 1e9)  # whatever stands in an inactive cell must not count
    loss = policy_loss(torch.ones_like(advantage), advantage, mask, 0.2)
    assert round(loss.item(), 2) == -0.77
    group_means = torch.stack([row[keep].mean() for row, keep in zip(cells, mask, strict=True)])
    assert round(group_means.mean().item(), 2) == 0.68  # the mean of group means is another number


def test_rewards_split_into_groups():
    shared = [4.2, 3.1, 5.6, 14.3, 5.3, 2.8, 6.1, 15.2]
    groups = [
        [1.2, 1.1, 1.5, None, 0.8, 0.9, 1.8, 7.1],
        [None, 0.0, 3.3, 6.8, 1.3, 1.2, None, None],
        [1.3, 0.8, 0.8, 7.5, None, None, 2.4, 8.1],
        [1.7, 1.2, None, None, 2.1, 0.7, 1.9, None],
    ]
    mask = torch.tensor([[x is not None for x in row] for row in groups]).T
    rewards = torch.tensor([[99.0 if x is None else x for x in row] for row in groups]).T
    everybody = torch.zeros_like(rewards, dtype=torch.long)
    team = group_sum(rewards, everybody, mask, 1)[:, 0]
    # Step 5 is left out: the groups add up to 4.2 and the figure prints 5.3, a misprint.
    right = [0, 1, 2, 3, 5, 6, 7]
    np.testing.assert_allclose(team[right], np.array(shared)[right], atol=1e-5)
    assert team[4].item() == pytest.approx(4.2)
    own = group_sum(rewards, torch.arange(4).expand(8, 4), mask, 4)
    np.testing.assert_allclose(own, torch.where(mask, rewards, 0.0))


# ---- groups


def test_group_index():
    unit_id = torch.tensor([[4, 9, 6, 0, 1]])  # three unit slots, two factories
    assert group_index(unit_id, 3, 0).tolist() == [[0, 1, 2, 3, 4]]
    assert group_index(unit_id, 3, 2).tolist() == [[0, 1, 0, 2, 3]]
    assert group_index(unit_id, 3, 4).tolist() == [[0, 1, 2, 4, 5]]
    far = torch.tensor([[10**6, 0, 7, 0, 0]])  # also of empty slots, whose unit id is 0
    for num_groups in range(6):
        assert group_index(far, 3, num_groups).max() < (num_groups or 3) + 2


def test_group_is_done_when_all_that_acted_are():
    # Slots 0 and 1 are group 0. Slot 0 dies at step 0, slot 1 at step 1, and slot 2, a newborn of
    # group 0, appears at step 2: it does not keep the group of step 1 alive.
    trajectories = separate(
        rewards=[[1, 2, 0], [0, 4, 0], [0, 0, 8]],
        dones=[[1, 0, 0], [0, 1, 0], [0, 0, 0]],
        values=[[1, 10, 0], [100, 20, 0], [100, 100, 50], [100, 100, 60]],
        mask=[[1, 1, 0], [0, 1, 0], [0, 0, 1]],
        group=[[0, 0, 0]] * 3,
    )
    assert trajectories.dones[:, 0, 0].tolist() == [0, 1, 0]
    assert trajectories.rewards[:, 0, 0].tolist() == [3, 4, 8]
    assert trajectories.values[:, 0, 0].tolist() == [11, 20, 50]
    # The bootstrap is that of the members that acted and survived, at their new pixels.
    assert trajectories.next_values[:, 0, 0].tolist() == [20, 0, 60]
    assert trajectories.active[:, 0, 0].all()


def test_members_that_move_to_another_group_are_bootstrapped_where_they_acted():
    trajectories = separate(
        rewards=[[1, 2], [4, 8]],
        dones=[[0, 0], [0, 0]],
        values=[[1, 2], [30, 40], [500, 600]],
        mask=[[1, 1], [1, 1]],
        group=[[0, 0], [0, 1]],  # slot 1 moves to group 1 in step 1
    )
    assert trajectories.rewards[:, 0].tolist() == [[3, 0], [4, 8]]
    assert trajectories.values[:, 0].tolist() == [[3, 0], [30, 40]]
    assert trajectories.next_values[:, 0].tolist() == [[70, 0], [500, 600]]
    assert trajectories.active[:, 0].tolist() == [[True, False], [True, True]]
    assert trajectories.dones[:, 0].tolist() == [[0, 0], [0, 0]]  # a group without members has not ended


def test_next_values_are_0_where_a_group_ended():
    """On random rollouts of groups of several, with values that are never 0; nothing stands in inactive cells."""
    rng, ended = np.random.default_rng(0), 0
    for _ in range(20):
        mask = rng.random((10, 6)) < 0.6
        dones = mask & (rng.random((10, 6)) < 0.6)
        group = rng.integers(0, 3, (10, 6))
        values, rewards = rng.uniform(1, 2, (11, 6)), rng.normal(size=(10, 6))
        cells = separate(rewards, dones, values, mask, group.tolist(), total_groups=3)
        for g in range(3):
            members = mask & (group == g)
            survivors = members & ~dones
            np.testing.assert_array_equal(cells.active[:, 0, g], members.any(1))
            over = members.any(1) & ~survivors.any(1)
            np.testing.assert_array_equal(cells.dones[:, 0, g], over)
            np.testing.assert_array_equal(cells.next_values[:, 0, g] == 0, ~survivors.any(1))
            np.testing.assert_allclose(cells.next_values[:, 0, g], (values[1:] * survivors).sum(1), rtol=1e-5)
            np.testing.assert_allclose(cells.values[:, 0, g], (values[:-1] * members).sum(1), rtol=1e-5)
            assert not compute_gae(cells, GAMMA, LAMBDA)[:, 0, g][~members.any(1)].any()
            ended += over.sum()
    assert ended > 50


def test_choice_needs_more_than_one_legal_action():
    mask = torch.tensor([[[True, True, True, False]]])
    action_mask = torch.tensor([[[[1, 0], [1, 1], [1, 0], [1, 1]]]])
    zeros = torch.zeros(1, 1, 4)
    group = torch.tensor([[[0, 1, 1, 2]]])
    trajectories = separate_trajectories(zeros, zeros, torch.zeros(2, 1, 4), group, mask, action_mask, 3)
    assert trajectories.choice.tolist() == [[[False, True, False]]]
    assert trajectories.active.tolist() == [[[True, True, False]]]


# ---- GAE


def test_gae_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        steps, slots = 12, 4
        mask = np.ones((steps, slots), dtype=bool)
        dones = rng.random((steps, slots)) < 0.25
        born = rng.random((steps, slots)) < 0.5
        for t in range(1, steps):  # a slot is empty after a done until somebody is born in it
            mask[t] = (mask[t - 1] & ~dones[t - 1]) | (born[t] & ~(mask[t - 1] & ~dones[t - 1]))
        dones &= mask
        rewards, values = rng.normal(size=(steps, slots)), rng.normal(size=(steps + 1, slots))
        found = advantages(rewards.tolist(), dones.tolist(), values.tolist(), mask.tolist())
        for slot in range(slots):
            for t in range(steps):
                expected = 0.0
                for k in range(t, steps):
                    if not mask[t, slot]:
                        break
                    following = 0.0 if dones[k, slot] else values[k + 1, slot]
                    delta = rewards[k, slot] + GAMMA * following - values[k, slot]
                    expected += (GAMMA * LAMBDA) ** (k - t) * delta
                    if dones[k, slot]:
                        break
                assert found[t, slot].item() == pytest.approx(expected, abs=1e-5)


# ---- the three pathologies, each beside the shared trajectory that has it


def scene(late=0.0, predecessor=0.0, mate=0.0):
    """Slot 0: A dies at step 1, B is born into the slot at step 3. Slot 1: a team-mate, always there."""
    return {
        "rewards": [[1, mate], [predecessor, mate], [0, late], [late, mate], [late, mate]],
        "dones": [[0, 0], [1, 0], [0, 0], [0, 0], [1, 1]],
        "values": [[0.5, 0.2], [0.4, 0.3], [9, 0.1], [0.6, 0.2], [0.7, 0.3], [9, 9]],
        "mask": [[1, 1], [1, 1], [0, 1], [1, 1], [1, 1]],
    }


def shared_scene(**changes):
    """The same rollout as one trajectory of the team, which is done when the episode is."""
    one = scene(**changes)
    return {**one, "group": [[0, 0]] * 5}


def test_posthumous_reinforcement():
    quiet, loud = advantages(**scene()), advantages(**scene(late=100.0))
    torch.testing.assert_close(quiet[:2, 0], loud[:2, 0], rtol=0, atol=0)
    assert not torch.allclose(advantages(**shared_scene())[:2], advantages(**shared_scene(late=100.0))[:2])


def policy_gradient(rollout, slot_steps):
    """Gradient of the policy loss with respect to the log-probabilities of some (slot, step)s."""
    trajectories = separate(**rollout)
    cells = trajectories.rewards.shape
    logprobs = torch.zeros(5, 1, 2, requires_grad=True)
    group = torch.tensor(rollout.get("group", [[0, 1]] * 5))[:, None]
    mask = torch.tensor(rollout["mask"]).bool()[:, None]
    ratio = group_sum(logprobs, group, mask, cells[-1]).exp()
    policy_loss(ratio, compute_gae(trajectories, GAMMA, LAMBDA), trajectories.choice, 0.2).backward()
    return torch.stack([logprobs.grad[step, 0, slot] for slot, step in slot_steps])


def test_no_gradient_from_after_death():
    samples = [(0, 0), (0, 1)]  # A's two actions
    same = policy_gradient(scene(), samples), policy_gradient(scene(late=100.0), samples)
    torch.testing.assert_close(*same, rtol=0, atol=0)
    shared = policy_gradient(shared_scene(), samples), policy_gradient(shared_scene(late=100.0), samples)
    assert not torch.allclose(*shared)


def test_inherited_credit():
    # What A earns does not reach B, born later into its slot, nor the other way round.
    quiet, rich = advantages(**scene()), advantages(**scene(predecessor=100.0))
    torch.testing.assert_close(quiet[3:, 0], rich[3:, 0], rtol=0, atol=0)
    assert not torch.allclose(quiet[:2, 0], rich[:2, 0])
    loud = advantages(**scene(late=100.0))
    torch.testing.assert_close(quiet[:2, 0], loud[:2, 0], rtol=0, atol=0)
    assert not torch.allclose(quiet[3:, 0], loud[3:, 0])
    # In the shared trajectory B's reward is credited to A's time.
    assert not torch.allclose(advantages(**shared_scene())[:2], advantages(**shared_scene(late=100.0))[:2])


def test_diluted_signals():
    alone, helped = advantages(**scene()), advantages(**scene(mate=100.0))
    torch.testing.assert_close(alone[:, 0], helped[:, 0], rtol=0, atol=0)
    assert not torch.allclose(alone[:, 1], helped[:, 1])
    assert not torch.allclose(advantages(**shared_scene()), advantages(**shared_scene(mate=100.0)))


# ---- losses


def test_masked_mean_and_normalize():
    x = torch.tensor([1.0, 3.0, 100.0])
    mask = torch.tensor([True, True, False])
    assert masked_mean(x, mask).item() == 2.0
    assert masked_mean(x, torch.zeros(3).bool()).item() == 0.0
    torch.testing.assert_close(normalize(x, mask)[:2], torch.tensor([-1.0, 1.0]))


def test_policy_loss_clips():
    ratio, advantage = torch.tensor([2.0, 2.0, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    for cell, expected in enumerate([-1.2, 2.0, -0.5, 0.8]):
        mask = torch.arange(4) == cell
        assert policy_loss(ratio, advantage, mask, 0.2).item() == pytest.approx(expected)


def test_value_loss():
    new, old, returns = torch.tensor([2.0, 7.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    mask = torch.tensor([True, False])
    assert value_loss(new, old, returns, mask).item() == pytest.approx(0.5)
    # the larger of the errors of the new value and of the new value no more than 0.2 from the old one, which is 1
    cases = [(2.0, 0.0, 2.0), (2.0, 1.8, 0.18), (0.0, 0.2, 0.18), (0.0, 2.0, 2.0), (1.1, 1.0, 0.005)]
    for now, goal, expected in cases:
        new, returns = torch.tensor([now, 7.0]), torch.tensor([goal, 0.0])
        assert value_loss(new, old, returns, mask, 0.2).item() == pytest.approx(expected), (now, goal)
