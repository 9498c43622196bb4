"""Trajectory-separated PPO on Lux AI Season 2, in one file.

Reproduces "Trajectory Separation for Scalable Credit Assignment in Cooperative MARL" (Takacs,
Gulyas, Magyar, ICCCI 2026): one network sees the whole map, and every unit and every factory has
a trajectory, a reward, a value and an advantage of its own inside standard PPO.

The idea. Twelve units act at once. With one trajectory for the whole team, every step has one
advantage, by which every unit's action becomes more or less likely. Three things go wrong:
- Posthumous reinforcement: a unit dies, and its last moves are praised for what others do later.
- Inherited credit: a newborn takes the dead one's place in the buffer; each is paid for the other.
- Diluted signals: one unit digs, eleven walk about, and all twelve see the same advantage.

So the buffer gets one more axis, (steps, environments, groups) in place of (steps, environments).
A group is one entity, or several; it has its own rewards and values and ends with its last member.
Cells in which it does not exist are in no loss. The rest is PPO as it always was.
Read from top to bottom: settings; trajectories (groups, GAE, losses); the network; the Lux
environment; training. After a third of the file you know the method; the game comes after it.

GPU, the paper's setting:   python ppo_trajsep_lux.py
CPU, a run of minutes:      python ppo_trajsep_lux.py --small
"""

import csv
import ctypes
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections import defaultdict, deque
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from filelock import FileLock, Timeout
from luxai_s2.config import EnvConfig
from luxai_s2_fast import LuxAI_S2  # or luxai_s2.env: the same game, slower
from scipy.ndimage import gaussian_filter
from torch.distributions.categorical import Categorical
from torch.utils.tensorboard import SummaryWriter

# ==============================================================================================
# Settings
# ==============================================================================================


def computes_in_bf16():
    """Whether to compute in bfloat16: on GPUs (it pays from Ampere on) and processors that have it; others are slow."""
    cpu, gpu = torch.cpu.get_capabilities(), torch.cuda.is_available() and "--no-cuda" not in sys.argv
    return gpu or cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)


@dataclass
class Args:
    small: bool = False
    """a run of minutes on a CPU: other defaults, see `SMALL`"""
    run_name: str = ""
    """folder under runs/ for this run's files (default: the script's name, seed and time)"""
    resume: bool = False
    """go on with the run of that name where it stopped, or begin it; a saved run knows its other flags"""
    seed: int = 1
    """seed of the run: weights, sampling and training maps"""
    cuda: bool = True
    """if toggled, the GPU is used where there is one"""
    bf16: bool = field(default_factory=computes_in_bf16)
    """if toggled, the convolutions run under bfloat16 autocast (default: on a GPU, and on a CPU that has it)"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases (project: WANDB_PROJECT)"""

    # The Lux environment
    map_size: int = 48
    """width and height of the map in tiles, 24 to 64"""
    factories_per_team: int = 4
    """factories that each team places, 1 to 10"""
    max_units: int = 60
    """unit slots per team; building is masked while none is free (15 per factory hold all that its metal builds)"""
    opponent: Literal["idle", "self"] = "idle"
    """who plays the other side: nobody (its factories never starve), or the same policy"""
    augment: bool = True
    """show each observation in a random one of the square's eight symmetries"""
    reward_ice_dug: float = 0.001
    """to a unit, per ice it digs (a new reward term is a field here and a term in `entity_rewards`)"""
    reward_ice_delivered: float = 0.0005
    """to a unit, per ice it transfers into an own factory"""
    reward_ice_received: float = 0.0005
    """to a factory, per ice that units transfer into it"""
    reward_rubble_cleared: float = 0.001
    """to a unit, per rubble it digs off a tile with ice"""
    reward_factory_alive: float = 0.001
    """to a factory, per step it survives"""
    reward_lichen: float = 0.0
    """to a factory, per lichen that it gained in the step (whole games are won by lichen)"""
    reward_unit_lost: float = -0.1
    """to a unit, when it is destroyed"""
    reward_factory_lost: float = -1.0
    """to a factory, when it runs out of water"""

    # Trajectory separation
    num_groups: int = 0
    """0: every unit has a trajectory of its own; N: units share N trajectories, by unit id modulo N"""

    # The network
    channels: int = 56
    """width of every convolution"""

    # PPO
    total_timesteps: int = 102400
    """environment steps of the run, all environments together"""
    learning_rate: float = 1e-3
    """the learning rate of the optimizer"""
    num_envs: int = 8
    """environments that step in parallel, a process each"""
    num_steps: int = 64
    """steps per environment in each rollout"""
    anneal_lr: bool = True
    """toggle learning rate annealing"""
    gamma: float = 0.99
    """the discount factor gamma"""
    gae_lambda: float = 0.95
    """the lambda of the general advantage estimation"""
    num_minibatches: int = 8
    """minibatches per epoch; of rows, each of which is one step's map of one side with all its cells"""
    update_epochs: int = 3
    """the K epochs to update the policy"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    clip_vloss: bool = True
    """toggle a clipped loss for the value function"""
    ent_coef: float = 0.02
    """coefficient of the entropy"""
    anneal_ent: bool = True
    """toggle entropy coefficient annealing, as that of the learning rate"""
    vf_coef: float = 0.5
    """coefficient of the value function"""
    max_grad_norm: float = 0.5
    """the maximum norm for the gradient clipping"""

    @property
    def batch_size(self):  # maps per rollout: one per step, environment and side that the policy plays
        return self.num_envs * self.num_steps * (2 if self.opponent == "self" else 1)

    @property
    def num_iterations(self):  # rollouts, each with its update
        return self.total_timesteps // (self.num_envs * self.num_steps)


SMALL = Args(small=True, map_size=32, factories_per_team=2, max_units=30, channels=24, total_timesteps=24576)
RANGES = {  # what numbers may be, ends included; all others from 1 to 10^9 if whole, else from -1000 to 1000
    **{"map_size": (24, 64), "factories_per_team": (1, 10), "max_units": (1, 1000), "num_envs": (1, 1000)},
    **{"seed": (0, 2**32 - 1), "num_groups": (0, 1000), "channels": (4, 4096)},
    **dict.fromkeys(("learning_rate", "clip_coef", "max_grad_norm"), (1e-12, 10**6)),
    **{"gamma": (0, 1), "gae_lambda": (0, 1), "ent_coef": (0, 100), "vf_coef": (0, 100)},
}


class Refusal(Exception):
    """What the user can mend; the message says how."""


def check_args(args):
    """Raise Refusal, which names the flag, if a number is out of range or does not fit."""
    for name, value in asdict(args).items():
        if type(value) in (int, float):
            low, high = RANGES.get(name, (1, 10**9) if type(value) is int else (-1000, 1000))
            if not low <= value <= high:
                raise Refusal(f"--{name.replace('_', '-')} must be between {low} and {high}, got {value}.")
    if args.batch_size % args.num_minibatches:
        raise Refusal(f"--num-minibatches must divide the {args.batch_size} maps of a rollout.")
    if args.num_iterations < 1:
        raise Refusal(f"--total-timesteps must hold one rollout of {args.num_envs * args.num_steps} steps.")


# ==============================================================================================
# Trajectories: groups, GAE and losses
# ==============================================================================================

# A team's units and factories come and go, so each stands in a slot: `max_units` slots for units,
# then one for each factory. Tensors per slot are (T, B, K): T steps, B environments (times sides), K
# slots; `entity_mask` says which are taken. A group is the slots that share a trajectory, a cell is one (step,
# environment, group). `separate_trajectories` goes from slots to cells (T, B, G); the losses are over cells. dones[t]:
# the group ended in the step from obs[t] to obs[t + 1] (CleanRL notes it at t + 1): nothing later flows back over it.

EMPTY, LIGHT, HEAVY, FACTORY = range(4)  # kind of entity in a slot


def group_index(unit_id, max_units, num_groups):
    """The trajectory of every slot: long (..., K). Factories keep one each, after the units'.

    All are below the training section's `total_groups`, also in empty slots, which `entity_mask` excludes.
    """
    slot = torch.arange(unit_id.shape[-1], device=unit_id.device).expand(unit_id.shape)
    if num_groups == 0:
        return slot
    return torch.where(slot < max_units, unit_id.long() % num_groups, slot - max_units + num_groups)


def group_sum(x, group, entity_mask, total_groups):
    """Sum `x` (..., K) over the members of each group, entities in `entity_mask` only: (..., G)."""
    zeros = torch.zeros(*x.shape[:-1], total_groups, dtype=x.dtype, device=x.device)
    return zeros.scatter_add(-1, group, torch.where(entity_mask, x, torch.zeros_like(x)))


class Trajectories(NamedTuple):
    """The rollout by group; every tensor (T, B, G)."""

    rewards: torch.Tensor  # sum of the members'
    dones: torch.Tensor  # 1 where members acted and none survived the step
    values: torch.Tensor  # sum of the members'
    next_values: torch.Tensor  # of the members that acted and survived, at their new pixels
    active: torch.Tensor  # the group had a member
    choice: torch.Tensor  # ... that had more than one legal action; the others teach the critic only


def separate_trajectories(rewards, dones, values, group, entity_mask, action_mask, total_groups):
    """Reduce per-slot rollout tensors to trajectories of groups (paper, section Trajectory Separation).

    `rewards`, `dones`, `group` and `entity_mask` have shape (T, B, K), `values` (T + 1, B, K),
    `action_mask` (T, B, K, NUM_ACTIONS). A group is done when all members that acted are (Fig. 2).
    It bootstraps from those who acted and survived, not from its own value a step later: newborns
    had no part in the step, and members may have moved to another group.
    """
    survived = entity_mask & ~dones.bool()
    active = group_sum(entity_mask.float(), group, entity_mask, total_groups) > 0
    alive = group_sum(survived.float(), group, entity_mask, total_groups) > 0
    free = (action_mask.sum(-1) > 1).float()
    return Trajectories(
        rewards=group_sum(rewards, group, entity_mask, total_groups),
        dones=(active & ~alive).float(),
        values=group_sum(values[:-1], group, entity_mask, total_groups),
        next_values=group_sum(values[1:], group, survived, total_groups),
        active=active,
        choice=group_sum(free, group, entity_mask, total_groups) > 0,
    )


def compute_gae(trajectories, gamma, gae_lambda):
    """Generalised advantage estimates of every cell, zero in inactive ones: (T, B, G)."""
    rewards, dones, values, next_values, active, _ = trajectories
    advantages = torch.zeros_like(rewards)
    lastgaelam = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] - values[t]  # no (1 - dones): next_values know of every end
        lastgaelam = active[t] * (delta + gamma * gae_lambda * (1.0 - dones[t]) * lastgaelam)
        advantages[t] = lastgaelam
    return advantages


def masked_mean(x, mask):
    """Mean of `x` over the cells of the bool tensor `mask`; 0 if there is none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def normalize(advantages, mask):
    """Advantages with mean 0 and standard deviation 1 over the cells of `mask`."""
    mean = masked_mean(advantages, mask)
    return (advantages - mean) / (masked_mean((advantages - mean) ** 2, mask).sqrt() + 1e-8)


