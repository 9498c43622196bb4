"""What each training script would say of a rollout: its own functions, with a critic fitted for a frozen policy.

`tools/credit_truth.py` compares these advantages with the simulated truth. All are in units of the
team's reward: what a script pays as a share is divided by that share.
"""

from dataclasses import asdict, fields
from pathlib import Path

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
# each script's own settings stay; an untrained run's learning rate of nearly 0 would leave its critics untrained, too
OWN = {"gae_lambda", "team_scale", "num_groups", "own_reward", "bf16", "learning_rate"}
NEAR = 20  # steps before a death and after a birth that are looked at


def settings(script, args, changed):
    """The script's Args for the run's game, network and PPO settings."""
    names = {field.name for field in fields(script.Args)} - OWN
    known = {name: value for name, value in asdict(args).items() if name in names}
    # a twelfth of the reward would drown in what a critic says before it has learnt
    whole = {"team_scale": 1.0} if hasattr(script.Args, "team_scale") else {}
    return script.Args(**known | {"bf16": args.bf16} | whole | changed)


# ---- advantages


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
        steps = [{key: value[t] for key, value in seen.items()} for t in range(len(seen["kind"]))]
        rows = [look(script, agent, now, now["action"], now["probs"]) for now in steps]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


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
        batch |= {name: getattr(trajectories, name) for name in ("values", "rewards", "active")} | {"returns": returns}
        batch = {key: value.flatten(0, 1) for key, value in batch.items()}
        size = len(returns) * returns.shape[1]
        for _ in range(args.update_epochs):
            for mb_inds in torch.randperm(size).split(size // args.num_minibatches):
                mb = {key: value[mb_inds] for key, value in batch.items()}
                new = look(script, agent, mb, mb["action"], mb["probs"])
                v_loss = script.value_loss(new["values"], mb["values"], mb["returns"], mb["active"], clip)
                if "paid" in new:
                    v_loss = v_loss + script.value_loss(new["paid"], None, mb["rewards"], mb["active"])
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
        self.mean = self.script.masked_mean(raw, trajectories.choice) if self.name == NO_CRITIC[1] else 0.0
        shape = rollout["paid"]["rewards"].shape
        return ((raw - self.mean) / self.scale).expand(shape), normal.expand(shape), returns, trajectories, said

    def without(self, rollout, said, b, erased):
        """Raw advantages (T, K) of environment b had the rewards `erased` (T, K) not been paid; after `advantages`."""
        seen = {key: value[:, b : b + 1] for key, value in rollout["seen"].items() if key != "planes"}
        paid = {key: value[:, b : b + 1].clone() for key, value in rollout["paid"].items()}
        for key in ("rewards", "differences"):
            paid[key][:, 0][erased] = 0
        raw, *_ = credit(self.script, self.args, seen, paid, {key: x[:, b : b + 1] for key, x in said.items()})
        return ((raw - self.mean) / self.scale).expand(paid["rewards"].shape)[:, 0]


# ---- deaths and births


def deaths_and_births(script, rollout):
    """Cases (b, slot, cells, erased): a unit's steps near its end or start, and the rewards in question (T, K).

    After a death those are all rewards; after a birth those of everybody who was there before.
    """
    mask, dones = rollout["seen"]["kind"][:-1] != script.EMPTY, rollout["paid"]["dones"].bool()
    over, unit = (mask <= dones).all(-1), rollout["seen"]["kind"][:-1] != script.FACTORY
    deaths, births = [], []
    for t, b, slot in (mask & unit & dones & ~over[..., None]).nonzero().tolist():
        start = (u for u in range(t, 0, -1) if over[u - 1, b] or not mask[u - 1, b, slot])
        first = max(next(start, 0), t - NEAR + 1)
        erased = torch.zeros_like(mask[:, b])
        erased[t + 1 :] = True
        deaths.append((b, slot, slice(first, t + 1), erased))
    for t, b, slot in (mask & unit)[1:].logical_and(~mask[:-1] & ~over[:-1, :, None]).nonzero().tolist():
        last = next((u for u in range(t + 1, min(t + 1 + NEAR, len(mask))) if dones[u, b, slot]), t + NEAR)
        erased = torch.zeros_like(mask[:, b])
        erased[t + 1 :] = mask[t, b]
        births.append((b, slot, slice(t + 1, last + 1), erased))
    return {"after_death": deaths, "before_birth": births}
