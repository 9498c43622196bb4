"""Whose credit is right? Every estimator's advantages against the simulated effect of the actions.

The policy of a run is frozen. Truth: the game is copied in a state, one entity's action is replaced by
each other that is legal, and all copies are played on by the policy with the same chance (symmetries
by step; Gumbel noise by step, slot and action). An action's true advantage is the team's discounted
return over the next steps less its mean over the entity's policy. Estimates: each training script's own
functions, with a critic of its own fitted from scratch, on the rollout in which the state came up.
All are in units of the team's reward: what a script pays as a share is divided by that share.
The script beside the model is run as a program: measure only runs that you trust.

    python tools/credit_truth.py runs/NAME --json truth.json --picture truth.png
"""

import argparse
import inspect
import json
import sys
import time
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path

import load
import numpy as np
import torch
from load import call

ROOT = Path(__file__).parents[1]
ESTIMATORS = {  # the script of each, and the settings that are not the script's own or the run's
    "separation": ("ppo_trajsep_lux.py", {}),
    "own rewards, no critic": ("ppo_trajsep_lux.py", {"gae_lambda": 1.0}),
    "own rewards less their mean": ("ppo_trajsep_lux.py", {"gae_lambda": 1.0}),
    "IPPO": ("ippo_lux.py", {}),
    "MAPPO": ("mappo_lux.py", {}),
    "one global trajectory": ("ppo_global_lux.py", {}),
    "GPAE 0": ("ablations/gpae_lux.py", {"gae_lambda": 0.0}),
    "GPAE 0.5": ("ablations/gpae_lux.py", {"gae_lambda": 0.5}),
    "GPAE 0.95": ("ablations/gpae_lux.py", {"gae_lambda": 0.95}),
    "COMA": ("ablations/coma_lux.py", {}),
    "DAE 0.25": ("ablations/dae_lux.py", {"beta": 0.25}),
    "DAE 1": ("ablations/dae_lux.py", {"beta": 1.0}),
    "differences": ("ablations/difference_lux.py", {}),
}
NO_CRITIC = ("own rewards, no critic", "own rewards less their mean")
OWN = {"gae_lambda", "team_scale", "num_groups", "own_reward", "bf16"}  # each script's own settings stay
FORCED = 0.05  # how often a unit is made to stand still for the advantage gap
NEAR = 20  # steps before a death and after a birth that are looked at
CASES = 200  # deaths and births looked at, at most
QUICK = 24, 8  # for a page of tools/watch.py: steps that are looked ahead, seeds
TABLE = ("slope", "correlation", "noise", "signs", "explained", "gap", "after_death", "before_birth", "spread")


def settings(script, args, changed):
    """The script's Args for the run's game, network and PPO settings."""
    names = {field.name for field in fields(script.Args)} - OWN
    known = {name: value for name, value in asdict(args).items() if name in names}
    return script.Args(**known | {"bf16": args.bf16} | changed)


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

    def act(self):
        """The batch that the policy sees, its probabilities and sampled actions (B, num_slots)."""
        batch = batch_of(self.obs)
        probs = self.agent.get_distribution(batch).probs
        return batch, probs, probs.flatten(0, 1).multinomial(1, generator=self.generator).view(probs.shape[:2])

    def move(self, b, action, simulate=True):
        """One step of environment b: the observation that ends it, in which reward and done stand."""
        last, _, over, _, _ = step(self.envs[b], action.numpy(), simulate)
        self.obs[b] = self.envs[b].reset()[0] if over else last
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
        as many units that were not touched. `kept` names the (t, b) whose environments are copied.
        """
        seen, paid, lists, states = [], [], {"stood": [], "spared": []}, []
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
                last = batch_of([self.move(b, action[b]) for b in range(len(self.envs))])
                names = {"reward": "rewards", "done": "dones", "difference": "differences"}
                paid.append({names[key]: last[key].float() for key in names})
        stack = [{key: torch.stack([row[key] for row in rows]) for key in rows[0]} for rows in (seen, paid)]
        return {"seen": stack[0], "paid": stack[1], "states": states, **lists}


# ---- the truth


def copy_of(env):
    """The environment in this state, to be played on apart from it; without its moves and what tapes it."""
    copy = deepcopy(env, {id(env.moves): []})
    vars(copy.engine).pop("step", None)
    return copy


def futures(agent, env, actions, horizon, seed):
    """The team's reward in each of the next steps after each of m first actions (m, num_slots): (m, horizon)."""
    branches, rewards, now = [], np.zeros((len(actions), horizon)), np.array(actions)
    noise = np.random.default_rng(seed).gumbel(size=(horizon, *agent_shape(env)))
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


