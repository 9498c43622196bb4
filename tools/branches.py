"""The game played on by a frozen policy: rollouts of it, and the true effect of an action by simulation.

In a state the game is copied, one entity's action is replaced by each other that is legal, and all copies
are played on with the same chance: symmetries by step; Gumbel noise by step, slot and action.
"""

import inspect
import itertools
from copy import deepcopy

import numpy as np
import torch

GAMES = itertools.count()  # numbers of games
QUICK = 24, 8  # for a page of tools/watch.py: steps that are looked ahead, seeds


# ---- the game


def step(env, action, simulate=False):
    """`env.step` for one side's actions (num_slots,); difference_lux.py alone can simulate besides."""
    extra = {"simulate": simulate} if "simulate" in inspect.signature(env.step).parameters else {}
    return env.step(action[None], **extra)


def batch_of(obs):
    """The first side's observations of several environments as one batch of tensors."""
    return {key: torch.from_numpy(np.stack([one[key][0] for one in obs])) for key in obs[0]}


class Games:
    """Environments that one frozen policy plays, each begun anew when its game is over."""

    def __init__(self, script, args, agent, seed):
        self.script, self.agent, self.rng = script, agent, np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.envs = [script.LuxEnv(args) for _ in range(args.num_envs)]
        self.obs = [env.reset(seed=int(self.rng.integers(2**31)))[0] for env in self.envs]
        self.numbers = [next(GAMES) for _ in self.envs]

    def act(self):
        """The batch that the policy sees, its probabilities and sampled actions (B, num_slots)."""
        batch = batch_of(self.obs)
        probs = self.agent.get_distribution(batch).probs
        return batch, probs, probs.flatten(0, 1).multinomial(1, generator=self.generator).view(probs.shape[:2])

    def move(self, b, action, simulate=True):
        """One step of environment b: the observation that ends it, in which reward and done stand."""
        last, _, over, _, _ = step(self.envs[b], action.numpy(), simulate)
        self.obs[b] = self.envs[b].reset()[0] if over else last
        self.numbers[b] = next(GAMES) if over else self.numbers[b]
        return last

    def scatter(self, steps):
        """Play each environment a random number of steps on, so that they are at all times of a game."""
        left = self.rng.integers(steps, size=len(self.envs))
        for t in range(left.max()):
            action = self.act()[2]
            for b in np.flatnonzero(left > t):
                self.move(b, action[b], simulate=False)

    def rollout(self, steps, forced=0.0, kept=()):
        """T steps: tensors (T + 1, B, ...) of what is seen and done, (T, B, K) of rewards, dones and differences.

        With probability `forced` a step makes one random unit stand still; `stood` lists (t, b, slot), `spared`
        as many units that were not touched. `kept` names the (t, b) whose environments are copied; `games`
        (T, B) numbers the games.
        """
        seen, paid, lists, states, games = [], [], {"stood": [], "spared": []}, [], []
        for t in range(steps + 1):
            batch, probs, action = self.act()
            free = (batch["action_mask"].sum(-1) > 1) & (batch["kind"] < self.script.FACTORY) & (action != 0)
            for b in np.flatnonzero(self.rng.random(len(self.envs)) < 2 * forced) if t < steps else ():
                if free[b].any():
                    slot = int(self.rng.choice(np.flatnonzero(free[b])))
                    name = ("stood", "spared")[self.rng.integers(2)]
                    lists[name].append((t, int(b), slot))
                    action[b, slot] *= name == "spared"  # 0 is NO_OP
            states += [((t, b), copy_of(self.envs[b]), self.obs[b], action[b].clone()) for u, b in kept if u == t]
            kinds = {key: batch[key] for key in ("planes", "pixel", "kind", "unit_id", "action_mask")}
            seen.append(kinds | {"action": action, "probs": probs})
            if t < steps:
                games.append(list(self.numbers))
                last = batch_of([self.move(b, action[b]) for b in range(len(self.envs))])
                names = {"reward": "rewards", "done": "dones", "difference": "differences"}
                paid.append({names[key]: last[key].float() for key in names})
        stack = [{key: torch.stack([row[key] for row in rows]) for key in rows[0]} for rows in (seen, paid)]
        return {"seen": stack[0], "paid": stack[1], "states": states, "games": np.array(games), **lists}


