"""Each ablation's mechanism by hand-computed cases: which cells enter the loss, which reward and value each gets."""

import importlib.util
import json
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import tyro
from test_network import play_and_train, some_obs

import ppo_trajsep_lux
from ppo_trajsep_lux import EMPTY, FACTORY, HEAVY, LIGHT, NUM_ACTIONS, NUM_PLANES

ROOT = Path(__file__).resolve().parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"ablations/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


global_critic, own_reward = load("trajsep_global_critic_lux"), load("trajsep_own_reward_lux")
grouping = load("trajsep_grouping_lux")
mixed, reduction = load("trajsep_mixed_lux"), load("trajsep_sample_reduction_lux")
poster = load("trajsep_poster_norms_lux")
NARROW = ppo_trajsep_lux.Args(channels=8, bf16=False)


# ---- Fig. 9: the share of the own reward


def test_blended_rewards_add_up_to_the_teams():
    rewards = torch.tensor([[[4.0, 0.0, 2.0, 9.0]], [[-1.0, 3.0, 9.0, 9.0]]])  # 9: of empty slots
    mask = torch.tensor([[[1, 1, 1, 0]], [[1, 1, 0, 0]]], dtype=torch.bool)
    half = own_reward.blend_rewards(rewards, mask, 0.5)
    assert half.tolist() == [[[3.0, 1.0, 2.0, 0.0]], [[0.0, 2.0, 0.0, 0.0]]]  # shares of 2 and of 1
    assert own_reward.blend_rewards(rewards, mask, 0.0).tolist() == [[[2, 2, 2, 0]], [[1, 1, 0, 0]]]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        blended = own_reward.blend_rewards(rewards, mask, share)
        torch.testing.assert_close(blended.sum(-1), (rewards * mask).sum(-1))


def test_all_own_is_the_parent_to_the_bit():
    torch.manual_seed(0)
    rewards, mask = torch.randn(5, 3, 7) * 1e-3, torch.rand(5, 3, 7) > 0.4
    assert torch.equal(own_reward.blend_rewards(rewards, mask, 1.0), rewards * mask)


def test_correlation_with_the_team():
    rewards = torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]])
    mask = torch.tensor([[1, 0], [1, 0], [1, 0]], dtype=torch.bool)
    assert own_reward.team_correlation(rewards, torch.tensor([10.0, 30.0, 20.0]), mask) == pytest.approx(1)
    assert own_reward.team_correlation(rewards, torch.tensor([30.0, 10.0, 20.0]), mask) == pytest.approx(-1)
    assert own_reward.team_correlation(rewards, torch.tensor([1.0, 1.0, 4.0]), mask) == pytest.approx(0, abs=1e-6)


# ---- Fig. 8: the global critic


def test_every_cell_has_the_maps_value_and_its_own_reward_and_done():
    rewards = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    dones = torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]])
    mask = torch.tensor([[[1, 1]], [[1, 0]]], dtype=torch.bool)
    values = torch.tensor([10.0, 20.0, 30.0]).reshape(3, 1, 1)
    group = torch.arange(2).expand(2, 1, 2)
    cells = global_critic.separate_trajectories(rewards, dones, values, group, mask, torch.ones(2, 1, 2, 8), 2)
    assert cells.values.tolist() == [[[10, 10]], [[20, 20]]]
    assert cells.rewards.tolist() == [[[1, 2]], [[3, 0]]] and cells.dones.tolist() == [[[0, 1]], [[0, 0]]]
    advantages = global_critic.compute_gae(cells, 0.5, 0.5)
    second = 3 + 0.5 * 30 - 20  # of the first entity, in step 1
    assert advantages[:, 0, 0].tolist() == [1 + 0.5 * 20 - 10 + 0.25 * second, second]
    assert advantages[:, 0, 1].tolist() == [2 - 10, 0]  # the second one dies in step 0: no bootstrap


def test_the_global_critic_sees_the_whole_map_and_the_actor_is_the_parents():
    torch.manual_seed(0)
    obs = {
        "planes": torch.rand(2, NUM_PLANES, 24, 24),
        "pixel": torch.tensor([[50, 200, 400]]).repeat(2, 1),
        "kind": torch.tensor([[LIGHT, HEAVY, FACTORY]], dtype=torch.int8).repeat(2, 1),
        "action_mask": torch.ones(2, 3, NUM_ACTIONS, dtype=torch.int8),
    }
    parent, agent = ppo_trajsep_lux.Agent(NARROW), global_critic.Agent(NARROW)
    weights = {k: v for k, v in parent.state_dict().items() if not k.startswith("critic_head")}
    agent.load_state_dict(weights, strict=False)
    torch.testing.assert_close(agent.get_distribution(obs).logits, parent.get_distribution(obs).logits)
    before = agent.get_value(obs)
    assert before.shape == (2, 1)
    obs["planes"][:, :, -2:, -2:] += 1
    assert ((agent.get_value(obs) - before).abs() > 1e-6).all()