def agent_shape(env):
    """Slots and actions of the policy."""
    return env.observation_space["action_mask"].shape[1:]


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
    would have brought against the policy's mean (`still`).
    """
    taken = np.take_along_axis(returns, np.asarray(action)[None, :, None], -1)[..., 0]
    mean = np.where(np.isnan(taken), np.nan, np.nansum(np.asarray(probs) * returns, -1))
    found = {"policy": taken - mean, "no_op": taken - returns[..., 0], "still": returns[..., 0] - mean}
    return {name: (x.mean(0), x.std(0, ddof=1) / len(x) ** 0.5) for name, x in found.items()}


def quick_truth(agent, env, obs, action, probs, gamma):
    """What each action of this step brings against the policy's mean, and its error: (2, num_slots)."""
    steps, seeds = QUICK
    returns = branch_returns(agent, env, obs, action, (steps,), range(seeds), gamma)
    return np.stack(true_advantages(returns[0], probs, action)["policy"])


# ---- the estimates


def look(script, agent, obs, action, probs):
    """What a critic says of a batch (B, ...): values (B, K or 1), and what COMA and DAE have beside them."""
    said, taken = call(agent.get_value, {"obs": obs, "action": action, "probs": probs}), action[..., None]
    if isinstance(said, tuple):  # DAE: values, and the next reward for every action
        value, reward = said
        return {"values": value, "expected": (probs * reward).sum(-1), "paid": reward.gather(-1, taken).squeeze(-1)}
    if said.dim() == 3:  # COMA: Q of every action
        advantages = script.counterfactual_advantage(said, probs, action)
        return {"values": said.gather(-1, taken).squeeze(-1), "advantages": advantages}
    return {"values": said}