# ---- the truth


def copy_of(env):
    """The environment in this state, to be played on apart from it; without its moves and what tapes it."""
    copy = deepcopy(env, {id(env.moves): []})
    vars(copy.engine).pop("step", None)
    return copy


def futures(agent, env, actions, horizon, seed):
    """The team's reward in each of the next steps after each of m first actions (m, num_slots): (m, horizon)."""
    branches, rewards, now = [], np.zeros((len(actions), horizon)), np.array(actions)
    chance = np.random.default_rng([*np.ravel(seed), 1])  # apart from that of the symmetries
    noise = chance.gumbel(size=(horizon, *env.observation_space["action_mask"].shape[1:]))
    for _ in actions:
        branches.append(copy_of(env))
        branches[-1].np_random = np.random.default_rng(seed)  # the same symmetries in all
    playing = list(range(len(actions)))
    for t in range(horizon):
        obs = {}
        for i in playing:
            obs[i], rewards[i, t], over, _, _ = step(branches[i], now[i])
            if over:
                del obs[i]
        playing = list(obs)
        if not playing or t == horizon - 1:
            break
        logits = agent.get_distribution(batch_of(list(obs.values()))).logits
        now[playing] = (logits.numpy() + noise[t]).argmax(-1)
    return rewards


def branch_returns(agent, env, obs, action, horizons, seeds, gamma):
    """Returns of every legal action of every entity with a choice: (horizons, seeds, num_slots, NUM_ACTIONS).

    The others do what `action` (num_slots,) says in the first step. NaN where there is nothing to choose.
    """
    legal = obs["action_mask"][0].astype(bool)
    action, free = np.asarray(action), legal.sum(-1) > 1
    branches = [(slot, other) for slot, other in np.argwhere(legal & free[:, None]) if other != action[slot]]
    first = np.repeat(action[None], len(branches) + 1, 0)
    for row, (slot, other) in enumerate(branches):
        first[row, slot] = other
    returns = np.full((len(horizons), len(seeds), *legal.shape), np.nan)
    for s, seed in enumerate(seeds):
        discounted = futures(agent, env, first, max(horizons), seed) * gamma ** np.arange(max(horizons))
        for h, horizon in enumerate(horizons):
            total = discounted[:, :horizon].sum(1)
            returns[h, s, free, action[free]] = total[-1]
            for row, (slot, other) in enumerate(branches):
                returns[h, s, slot, other] = total[row]
    return returns


def true_advantages(returns, probs, action):
    """Of one horizon's returns (seeds, K, NUM_ACTIONS): what the action brings, mean and standard error, each (K,).

    Against the policy's own mean (`policy`), against standing still (`no_op`), and what standing still
    would have brought against the policy's mean (`still`). `inner_error`: how much the error adds to the
    variance of `policy` among the entities, whose errors go together.
    """
    taken = np.take_along_axis(returns, np.asarray(action)[None, :, None], -1)[..., 0]
    mean = np.where(np.isnan(taken), np.nan, np.nansum(np.asarray(probs) * returns, -1))
    found = {"policy": taken - mean, "no_op": taken - returns[..., 0], "still": returns[..., 0] - mean}
    off = (found["policy"] - found["policy"].mean(0))[:, ~np.isnan(taken[0])]
    inner = off.var(1, ddof=1).sum() / len(off) / (len(off) - 1) if off.shape[1] > 1 else np.nan
    return {name: (x.mean(0), x.std(0, ddof=1) / len(x) ** 0.5) for name, x in found.items()} | {"inner_error": inner}


def quick_truth(agent, env, obs, action, probs, gamma):
    """What each action of this step brings against the policy's mean, and its error: (2, num_slots)."""
    steps, seeds = QUICK
    returns = branch_returns(agent, env, obs, action, (steps,), range(seeds), gamma)
    return np.stack(true_advantages(returns[0], probs, action)["policy"])