# ---- Fig. 3: factories and units apart


@pytest.mark.parametrize(
    "units, factories, expected",
    [
        (True, True, [0, 1, 2, 3, 4]),
        (True, False, [0, 1, 2, 3, 3]),
        (False, True, [0, 0, 0, 1, 2]),
        (False, False, [0, 0, 0, 1, 1]),
    ],
)
def test_mixed_groups(units, factories, expected):
    unit_id = torch.tensor([[[17, 4, 9, 0, 1]]])
    assert mixed.group_index(unit_id, 3, units, factories).tolist() == [[expected]]


def test_both_separate_is_the_parent():
    unit_id = torch.arange(10).reshape(1, 2, 5)
    assert torch.equal(mixed.group_index(unit_id, 3, True, True), ppo_trajsep_lux.group_index(unit_id, 3, 0))
    assert torch.equal(mixed.group_index(unit_id, 3, False, True), ppo_trajsep_lux.group_index(unit_id, 3, 1))


# ---- Fig. 5: groups that units join and leave


def places(*tiles, size=24):
    """Tile numbers (1, K) of (x, y) pairs; None for an empty slot."""
    return torch.tensor([[0 if tile is None else tile[0] * size + tile[1] for tile in tiles]])


def groups(rule, tile, *kinds):
    return grouping.group_index(tile, torch.tensor([kinds], dtype=torch.int8), 24, len(kinds) - 2, rule)[0].tolist()


def test_units_by_quadrant():
    tile = places((0, 0), (11, 12), (12, 11), (23, 23), (5, 5), (20, 20))  # four units, two factories
    assert groups("quadrant", tile, LIGHT, HEAVY, LIGHT, LIGHT, FACTORY, FACTORY) == [0, 1, 2, 3, 4, 5]


def test_units_by_closest_factory():
    tile = places((0, 0), (11, 12), (14, 20), (5, 5), (20, 20))
    assert groups("closest-factory", tile, LIGHT, HEAVY, LIGHT, FACTORY, FACTORY) == [0, 0, 1, 2, 3]
    tile = places((0, 0), (11, 12), (14, 20), None, (20, 20))  # a factory that is lost draws nobody
    assert groups("closest-factory", tile, LIGHT, HEAVY, LIGHT, EMPTY, FACTORY)[:3] == [1, 1, 1]


def test_units_by_closest_heavy():
    tile = places((0, 0), (11, 12), (20, 20), (19, 20), (5, 5), (20, 20))
    assert groups("closest-heavy", tile, LIGHT, HEAVY, HEAVY, LIGHT, FACTORY, FACTORY) == [1, 1, 2, 2, 4, 5]
    assert groups("closest-heavy", tile, LIGHT, LIGHT, LIGHT, LIGHT, FACTORY, FACTORY) == [0, 0, 0, 0, 4, 5]


def test_the_bootstrap_is_of_the_steps_members_wherever_they_belong_next():
    """Two units in group 0; one of them moves to group 1 in step 1, from which on it counts there."""
    group = torch.tensor([[[0, 0]], [[0, 1]]])
    rewards, dones = torch.tensor([[[1.0, 2.0]], [[4.0, 8.0]]]), torch.zeros(2, 1, 2)
    values = torch.tensor([[[10.0, 20.0]], [[30.0, 40.0]], [[50.0, 60.0]]])
    mask, actions = torch.ones(2, 1, 2, dtype=torch.bool), torch.ones(2, 1, 2, NUM_ACTIONS)
    cells = grouping.separate_trajectories(rewards, dones, values, group, mask, actions, 2)
    assert cells.rewards.tolist() == [[[3, 0]], [[4, 8]]]
    assert cells.values.tolist() == [[[30, 0]], [[30, 40]]]
    assert cells.next_values.tolist() == [
        [[70, 0]],
        [[50, 60]],
    ]  # 30 + 40: both members, one of them in group 1 by then
    advantages = grouping.compute_gae(cells, 0.5, 0.5)
    last = 4 + 0.5 * 50 - 30
    assert advantages[:, 0, 0].tolist() == [3 + 0.5 * 70 - 30 + 0.25 * last, last]
    assert advantages[:, 0, 1].tolist() == [0, 8 + 0.5 * 60 - 40]