def look_at(script, agent, rollout):
    """`look` at every step of a rollout: (T + 1, B, ...); values of zero without a critic."""
    seen = rollout["seen"]
    if agent is None:
        return {"values": torch.zeros(seen["kind"].shape)}
    with torch.no_grad():
        rows = [look(script, agent, now, now["action"], now["probs"]) for now in rows_of(seen)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def rows_of(seen):
    """A dictionary per step."""
    return [{key: value[t] for key, value in seen.items()} for t in range(len(seen["kind"]))]


def credit(script, args, seen, paid, said):
    """By the script's own functions: advantages, targets of the critic (both (T, B, K or 1)) and trajectories."""
    now = {key: value[:-1] for key, value in seen.items() if key != "planes"}
    known = {**asdict(args), **now, **paid, **{key: value[:-1] for key, value in said.items()}}
    known |= {"entity_mask": now["kind"] != script.EMPTY, "values": said["values"]}
    known["weights"] = torch.ones(now["kind"].shape)  # of GPAE's traces: the policy is the one that acted
    known["group"] = call(script.group_index, known)
    known["total_groups"] = int(known["group"].max()) + 1
    if hasattr(script, "decoupled_rewards"):
        known["rewards"] = call(script.decoupled_rewards, known)
    if hasattr(script, "team_reward"):
        known["reward"] = call(script.team_reward, known)
    known["trajectories"] = trajectories = call(script.separate_trajectories, known)
    advantages = call(script.compute_gae, known)
    if hasattr(script, "difference_advantages"):
        known |= {"advantages": advantages, "dones": trajectories.dones}
        known["expected"] = known["expected"] * known["entity_mask"]
        advantages = call(script.difference_advantages, known)
    returns = advantages + trajectories.values
    return said["advantages"][:-1] if "advantages" in said else advantages, returns, trajectories  # COMA has its own


def fit(script, args, rollouts, seed):
    """A critic from scratch, trained as in the script on each rollout in turn, the actor left as it is."""
    torch.manual_seed(seed)
    agent = script.Agent(args)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-8)
    clip = args.clip_coef if args.clip_vloss else None
    for n, rollout in enumerate(rollouts):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - n / len(rollouts)) * args.learning_rate
        said = look_at(script, agent, rollout)
        _, returns, trajectories = credit(script, args, rollout["seen"], rollout["paid"], said)
        batch = {key: value[:-1] for key, value in rollout["seen"].items()}
        batch |= {"values": trajectories.values, "returns": returns, "active": trajectories.active}
        batch["reward"] = trajectories.rewards
        batch = {key: value.flatten(0, 1) for key, value in batch.items()}
        size = len(returns) * returns.shape[1]
        for _ in range(args.update_epochs):
            for mb_inds in torch.randperm(size).split(size // args.num_minibatches):
                mb = {key: value[mb_inds] for key, value in batch.items()}
                new = look(script, agent, mb, mb["action"], mb["probs"])
                v_loss = script.value_loss(new["values"], mb["values"], mb["returns"], mb["active"], clip)
                if "paid" in new:
                    v_loss = v_loss + script.value_loss(new["paid"], None, mb["reward"], mb["active"])
                optimizer.zero_grad()
                (args.vf_coef * v_loss).backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
    return agent.requires_grad_(False)


class Estimator:
    """A script's advantages by one fitted critic, in units of the team's reward."""

    def __init__(self, name, script, args, agent):
        self.name, self.script, self.args, self.agent = name, script, args, agent
        self.scale = getattr(args, "team_scale", 1.0)

    def advantages(self, rollout):
        """Raw and normalised as in the loss, both (T, B, K); targets, trajectories and what the critic said."""
        said = look_at(self.script, self.agent, rollout)
        raw, returns, trajectories = credit(self.script, self.args, rollout["seen"], rollout["paid"], said)
        normal = self.script.normalize(raw, trajectories.choice)
        if self.name == NO_CRITIC[1]:
            raw = raw - self.script.masked_mean(raw, trajectories.choice)
        shape = rollout["paid"]["rewards"].shape
        return (raw / self.scale).expand(shape), normal.expand(shape), returns, trajectories, said

    def without(self, rollout, said, b, erased):
        """Raw advantages (T, K) of environment b had the rewards `erased` (T, K) not been paid."""
        seen = {key: value[:, b : b + 1] for key, value in rollout["seen"].items() if key != "planes"}
        paid = {key: value[:, b : b + 1].clone() for key, value in rollout["paid"].items()}
        for key in ("rewards", "differences"):
            paid[key][:, 0][erased] = 0
        raw, *_ = credit(self.script, self.args, seen, paid, {key: x[:, b : b + 1] for key, x in said.items()})
        return (raw / self.scale).expand(paid["rewards"].shape)[:, 0]


# ---- measures


def measure(truth, estimate, known):
    """Of estimates on truths, both (n,): slope, correlation, noise over truth; share of right signs where `known`."""
    if len(truth) < 3 or np.std(truth) == 0:
        return dict.fromkeys(("slope", "correlation", "noise", "signs"), np.nan)
    covariance = np.cov(truth, estimate)
    spread, signs = np.sqrt(np.diag(covariance)), np.sign(truth) == np.sign(estimate)
    return {
        "slope": covariance[0, 1] / covariance[0, 0],
        "correlation": covariance[0, 1] / spread.prod() if spread[1] else 0.0,
        "noise": np.std(estimate - truth) / np.std(truth),
        "signs": signs[known].mean() if known.any() else np.nan,
    }


def intervals(cluster, statistic, resamples=400):
    """The 95% interval of each number in statistic(rows) when whole clusters (n,) are drawn anew."""
    rows, rng = [np.flatnonzero(cluster == name) for name in np.unique(cluster)], np.random.default_rng(0)
    if len(rows) < 3:  # too few to tell
        return dict.fromkeys(statistic(np.arange(len(cluster))), [np.nan, np.nan])
    drawn = [
        statistic(np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])) for _ in range(resamples)
    ]
    found = {name: np.array([one[name] for one in drawn]) for name in drawn[0]}
    found = {name: x[np.isfinite(x)] for name, x in found.items()}
    return {name: np.percentile(x, [2.5, 97.5]).tolist() if len(x) else [np.nan] * 2 for name, x in found.items()}


