"""The network: parameters, what a value sees, and that rollout and update compute the same function."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from ppo_trajsep_lux import (
    EMPTY,
    FACTORY,
    HEAVY,
    LIGHT,
    NUM_ACTIONS,
    NUM_PLANES,
    Agent,
    Args,
    LuxEnv,
    masked_mean,
    to_tensors,
)

NORMS = ("none", "spectral", "poster")


def some_obs(batch=3, slots=7, size=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(EMPTY, FACTORY + 1, (batch, slots), generator=generator)
    mask = torch.randint(0, 2, (batch, slots, NUM_ACTIONS), generator=generator)
    mask[..., 0] = 1
    return {
        "planes": torch.rand(batch, NUM_PLANES, size, size, generator=generator).half(),
        "pixel": torch.randint(0, size * size, (batch, slots), generator=generator),
        "kind": kind.to(torch.int8),
        "action_mask": mask.to(torch.int8),
    }


def test_the_default_has_200k_parameters():
    args = Args()
    count = sum(p.numel() for p in Agent(args.channels, args.num_blocks, args.norm).parameters())
    assert 195_000 <= count <= 205_000


@pytest.mark.parametrize("norm", NORMS)
def test_any_map_size_and_only_legal_actions(norm):
    agent = Agent(8, 1, norm)
    for size in (24, 33, 64):
        obs = some_obs(size=size)
        distribution = agent.get_distribution(obs)
        assert agent.get_value(obs).shape == (3, 7)
        assert distribution.probs[~obs["action_mask"].bool()].max() == 0
        assert distribution.entropy().isfinite().all()


def test_features_at_tiles_are_those_of_a_convolution_of_the_whole_map():
    torch.manual_seed(0)
    trunk, planes = Agent(8, 1, "none").actor, torch.rand(2, NUM_PLANES, 24, 24)
    everywhere = torch.arange(24 * 24).expand(2, -1)  # corners and edges as well
    kernel = trunk.last[0].weight.view(8, 3, 3, 8).permute(0, 3, 1, 2)
    dense = nn.functional.conv2d(trunk.blocks(trunk.stem(planes)), kernel, trunk.last[0].bias, padding=1)
    expected = nn.functional.leaky_relu(dense).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(trunk(planes, everywhere), expected, rtol=1e-4, atol=1e-5)


def test_heads_by_kind():
    """A light, a heavy and a factory on one pixel get logits and values of their own."""
    torch.manual_seed(0)
    agent = Agent(8, 1, "none")
    obs = some_obs(batch=1, slots=3)
    obs["pixel"][:], obs["action_mask"][:] = 100, 1
    obs["kind"][0] = torch.tensor([LIGHT, HEAVY, FACTORY])
    nn.init.normal_(agent.actor_head.weight)
    values, logits = agent.get_value(obs)[0], agent.get_distribution(obs).logits[0]
    assert len({round(v.item(), 5) for v in values}) == 3
    assert (logits[0] - logits[1]).abs().max() > 1e-3 < (logits[1] - logits[2]).abs().max()
    obs["kind"][0] = HEAVY
    torch.testing.assert_close(agent.get_value(obs)[0], values[1].expand(3))


def test_features_come_from_the_entitys_pixel():
    torch.manual_seed(0)
    agent = Agent(8, 0, "none")  # without squeeze-and-excitation: local
    obs = some_obs(batch=2, size=24)
    before = agent.get_value(obs).detach()
    for slot in range(7):
        x, y = divmod(obs["pixel"][1, slot].item(), 24)
        changed = {key: value.clone() for key, value in obs.items()}
        changed["planes"][1, :, x, y] += 1
        after = agent.get_value(changed).detach()
        assert (after[1, slot] - before[1, slot]).abs() > 1e-6
        torch.testing.assert_close(after[0], before[0])


def test_a_value_sees_the_whole_map():
    torch.manual_seed(0)
    agent = Agent(16, 1, "none")
    obs = some_obs(batch=1, slots=1, size=48)
    obs["pixel"][:], obs["kind"][:] = 0, LIGHT
    before = agent.get_value(obs).item()
    obs["planes"][0, :, 40:, 40:] += 1  # a far corner
    assert abs(agent.get_value(obs).item() - before) > 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_rollout_and_update_compute_the_same_function(norm):
    """After two updates, on the first minibatch after a rollout, every ratio is 1 and clipfrac is 0."""
    torch.manual_seed(0)
    args = Args(map_size=24, factories_per_team=1, max_units=16)
    env, rng = LuxEnv(args), np.random.default_rng(0)
    next_obs = env.reset(seed=0)[0]
    agent = Agent(16, 1, norm)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    agent.refresh_batch_norm([to_tensors({k: v[None] for k, v in next_obs.items()}, "cpu")])
    for _update in range(3):
        rows, logprobs, actions = [], [], []
        for _step in range(32):
            obs = to_tensors({key: value[None] for key, value in next_obs.items()}, "cpu")
            with torch.no_grad():
                distribution = agent.get_distribution(obs)
                action = distribution.sample()
            rows.append(obs), actions.append(action), logprobs.append(distribution.log_prob(action))
            next_obs, _, over, _, _ = env.step(action.numpy())
            next_obs = env.reset()[0] if over else next_obs
        batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        actions_, logprobs_ = torch.cat(actions), torch.cat(logprobs)
        target = torch.from_numpy(rng.integers(0, NUM_ACTIONS, actions_.shape))
        for minibatch in range(4):
            distribution = agent.get_distribution(batch)
            ratio = (distribution.log_prob(actions_) - logprobs_).exp()
            if minibatch == 0:
                assert (ratio - 1).abs().max() < 1e-4
                assert masked_mean(((ratio - 1).abs() > 0.2).float(), torch.ones_like(ratio).bool()) == 0
            logits = distribution.logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).clamp(min=-20), target.flatten())
            optimizer.zero_grad()
            (loss + agent.get_value(batch).pow(2).mean()).backward()
            optimizer.step()
            agent.power_iteration()
        assert (ratio - 1).abs().max() > 0.05  # the policy did move, and is no longer uniform
        agent.refresh_batch_norm([batch])


def test_spectral_norm_moves_once_per_optimizer_step():
    torch.manual_seed(0)
    agent, obs = Agent(8, 1, "poster"), some_obs()
    with torch.no_grad():  # as after an optimiser step; at first all singular values are equal
        for name, parameter in agent.named_parameters():
            if name.endswith("weight.original"):
                parameter.add_(torch.randn_like(parameter))

    def vectors():
        return [value.clone() for name, value in agent.state_dict().items() if name.endswith("0._u")]

    start = vectors()
    assert len(start) == 9  # all convolutions: four in each trunk, and the critic's 1x1
    agent.get_value(obs), agent.get_distribution(obs)
    agent.refresh_batch_norm([obs])
    for old, new in zip(start, vectors(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)
    agent.power_iteration()
    assert any((old - new).abs().max() > 1e-6 for old, new in zip(start, vectors(), strict=True))


def test_batch_norm_averages_over_the_observations_it_is_given():
    """First the plain average, later a moving one."""
    torch.manual_seed(0)
    agent, one, two = Agent(8, 1, "poster"), some_obs(seed=1), some_obs(seed=2)
    before = agent.get_value(one)
    torch.testing.assert_close(before, agent.get_value(one), rtol=0, atol=0)  # a forward pass leaves them alone
    agent.refresh_batch_norm([one])
    assert (agent.get_value(one) - before).abs().max() > 1e-4
    agent.refresh_batch_norm([two])
    first, last = agent.actor.stem[1], agent.actor.last[1]
    means = [agent.actor.stem[0](obs["planes"].float()).mean((0, 2, 3)) for obs in (one, two)]
    torch.testing.assert_close(first.running_mean, (means[0] + means[1]) / 2, rtol=1e-3, atol=1e-4)
    assert last.num_batches_tracked == 2

    for norm in (first, last):
        norm.num_batches_tracked.fill_(100)
    old = first.running_mean.clone()
    agent.refresh_batch_norm([one])
    torch.testing.assert_close(first.running_mean, old + (means[0] - old) / 40, rtol=1e-3, atol=1e-4)


def test_the_last_batch_norm_has_the_statistics_of_all_tiles():
    torch.manual_seed(0)
    agent, obs = Agent(8, 1, "poster"), some_obs()
    agent.refresh_batch_norm([obs])
    trunk = agent.actor
    kernel = trunk.last[0].weight.view(8, 3, 3, 8).permute(0, 3, 1, 2)
    everywhere = nn.functional.conv2d(trunk.blocks(trunk.stem(obs["planes"].float())), kernel, padding=1)
    expected = everywhere.mean((0, 2, 3)) + trunk.last[0].bias
    # within the forward pass the earlier norms used the batch's own statistics, which by then are the running ones
    torch.testing.assert_close(trunk.last[1].running_mean, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm, value", [("none", 1.0), ("spectral", 1.0), ("poster", 0.1)])
def test_normed_values_are_tenths_of_the_heads_output(norm, value):
    agent = Agent(8, 1, norm)
    nn.init.zeros_(agent.critic_head.weight), nn.init.ones_(agent.critic_head.bias)
    torch.testing.assert_close(agent.get_value(some_obs()), torch.full((3, 7), value))