def test_groups_do_not_turn_with_the_observation():
    """The environment gives positions before the turn; the turned ones are what the network sees."""
    env = grouping.LuxEnv(grouping.Args(map_size=24, factories_per_team=1, max_units=16))
    obs, _ = env.reset(seed=0)
    rng, turned, units = np.random.default_rng(0), set(), 0
    for _ in range(40):
        view = env.views[0]
        for rows in (view.units, view.factories):
            np.testing.assert_array_equal(np.divmod(obs["tile"][0, rows["slot"]], 24), rows["pos"].T)
        turned.add(int(obs["pixel"][0, 16]))  # of the factory, which never moves
        units += len(view.units)
        obs = env.step((rng.random(obs["action_mask"].shape) * obs["action_mask"]).argmax(-1))[0]
    assert len(turned) > 3 and units > 40


# ---- Figs. 6 and 7: fewer samples

ADVANTAGES = torch.tensor([[1.0, -5.0, 3.0, 9.0, 2.0], [0.5, -0.1, 0.0, 0.2, 0.1]])
RETURNS = torch.tensor([[7.0, 1.0, 3.0, 9.0, 8.0], [-1.0, -2.0, -3.0, 0.0, 0.0]])
ACTIVE = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)  # the 9s are of nobody


@pytest.mark.parametrize(
    "keep, count, expected",
    [
        ("top-advantage", 1, [[2], [2]]),
        ("top-advantage", 2, [[2, 4], [1, 2]]),
        ("top-abs-advantage", 1, [[1], [1]]),
        ("top-return", 1, [[4], [1]]),
        ("top-return", 3, [[0, 2, 4], [1, 2]]),
        ("random", 9, [[0, 1, 2, 4], [1, 2]]),
    ],
)
def test_selected_cells(keep, count, expected):
    selected = reduction.select_cells(ADVANTAGES, RETURNS, ACTIVE, keep, count)
    assert [row.nonzero().flatten().tolist() for row in selected] == expected


def test_random_cells_are_uniform_over_the_active_ones():
    torch.manual_seed(0)
    shape = (4000, 5)
    drawn = reduction.select_cells(
        ADVANTAGES[0].expand(shape), RETURNS[0].expand(shape), ACTIVE[0].expand(shape), "random", 2
    )
    assert (drawn.sum(-1) == 2).all() and drawn[:, 3].sum() == 0
    share = drawn.float().mean(0)[[0, 1, 2, 4]]
    assert ((share - 0.5).abs() < 0.05).all()  # 2 of 4; the standard error is 0.008


def test_a_step_in_which_nobody_acts_selects_nothing():
    none = reduction.select_cells(ADVANTAGES, RETURNS, torch.zeros_like(ACTIVE), "top-advantage", 2)
    assert not none.any()


# ---- the poster's norms


def poster_agent(seed=0):
    torch.manual_seed(seed)
    return poster.Agent(NARROW)


def test_normed_networks_take_any_map_size_and_only_legal_actions():
    agent = poster_agent()
    for size in (24, 33, 64):
        obs = some_obs(size=size)
        distribution = agent.get_distribution(obs)
        assert agent.get_value(obs).shape == (3, 7)
        assert distribution.probs[~obs["action_mask"].bool()].max() == 0
        assert distribution.entropy().isfinite().all()


def test_every_convolution_has_both_norms():
    modules = list(poster_agent().modules())
    normed = [module for module in modules if nn.utils.parametrize.is_parametrized(module)]
    assert all(module in normed for module in modules if isinstance(module, nn.Conv2d))
    assert len(normed) == 9  # four in each trunk, and the critic's 1x1, which is a linear layer
    assert sum(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in modules) == 9


def test_normed_rollout_and_update_compute_the_same_function():
    """The norms move between steps and between updates only: every ratio is 1 in the first step after a rollout."""
    ratios = play_and_train(
        poster,
        each_step=poster.Agent.power_iteration,
        each_update=lambda agent, obs: agent.refresh_batch_norm([obs]),
    )
    for first, last in ratios:
        assert (first - 1).abs().max() < 1e-4
        assert (last - 1).abs().max() > 0.05