def deaths_and_births(script, rollout):
    """Cases (b, slot, cells, erased): a unit's steps near its end or start, and the rewards in question (T, K).

    After a death those are all rewards; after a birth those of everybody who was there before.
    """
    mask, dones = rollout["seen"]["kind"][:-1] != script.EMPTY, rollout["paid"]["dones"].bool()
    over, unit = (mask <= dones).all(-1), rollout["seen"]["kind"][:-1] != script.FACTORY
    deaths, births = [], []
    for t, b, slot in (mask & unit & dones & ~over[..., None]).nonzero().tolist():
        first = next(
            (u for u in range(t, max(t - NEAR, -1), -1) if u == 0 or over[u - 1, b] or not mask[u - 1, b, slot]),
            t - NEAR + 1,
        )
        erased = torch.zeros_like(mask[:, b])
        erased[t + 1 :] = True
        deaths.append((b, slot, slice(first, t + 1), erased))
    for t, b, slot in (mask & unit)[1:].logical_and(~mask[:-1] & ~over[:-1, :, None]).nonzero().tolist():
        last = next((u for u in range(t + 1, min(t + 1 + NEAR, len(mask))) if dones[u, b, slot]), t + NEAR)
        erased = torch.zeros_like(mask[:, b])
        erased[t + 1 :] = mask[t, b]
        births.append((b, slot, slice(t + 1, last + 1), erased))
    return {"after_death": deaths, "before_birth": births}


def within_steps(state, x):
    """The variance of x (n,) among the entities of each state that has two or more: (states,)."""
    several = [x[state == name] for name in np.unique(state)]
    return np.array([np.var(some, ddof=1) for some in several if len(some) > 1])


# ---- the whole measurement


def collect_truth(flags, agent, args, rollouts):
    """One row for each entity with a choice in each kept state: a dictionary of arrays (n,)."""
    rows, number = [], 0
    for r, rollout in enumerate(rollouts):
        for (t, b), env, obs, action in rollout["states"]:
            horizons = (flags.steps, flags.long_steps) if number < flags.long_states else (flags.steps,)
            seeds = [[flags.seed, number, s] for s in range(flags.seeds)]
            returns = branch_returns(agent, env, obs, action, horizons, seeds, args.gamma)
            probs = rollout["seen"]["probs"][t, b].numpy()
            found = [true_advantages(one, probs, action.numpy()) for one in returns]
            kind, free = obs["kind"][0], obs["action_mask"][0].sum(-1) > 1
            for slot in np.flatnonzero(free):
                row = {"state": number, "rollout": r, "t": t, "b": b, "slot": int(slot), "kind": int(kind[slot])}
                row |= {"action": int(action[slot]), "living": int((kind > 0).sum())}
                for name in found[0]:
                    row |= {name: found[0][name][0][slot], f"{name}_error": found[0][name][1][slot]}
                row["long"], row["long_error"] = (
                    [x[slot] for x in found[-1]["policy"]] if len(found) > 1 else [np.nan] * 2
                )
                rows.append(row)
            number += 1
            print(f"\rtruth: {number} states, {len(rows)} actions", end="", file=sys.stderr, flush=True)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def quality(error, truth):
    """Of a truth (n,): its spread, the mean of its errors, its reliability and the highest correlation it allows."""
    reliability = max(0.0, 1 - np.mean(error**2) / np.var(truth)) if np.var(truth) else 0.0
    numbers = {"actions": len(truth), "std": np.std(truth), "error": np.sqrt(np.mean(error**2))}
    return numbers | {"reliability": reliability, "ceiling": reliability**0.5}


def groups_of(script, truth):
    """Which rows each row of the tables is over, and the truth that it takes: {name: (rows, name of the truth)}."""
    low, high = np.quantile(truth["living"], (1 / 3, 2 / 3))
    long = np.isfinite(truth["long"])
    groups = {"all": (np.full(len(long), True), "policy")}
    groups |= {
        name: (truth["kind"] == getattr(script, name.upper()), "policy") for name in ("light", "heavy", "factory")
    }
    groups[f"few (to {low:.0f})"] = truth["living"] <= low, "policy"
    groups[f"some (to {high:.0f})"] = (truth["living"] > low) & (truth["living"] <= high), "policy"
    groups["many"] = truth["living"] > high, "policy"
    groups |= {
        "against no-op": (truth["action"] != 0, "no_op"),
        "long": (long, "long"),
        "long's states": (long, "policy"),
    }
    return {name: group for name, group in groups.items() if group[0].any()}


def true_gap(truth):
    """The advantage gap by the truth: what the others' actions bring less what standing still would bring."""
    gaps = []
    for n in np.flatnonzero((truth["action"] != 0) & (truth["kind"] < 3)):
        others = (truth["state"] == truth["state"][n]) & (truth["kind"] < 3)
        others[n] = False
        if others.any():
            gaps.append((truth["policy"][others].mean() - truth["still"][n], truth["state"][n]))
    if not gaps:
        return {"gap": np.nan, "interval": [np.nan] * 2}
    gap, state = np.array(gaps).T
    return {"gap": gap.mean(), "interval": intervals(state, lambda rows: {"gap": gap[rows].mean()})["gap"]}