def policy_loss(ratio, advantages, mask, clip_coef):
    """Clipped surrogate, averaged over the cells of `mask` (paper, Fig. 1, which prints its negative)."""
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * torch.clamp(ratio, 1 - clip_coef, 1 + clip_coef)
    return masked_mean(torch.max(pg_loss1, pg_loss2), mask)


def value_loss(newvalue, values, returns, mask, clip_coef=None):
    """Half the squared error, averaged over the cells of `mask`, clipped around the old values if asked."""
    v_loss = (newvalue - returns) ** 2
    if clip_coef is not None:
        v_clipped = values + torch.clamp(newvalue - values, -clip_coef, clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - returns) ** 2)
    return 0.5 * masked_mean(v_loss, mask)


# ==============================================================================================
# The network
# ==============================================================================================

NUM_PLANES = 18  # of the map as the network sees it, see `make_planes`
NUM_ACTIONS = 8  # of a unit; a factory has four of them


def layer_init(layer, std=np.sqrt(2), bias_const=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


def conv_block(in_channels, channels):
    """3x3 convolution and LeakyReLU: (B, in_channels, H, W) to (B, channels, H, W)."""
    return nn.Sequential(layer_init(nn.Conv2d(in_channels, channels, 3, padding=1)), nn.LeakyReLU(inplace=True))


class ResidualBlock(nn.Module):
    """Two convolutions, then squeeze-and-excitation: the gates see the whole map."""

    def __init__(self, channels):
        super().__init__()
        self.convs = nn.Sequential(conv_block(channels, channels), conv_block(channels, channels))
        self.squeeze = layer_init(nn.Linear(channels, channels // 4))
        self.excite = layer_init(nn.Linear(channels // 4, channels), std=1.0)

    def forward(self, x):
        y = self.convs(x)
        gate = torch.sigmoid(self.excite(F.leaky_relu(self.squeeze(y.mean(dim=(2, 3))))))
        return x + y * gate[:, :, None, None]


class Trunk(nn.Module):
    """Planes (B, 18, x, y) to features at the pixels (B, K), x * map_size + y, of the entities: (B * K, channels).

    Stem, residual block, one more convolution: as in the paper's architecture figure.
    """

    def __init__(self, channels):
        super().__init__()
        self.stem = conv_block(NUM_PLANES, channels)
        self.block = ResidualBlock(channels)
        self.last = layer_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, planes, pixel):
        x = self.block(self.stem(planes))  # (B, C, H, W)
        # The last convolution at the entities' pixels (B, K) only, as a matrix product with the 3x3
        # patches around them: the numbers of self.last(x) at these pixels, for less work.
        size = planes.shape[-1]
        x = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, H + 2, W + 2, C)
        near = torch.arange(3, device=x.device)
        rows = (pixel // size)[..., None, None] + near[:, None]  # (B, K, 3, 1)
        columns = (pixel % size)[..., None, None] + near  # (B, K, 1, 3)
        maps = torch.arange(len(x), device=x.device)[:, None, None, None]
        patches = x[maps, rows, columns].flatten(0, 1).flatten(1)  # (B * K, 3 * 3 * C)
        weight = self.last.weight.permute(0, 2, 3, 1).flatten(1)  # (C, 3 * 3 * C)
        return F.leaky_relu(F.linear(patches, weight, self.last.bias))


def of_kind(outputs, kind):
    """From head outputs (B, K, 3, ...), those of each slot's kind (light, heavy, factory): (B, K, ...)."""
    index = (kind.long() - 1).clamp(min=0).reshape(*kind.shape, *[1] * (outputs.dim() - 2))
    return outputs.gather(2, index.expand(*outputs.shape[:2], 1, *outputs.shape[3:])).squeeze(2)


class Agent(nn.Module):
    """Actor and critic: one architecture, separate weights; pixel to pixel, so any map size fits."""

    def __init__(self, args):
        super().__init__()
        self.bf16 = args.bf16
        self.actor = Trunk(args.channels)
        self.actor_head = layer_init(nn.Linear(args.channels, 3 * NUM_ACTIONS), std=0.01)
        self.critic = Trunk(args.channels)
        self.critic_pixel = layer_init(nn.Linear(args.channels, args.channels))  # a 1x1 convolution
        self.critic_head = layer_init(nn.Linear(args.channels, 3), std=1.0)
        self.to(memory_format=torch.channels_last)

    def entity_features(self, trunk, obs):
        """The trunk's feature vector at every entity's pixel: float32 (B * K, channels)."""
        planes = obs["planes"].to(torch.bfloat16 if self.bf16 else torch.float32, memory_format=torch.channels_last)
        with torch.autocast(planes.device.type, torch.bfloat16, enabled=self.bf16):
            return trunk(planes, obs["pixel"]).float()

    def get_value(self, obs):
        """Value of every entity, at its pixel: (B, K)."""
        features = F.leaky_relu(self.critic_pixel(self.entity_features(self.critic, obs)))
        return of_kind(self.critic_head(features).unflatten(0, obs["kind"].shape), obs["kind"])

    def get_distribution(self, obs):
        """Action distribution of every entity, at its pixel: Categorical (B, K)."""
        logits = self.actor_head(self.entity_features(self.actor, obs))  # (B * K, 3 * NUM_ACTIONS)
        logits = of_kind(logits.view(*obs["kind"].shape, 3, NUM_ACTIONS), obs["kind"])
        return Categorical(logits=logits.masked_fill(~obs["action_mask"].bool(), -1e8), validate_args=False)


# ==============================================================================================
# The Lux environment
# ==============================================================================================

EPISODE_STEPS = 1000
EPISODE_STATS = ["episodic_return", "episodic_length", "ice_transferred", "ice_dug"]
EPISODE_STATS += ["factories_alive", "factory_count", "units_built", "units_lost"]  # count: summed over the steps
PLAYERS = ("player_0", "player_1")

NO_OP, UP, RIGHT, DOWN, LEFT, DIG, DELIVER, PICK_UP = range(NUM_ACTIONS)  # unit actions
BUILD_LIGHT, BUILD_HEAVY, WATER = 1, 2, 3  # factory actions, beside NO_OP
DELTAS = np.array([[0, 0], [0, -1], [1, 0], [0, 1], [-1, 0]])  # of tiles (x, y): stay, up, right, down, left


def by_kind(name):
    """A number of the rules for each kind, so that an array of kinds can index it."""
    robots = EnvConfig().ROBOTS
    return np.array([0, getattr(robots["LIGHT"], name), getattr(robots["HEAVY"], name)])


METAL_COST, POWER_COST = by_kind("METAL_COST"), by_kind("POWER_COST")
CARGO_SPACE, BATTERY_CAPACITY = by_kind("CARGO_SPACE"), by_kind("BATTERY_CAPACITY")
MOVE_COST, RUBBLE_MOVEMENT_COST = by_kind("MOVE_COST"), by_kind("RUBBLE_MOVEMENT_COST")
DIG_COST, QUEUE_COST = by_kind("DIG_COST"), by_kind("ACTION_QUEUE_POWER_COST")


# ---- the engine, with meters


class MeteredLux(LuxAI_S2):
    """The engine, noting for every step what each entity dug, cleared, delivered, received and grew.

    Cargo before and after would mislead: a unit that is destroyed in the move phase still makes its
    transfer, and factories refine ice in the step in which they receive it.
    """

    def step(self, actions):
        names = ("ice_dug", "ice_delivered", "ice_received", "rubble_cleared", "lichen_gained")
        self.meters = {name: defaultdict(int) for name in names}  # by entity id
        before = self.lichen()
        result = super().step(actions)
        for strain, gained in enumerate(self.lichen() - before):
            self.meters["lichen_gained"][f"factory_{strain}"] = max(gained, 0)
        return result

    def lichen(self):
        """How much lichen each factory has, by its number."""
        strains, lichen = self.state.board.lichen_strains, self.state.board.lichen
        return np.bincount(strains[strains >= 0], lichen[strains >= 0], 2 * self.env_cfg.MAX_FACTORIES)

    def _handle_dig_actions(self, actions_by_type):
        rubble, diggers = self.state.board.rubble, [unit for unit, _ in actions_by_type["dig"]]
        before = [(unit.cargo.ice, rubble[tuple(unit.pos.pos)]) for unit in diggers]
        super()._handle_dig_actions(actions_by_type)
        for unit, (ice_before, rubble_before) in zip(diggers, before, strict=True):
            tile = tuple(unit.pos.pos)
            self.meters["ice_dug"][unit.unit_id] = unit.cargo.ice - ice_before
            if self.state.board.ice[tile]:
                self.meters["rubble_cleared"][unit.unit_id] = rubble_before - rubble[tile]

    def _handle_transfer_actions(self, actions_by_type):
        for unit, transfer in actions_by_type["transfer"]:
            tile = tuple(unit.pos.pos + DELTAS[transfer.transfer_dir])
            factory_id = f"factory_{self.state.board.factory_occupancy_map[tile]}"
            if transfer.resource == ICE and factory_id in self.state.factories[unit.team.agent]:
                amount = min(unit.cargo.ice, max(transfer.transfer_amount, 0))
                self.meters["ice_delivered"][unit.unit_id] = amount
                self.meters["ice_received"][factory_id] += amount
        super()._handle_transfer_actions(actions_by_type)


def placement_score(obs, player):
    """How good each tile is as a factory's centre: float (map_size, map_size), higher is better.

    Gaussian filters (the paper's; the terms are ours) over ice, less where rubble lies on it, once narrow
    and once wide, and over clear ground; minus own factories close by.
    """
    board = obs["board"]
    clear = 1 - board["rubble"] / 100
    ice = board["ice"] * (0.3 + 0.7 * clear)
    own = np.zeros(clear.shape)
    for factory in obs["factories"].get(player, {}).values():
        own[tuple(factory["pos"])] = 1
    score, terms = 0, ((ice, 1.5, 1.0), (ice, 6.0, 0.2), (clear, 3.0, 0.01), (own, 4.0, -0.5))
    for layer, sigma, weight in terms:  # the weight is that of one tile at distance 0
        score = score + weight * 2 * np.pi * sigma**2 * gaussian_filter(layer, sigma, mode="constant")
    return score


def choose_spot(obs, player):
    """The tile (2,) for the player's next factory, by the engine's observation; None if there is no room."""
    score = np.where(obs["board"]["valid_spawns_mask"], placement_score(obs, player), -np.inf)
    return None if score.max() == -np.inf else np.array(np.unravel_index(score.argmax(), score.shape))


# ---- observation

MOVE_ORDER, TRANSFER_ORDER, PICKUP_ORDER, DIG_ORDER = range(4)  # the engine's types of orders
ICE, POWER = 0, 4  # the engine's numbers of resources
REPEATED = {(MOVE_ORDER, move): move for move in range(UP, DIG)} | {(DIG_ORDER, 0): DIG}  # what a queued order repeats
FORBIDDEN = 10**6  # rubble where no unit can go: it would cost more power than any has
RING = np.array(  # from a factory's centre to the 12 tiles that touch it, where lichen starts
    [(d, side) for d in (-1, 0, 1) for side in (-2, 2)] + [(side, d) for d in (-1, 0, 1) for side in (-2, 2)]
)


def assign_slots(ids, numbers, obs, player, max_units):
    """The entity in every slot after a step: list of ids (num_slots,), None where empty.

    `ids` is that list before the step. A newborn takes a slot that was free before the step, so that a
    slot stands empty between two owners. `numbers` {unit's id: its number} gets each newborn: the number is
    the id that it would have if only this side built (in self-play both count together).
    """
    free = iter([slot for slot in range(max_units) if ids[slot] is None])
    living = {*obs["units"][player], *obs["factories"][player]}
    after = [entity if entity in living else None for entity in ids]
    for unit_id in obs["units"][player]:
        if unit_id not in numbers:
            numbers[unit_id] = 2 * (len(ids) - max_units) + len(numbers)
            after[next(free)] = unit_id
    return after


def look(layer, tiles, outside):
    """What a layer (size, size) holds at tiles (..., 2), and `outside` where they are off the map: (...)."""
    x, y = tiles[..., 0], tiles[..., 1]
    inside = (x >= 0) & (x < len(layer)) & (y >= 0) & (y < len(layer))
    return np.where(inside, layer[x * inside, y * inside], outside)


def steps_to(centres, size):
    """How many steps every tile is from the nine tiles of each factory (f, 2): (f, size, size)."""
    away = np.maximum(np.abs(np.arange(size) - centres[:, :, None]) - 1, 0)  # (f, 2, size)
    return away[:, 0, :, None] + away[:, 1, None, :]


UNIT_ROW = np.dtype([*((name, int) for name in ("slot", "id", "kind", "power", "ice", "queued")), ("pos", int, 2)])
FACTORY_ROW = np.dtype([*((name, int) for name in ("slot", "id", "power", "water", "metal", "ice")), ("pos", int, 2)])


class View:
    """One player's n units and f factories, read off the observation that the engine hands to players.

    `ids`, `numbers`: see `assign_slots`; `previous`: the player's View one step earlier. `units` (n,) and
    `factories` (f,) are arrays of rows with named fields: `units["power"]` is (n,).
    """

    def __init__(self, obs, player, ids, numbers, max_units, previous=None):
        self.obs, self.board, self.ids, self.max_units = obs, obs["board"], ids, max_units
        self.enemy, self.size = PLAYERS[player == PLAYERS[0]], len(self.board["rubble"])
        units, factories = [], []
        for slot, entity in enumerate(ids):
            if entity in numbers:  # a unit
                unit = obs["units"][player][entity]
                kind, queue = LIGHT if unit["unit_type"] == "LIGHT" else HEAVY, unit["action_queue"]
                queued = REPEATED.get(tuple(queue[0][:2]), -1) if len(queue) else NO_OP  # -1: any other
                row = (slot, numbers[entity], kind, unit["power"], unit["cargo"]["ice"], queued, tuple(unit["pos"]))
                units.append(row)
            elif entity is not None:
                factory = obs["factories"][player][entity]
                stock = factory["power"], *(factory["cargo"][name] for name in ("water", "metal", "ice"))
                factories.append((slot, factory["strain_id"], *stock, tuple(factory["pos"])))
        self.units, self.factories = np.array(units, UNIT_ROW), np.array(factories, FACTORY_ROW)
        own = steps_to(self.factories["pos"], self.size)
        enemies = [factory["pos"] for factory in obs["factories"][self.enemy].values()]
        self.home = own.min(0, initial=20)  # steps to the nearest own factory, at most 20: (size, size)
        self.owner = np.where(own == 0, np.arange(len(own))[:, None, None], -1).max(0, initial=-1)  # its row, or -1
        self.foe = (steps_to(np.reshape(enemies, (-1, 2)), self.size) == 0).any(0)  # an enemy factory is there
        self.rubble = np.where(self.foe, FORBIDDEN, self.board["rubble"])
        strains = self.board["lichen_strains"]
        self.own_lichen = np.isin(strains, obs["teams"][player]["factory_strains"])
        self.lichen_tiles = np.zeros(len(ids), dtype=int)  # how many each factory has, by slot
        self.lichen_tiles[self.factories["slot"]] = [(strains == strain).sum() for strain in self.factories["id"]]
        # in this step or the one before: the engine judges the cost of watering by both
        self.most_lichen_tiles = np.maximum(self.lichen_tiles, (previous or self).lichen_tiles)
        # row of the own factory under (0), above, right, below or left of each unit, -1 for none: (n, 5)
        self.touching = look(self.owner, self.units["pos"][:, None] + DELTAS, -1)

    def step_costs(self, units, tiles):
        """Power that the units in rows `units` (n,) need to step onto tiles (n, m, 2): (n, m)."""
        kind, rubble = self.units["kind"][units, None], look(self.rubble, tiles, FORBIDDEN)
        return np.floor(MOVE_COST[kind] + RUBBLE_MOVEMENT_COST[kind] * rubble)

    def reach(self, units, directions, power):
        """How many steps in their directions the power of the units in rows `units` lasts; all arguments (n,)."""
        steps = DELTAS[directions, None] * np.arange(1, self.size)[:, None]  # (n, size - 1, 2)
        return (self.step_costs(units, self.units["pos"][units, None] + steps).cumsum(1) <= power[:, None]).sum(1)

    def can_grow(self):
        """Whether lichen can grow next to each factory, on bare ground that no other lichen touches: bool (f,)."""
        bare = (self.rubble == 0) & (self.board["ice"] + self.board["ore"] == 0) & (self.owner < 0)
        centre, own = self.factories["pos"][:, None, None], self.factories["id"][:, None, None]
        around = centre + RING[:, None] + DELTAS  # (f, 12, 5, 2): tiles and their neighbours
        strains = look(self.board["lichen_strains"], around, -1)
        friendly = ((strains == -1) | (strains == own))[..., 1:].all(-1) | (strains[..., 0] == own[..., 0])
        return (look(bare, around[:, :, 0], False) & friendly).any(1)


def make_planes(view):
    """The map as the network sees it: float16 (18, map_size, map_size), scaled to about [0, 2].

    0 rubble, 1 ice, 2 steps to the nearest own factory (in tens), 3 own lichen, 4 enemy lichen, 5 own factory, 6 enemy
    factory, 7-10 power, water, metal and ice of own factories (on their nine tiles), 11 own light unit, 12 own heavy
    unit, 13 enemy unit (light 0.5, heavy 1), 14 own unit's power, 15 own unit's ice, 16 time of day, 17 time of the
    episode. Power enters as a square root, because a little more matters most where little is left. No plane holds a
    team total, which would leak the whole map into the local critic of IPPO.
    """
    board, units, factories = view.board, view.units, view.factories
    planes = np.zeros((NUM_PLANES, view.size, view.size), dtype=np.float16)
    planes[0] = board["rubble"] / 100
    planes[1] = board["ice"]
    planes[2] = view.home / 10
    planes[3] = board["lichen"] * view.own_lichen / 100
    planes[4] = board["lichen"] * ~view.own_lichen / 100
    planes[5], planes[6] = view.owner >= 0, view.foe
    for factory in factories:
        x, y = factory["pos"]
        nine = planes[:, x - 1 : x + 2, y - 1 : y + 2]
        nine[7] = np.sqrt(min(factory["power"] / 3000, 2))
        nine[8] = min(factory["water"] / 300, 2)
        nine[9] = min(factory["metal"] / 150, 2)
        nine[10] = min(factory["ice"] / 1000, 2)
    x, y = units["pos"].T
    planes[10 + units["kind"], x, y] = 1
    for unit in view.obs["units"][view.enemy].values():
        planes[13][tuple(unit["pos"])] = 0.5 if unit["unit_type"] == "LIGHT" else 1
    planes[14, x, y] = np.sqrt(units["power"] / BATTERY_CAPACITY[units["kind"]])
    planes[15, x, y] = units["ice"] / CARGO_SPACE[units["kind"]]
    clock, day = view.obs["real_env_steps"], 50  # steps of a day and a night
    planes[16], planes[17] = clock % day / day, clock / EPISODE_STEPS
    return planes


def action_masks(view):
    """Which actions the engine would carry out and make sense: bool (num_slots, NUM_ACTIONS).

    A unit that goes on with what its queue repeats pays no power for the queue; any other action
    needs the power of the queue update on top. NO_OP is always legal, also in empty slots.
    """
    board, units, factories = view.board, view.units, view.factories
    kind, (x, y) = units["kind"], units["pos"].T
    update = QUEUE_COST[kind, None] * (np.arange(NUM_ACTIONS) != units["queued"][:, None])
    left = units["power"][:, None] - update  # (n, NUM_ACTIONS) power left for the action itself
    legal = np.zeros((len(units), NUM_ACTIONS), dtype=bool)
    around = units["pos"][:, None] + DELTAS[UP : LEFT + 1]  # (n, 4, 2)
    legal[:, UP : LEFT + 1] = left[:, UP : LEFT + 1] >= view.step_costs(slice(None), around)
    obstacle = (board["rubble"][x, y] > 0) | ((board["lichen"][x, y] > 0) & ~view.own_lichen[x, y])
    ice_fits = (board["ice"][x, y] > 0) & (units["ice"] < CARGO_SPACE[kind])
    legal[:, DIG] = (obstacle | ice_fits) & (view.touching[:, 0] < 0) & (left[:, DIG] >= DIG_COST[kind])
    legal[:, DELIVER] = (view.touching >= 0).any(1) & (units["ice"] > 0) & (left[:, DELIVER] >= 0)
    power_here = (view.touching[:, :1] == np.flatnonzero(factories["power"] > 0)).any(1)
    legal[:, PICK_UP] = (units["power"] < BATTERY_CAPACITY[kind]) & power_here & (left[:, PICK_UP] >= 0)
    mask = np.zeros((len(view.ids), NUM_ACTIONS), dtype=bool)
    mask[units["slot"]] = legal
    mask[:, NO_OP] = True
    centre_free = (factories["pos"][:, None] != units["pos"]).any(-1).all(1)  # (f,) no enemy can be there
    metal, power = factories["metal"][:, None], factories["power"][:, None]
    can_build = centre_free[:, None] & (metal >= METAL_COST[LIGHT:]) & (power >= POWER_COST[LIGHT:])  # (f, 2)
    # a slot is left if all before it build as well; whoever can build a heavy can build a light
    has_slot = can_build[:, :1].cumsum(0) <= view.max_units - len(units)
    mask[factories["slot"], BUILD_LIGHT : BUILD_HEAVY + 1] = can_build & has_slot
    cost = np.ceil((len(RING) + 5 * view.most_lichen_tiles[factories["slot"]]) / 10)  # at most: if all around grows
    mask[factories["slot"], WATER] = view.can_grow() & (factories["water"] > cost)
    return mask


# ---- actions

ORDERS = np.array(  # the engine's type, direction and resource for each unit action
    [(MOVE_ORDER, direction, 0) for direction in range(LEFT + 1)]
    + [(DIG_ORDER, 0, 0), (TRANSFER_ORDER, 0, ICE), (PICKUP_ORDER, 0, POWER)]
)


def resolve_collisions(pos, target, newborn):
    """Which units must stay so that no two units of a team end on one tile: bool (n,).

    `pos`, `target` (n, 2): tiles before and after the move; `newborn` (m, 2): where units are being built.
    A mover is stopped if a parked unit, a newborn or an earlier mover has its target; that can stop
    others in turn, so it goes on to a fixed point. Swaps are legal.
    """
    pos, goal, newborn = ([tuple(tile) for tile in tiles.tolist()] for tiles in (pos, target, newborn))
    settled = False
    while not settled:
        settled, taken = True, {*newborn, *(here for here, aim in zip(pos, goal, strict=True) if here == aim)}
        for i, aim in enumerate(goal):
            if aim != pos[i]:
                if aim in taken:
                    goal[i], settled = pos[i], False
                taken.add(aim)
    return np.array([tuple(wanted) != aim for wanted, aim in zip(target.tolist(), goal, strict=True)], dtype=bool)


def engine_actions(view, mask, action):
    """Translate one player's slot actions (num_slots,) into the engine's: {entity id: action}.

    Masked-out actions and moves that would collide with an own unit become NO_OP. A move or a dig
    is queued as often as the power lasts, and is not sent again while the choice stays the same;
    the queue always leaves the power that it takes to cancel it.
    """
    units, factories = view.units, view.factories
    action = np.where(mask[np.arange(len(mask)), action], action, NO_OP)
    chosen, act = action[factories["slot"]], action[units["slot"]]
    newborn = factories["pos"][(chosen == BUILD_LIGHT) | (chosen == BUILD_HEAVY)]
    target = units["pos"] + DELTAS[np.where(act <= LEFT, act, NO_OP)]
    act = np.where(resolve_collisions(units["pos"], target, newborn), NO_OP, act)
    sent = np.flatnonzero((act != units["queued"]) & (units["power"] >= QUEUE_COST[units["kind"]]))
    act, units, touching = act[sent], units[sent], view.touching[sent]  # from here on those that are sent alone
    power, battery, update = units["power"], BATTERY_CAPACITY[units["kind"]], QUEUE_COST[units["kind"]]
    moving, deliver = np.flatnonzero((act > NO_OP) & (act <= LEFT)), act == DELIVER
    budget = power - 2 * update  # one update now, one to cancel
    room = battery - (power - update)  # more power than that would be wasted
    times = np.where(act == DIG, budget // DIG_COST[units["kind"]], 1)
    times[moving] = view.reach(sent[moving], act[moving], budget[moving])
    orders = np.zeros((len(units), 1, 6), dtype=np.int64)  # queues of one: type, direction, resource, amount, repeat, n
    orders[:, 0, :3] = ORDERS[act]
    orders[:, 0, 1] += deliver * (touching >= 0).argmax(1)
    orders[:, 0, 3] = deliver * units["ice"] + (act == PICK_UP) * room
    orders[:, 0, 5] = np.maximum(times, 1)
    engine = {view.ids[s]: order[: int(a != NO_OP)] for s, order, a in zip(units["slot"], orders, act, strict=True)}
    for slot, choice in zip(factories["slot"], chosen, strict=True):
        if choice != NO_OP:
            engine[view.ids[slot]] = int(choice) - BUILD_LIGHT
    return engine


def entity_rewards(args, kind, lost, ice_dug, ice_delivered, ice_received, rubble_cleared, lichen_gained):
    """Each entity's own reward for one step, from what it did itself: float32 (num_slots,).

    All arguments after `args` are (num_slots,), `kind` that before the step; what a new term needs to know
    is noted in `MeteredLux`. Ice pays when it is dug (found early, by chance) and when it is delivered
    to a factory (what the team needs; paid between units, it could be farmed), to unit and factory alike: in
    all 0.002 a piece, as in the paper's tables. Rubble on ice pays, since it takes some three digs.
    """
    survival = np.where(lost, args.reward_factory_lost, args.reward_factory_alive)
    factory = args.reward_ice_received * ice_received + args.reward_lichen * lichen_gained + survival
    mining = args.reward_ice_dug * ice_dug + args.reward_rubble_cleared * rubble_cleared
    unit = mining + args.reward_ice_delivered * ice_delivered + args.reward_unit_lost * lost
    return np.where(kind == FACTORY, factory, np.where(kind == EMPTY, 0, unit)).astype(np.float32)


# ---- symmetries


def turn_tiles(xy, symmetry, size):
    """Where tiles (n, 2) lie after a symmetry, 0 to 7: 4 swaps x and y, then 2 mirrors the new x, 1 the new y."""
    turned = xy[:, ::-1] if symmetry & 4 else xy
    return np.where((symmetry & 2, symmetry & 1), size - 1 - turned, turned)


def turn_actions(symmetry):
    """The unit action that each unit action becomes by a symmetry: (NUM_ACTIONS,)."""
    turned = turn_tiles(DELTAS + 1, symmetry, 3) - 1  # the middle of a 3x3 map and its neighbours
    moves = (turned[:, None] == DELTAS).all(-1).argmax(1)
    return np.append(moves, range(DIG, NUM_ACTIONS))


TURNED = np.stack([turn_actions(symmetry) for symmetry in range(8)])  # (8, NUM_ACTIONS): what each action becomes
TURNED_BACK = TURNED.argsort(1)  # the inverse permutations: which action each was before


def observe(view, mask, symmetry):
    """What the network sees of a view after a symmetry: a side's part of the observation of `LuxEnv`."""
    slots = {key: np.zeros(len(view.ids), dtype=int) for key in ("pixel", "kind", "unit_id")}
    for rows, kind in ((view.units, view.units["kind"]), (view.factories, FACTORY)):
        slots["pixel"][rows["slot"]] = turn_tiles(rows["pos"], symmetry, view.size) @ (view.size, 1)
        slots["kind"][rows["slot"]], slots["unit_id"][rows["slot"]] = kind, rows["id"]
    seen_mask = mask.copy()
    seen_mask[: view.max_units] = mask[: view.max_units, TURNED_BACK[symmetry]]  # factories do not turn
    planes = make_planes(view)  # turned as `turn_tiles` has it
    planes = planes.transpose(0, 2, 1) if symmetry & 4 else planes
    planes = planes[:, :: -1 if symmetry & 2 else 1, :: -1 if symmetry & 1 else 1]
    return {"planes": planes, "action_mask": seen_mask, **slots}


# ---- the gymnasium.Env

NUM_EVAL_MAPS = 100_000  # map seeds below this are for evaluation; training draws above


def draw_maps(rng, map_seed=None):
    """Seeds to try, without end: of training maps; or `map_seed`, then evaluation maps in case it does not do."""
    low, high = NUM_EVAL_MAPS, 2**31
    if map_seed is not None:
        yield map_seed
        rng, low, high = np.random.default_rng(map_seed), 0, NUM_EVAL_MAPS
    while True:
        yield int(rng.integers(low, high))


class LuxEnv(gym.Env):
    """One game of Lux AI Season 2 against an idle opponent, or against the same policy.

    Observations are a dictionary of arrays with a leading axis of sides (1, or 2 in self-play): `planes` (sides, 18,
    map_size, map_size); per slot `pixel`, `kind`, `unit_id`, `action_mask`; and `reward` and `done` of the step that
    led here, in the slots as they were before it, because gymnasium's vector environments carry only one reward per
    environment. An action is an integer per side and slot; illegal ones count as NO_OP. An episode ends, by
    termination, after 1,000 steps or with the loss of a side's last factory.

    Training maps come from the environment's own generator (`reset(seed=...)`), map n by `reset(options={"map_seed":
    n})`. With `augment`, each observation is turned or mirrored by chance, and the action that answers it is turned
    back. From step to step it keeps by side `ids`, `numbers` (see `assign_slots`), `views`, `masks` (not turned),
    `kinds` and `stats`; and the last `symmetry`.
    """

    def __init__(self, args):
        self.args = args
        self.players = PLAYERS if args.opponent == "self" else PLAYERS[:1]
        self.num_slots = args.max_units + args.factories_per_team
        self.views = []  # until a map has been found
        rules = {"map_size": args.map_size, "max_episode_length": EPISODE_STEPS, "verbose": 0}
        rules |= dict.fromkeys(("MIN_FACTORIES", "MAX_FACTORIES"), args.factories_per_team)
        self.engine = MeteredLux(**rules)
        slots = (len(self.players), self.num_slots)
        self.observation_space = gym.spaces.Dict(
            planes=gym.spaces.Box(0, 2, (len(self.players), NUM_PLANES, args.map_size, args.map_size), np.float16),
            pixel=gym.spaces.Box(0, args.map_size**2 - 1, slots, np.int64),
            kind=gym.spaces.Box(EMPTY, FACTORY, slots, np.int8),
            unit_id=gym.spaces.Box(0, 2**31 - 1, slots, np.int32),
            action_mask=gym.spaces.MultiBinary((*slots, NUM_ACTIONS)),
            reward=gym.spaces.Box(-np.inf, np.inf, slots, np.float32),
            done=gym.spaces.MultiBinary(slots),
        )
        self.action_space = gym.spaces.MultiDiscrete(np.full(slots, NUM_ACTIONS))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.generator, self.moves = self.np_random.bit_generator.state, []
        for draw, map_seed in enumerate(draw_maps(self.np_random, (options or {}).get("map_seed")), start=1):
            obs = self._start_game(map_seed)
            if obs is not None:
                break
            if draw == 100 and not self.views:  # a setting that had a map once will have another
                raise Refusal("100 maps lacked ice or room: raise --map-size or lower --factories-per-team.")
        self.ids = [[None] * self.args.max_units + list(obs["factories"][player]) for player in self.players]
        self.numbers = [{} for _ in self.players]
        self.views = [None] * len(self.players)
        self.stats = [dict.fromkeys(EPISODE_STATS, 0.0) for _ in self.players]
        nothing = np.zeros((len(self.players), self.num_slots))
        return self._observe(obs, nothing, nothing), {}

    def _start_game(self, map_seed):
        """Bid nothing and place all factories in turn; None if the map has no ice or no room."""
        obs = self.engine.reset(seed=map_seed)[0][PLAYERS[0]]
        if not obs["board"]["ice"].any():
            return None
        self.engine.step({player: {"faction": "AlphaStrike", "bid": 0} for player in PLAYERS})
        for turn in range(2 * self.args.factories_per_team):
            player = PLAYERS[turn % 2]  # on equal bids player_0 places first
            spot = choose_spot(obs, player)
            if spot is None:
                return None
            placement = {"spawn": spot, "metal": 150, "water": 150}
            obs = self.engine.step({p: placement if p == player else {} for p in PLAYERS})[0][PLAYERS[0]]
        if self.args.opponent == "idle":
            for factory in self.engine.state.factories[PLAYERS[1]].values():
                factory.cargo.water += EPISODE_STEPS
        return obs

    def _observe(self, obs, rewards, dones):
        self.symmetry = int(self.np_random.integers(8)) if self.args.augment else 0
        before, most = zip(self.players, self.ids, self.numbers, self.views, strict=True), self.args.max_units
        self.views = [View(obs, player, ids, numbers, most, view) for player, ids, numbers, view in before]
        self.masks = [action_masks(view) for view in self.views]
        sides = [observe(view, mask, self.symmetry) for view, mask in zip(self.views, self.masks, strict=True)]
        self.kinds = [side["kind"] for side in sides]
        seen = {key: np.stack([side[key] for side in sides]) for key in sides[0]} | {"reward": rewards, "done": dones}
        return {key: np.asarray(seen[key], dtype=space.dtype) for key, space in self.observation_space.items()}

    def step(self, action):
        self.moves.append(np.array(action, dtype=np.uint8))
        action = np.array(action)  # (sides, num_slots)
        units = action[:, : self.args.max_units]
        units[:] = TURNED_BACK[self.symmetry][units]  # from the directions that the network saw to the map's
        orders = {player: {} for player in PLAYERS}
        for side, player in enumerate(self.players):
            orders[player] = engine_actions(self.views[side], self.masks[side], action[side])
        obs, _, terminations, _, _ = self.engine.step(orders)
        obs, over = obs[PLAYERS[0]], bool(terminations[PLAYERS[0]])
        rewards, dones = [], []
        for side, player in enumerate(self.players):
            ids, kind = self.ids[side], self.kinds[side]
            self.ids[side] = assign_slots(ids, self.numbers[side], obs, player, self.args.max_units)
            lost = np.array([entity is not None and entity not in self.ids[side] for entity in ids])
            meters = {name: np.array([meter[entity] for entity in ids]) for name, meter in self.engine.meters.items()}
            rewards.append(entity_rewards(self.args, kind, lost, **meters))
            dones.append(lost | (over & (kind != EMPTY)))
            stats = self.stats[side]
            stats["episodic_return"] += float(rewards[side].sum())
            stats["episodic_length"] += 1
            stats["ice_transferred"] += int(meters["ice_delivered"].sum())
            stats["ice_dug"] += int(meters["ice_dug"].sum())
            stats["factory_count"] += len(obs["factories"][player])
            stats["factories_alive"] = stats["factory_count"] / EPISODE_STEPS
            stats["units_built"] = len(self.numbers[side])
            stats["units_lost"] += int((lost & (kind != FACTORY)).sum())
        info = {"episode": {k: np.mean([stats[k] for stats in self.stats]) for k in EPISODE_STATS}} if over else {}
        return self._observe(obs, rewards, dones), float(np.sum(rewards)), over, False, info

    @property
    def game(self):  # for a checkpoint: the generator before the reset and all moves since; played again they lead here
        return {"generator": self.generator, "moves": torch.from_numpy(np.array(self.moves, dtype=np.uint8))}

    @game.setter
    def game(self, game):
        self.np_random.bit_generator.state = game["generator"]
        self.reset()
        for move in game["moves"].numpy():
            self.step(move)


def make_worker_env(args):
    """An environment in a process of its own, which ends with the main process and leaves signals to it."""
    if multiprocessing.parent_process() is not None:  # gymnasium makes one in the main process as well
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also if the main process is killed
        sys.stderr = open(os.devnull, "w")  # gymnasium would print a traceback of that end
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return LuxEnv(args)


def to_tensors(obs, device):
    """Observation arrays (num_envs, sides, ...) as tensors (num_envs * sides, ...) on the device."""
    return {key: torch.from_numpy(value).flatten(0, 1).to(device) for key, value in obs.items()}


# ==============================================================================================
# Training
# ==============================================================================================

LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")


def leave(status, sentence, main=os.getpid()):
    """End this process and its workers at once: what is worth keeping is on the disk."""
    for process in multiprocessing.active_children():
        process.kill()
    try:
        if os.getpid() == main:  # a signal can reach a worker that does not yet ignore it
            print(sentence, file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def explain(envs, kind, error, trace):
    """The excepthook: a sentence for what user, disk or machine did, a traceback for an error in the code."""
    sentence, lost = str(error) or kind.__name__, []
    if envs is not None and isinstance(error, (EOFError, ConnectionError)):
        time.sleep(0.5)  # until a death is known
        lost = [i for i, process in enumerate(envs.processes) if not process.is_alive()]
    elif envs is not None and isinstance(error, multiprocessing.TimeoutError):
        lost = [i for i, pipe in enumerate(envs.parent_pipes) if not pipe.poll()]
    if lost:
        sentence = f"The process of environment {lost[:9]} died or hangs: rerun it with --resume."
    elif isinstance(error, (OSError, EOFError, MemoryError)) or re.search("out of memory|allocate", sentence):
        sentence += ": see to it (disk, memory, output, or fewer --num-envs), then rerun it with --resume."
    elif not isinstance(error, Refusal) and not kind.__module__.startswith("wandb"):
        sys.__excepthook__(kind, error, trace)
        sentence = "An error in the code; what was trained before is kept."
    leave(1, sentence)


def save(content, path):
    """Write a file of tensors and settings, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # straight to a full disk it hides the cause behind an error of its own
    with open(path + ".tmp", "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    # ---- setup
    args, global_step, checkpoint = tyro.cli(Args, default=SMALL if "--small" in sys.argv else Args()), 0, None
    sys.excepthook = partial(explain, None)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: leave(128 + n, f"Stopped at step {global_step}; rerun it with --resume."))
    script = os.path.basename(__file__).removesuffix(".py")
    run_dir = os.path.join("runs", args.run_name or f"{script}__{args.seed}__{int(time.time())}")
    in_run = partial(os.path.join, run_dir)
    if not re.fullmatch(r"(?!\.+$)[A-Za-z0-9_.+=-]{0,200}", args.run_name) or (args.resume and not args.run_name):
        raise Refusal("--run-name must be up to 200 letters, digits and _.+=-, without a path; --resume needs one.")
    if os.path.exists(run_dir) and not args.resume:
        raise Refusal(f"{run_dir} exists already: choose another --run-name, or go on with --resume.")
    if path := next(filter(os.path.exists, (in_run("checkpoint.pt"), in_run("previous.pt"))), None):  # the newer
        try:
            if zipfile.ZipFile(path).testzip():  # torch does not look at the checksums
                raise ValueError
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise Refusal(f"{path} is damaged (or not yours to read): delete it, the one before is used.") from error
    elif os.path.exists(in_run("progress.csv")) and len(open(in_run("progress.csv")).readlines()) > 2:  # from row 2 on
        raise Refusal(f"{run_dir} has lost its checkpoint.pt: bring it back, or choose another --run-name.")
    if checkpoint is not None:
        if checkpoint["script"] != script:
            raise Refusal(f"{run_dir} was begun by {checkpoint['script']}.py: go on with that.")
        global_step = checkpoint["rows"][-1]["global_step"]
        args = tyro.cli(Args, default=Args(**checkpoint["args"]))  # what is not said stays as it was
        saved = checkpoint["args"] | {"run_name": args.run_name}  # a folder may have been renamed
        changed = [name for name in saved if name not in ("resume", "track") and getattr(args, name) != saved[name]]
        if changed:
            raise Refusal(f"--{changed[0].replace('_', '-')} was another when {run_dir} began: leave it as it was.")
        if checkpoint["iteration"] == args.num_iterations:
            leave(0, f"{run_dir} is finished.")
    check_args(args)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    torch.use_deterministic_algorithms(device.type == "cpu", warn_only=True)  # else threads add gradients in any order
    LuxEnv(args).reset(seed=args.seed)  # fails here if no map can hold the factories
    slow = "The environments' processes did not start in 10 minutes: fewer --num-envs, or rerun it with --resume."
    starting = threading.Timer(600, leave, (1, slow))  # until `cancel`: some waits have no limit of their own
    starting.start()
    modes = {"copy": False, "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    envs = gym.vector.AsyncVectorEnv([lambda: make_worker_env(args)] * args.num_envs, **modes)
    sys.excepthook = partial(explain, envs)
    agent = Agent(args).to(device)
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-8)
    if args.track:
        import wandb

        settings, name = wandb.Settings(init_timeout=30), os.path.basename(run_dir)
        try:
            wandb.init(name=name, config=asdict(args), sync_tensorboard=True, save_code=True, settings=settings)
        finally:  # its own hook prints a traceback
            sys.excepthook = partial(explain, envs)

    # ---- start, or go on
    start = checkpoint or {"iteration": 0, "seconds": 0.0, "rows": [], "recent": [], "best": -np.inf}
    rows, recent, best = start["rows"], deque(start["recent"], maxlen=16), start["best"]  # recent episodes' returns
    if checkpoint is None:
        seeds = np.random.SeedSequence(args.seed).generate_state(args.num_envs)
        envs.reset_async(seed=[int(seed) for seed in seeds])
        next_obs = to_tensors(envs.reset_wait(timeout=60)[0], device)
    else:
        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
        envs.set_attr("game", checkpoint["games"])
        next_obs = {key: value.to(device) for key, value in checkpoint["next_obs"].items()}
    starting.cancel()
    steps = args.num_envs * args.num_steps
    start_time, last_line, num_threads = time.time() - start["seconds"], -np.inf, torch.get_num_threads()

    # ---- storage
    num_slots = args.max_units + args.factories_per_team
    total_groups = (args.num_groups or args.max_units) + args.factories_per_team
    num_rows = args.batch_size // args.num_steps  # environments times sides
    shape = (args.num_steps, num_rows, num_slots)
    obs = {key: value.new_zeros(args.num_steps, *value.shape) for key, value in next_obs.items()}
    del obs["reward"], obs["done"]  # of the step before: they have buffers of their own
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    entity_logprobs, entity_reward, entity_dones = torch.zeros(3, *shape, device=device)
    entity_values = torch.zeros(args.num_steps + 1, num_rows, num_slots, device=device)

    # ---- the run's folder
    os.makedirs(run_dir, exist_ok=True)
    try:
        lock = FileLock(in_run("lock"), timeout=0).acquire()  # held as long as the name lives
    except Timeout:
        raise Refusal(f"Another process is writing to {run_dir}: choose another --run-name.") from None
    if checkpoint is None:
        shutil.copy(__file__, in_run("script.py"))  # the tools play the model with it
        with open(in_run("args.json"), "w") as file:
            json.dump(asdict(args), file, indent=2)
    print(f"{run_dir}: {sum(p.numel() for p in agent.parameters()):,} parameters on {device}, ", end="")
    print(f"steps {global_step:,} to {args.num_iterations * steps:,} in rollouts of {steps:,}", flush=True)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1)

    for iteration in range(start["iteration"] + 1, args.num_iterations + 1):
        frac = 1.0 - (iteration - 1.0) / args.num_iterations
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = frac * args.learning_rate
        ent_coef = frac * args.ent_coef if args.anneal_ent else args.ent_coef

        # ---- rollout
        rollout_start = time.time()
        torch.set_num_threads(max(1, num_threads // 2))  # the environments' processes need cores as well
        episodes = {name: [] for name in EPISODE_STATS}
        for step in range(args.num_steps):
            for key, buffer in obs.items():
                buffer[step] = next_obs[key]
            with torch.no_grad():
                distribution = agent.get_distribution(next_obs)
                actions[step] = distribution.sample()
                entity_logprobs[step] = distribution.log_prob(actions[step])
                envs.step_async(actions[step].cpu().numpy().reshape(envs.action_space.shape))
                # meanwhile the environments step: on a CPU next_obs is their own memory, so the value is of the buffers
                entity_values[step] = agent.get_value({key: buffer[step] for key, buffer in obs.items()})
            next_obs, _, terminations, _, infos = envs.step_wait(timeout=60)
            last = {key: next_obs[key].copy() for key in ("reward", "done")}
            for i in np.flatnonzero(terminations):
                for key in last:  # the reset in the same step has overwritten these
                    last[key][i] = infos["final_obs"][i][key]
                for name in EPISODE_STATS:
                    episodes[name].append(infos["final_info"]["episode"][name][i])
            last, next_obs = to_tensors(last, device), to_tensors(next_obs, device)
            entity_reward[step], entity_dones[step] = last["reward"], last["done"]
        with torch.no_grad():
            entity_values[args.num_steps] = agent.get_value(next_obs)
        torch.set_num_threads(num_threads)

        # ---- trajectories
        update_start = time.time()
        entity_mask = obs["kind"] != EMPTY  # (num_steps, num_rows, num_slots)
        group = group_index(obs["unit_id"], args.max_units, args.num_groups)
        trajectories = separate_trajectories(
            entity_reward, entity_dones, entity_values, group, entity_mask, obs["action_mask"], total_groups
        )
        advantages = compute_gae(trajectories, args.gamma, args.gae_lambda)  # (num_steps, num_rows, total_groups)
        batch = {  # a row is one map with all its cells: of a (step, environment, side)
            **obs,
            "actions": actions,
            "group": group,
            "entity_mask": entity_mask,
            "logprobs": group_sum(entity_logprobs, group, entity_mask, total_groups),
            "advantages": advantages,
            "returns": advantages + trajectories.values,
            "values": trajectories.values,
            "active": trajectories.active,
            "choice": trajectories.choice,
        }
        batch = {key: value.flatten(0, 1) for key, value in batch.items()}  # (batch_size, ...)

        # ---- update
        losses = []  # of every minibatch
        for _ in range(args.update_epochs):
            b_inds = torch.randperm(args.batch_size, device=device)
            for mb_inds in b_inds.split(args.batch_size // args.num_minibatches):
                mb = {key: value[mb_inds] for key, value in batch.items()}  # (minibatch size, ...)
                distribution = agent.get_distribution(mb)
                members = (mb["group"], mb["entity_mask"], total_groups)
                newlogprob = group_sum(distribution.log_prob(mb["actions"]), *members)
                entropy = group_sum(distribution.entropy(), *members)
                newvalue = group_sum(agent.get_value(mb), *members)
                logratio = newlogprob - mb["logprobs"]
                ratio = logratio.exp()
                pg_loss = policy_loss(ratio, normalize(mb["advantages"], mb["choice"]), mb["choice"], args.clip_coef)
                v_clip = args.clip_coef if args.clip_vloss else None
                v_loss = value_loss(newvalue, mb["values"], mb["returns"], mb["active"], v_clip)
                entropy_loss = masked_mean(entropy, mb["choice"])
                loss = pg_loss - ent_coef * entropy_loss + args.vf_coef * v_loss
                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

                with torch.no_grad():
                    approx_kl = masked_mean((ratio - 1) - logratio, mb["choice"])
                    clipfrac = masked_mean(((ratio - 1.0).abs() > args.clip_coef).float(), mb["choice"])
                losses.append(torch.stack((pg_loss, v_loss, entropy_loss, approx_kl, clipfrac, grad_norm)).detach())

        # ---- logging
        losses = torch.stack(losses)  # (minibatches, LOSSES)
        weights = torch.stack([parameter.abs().max() for parameter in agent.parameters()])
        wrong = [name for now in losses.tolist() for name, x in zip(LOSSES, now, strict=True) if not np.isfinite(x)]
        wrong += [] if weights.isfinite().all() else ["largest weight"]
        if wrong:  # nothing of this iteration is saved
            raise Refusal(f"The {wrong[0]} is not finite in iteration {iteration}: lower --learning-rate, begin anew.")
        full = [length >= EPISODE_STEPS for length in episodes["episodic_length"]]
        recent.extend(map(float, episodes["episodic_return"]))
        steps_done, seconds = iteration * steps, time.time() - start_time
        row = {"global_step": steps_done, "charts/seconds": seconds, "charts/SPS": steps_done / seconds}
        row["charts/rollout_seconds"] = update_start - rollout_start
        row["charts/update_seconds"] = time.time() - update_start
        row["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        row["charts/episodes"] = len(full)  # that ended in this iteration; their means follow
        for name, values in {**episodes, "full_episodes": full}.items():
            row[f"charts/{name}"] = float(np.mean(values)) if values else None  # blank where no episode ended
        row["charts/active_cells"] = (batch["active"].sum() / args.batch_size).item()
        row |= {f"losses/{name}": value for name, value in zip(LOSSES, losses.mean(0).tolist(), strict=True)}
        errors = (batch["returns"] - batch["values"])[batch["active"]]
        row["losses/explained_variance"] = (1 - errors.var() / batch["returns"][batch["active"]].var()).item()
        for name, value in row.items():
            if value is not None:
                writer.add_scalar(name, value, steps_done)
        writer.flush()
        if seconds - last_line > 30 or iteration == args.num_iterations:
            last_line, left = seconds, seconds / iteration * (args.num_iterations - iteration) / 60
            line = f"step {steps_done:,}, {row['charts/SPS']:.0f} steps/s, {left:.0f} minutes left"
            known = [past for past in (*rows, row) if past["charts/episodes"]][-1:]  # the newest, if any
            for name in ("episodic_return", "episodic_length", "ice_transferred"):
                line += "".join(f", {name} {past[f'charts/{name}']:.1f}" for past in known)
            print(line, flush=True)

        # ---- saving, the checkpoint last
        rows.append(row)
        with open(in_run("progress.csv.tmp"), "w", newline="") as file:
            csv_writer = csv.DictWriter(file, row.keys())
            csv_writer.writeheader()
            csv_writer.writerows(rows)
        os.replace(in_run("progress.csv.tmp"), in_run("progress.csv"))
        model = {"script": script, "args": asdict(args), "model": agent.state_dict()}
        save(model, in_run("model.pt"))
        if len(recent) == recent.maxlen and np.mean(recent) > best:
            best = float(np.mean(recent))
            save(model, in_run("best.pt"))
        envs.call_async("game")
        state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "games": envs.call_wait(timeout=60)}
        state |= {"cuda_rng": torch.cuda.get_rng_state_all()[:1], "iteration": iteration, "seconds": seconds}
        state |= {"next_obs": next_obs, "rows": rows, "recent": list(recent), "best": best}
        if os.path.exists(in_run("checkpoint.pt")):
            os.replace(in_run("checkpoint.pt"), in_run("previous.pt"))
        save(model | state, in_run("checkpoint.pt"))
        global_step = steps_done  # what a signal says is kept

    # ---- the end
    print(f"{run_dir} is finished; play its policy with tools/evaluate.py {run_dir}", flush=True)
    for process in envs.processes:  # no need to wait for them
        process.kill()
    writer.close()