def test_spectral_norm_moves_once_per_optimizer_step():
    agent, obs = poster_agent(), some_obs()
    with torch.no_grad():  # as after an optimiser step; at first all singular values are equal
        for name, parameter in agent.named_parameters():
            if name.endswith("weight.original"):
                parameter.add_(torch.randn_like(parameter))

    def vectors():  # and the weight of each normed layer
        norms = [module for module in agent.modules() if nn.utils.parametrize.is_parametrized(module)]
        parts = [module.parametrizations.weight for module in norms]
        return [(part.original.detach().flatten(1), part[0]._u.clone(), part[0]._v.clone()) for part in parts]

    start = vectors()
    assert len(start) == 9
    agent.get_value(obs), agent.get_distribution(obs)
    agent.refresh_batch_norm([obs])
    for (_, *old), (_, *new) in zip(start, vectors(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)
    agent.power_iteration()
    for (weight, u, v), (_, *new) in zip(start, vectors(), strict=True):
        expected = nn.functional.normalize(weight @ v, dim=0)
        torch.testing.assert_close(new, [expected, nn.functional.normalize(weight.T @ expected, dim=0)])
        assert (u - expected).abs().max() > 1e-6


def test_batch_norm_averages_over_the_observations_it_is_given():
    """First the plain average, later a moving one."""
    agent, one, two = poster_agent(), some_obs(seed=1), some_obs(seed=2)
    before = agent.get_value(one)
    torch.testing.assert_close(before, agent.get_value(one), rtol=0, atol=0)  # a forward pass leaves them alone
    agent.refresh_batch_norm([one])
    assert (agent.get_value(one) - before).abs().max() > 1e-4
    agent.refresh_batch_norm([two])
    first, last = agent.actor.stem[1], agent.actor.last_norm
    means = [agent.actor.stem[0](obs["planes"].float()).mean((0, 2, 3)) for obs in (one, two)]
    torch.testing.assert_close(first.running_mean, (means[0] + means[1]) / 2, rtol=1e-3, atol=1e-4)
    assert last.num_batches_tracked == 2

    for norm in (first, last):
        norm.num_batches_tracked.fill_(100)
    old, bright = first.running_mean.clone(), {**one, "planes": one["planes"] + 9}
    new = agent.actor.stem[0](bright["planes"].float()).mean((0, 2, 3))
    agent.refresh_batch_norm([bright])
    torch.testing.assert_close(first.running_mean, old + (new - old) / 40, rtol=1e-3, atol=1e-4)


def test_the_last_batch_norm_has_the_statistics_of_all_tiles():
    agent, obs = poster_agent(), some_obs()
    agent.refresh_batch_norm([obs])
    trunk = agent.actor
    inside = trunk.block(trunk.stem(obs["planes"].float()))
    expected = nn.functional.conv2d(inside, trunk.last.weight, trunk.last.bias, padding=1).mean((0, 2, 3))
    # within the forward pass the earlier norms used the batch's own statistics, which by then are the running ones
    torch.testing.assert_close(trunk.last_norm.running_mean, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("script, value", [(ppo_trajsep_lux, 1.0), (poster, 0.1)], ids=["parent", "poster"])
def test_normed_values_are_tenths_of_the_heads_output(script, value):
    agent = script.Agent(NARROW)
    nn.init.zeros_(agent.critic_head.weight), nn.init.ones_(agent.critic_head.bias)
    torch.testing.assert_close(agent.get_value(some_obs()), torch.full((3, 7), value))


def test_the_global_critic_is_linear_in_the_mean_of_the_features():
    torch.manual_seed(0)
    agent, obs = global_critic.Agent(NARROW), some_obs(batch=2)
    with torch.no_grad():
        features = nn.functional.leaky_relu(agent.critic_pixel(agent.critic.everywhere(obs["planes"].float())))
        single = agent.critic_head(features)  # of each tile: the value is their mean
        torch.testing.assert_close(agent.get_value(obs), single.mean(1))
    assert single.std() > 1e-3


# ---- all of them


def test_the_commands_of_committed_curves_mean_today_what_they_meant():
    """A default that changes would change every curve whose command does not name it."""
    scripts, looked_at = {}, 0
    for path in (ROOT / "ablations/results").glob("*/*/seed*.json"):
        made = json.loads(path.read_text())
        if "settings" not in made:  # noted from commit d004cd2 on
            continue
        name, *flags = shlex.split(made["command"])[1:]
        if name not in scripts:
            scripts[name] = load(f"../{name.removesuffix('.py')}")
        Args, small = scripts[name].Args, scripts[name].SMALL
        today = asdict(tyro.cli(Args, args=flags, default=small if "--small" in flags else Args()))
        of_machine = {"bf16", "cuda"}
        assert today.items() >= {key: made["settings"][key] for key in {*made["settings"]} - of_machine}.items(), path
        looked_at += 1
    assert looked_at > 80