def judge(estimator, truth, fresh, forced, cases):
    """What one fit of an estimator says: estimates at the truth's rows, explained variance, gaps and faults."""
    script, found = estimator.script, {"raw": np.zeros(len(truth["t"])), "normal": np.zeros(len(truth["t"]))}
    errors, targets, gaps, parts = [], [], [], {"after_death": [], "before_birth": []}
    for r, rollout in enumerate((*fresh, *forced)):
        raw, normal, returns, trajectories, said = estimator.advantages(rollout)
        if r < len(fresh):
            at = np.flatnonzero(truth["rollout"] == r)
            where = tuple(truth[name][at] for name in ("t", "b", "slot"))
            found["raw"][at], found["normal"][at] = raw[where].numpy(), normal[where].numpy()
            targets.append(returns[trajectories.active])
            errors.append((returns - trajectories.values)[trajectories.active])
        unit = (rollout["seen"]["kind"][:-1] < script.FACTORY) & (rollout["seen"]["action_mask"][:-1].sum(-1) > 1)
        for name in ("stood", "spared"):
            for t, b, slot in rollout[name]:
                others = unit[t, b].clone()
                others[slot] = False
                if others.any():
                    gap = [(x[t, b, others].mean() - x[t, b, slot]).item() for x in (raw, normal)]
                    gaps.append((name == "stood", r // 8 * 1000 + b, *gap))
        for name, (b, slot, cells, erased) in cases[r]:
            part = (raw[:, b] - estimator.without(rollout, said, b, erased))[cells, slot].abs().sum()
            parts[name].append((part.item(), raw[cells, b, slot].abs().sum().item()))
    found |= {"errors": torch.cat(errors), "targets": torch.cat(targets), "gaps": np.array(gaps).reshape(-1, 4)}
    return found | {"parts": parts}


def summary(script, truth, fits):
    """An estimator's numbers in the mean over its fits, with intervals over states (or games) and by group."""
    result = {}
    for name, (chosen, which) in groups_of(script, truth).items():
        true, state = truth[which][chosen], truth["state"][chosen]
        known = np.abs(true) > np.maximum(2 * truth[f"{which}_error"][chosen], 1e-9)
        estimates = {key: [one[key][chosen] for one in fits] for key in ("raw", "normal")}

        def statistic(rows, true=true, estimates=estimates, known=known):
            several = [measure(true[rows], x[rows], known[rows]) for x in estimates["raw"]]
            found = {key: np.mean([one[key] for one in several]) for key in several[0]}
            normal = [measure(true[rows], x[rows], known[rows])["correlation"] for x in estimates["normal"]]
            return found | {"correlation_normal": np.mean(normal)}

        result[name] = {"value": statistic(np.arange(len(true))), "interval": intervals(state, statistic)}
        result[name]["fits"] = [measure(true, x, known) for x in estimates["raw"]]
    found, error = result["all"], np.mean(truth["policy_error"] ** 2)  # which widens the truth's spread
    inner = [within_steps(truth["state"], x) for x in (truth["policy"], *(one["raw"] for one in fits))]

    def spread(rows):
        true, *estimates = (np.mean(variance[rows]) for variance in inner)
        return {"spread": np.sqrt(np.mean(estimates) / (true - error)) if true > error else np.nan}

    rows = np.arange(len(inner[0]))
    found["value"] |= spread(rows)
    found["interval"] |= intervals(rows, spread)
    variance = [(1 - one["errors"].var() / one["targets"].var()).item() for one in fits]
    found["value"]["explained"], found["explained_fits"] = np.mean(variance), variance
    stood, cluster = fits[0]["gaps"][:, 0] > 0, fits[0]["gaps"][:, 1]
    both = np.mean([one["gaps"][:, 2:] for one in fits], 0)  # (n, raw and normalised)

    def gap(rows):
        now, x = stood[rows], both[rows]
        if now.all() or not now.any():
            return dict.fromkeys(("gap_raw", "gap_seen", "placebo", "gap"), np.nan)
        seen, placebo = x[now].mean(0), x[~now].mean(0)
        return {
            "gap_raw": seen[0] - placebo[0],
            "gap_seen": seen[1],
            "placebo": placebo[1],
            "gap": seen[1] - placebo[1],
        }

    found["value"] |= gap(np.arange(len(both)))
    found["interval"] |= intervals(cluster, gap)
    for name in ("after_death", "before_birth"):
        part, whole = np.sum([np.array(one["parts"][name]).reshape(-1, 2) for one in fits], 0).T

        def share(rows, name=name, part=part, whole=whole):
            return {name: part[rows].sum() / whole[rows].sum() if whole[rows].sum() else np.nan}

        found["value"] |= share(np.arange(len(part)))
        found["interval"] |= intervals(np.arange(len(part)), share)
        found[f"{name}_cases"] = len(part)
    return result


def show(results, truth):
    """The tables, to stdout."""
    print(f"{'':<28}" + "".join(f"{name.replace('_', ' '):>22}" for name in TABLE))
    for name, groups in results.items():
        cells = []
        for key in TABLE:
            low, high = groups["all"]["interval"].get(key, (np.nan, np.nan))
            cells.append(
                f"{groups['all']['value'][key]:.2f}" + (f" ({low:.2f}, {high:.2f})" if np.isfinite(low) else "")
            )
        print(f"{name:<28}" + "".join(f"{cell:>22}" for cell in cells))
    print("\nslope, correlation, noise over truth by group")
    names = list(next(iter(results.values())))
    print(f"{'':<28}" + "".join(f"{name:>22}" for name in names))
    print(
        f"{'actions, ceiling':<28}" + "".join(f"{truth[n]['actions']:>15} {truth[n]['ceiling']:.2f}  " for n in names)
    )
    for name, groups in results.items():
        three = [[groups[n]["value"][key] for key in ("slope", "correlation", "noise")] for n in names]
        print(f"{name:<28}" + "".join(f"{' '.join(f'{x:.2f}' for x in cell):>22}" for cell in three))


def draw(path, truth, results, estimates, kinds):
    """Truth across, estimate up, a panel an estimator; the grey line is where they are equal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.9 * rows), sharex=True, squeeze=False)
    wide = np.abs(truth["policy"]).max() * 1.05
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for axis, (name, groups) in zip(axes.flat, results.items(), strict=False):
        estimate, found = estimates[name]["raw"][0], groups["all"]["value"]
        axis.plot([-wide, wide], [-wide, wide], color="0.7", linewidth=1)
        for kind, (label, colour) in kinds.items():
            chosen = truth["kind"] == kind
            axis.scatter(truth["policy"][chosen], estimate[chosen], s=7, color=colour, label=label, alpha=0.7)
        axis.set_title(f"{name}\ncorrelation {found['correlation']:.2f}, slope {found['slope']:.2f}", fontsize=9)
        axis.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("true advantage of the action (simulated), in the team's reward", fontsize=9)
    figure.supylabel("the estimator's advantage (first fit)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plain(x):
    """Numbers and arrays as JSON has them; NaN becomes null."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [plain(value) for value in x]
    if isinstance(x, (float, np.floating)):
        return round(float(x), 6) if np.isfinite(x) else None
    return int(x) if isinstance(x, np.integer) else str(x) if isinstance(x, Path) else x


def credit_truth(flags):
    load.refuse_taken(flags.json, flags.picture)
    script, args, agent = load.load(flags.run, flags.best, flags.script)
    numbers = {name: value for name, value in vars(flags).items() if type(value) is int}
    least = {"long_states": 0, "long_steps": flags.steps, "seeds": 2, "seed": 0}
    for name, value in numbers.items():
        if not least.get(name, 1) <= value <= 10**6:
            raise load.Refusal(f"--{name.replace('_', '-')} must be from {least.get(name, 1)} to 1000000, got {value}.")
    if args.opponent != "idle":
        raise load.Refusal(
            f"{flags.run} was trained in self-play: the truth is measured against the idle opponent only."
        )
    torch.set_num_threads(1)
    files = {file: load.import_script(ROOT / file) for file, _ in ESTIMATORS.values()}
    game, start, seconds = files["ablations/difference_lux.py"], time.time(), {}
    game_args = settings(game, args, {})

    def say(stage, text):
        seconds[stage] = time.time() - start
        print(f"{seconds[stage]:7.0f} s  {stage}: {text}", file=sys.stderr, flush=True)

    def games(part):
        found = Games(game, game_args, agent, 10000 * flags.seed + part)
        found.scatter(game.EPISODE_STEPS)
        return found

    playing, steps, envs = games(0), args.num_steps, args.num_envs
    train = [playing.rollout(steps) for _ in range(flags.rollouts)]
    say("rollouts", f"{len(train)} to fit critics on")
    fresh, forced, events = [], [], 0
    for r in range(-(-flags.states // envs)):  # every state from a game, hence a map, of its own
        playing, count = games(1 + r), min(envs, flags.states - r * envs)
        fresh.append(playing.rollout(steps, kept=[(int(playing.rng.integers(steps)), b) for b in range(count)]))
    playing = games(9999)
    while events < flags.gap_events and len(forced) * steps * envs * FORCED < 5 * flags.gap_events:
        forced.append(playing.rollout(steps, FORCED))
        events += len(forced[-1]["stood"])
    say("fresh rollouts", f"{len(fresh)} for the truth, {len(forced)} with {events} units made to stand still")
    truth = collect_truth(flags, agent, args, fresh)
    groups = groups_of(script, truth)
    known = {n: quality(truth[f"{which}_error"][rows], truth[which][rows]) for n, (rows, which) in groups.items()}
    say(
        "truth", f"{len(truth['t'])} actions in {flags.states} states; correlation can be {known['all']['ceiling']:.2f}"
    )
    every = [
        (r, name, case)
        for r, rollout in enumerate((*fresh, *forced))
        for name, found in deaths_and_births(script, rollout).items()
        for case in found
    ]
    cases = [[] for _ in (*fresh, *forced)]
    for name in ("after_death", "before_birth"):
        some = [one for one in every if one[1] == name]
        for i in np.random.default_rng(flags.seed).permutation(len(some))[:CASES]:
            cases[some[i][0]].append((name, some[i][2]))
    results, estimates = {}, {}
    for name, (file, changed) in ESTIMATORS.items():
        its_args, fits = settings(files[file], args, changed), []
        for seed in range(1 if name in NO_CRITIC else flags.fits):
            critic = None if name in NO_CRITIC else fit(files[file], its_args, train, seed)
            fits.append(judge(Estimator(name, files[file], its_args, critic), truth, fresh, forced, cases))
        results[name] = summary(script, truth, fits)
        estimates[name] = {key: [one[key] for one in fits] for key in ("raw", "normal")}
        say(name, f"{len(fits)} fits, correlation {results[name]['all']['value']['correlation']:.2f}")
    print(f"{flags.run}: {len(truth['t'])} actions in {flags.states} states, {events} units made to stand still")
    print(
        f"truth over {flags.steps} steps: standard deviation {known['all']['std']:.4f}, error {known['all']['error']:.4f}"
    )
    gap = true_gap(truth)
    print(f"its advantage gap: {gap['gap']:.4f} ({gap['interval'][0]:.4f}, {gap['interval'][1]:.4f})\n")
    show(results, known)
    if flags.json:
        content = {"run": flags.run, "flags": {key: value for key, value in vars(flags).items() if key != "run"}}
        content |= {"args": asdict(args), "seconds": seconds, "events": events, "quality": known, "true_gap": gap}
        content |= {"truth": truth, "estimators": results, "estimates": estimates}
        with open(flags.json, "x") as file:
            json.dump(plain(content), file)
    if flags.picture:
        colours = {
            script.LIGHT: ("light", "#6aaed6"),
            script.HEAVY: ("heavy", "#08306b"),
            script.FACTORY: ("factory", "#d95f02"),
        }
        draw(flags.picture, truth, results, estimates, colours)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    load.add_arguments(parser)
    for name, default, text in (
        ("states", 40, "states, each on a map of its own, in which every entity's action is judged"),
        ("seeds", 24, "how often each branch is played on"),
        ("steps", 24, "how many steps the truth looks ahead"),
        ("long-states", 4, "states in which it looks further as well"),
        ("long-steps", 100, "how far"),
        ("rollouts", 60, "rollouts that critics are fitted on"),
        ("fits", 3, "critics of each estimator"),
        ("gap-events", 3000, "units that are made to stand still"),
        ("seed", 0, "of everything that is drawn"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})", metavar="N")
    parser.add_argument("--json", type=Path, help="write all numbers", metavar="FILE")
    parser.add_argument("--picture", type=Path, help="draw truth and estimates", metavar="FILE.png")
    try:
        credit_truth(parser.parse_args())
    except (load.Refusal, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
