"""The network: parameters, what a value sees, and that rollout and update compute the same function."""

import numpy as np
import torch
import torch.nn as nn

import ppo_trajsep_lux
from ppo_trajsep_lux import (
    EMPTY,
    FACTORY,
    HEAVY,
    LIGHT,
    NUM_ACTIONS,
    NUM_PLANES,
    Agent,
    Args,
    ResidualBlock,
    conv_block,
    masked_mean,
)


def small(**changes):
    """Settings of a narrow network."""
    return Args(**{"channels": 8, "bf16": False, **changes})


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
    count = sum(p.numel() for p in Agent(Args()).parameters())
    assert 195_000 <= count <= 205_000


def test_any_map_size_and_only_legal_actions():
    agent = Agent(small())
    for size in (24, 33, 64):
        obs = some_obs(size=size)
        distribution = agent.get_distribution(obs)
        assert agent.get_value(obs).shape == (3, 7)
        assert distribution.probs[~obs["action_mask"].bool()].max() == 0
        assert distribution.entropy().isfinite().all()


def test_a_convolution_is_followed_by_leaky_relu():
    block, x = conv_block(1, 1), torch.tensor([[-3.0, 0.0], [0.5, 2.0]])
    nn.init.dirac_(block[0].weight)  # each tile as it is
    torch.testing.assert_close(block(x[None, None])[0, 0].detach(), torch.tensor([[-0.03, 0.0], [0.5, 2.0]]))


def test_a_residual_block_adds_to_what_it_gets():
    """If its convolutions give 0 everywhere, then nothing; if 6, then 6 times the gate, which is 1/2 or sigmoid(3)."""
    block, x = ResidualBlock(4), torch.randn(2, 4, 5, 5)
    for layer in (block.convs[0][0], block.convs[1][0], block.squeeze, block.excite):
        nn.init.zeros_(layer.weight)
    torch.testing.assert_close(block(x), x)
    nn.init.constant_(block.convs[1][0].bias, 6.0)
    torch.testing.assert_close(block(x), x + 3.0)
    nn.init.constant_(block.squeeze.weight, 0.25)  # the mean over channels and tiles, 6
    nn.init.constant_(block.excite.weight, 0.5)
    torch.testing.assert_close(block(x), x + 6 * 0.9525741)


def test_a_fresh_policy_is_nearly_uniform_over_the_legal_actions():
    torch.manual_seed(0)
    obs = some_obs()
    legal = obs["action_mask"].float()
    uniform = legal / legal.sum(-1, keepdim=True)
    assert legal.sum(-1).max() > 4
    torch.testing.assert_close(Agent(small()).get_distribution(obs).probs, uniform, rtol=0, atol=0.02)


def test_features_at_pixels_are_those_of_the_dense_convolution():
    """At every tile, corners and edges as well, and at tiles that several entities share, in any order."""
    torch.manual_seed(0)
    trunk, planes = Agent(small()).actor, torch.rand(2, NUM_PLANES, 24, 24)
    nn.init.normal_(trunk.last.bias)
    everywhere = torch.stack([torch.arange(24 * 24), torch.randint(24 * 24, (24 * 24,))])
    dense = nn.functional.leaky_relu(trunk.last(trunk.block(trunk.stem(planes)))).flatten(2)  # (2, 8, H * W)
    expected = torch.cat([features[:, tiles].T for features, tiles in zip(dense, everywhere, strict=True)])
    torch.testing.assert_close(trunk(planes, everywhere), expected, rtol=1e-4, atol=1e-5)


def test_heads_by_kind():
    """A light, a heavy and a factory on one pixel get logits and values of their own."""
    torch.manual_seed(0)
    agent = Agent(small())
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
    agent = Agent(small())
    for trunk in (agent.actor, agent.critic):
        trunk.block = nn.Identity()  # without squeeze-and-excitation: local
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
    agent = Agent(small(channels=16))
    obs = some_obs(batch=1, slots=1, size=48)
    obs["pixel"][:], obs["kind"][:] = 0, LIGHT
    before = agent.get_value(obs).item()
    obs["planes"][0, :, 40:, 40:] += 1  # a far corner
    assert abs(agent.get_value(obs).item() - before) > 1e-6


def play_and_train(script, each_step=lambda agent: None, each_update=lambda agent, obs: None):
    """Three rollouts, each with four optimiser steps: (ratios in the first, ratios in the last step) of each."""
    torch.manual_seed(0)
    args = script.Args(map_size=24, factories_per_team=1, max_units=16, channels=16, bf16=False)
    env, rng = script.LuxEnv(args), np.random.default_rng(0)
    next_obs, agent = env.reset(seed=0)[0], script.Agent(args)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    each_update(agent, script.to_tensors({key: value[None] for key, value in next_obs.items()}, "cpu"))
    for _update in range(3):
        rows, logprobs, actions = [], [], []
        for _step in range(32):
            obs = script.to_tensors({key: value[None] for key, value in next_obs.items()}, "cpu")
            with torch.no_grad():
                distribution = agent.get_distribution(obs)
                action = distribution.sample()
            rows.append(obs), actions.append(action), logprobs.append(distribution.log_prob(action))
            next_obs, _, over, _, _ = env.step(action.numpy())
            next_obs = env.reset()[0] if over else next_obs
        batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        actions, logprobs, ratios = torch.cat(actions), torch.cat(logprobs), []
        target = torch.from_numpy(rng.integers(0, NUM_ACTIONS, actions.shape))
        for _minibatch in range(4):
            distribution = agent.get_distribution(batch)
            ratios.append((distribution.log_prob(actions) - logprobs).exp().detach())
            loss = nn.functional.cross_entropy(distribution.logits.flatten(0, 1).clamp(min=-20), target.flatten())
            optimizer.zero_grad()
            (loss + agent.get_value(batch).pow(2).mean()).backward()
            optimizer.step()
            each_step(agent)
        each_update(agent, batch)
        yield ratios[0], ratios[-1]


def test_rollout_and_update_compute_the_same_function():
    """On the first minibatch after a rollout, also after updates, every ratio is 1 and clipfrac is 0."""
    for first, last in play_and_train(ppo_trajsep_lux):
        assert (first - 1).abs().max() < 1e-4
        assert masked_mean(((first - 1).abs() > 0.2).float(), torch.ones_like(first).bool()) == 0
        assert (last - 1).abs().max() > 0.05  # the policy did move, and is no longer uniform


def test_bf16_is_the_same_function_to_its_precision():
    torch.manual_seed(0)
    agent, obs = Agent(small(channels=16)), some_obs()
    exact, coarse = [], []
    for bf16, out in ((False, exact), (True, coarse)):
        agent.bf16 = bf16
        out += [agent.get_value(obs), agent.get_distribution(obs).probs]
        assert {tensor.dtype for tensor in out} == {torch.float32}
    for one, other in zip(exact, coarse, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    assert (exact[0] - coarse[0]).abs().max() > 1e-5  # it was computed in bfloat16
