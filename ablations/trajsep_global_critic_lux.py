"""Trajectory separation with a global critic on Lux AI Season 2 (Fig. 8), in one file.

Every entity keeps the trajectory, reward, done and ratio of its own, but the value of the whole map
is the baseline of every cell, regressed on each cell's own return. It cannot tell who the return is
of. `ppo_trajsep_lux.py` is the parent; lines that say "Differs" or "Added" mark what is not the same.

GPU, the paper's setting:   python ablations/trajsep_global_critic_lux.py
CPU, a run of minutes:      python ablations/trajsep_global_critic_lux.py --map-size 32 \
                                --factories-per-team 2 --max-units 30 --channels 24 --total-timesteps 24576
"""

# Parent: ppo_trajsep_lux.py

import csv
import json
import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from luxai_s2 import actions as lux
from luxai_s2.config import EnvConfig
from luxai_s2.env import LuxAI_S2
from luxai_s2.factory import Factory
from luxai_s2.map.position import Position
from luxai_s2.state import State
from luxai_s2.utils.utils import is_day
from scipy.ndimage import gaussian_filter, label
from torch.distributions.categorical import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ==============================================================================================
# Settings
# ==============================================================================================


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    run_name: str = ""
    """folder under runs/ for this run's files (default: exp_name, seed and time)"""
    seed: int = 1
    """seed of the run: weights, sampling and training maps"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = True
    """if toggled, the GPU is used where there is one"""
    bf16: bool = False
    """if toggled, the convolutions run under bfloat16 autocast"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases"""
    wandb_project_name: str = "trajsep-lux"
    """the wandb project's name"""
    wandb_entity: str | None = None
    """the entity (team) of the wandb project"""
    save_model: bool = True
    """whether to save weights and settings to runs/<run_name>/model.pt, after every iteration"""
    evaluate: str | None = None
    """play a saved model.pt instead of training; its settings become the defaults of all other flags"""
    eval_episodes: int = 16
    """how many evaluation maps `--evaluate` plays, once sampling actions and once greedily"""

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
    """to a unit, per ice it digs"""
    reward_ice_delivered: float = 0.0005
    """to a unit, per ice it transfers into an own factory"""
    reward_ice_received: float = 0.0005
    """to a factory, per ice that units transfer into it"""
    reward_rubble_cleared: float = 0.001
    """to a unit, per rubble it digs off a tile with ice"""
    reward_factory_alive: float = 0.001
    """to a factory, per step it survives"""
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
    num_blocks: int = 1
    """residual blocks in the actor and in the critic"""
    norm: Literal["none", "spectral", "poster"] = "none"
    """none; spectral norm of all convolutions; or the poster's: spectral norm and batch norm"""

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
    """minibatches per epoch; a minibatch is a set of maps with all their trajectories"""
    update_epochs: int = 3
    """the K epochs to update the policy"""
    norm_adv: bool = True
    """toggle advantage normalization, over the cells of the policy loss in each minibatch"""
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
    target_kl: float | None = None
    """the target KL divergence threshold"""

    # To be filled in at run time
    batch_size: tyro.conf.Suppress[int] = 0
    """maps per rollout"""
    minibatch_size: tyro.conf.Suppress[int] = 0
    """maps per minibatch"""
    num_iterations: tyro.conf.Suppress[int] = 0
    """the number of iterations"""


RANGES = {  # what each number may be, ends included
    name: (low, high)
    for names, low, high in (
        ("num_steps num_minibatches update_epochs total_timesteps", 1, 10**9),
        ("max_units num_envs", 1, 1000),
        ("num_groups num_blocks", 0, 1000),
        ("channels", 4, 4096),  # squeeze-and-excitation keeps a quarter of them
        ("seed", 0, 2**32 - 1),
        ("learning_rate clip_coef max_grad_norm target_kl", 1e-12, 10**6),
        ("ent_coef vf_coef", 0, 100),
        ("gamma gae_lambda", 0, 1),
        ("reward_ice_dug reward_ice_delivered reward_ice_received reward_rubble_cleared", -1000, 1000),
        ("reward_factory_alive reward_unit_lost reward_factory_lost", -1000, 1000),
        ("map_size", 24, 64),
        ("factories_per_team", 1, 10),
        ("eval_episodes", 1, 100_000),
    )
    for name in names.split()
}


def check_args(args):
    """Fill in the run-time fields of `args`; ValueError with one sentence on a flag out of range."""
    for name, (low, high) in RANGES.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and not low <= value <= high:
            raise ValueError(f"{flag} must be between {low} and {high}, got {value}.")
    steps = args.num_envs * args.num_steps
    args.batch_size = steps * (2 if args.opponent == "self" else 1)
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_iterations = args.total_timesteps // steps
    if args.batch_size % args.num_minibatches:
        raise ValueError(
            f"--num-minibatches must divide the rollout's {args.batch_size} maps, got {args.num_minibatches}."
        )
    if args.num_iterations < 1:
        raise ValueError(f"--total-timesteps must hold one rollout of {steps} steps, got {args.total_timesteps}.")


# ==============================================================================================
# The Lux environment
# ==============================================================================================

EPISODE_STEPS = 1000
NUM_PLANES = 18
NUM_EVAL_MAPS = 100_000  # map seeds below this are for evaluation; training draws above
MAX_MAP_DRAWS = 100
CYCLE_LENGTH = 50  # steps of a day and a night
EPISODE_STATS = (
    *("episodic_return", "episodic_length", "ice_transferred", "ice_dug", "factories_alive"),
    *("factory_count", "units_built", "units_lost", "friendly_losses"),
)
PLAYERS = ("player_0", "player_1")

EMPTY, LIGHT, HEAVY, FACTORY = range(4)  # kind of entity in a slot
NO_OP, UP, RIGHT, DOWN, LEFT, DIG, DELIVER, PICK_UP = range(8)  # unit actions
BUILD_LIGHT, BUILD_HEAVY, WATER = 1, 2, 3  # factory actions, beside NO_OP
NUM_ACTIONS = 8
DELTAS = np.array([[0, 0], [0, -1], [1, 0], [0, 1], [-1, 0]])  # stay, up, right, down, left
STEPS = DELTAS.tolist()
RING = np.array(  # from a factory's centre to the 12 tiles that touch it, where lichen starts
    [(d, side) for d in (-1, 0, 1) for side in (-2, 2)] + [(side, d) for d in (-1, 0, 1) for side in (-2, 2)]
)
RING_AND_AROUND = RING[:, None] + DELTAS  # (12, 5, 2): those tiles, and their neighbours
HUNDREDTHS = (np.arange(101) / 100).astype(np.float16)  # a look-up is several times as fast as the conversion
FORBIDDEN = 10**6  # more power than any unit has
ICE, POWER = 0, 4  # the engine's numbers of resources
ORDERS = np.array(  # the engine's type, direction and resource for each unit action
    [(0, 0, 0), (0, UP, 0), (0, RIGHT, 0), (0, DOWN, 0), (0, LEFT, 0), (3, 0, 0), (1, 0, ICE), (2, 0, POWER)]
)
REPEATED = {tuple(ORDERS[act, :2].tolist()): act for act in range(UP, DIG + 1)}  # what such an order goes on with

ROBOTS = EnvConfig().ROBOTS


def _by_kind(field):
    return np.array([0, getattr(ROBOTS["LIGHT"], field), getattr(ROBOTS["HEAVY"], field)])


METAL_COST, POWER_COST = _by_kind("METAL_COST"), _by_kind("POWER_COST")
CARGO_SPACE, BATTERY_CAPACITY = _by_kind("CARGO_SPACE"), _by_kind("BATTERY_CAPACITY")
MOVE_COST, RUBBLE_MOVEMENT_COST = _by_kind("MOVE_COST"), _by_kind("RUBBLE_MOVEMENT_COST")
DIG_COST, QUEUE_COST = _by_kind("DIG_COST"), _by_kind("ACTION_QUEUE_POWER_COST")


class MapError(RuntimeError):
    """No map could be drawn that has ice and room for all factories."""


# ---- the engine: stock luxai_s2 without the work that a trainer does not need


# Tiles, and their neighbours on one side: the map without one edge and without the opposite edge
SIDES = [(np.s_[1:], np.s_[:-1]), (np.s_[:-1], np.s_[1:]), (np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :-1], np.s_[:, 1:])]


class Ground:
    """The map as it was in the middle of a step, and where lichen would grow on it.

    `owner` is the factory under a tile or whose lichen is on it, -1 for nobody (`bordered` has a
    border of -1 around it); `connected` tells which lichen reaches its own factory, for all at once.
    """

    def __init__(self, state, min_lichen_to_spread):
        board, strains = state.board, state.board.lichen_strains
        self.forbidden = (board.rubble > 0) | (board.factory_occupancy_map != -1) | (board.ice > 0) | (board.ore > 0)
        self.bordered = np.full(np.add(strains.shape, 2), -1)
        self.owner = self.bordered[1:-1, 1:-1]
        self.owner[:] = np.where(board.factory_occupancy_map != -1, board.factory_occupancy_map, strains)
        self.empty, self.rich = (strains == -1) & ~self.forbidden, board.lichen >= min_lichen_to_spread
        self.connected, lichen = np.zeros_like(self.forbidden), (strains != -1) & ~self.forbidden
        if lichen.any():
            roots, touching = np.zeros_like(lichen), False
            for here, there in SIDES:
                roots[here] |= strains[here] == board.factory_occupancy_map[there]
                touching |= ((strains[here] != strains[there]) & lichen[here] & lichen[there]).any()
            # lichen of two factories that touches must not be labelled as one
            for mask in [lichen & (strains == strain) for strain in np.unique(strains)] if touching else [lichen]:
                labels, n = label(mask)
                hit = np.zeros(n + 1, dtype=bool)
                hit[labels[roots & mask]] = True
                self.connected |= hit[labels]

    def grows(self, factory):
        """The tiles that grow if the factory waters: list of (x, y)."""
        own = self.connected & (self.owner == factory.num_id)
        reached = own.copy()
        reached[factory.ring] |= ~self.forbidden[factory.ring]
        spreads = reached & self.rich
        if spreads.any():
            for here, there in SIDES:
                reached[here] |= spreads[there] & self.empty[here]
        x, y = reached.nonzero()
        around = self.bordered[x[:, None] + DELTAS[1:, 0] + 1, y[:, None] + DELTAS[1:, 1] + 1]  # (n, 4)
        grows = own[x, y] | ((around == -1) | (around == factory.num_id)).all(1)
        return list(zip(x[grows].tolist(), y[grows].tolist(), strict=True))


class LazyFactory(Factory):
    """Asks where its lichen grows only when that matters: where lichen is, or water is being spent.

    The stock engine floods the map from every factory in every step. It judges the cost of watering
    by the step before, so the map of that step has to be kept.
    """

    ground, found = None, ()

    @property
    def grow_lichen_positions(self):
        if self.found is None:
            self.found = self.ground.grows(self)
        return self.found


class LiveState(State):
    """Fills the observation dictionary with live references; of an action queue, only with its head."""

    def get_obs(self):
        layers = ("rubble", "ore", "ice", "lichen", "lichen_strains", "valid_spawns_mask", "factories_per_team")
        return {
            "units": {
                player: {unit_id: self.live_unit(unit) for unit_id, unit in units.items()}
                for player, units in self.units.items()
            },
            "teams": self.generate_team_data(self.teams),
            "factories": self.generate_factory_data(self.factories),
            "board": {layer: getattr(self.board, layer) for layer in layers},
            "real_env_steps": self.real_env_steps,
            "global_id": self.global_id,
        }

    def live_unit(self, unit):
        return {
            "unit_id": unit.unit_id,
            "team_id": unit.team_id,
            "unit_type": unit.unit_type._name_,
            "pos": (unit.pos.x, unit.pos.y),
            "power": unit.power,
            "cargo": unit.cargo.__dict__,
            "action_queue": [
                (0, action.move_dir, 0, 0, action.repeat, action.n)
                if action.act_type == "move"
                else action.state_dict()
                for action in unit.action_queue[:1]
            ],
        }


class FastPosition(Position):
    """Python's integers, because numpy's are slow one by one."""

    x = y = None
    pos = property(lambda self: np.array((self.x, self.y)))

    def __init__(self, x, y):
        self.x, self.y = x, y


def make_action(kind, direction, resource, amount, repeat, n):
    """One row of a unit's queue as the engine's object."""
    types = "Move", "Transfer", "Pickup", "Dig", "SelfDestruct", "Recharge"
    own = (direction, 1), (direction, resource, amount), (resource, amount), (), (), (amount,)
    return getattr(lux, types[kind] + "Action")(*own[kind], repeat, n)


class FastLux(LuxAI_S2):
    """The engine: the same state after every step, faster, with meters on digging and delivering.

    The meters note for every step which unit dug, cleared and delivered how much. Comparing cargo
    before and after a step would mislead: a unit that is destroyed in the move phase may still have
    delivered, and factories refine ice in the step in which they receive it.
    """

    def __init__(self, **config):
        super().__init__(validate_action_space=False, verbose=0, **config)

    def reset(self, seed=None, options=None):
        result = super().reset(seed, options)
        self.state.__class__ = LiveState
        self.built = dict.fromkeys(PLAYERS, 0)  # units, so far
        return result

    def step(self, actions):
        """One step of the game, in the engine's order; actions must be well-formed, and rewards are left out."""
        state, board, cfg = self.state, self.state.board, self.env_cfg
        names = ("ice_dug", "ice_delivered", "ice_received", "rubble_cleared")
        self.meters = {name: defaultdict(int) for name in names}  # by entity id
        self.destroyed = []  # (player, tile) of the units that died
        if state.real_env_steps < 0:  # bids and placements
            return super().step(actions)

        # new orders: a unit pays for a new queue, or keeps the old one
        wanted = defaultdict(list)  # by type of action: (unit or factory, action)
        for player, orders in actions.items():
            units, factories = state.units[player], state.factories[player]
            for name, order in orders.items():
                if name in factories:
                    factories[name].action_queue.append(lux.format_factory_action(order))
                elif units[name].power >= units[name].unit_cfg.ACTION_QUEUE_POWER_COST:
                    units[name].power -= units[name].unit_cfg.ACTION_QUEUE_POWER_COST
                    units[name].action_queue = [make_action(*row) for row in order.tolist()]
            for unit in units.values():
                if unit.action_queue:
                    wanted[unit.action_queue[0].act_type].append((unit, unit.action_queue[0]))
            for factory in factories.values():
                if factory.action_queue:
                    action = factory.action_queue.pop(0)
                    wanted[action.act_type].append((factory, action))

        # what they can do, and the phases in which they do it
        moves = self.possible_moves(wanted.pop("move", ()))
        wanted = lux.validate_actions(cfg, state, wanted)
        self._handle_dig_actions(wanted)
        self._handle_self_destruct_actions(wanted)
        self._handle_factory_build_actions(wanted)
        self.move(moves)
        self._handle_recharge_actions(wanted)
        ground = Ground(state, cfg.MIN_LICHEN_TO_SPREAD)
        factories = [factory for team in state.factories.values() for factory in team.values()]
        for factory in factories:
            factory.ground, factory.found = ground, None
        self._handle_factory_water_actions(wanted)
        self._handle_transfer_actions(wanted)
        self._handle_pickup_actions(wanted)

        # lichen dries, factories refine and drink, the sun shines
        board.lichen = (board.lichen - 1).clip(0, cfg.MAX_LICHEN_PER_TILE)
        board.lichen_strains[board.lichen == 0] = -1
        tiles = np.bincount(ground.owner[ground.connected], minlength=state.global_id).tolist()  # of lichen
        for factory in factories:
            factory.refine_step(cfg)
            factory.cargo.water -= cfg.FACTORY_WATER_CONSUMPTION
            factory.power += cfg.FACTORY_CHARGE + tiles[factory.num_id] * cfg.POWER_PER_CONNECTED_LICHEN_TILE
            if factory.cargo.water < 0:
                self.destroy_factory(factory)
        if is_day(cfg, state.real_env_steps):
            for units in state.units.values():
                for unit in units.values():
                    unit.power = min(unit.power + unit.unit_cfg.CHARGE, unit.battery_capacity)
        board.rubble[board.factory_occupancy_map != -1] = 0

        self.env_steps, state.env_steps = self.env_steps + 1, state.env_steps + 1
        over = not all(state.factories.values()) or state.real_env_steps >= cfg.max_episode_length
        self.agents = [] if over else self.agents
        return dict.fromkeys(PLAYERS, state.get_obs()), {}, dict.fromkeys(PLAYERS, over), {}, {}

    def possible_moves(self, wanted):
        """Those of the wanted moves that can be made: [(unit, action, x, y)]."""
        board, moves = self.state.board, []
        for unit, action in wanted:
            dx, dy = STEPS[action.move_dir]
            x, y = int(unit.pos.x) + dx, int(unit.pos.y) + dy
            if 0 <= x < board.width and 0 <= y < board.height:
                owner = board.factory_occupancy_map[x, y]
                action.power_cost = unit.move_power_cost(board.rubble.item(x, y)) if action.move_dir else 0
                if action.power_cost <= unit.power and (owner == -1 or owner in unit.team.factory_strains):
                    moves.append((unit, action, x, y))
        return moves

    def move(self, moves):
        """Make the moves; where units meet on a tile, the engine says who survives."""
        tiles, movers = self.state.board.units_map, [move for move in moves if move[1].move_dir]
        left = {f"{unit.pos.x},{unit.pos.y}" for unit, *_ in movers}
        entered = {f"{x},{y}": unit for unit, _, x, y in movers}
        meet = len(entered) < len(movers) or any(tile in tiles and tile not in left for tile in entered)
        if meet or any(len(units) > 1 for units in tiles.values()):
            return self._handle_movement_actions({"move": [(unit, action) for unit, action, _, _ in moves]})
        for tile in left:
            del tiles[tile]
        tiles.update((tile, [unit]) for tile, unit in entered.items())
        for unit, action, x, y in moves:
            if action.move_dir:
                unit.pos = FastPosition(x, y)
                unit.power -= action.power_cost
            unit.repeat_action(action)

    def add_factory(self, team, pos):
        factory = super().add_factory(team, pos)
        if factory is not None:
            factory.__class__ = LazyFactory
            ring = factory.pos.pos + RING
            factory.ring = tuple(ring[((ring >= 0) & (ring < self.env_cfg.map_size)).all(1)].T)
        return factory

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

    def add_unit(self, team, unit_type, pos):
        self.built[team.agent] += 1
        unit = super().add_unit(team, unit_type, pos)
        unit.pos = FastPosition(*pos.tolist())
        return unit

    def destroy_unit(self, unit):
        self.destroyed.append((unit.team.agent, tuple(unit.pos.pos)))
        super().destroy_unit(unit)


# ---- placement


def placement_score(obs, player):
    """How good each tile is as a factory's centre: float (map_size, map_size), higher is better.

    A sum of Gaussian filters (poster; the terms are ours), each scaled so that one tile counts its
    weight at distance 0: ice with little rubble on it at the factory's edge, or else not far off;
    ground without rubble; own factories, which would share the ice, count against it.
    """
    board = obs["board"]
    clear = 1 - board["rubble"] / 100
    ice = board["ice"] * (0.3 + 0.7 * clear)
    own = np.zeros(clear.shape)
    for factory in obs["factories"].get(player, {}).values():
        own[tuple(factory["pos"])] = 1
    filters = ((ice, 1.5, 1.0), (ice, 6.0, 0.2), (clear, 3.0, 0.01), (own, 4.0, -0.5))  # of what, width, weight
    return sum(
        weight * 2 * np.pi * sigma**2 * gaussian_filter(layer, sigma, mode="constant")
        for layer, sigma, weight in filters
    )


# ---- observation


def with_margin(layer, outside):
    """A layer (size, size) with a margin of its own width that holds `outside`, flat: (4 * size * size,).

    The margin is on the right and below. It also serves as the one on the left, where it is the end
    of the row before, and above, where numbers are negative and count from the end.
    """
    size = len(layer)
    padded = np.full((2, size, 2, size), outside, dtype=np.int32)
    padded[0, :, 0] = layer
    return padded.ravel()


@lru_cache
def factory_layers(own, enemy, size):
    """Layers that stay as they are until a factory falls, from the factories' centres; read-only.

    float16 (3, size, size): steps to the nearest own factory (at most 20, in tens), own factories,
    enemy factories. Flat with a margin: the number of the own factory on a tile, -1 for none. And the
    numbers of the tiles that are under enemy factories.
    """
    away = np.abs(np.arange(size) - np.array(own + enemy, dtype=np.int64).reshape(-1, 2, 1))  # (f, 2, size)
    x, y = np.maximum(away - 1, 0).swapaxes(0, 1)
    steps = x[:, :, None] + y[:, None]  # (f, size, size)
    home, foe = steps[: len(own)].min(0, initial=20), (steps[len(own) :] == 0).any(0)
    number = np.where(steps[: len(own)] == 0, np.arange(len(own))[:, None, None], -1).max(0, initial=-1)
    planes = np.stack((home / 10, home == 0, foe)).astype(np.float16)
    return planes, with_margin(number, -1), np.flatnonzero(with_margin(foe, False))


class View:
    """One player's n units and f factories, read off the observation that the engine hands to players.

    `ids` holds the entity id of every slot, None where empty: `max_units` units, then factories.
    `previous` is the player's View one step earlier.
    """

    def __init__(self, obs, player, ids, max_units, previous=None):
        self.player, self.enemy = player, PLAYERS[player == PLAYERS[0]]
        self.obs, self.board, self.ids, self.max_units = obs, obs["board"], ids, max_units
        self.size = len(self.board["rubble"])

        rows = []
        for slot, unit_id in enumerate(ids[:max_units]):
            if unit_id is not None:
                unit = obs["units"][player][unit_id]
                kind, queue = LIGHT if unit["unit_type"] == "LIGHT" else HEAVY, unit["action_queue"]
                repeated = REPEATED.get(tuple(queue[0][:2]), -1) if len(queue) else NO_OP
                number, power, ice = int(unit_id.split("_")[1]), unit["power"], unit["cargo"]["ice"]
                rows.append((slot, number, kind, power, ice, repeated, *unit["pos"]))
        rows = np.array(rows, dtype=np.int64).reshape(-1, 8)  # (n, 8)
        self.slot, self.number, self.kind, self.power, self.ice, self.queued = rows[:, :6].T  # each (n,)
        self.pos = rows[:, 6:]  # (n, 2)

        strains = np.bincount(self.board["lichen_strains"].ravel() + 1, minlength=obs["global_id"] + 1)
        rows, self.lichen_tiles = [], {}
        for slot, factory_id in enumerate(ids[max_units:], start=max_units):
            if factory_id is not None:
                factory = obs["factories"][player][factory_id]
                strain, cargo = factory["strain_id"], factory["cargo"]
                now = self.lichen_tiles[factory_id] = strains[strain + 1]
                most = now if previous is None else max(now, previous.lichen_tiles[factory_id])  # of two steps
                stock = (factory["power"], cargo["water"], cargo["metal"], cargo["ice"])
                rows.append((slot, strain, most, *factory["pos"], *stock))
        rows = np.array(rows, dtype=np.int64).reshape(-1, 9)  # (f, 9)
        self.factory_slot, self.strain, self.most_lichen = rows[:, :3].T  # each (f,)
        self.factory_pos, self.factory_stock = rows[:, 3:5], rows[:, 5:]  # (f, 2), (f, 4)

        own, enemy = self.factory_pos.tolist(), [factory["pos"] for factory in obs["factories"][self.enemy].values()]
        centres = tuple(map(tuple, own)), tuple(map(tuple, enemy))
        self.factory_planes, self.owner, forbidden = factory_layers(*centres, self.size)
        own_strain = np.zeros(obs["global_id"] + 1, dtype=bool)
        own_strain[np.array(obs["teams"][player]["factory_strains"]) + 1] = True
        self.own_lichen = own_strain[self.board["lichen_strains"] + 1]
        # tiles by their numbers in flat layers with a margin, where a step in one direction is one addition
        self.flat = np.array([2 * self.size, 1])
        self.tile, self.factory_tile = self.pos @ self.flat, self.factory_pos @ self.flat
        self.steps = np.append(DELTAS @ self.flat, [0, 0, 0])  # what each unit action adds to the unit's tile
        self.rubble = with_margin(self.board["rubble"], FORBIDDEN)
        self.rubble[forbidden] = FORBIDDEN
        # ice and ore stay, so this layer does
        self.barren = previous.barren if previous else with_margin(self.board["ice"] + self.board["ore"], 1)
        # the number of the own factory under (0), above, right, below or left of each unit, -1 for none: (n, 5)
        self.touching = self.owner[self.tile[:, None] + self.steps[: LEFT + 1]]

    def step_costs(self, units, steps):
        """Power that units (n,) need to step onto the tiles that lie `steps` (n, m) from theirs: (n, m)."""
        kind, rubble = self.kind[units, None], self.rubble[self.tile[units, None] + steps]
        return np.floor(MOVE_COST[kind] + RUBBLE_MOVEMENT_COST[kind] * rubble)

    def reach(self, units, directions, power):
        """How many steps in their directions the power of units lasts; all arguments (n,)."""
        ahead = self.steps[directions, None] * np.arange(1, self.size)  # (n, map_size - 1)
        return (self.step_costs(units, ahead).cumsum(1) <= power[:, None]).sum(1)

    def can_grow(self):
        """Whether lichen can grow next to each factory: bool (f,)."""
        ring = self.factory_tile[:, None, None] + RING_AND_AROUND @ self.flat  # (f, 12, 5)
        first, strain = ring[..., 0], self.strain[:, None, None]
        bare = (self.rubble[first] == 0) & (self.barren[first] == 0) & (self.owner[first] < 0)
        strains = with_margin(self.board["lichen_strains"], -1)[ring]
        friendly = ((strains == -1) | (strains == strain))[..., 1:].all(-1) | (strains == strain)[..., 0]
        return (bare & friendly).any(1)

    def water_bound(self):
        """An upper bound of what it costs each factory to water its lichen: (f,).

        Lichen can grow on the 12 tiles around a factory, on the factory's lichen and beside that.
        The engine checks this step's cost and, by an oversight, that of the step before as well.
        """
        return np.ceil((len(RING) + 5 * self.most_lichen) / 10)


def make_planes(view):
    """The map as the network sees it: float16 (18, map_size, map_size), scaled to about [0, 1].

    0 rubble, 1 ice, 2 steps to the nearest own factory (in tens), 3 own lichen, 4 enemy lichen,
    5 own factory, 6 enemy factory, 7-10 power, water, metal and ice of own factories (on their nine
    tiles), 11 own light unit, 12 own heavy unit, 13 enemy unit (light 0.5, heavy 1), 14 own unit's
    power, 15 own unit's ice, 16 time of day, 17 time of the episode. Power enters as a square root,
    because what matters is how many more actions the last of it pays for. No plane holds a team
    total, which would leak the whole map into a local critic.
    """
    board, clock = view.board, view.obs["real_env_steps"]
    planes = np.zeros((NUM_PLANES, view.size, view.size), dtype=np.float16)
    planes[0] = HUNDREDTHS[board["rubble"]]
    planes[1] = HUNDREDTHS[board["ice"] * 100]
    planes[2], planes[5], planes[6] = view.factory_planes
    planes[3] = HUNDREDTHS[board["lichen"] * view.own_lichen]
    planes[4] = HUNDREDTHS[board["lichen"] * ~view.own_lichen]
    stock = np.minimum(view.factory_stock / (3000, 300, 150, 1000), 2)  # power, water, metal, ice
    stock[:, 0] = np.sqrt(stock[:, 0])
    for (x, y), values in zip(view.factory_pos, stock, strict=True):
        planes[7:11, x - 1 : x + 2, y - 1 : y + 2] = values[:, None, None]
    x, y = view.pos.T
    planes[10 + view.kind, x, y] = 1
    for unit in view.obs["units"][view.enemy].values():
        planes[13][tuple(unit["pos"])] = 0.5 if unit["unit_type"] == "LIGHT" else 1
    planes[14, x, y] = np.sqrt(view.power / BATTERY_CAPACITY[view.kind])
    planes[15, x, y] = view.ice / CARGO_SPACE[view.kind]
    planes[16], planes[17] = clock % CYCLE_LENGTH / CYCLE_LENGTH, clock / EPISODE_STEPS
    return planes


# ---- masks


def action_masks(view):
    """Which actions the engine would carry out and make sense: bool (num_slots, NUM_ACTIONS).

    A unit that goes on with what its queue repeats pays no power for the queue; any other action
    needs the power of the queue update on top. NO_OP is always legal, also in empty slots.
    """
    board, kind, (x, y) = view.board, view.kind, view.pos.T
    update = QUEUE_COST[kind, None] * (np.arange(NUM_ACTIONS) != view.queued[:, None])
    left = view.power[:, None] - update  # (n, NUM_ACTIONS) power left for the action itself
    legal = np.zeros((len(kind), NUM_ACTIONS), dtype=bool)
    legal[:, UP : LEFT + 1] = left[:, UP : LEFT + 1] >= view.step_costs(slice(None), view.steps[UP : LEFT + 1])
    obstacle = (board["rubble"][x, y] > 0) | ((board["lichen"][x, y] > 0) & ~view.own_lichen[x, y])
    ice_fits = (board["ice"][x, y] > 0) & (view.ice < CARGO_SPACE[kind])
    legal[:, DIG] = (obstacle | ice_fits) & (view.touching[:, 0] < 0) & (left[:, DIG] >= DIG_COST[kind])
    legal[:, DELIVER] = (view.touching >= 0).any(1) & (view.ice > 0) & (left[:, DELIVER] >= 0)
    power, water, metal, _ = view.factory_stock.T
    power_here = (view.touching[:, :1] == np.flatnonzero(power > 0)).any(1)
    legal[:, PICK_UP] = (view.power < BATTERY_CAPACITY[kind]) & power_here & (left[:, PICK_UP] >= 0)

    mask = np.zeros((len(view.ids), NUM_ACTIONS), dtype=bool)
    mask[view.slot] = legal
    mask[:, NO_OP] = True
    centre_free = (view.factory_tile[:, None] != view.tile).all(1, keepdims=True)  # no enemy can be there
    can_build = centre_free & (metal[:, None] >= METAL_COST[LIGHT:]) & (power[:, None] >= POWER_COST[LIGHT:])  # (f, 2)
    # whoever can build a heavy can build a light
    in_time = can_build[:, :1].cumsum(0) <= view.max_units - len(view.slot)
    mask[view.factory_slot, BUILD_LIGHT : BUILD_HEAVY + 1] = can_build & in_time
    mask[view.factory_slot, WATER] = view.can_grow() & (water > view.water_bound())
    return mask


# ---- actions


def resolve_collisions(pos, target, newborn):
    """Which units must stay so that no two units of a team end on one tile: bool (n,).

    `pos` and `target` (n,) are tile numbers before and after the move, `newborn` (m,) the tiles on
    which units are being built. A mover is stopped if a parked unit, a newborn or an earlier mover
    has its target; that can stop others in turn, so it goes on to a fixed point. Swaps are legal.
    """
    pos, goal, newborn = pos.tolist(), target.tolist(), newborn.tolist()
    clash = len({*goal, *newborn}) < len(goal) + len(newborn)
    while clash:
        clash, taken = False, {*newborn, *(tile for tile, stays in zip(pos, goal, strict=True) if tile == stays)}
        for i, tile in enumerate(goal):
            if tile != pos[i]:
                if tile in taken:
                    goal[i], clash = pos[i], True
                taken.add(tile)
    return target != goal


def engine_actions(view, mask, action):
    """Translate one player's slot actions (num_slots,) into the engine's: {entity id: action}.

    Masked-out actions and moves that would collide with an own unit become NO_OP. A move or a dig
    is queued as often as the power lasts, and is not sent again while the choice stays the same;
    the queue always leaves the power that it takes to cancel it.
    """
    action = np.where(mask[np.arange(len(mask)), action], action, NO_OP)
    chosen, act = action[view.factory_slot], action[view.slot]
    newborn = view.factory_tile[(chosen == BUILD_LIGHT) | (chosen == BUILD_HEAVY)]
    act = np.where(resolve_collisions(view.tile, view.tile + view.steps[act], newborn), NO_OP, act)

    units = np.flatnonzero((act != view.queued) & (view.power >= QUEUE_COST[view.kind]))
    act, kind, power = act[units], view.kind[units], view.power[units]
    moving, deliver = np.flatnonzero((act > NO_OP) & (act <= LEFT)), act == DELIVER
    budget = power - 2 * QUEUE_COST[kind]  # one update now, one to cancel
    room = BATTERY_CAPACITY[kind] - (power - QUEUE_COST[kind])  # more power than that would be wasted
    orders = np.zeros((len(units), 1, 6), dtype=np.int64)  # type, direction, resource, amount, repeat, n
    orders[:, 0, :3] = ORDERS[act]
    orders[:, 0, 1] += deliver * (view.touching[units] >= 0).argmax(1)
    orders[:, 0, 3] = deliver * view.ice[units] + (act == PICK_UP) * room
    n = np.where(act == DIG, budget // DIG_COST[kind], 1)
    n[moving] = view.reach(units[moving], act[moving], budget[moving])
    orders[:, 0, 5] = np.maximum(n, 1)
    engine = {
        view.ids[slot]: order[:0] if choice == NO_OP else order
        for slot, order, choice in zip(view.slot[units], orders, act, strict=True)
    }
    for slot, choice in zip(view.factory_slot, chosen, strict=True):
        if choice != NO_OP:
            engine[view.ids[slot]] = int(choice) - BUILD_LIGHT
    return engine


# ---- rewards


def entity_rewards(args, kind, lost, ice_dug, ice_delivered, ice_received, rubble_cleared):
    """Each entity's own reward for one step, from what it did itself: float32 (num_slots,).

    All arguments after `args` have shape (num_slots,); `kind` is that before the step.

    A unit earns `reward_ice_dug` per ice it digs (found early, by chance) and
    `reward_ice_delivered` per ice it brings to an own factory (what the team needs; unit-to-unit
    transfers do not count, they could be farmed); a factory earns `reward_ice_received` for the same
    ice, which credits it for the units it built. In all 0.002 per unit of ice, as in the paper's
    tables. A unit earns `reward_rubble_cleared` per rubble it takes off a tile with ice, since ice
    lies under about three digs of rubble; a factory earns `reward_factory_alive` per step it
    survives; both lose for being destroyed.
    """
    factory = args.reward_ice_received * ice_received + np.where(
        lost, args.reward_factory_lost, args.reward_factory_alive
    )
    mining = args.reward_ice_dug * ice_dug + args.reward_rubble_cleared * rubble_cleared
    unit = mining + args.reward_ice_delivered * ice_delivered + args.reward_unit_lost * lost
    return np.where(kind == FACTORY, factory, np.where(kind == EMPTY, 0, unit)).astype(np.float32)


# ---- symmetries


def turn_tiles(xy, symmetry, size):
    """Where tiles (n, 2) lie after one of the square's symmetries, 0 to 7: transposed, then flipped."""
    turned = xy[:, ::-1] if symmetry & 4 else xy
    return np.where((symmetry & 2, symmetry & 1), size - 1 - turned, turned)


def turn_planes(planes, symmetry):
    """Planes (18, map_size, map_size) after a symmetry, as `turn_tiles` has it."""
    planes = planes.transpose(0, 2, 1) if symmetry & 4 else planes
    return planes[:, :: -1 if symmetry & 2 else 1, :: -1 if symmetry & 1 else 1]


# The unit action that each unit action becomes by each symmetry (a map of one tile turns about the origin)
TURNED = np.tile(np.arange(NUM_ACTIONS), (8, 1))
for _symmetry in range(8):
    TURNED[_symmetry, :DIG] = (turn_tiles(DELTAS, _symmetry, 1)[:, None] == DELTAS).all(-1).argmax(1)


# ---- the gymnasium.Env


class LuxEnv(gym.Env):
    """One game of Lux AI Season 2 against an idle opponent, or against the same policy.

    Observations are a dictionary of arrays with a leading axis of sides (1, or 2 in self-play):
    `planes` (sides, 18, map_size, map_size); per slot `pixel`, `kind`, `unit_id` and `action_mask`;
    and, for the step that led here, `reward` and `done` of the slots as they were before it,
    because gymnasium's vector environments carry but one reward an environment.

    An action is an integer per side and slot; illegal ones count as NO_OP. An episode ends after
    1,000 steps or when a side has no factory left: both are terminations.

    Training maps come from the environment's own generator (`reset(seed=...)`); with `map_seeds`,
    those maps are played in turn instead. With `augment`, each observation is turned or mirrored by
    chance, and the action that answers it is turned back.

    Raises MapError if the first 100 maps all have no ice or no room for the factories.
    """

    metadata = {"render_modes": []}

    def __init__(self, args, map_seeds=None):
        self.args = args
        self.map_seeds = None if map_seeds is None else iter(map_seeds)
        self.players = PLAYERS if args.opponent == "self" else PLAYERS[:1]
        self.num_slots = args.max_units + args.factories_per_team
        self.views = []  # of the sides, once a map has been found
        self.engine = FastLux(
            map_size=args.map_size,
            MIN_FACTORIES=args.factories_per_team,
            MAX_FACTORIES=args.factories_per_team,
            max_episode_length=EPISODE_STEPS,
        )
        slots = (len(self.players), self.num_slots)
        planes = (len(self.players), NUM_PLANES, args.map_size, args.map_size)
        self.observation_space = gym.spaces.Dict(
            planes=gym.spaces.Box(0, 4, planes, np.float16),
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
        rng, seeds = self.np_random, (NUM_EVAL_MAPS, 2**31)
        map_seed = int(rng.integers(*seeds)) if self.map_seeds is None else next(self.map_seeds, 0)
        if self.map_seeds is not None:
            rng, seeds = np.random.default_rng(map_seed), (0, NUM_EVAL_MAPS)
        obs, draws = self._start_game(map_seed), 1
        while obs is None:
            if draws == MAX_MAP_DRAWS and not self.views:  # a setting that had a map once will have another
                raise MapError(
                    f"{MAX_MAP_DRAWS} maps of size {self.args.map_size} had no ice or no room for "
                    f"{self.args.factories_per_team} factories a team: raise --map-size or lower --factories-per-team."
                )
            map_seed = int(rng.integers(*seeds))
            obs, draws = self._start_game(map_seed), draws + 1
        self.ids = [[None] * self.args.max_units + list(obs["factories"][player]) for player in self.players]
        self.views = [None] * len(self.players)
        self.stats = [dict.fromkeys(EPISODE_STATS, 0.0) for _ in self.players]
        nothing = np.zeros(self.num_slots, dtype=np.float32)
        return self._observe(obs, [nothing] * len(self.players), [nothing] * len(self.players)), {}

    def _start_game(self, map_seed):
        """Bid nothing and place all factories in turn; None if the map has no ice or no room."""
        obs = self.engine.reset(seed=map_seed)[0][PLAYERS[0]]
        if not obs["board"]["ice"].any():
            return None
        self.engine.step({player: {"faction": "AlphaStrike", "bid": 0} for player in PLAYERS})
        for turn in range(2 * self.args.factories_per_team):
            player = PLAYERS[turn % 2]  # on equal bids player_0 places first
            score = np.where(obs["board"]["valid_spawns_mask"], placement_score(obs, player), -np.inf)
            if score.max() == -np.inf:
                return None
            spot = np.array(np.unravel_index(score.argmax(), score.shape))
            placement = {"spawn": spot, "metal": 150, "water": 150}
            obs = self.engine.step({p: placement if p == player else {} for p in PLAYERS})[0][PLAYERS[0]]
        if self.args.opponent == "idle":
            for factory in self.engine.state.factories[PLAYERS[1]].values():
                factory.cargo.water += EPISODE_STEPS
        return obs

    def _observe(self, obs, rewards, dones):
        seen = {key: np.zeros(space.shape, space.dtype) for key, space in self.observation_space.items()}
        seen["reward"][:], seen["done"][:] = rewards, dones
        self.masks, self.kinds = [], []
        self.symmetry = int(self.np_random.integers(8)) if self.args.augment else 0
        for side, player in enumerate(self.players):
            view = View(obs, player, self.ids[side], self.args.max_units, self.views[side])
            self.views[side] = view
            seen["planes"][side] = turn_planes(make_planes(view), self.symmetry)
            self.masks.append(action_masks(view))
            for slot, pos, number, kind in (
                (view.slot, view.pos, view.number, view.kind),
                (view.factory_slot, view.factory_pos, view.strain, FACTORY),
            ):
                seen["unit_id"][side, slot], seen["kind"][side, slot] = number, kind
                seen["pixel"][side, slot] = turn_tiles(pos, self.symmetry, view.size) @ (view.size, 1)
            self.kinds.append(seen["kind"][side].copy())
            mask = seen["action_mask"][side]
            mask[:] = self.masks[side]
            mask[: view.max_units, TURNED[self.symmetry]] = self.masks[side][: view.max_units]  # factories do not turn
        return seen

    def step(self, action):
        engine_action, action = {player: {} for player in PLAYERS}, np.array(action)
        units = action[:, : self.args.max_units]
        units[:] = TURNED[self.symmetry].argsort()[units]  # from the directions that the network saw to the map's
        for side, player in enumerate(self.players):
            engine_action[player] = engine_actions(self.views[side], self.masks[side], action[side])
        obs, _, terminations, _, _ = self.engine.step(engine_action)
        obs, over = obs[PLAYERS[0]], bool(terminations[PLAYERS[0]])
        rewards, dones = [], []
        for side, player in enumerate(self.players):
            ids, kind = self.ids[side], self.kinds[side]
            there = {None, *obs["units"][player], *obs["factories"][player]}
            lost = np.array([id_ not in there for id_ in ids])
            meters = {
                name: np.fromiter(map(meter.__getitem__, ids), np.int64, len(ids))
                for name, meter in self.engine.meters.items()
            }
            rewards.append(entity_rewards(self.args, kind, lost, **meters))
            dones.append(lost | (over & (kind != EMPTY)))
            # A newborn takes a slot that was free before the step: the done flag of a slot that
            # is freed now has to be recorded first.
            free = iter([slot for slot in range(self.args.max_units) if ids[slot] is None])
            known, self.ids[side] = set(ids), [id_ if id_ in there else None for id_ in ids]
            for unit_id in obs["units"][player]:
                if unit_id not in known:
                    self.ids[side][next(free)] = unit_id
            self._count(side, obs, rewards[side], meters)
        info = {"episode": {k: np.mean([stats[k] for stats in self.stats]) for k in EPISODE_STATS}} if over else {}
        return self._observe(obs, rewards, dones), float(np.sum(rewards)), over, False, info

    def _count(self, side, obs, reward, meters):
        """Keep the episode's statistics."""
        player, enemy, stats = PLAYERS[side], PLAYERS[1 - side], self.stats[side]
        stats["episodic_return"] += float(reward.sum())
        stats["episodic_length"] += 1
        stats["ice_transferred"] += int(meters["ice_delivered"].sum())
        stats["factory_count"] += len(obs["factories"][player])
        stats["factories_alive"] = stats["factory_count"] / EPISODE_STEPS
        stats["ice_dug"] += int(meters["ice_dug"].sum())
        stats["units_built"] = self.engine.built[player]
        lost = [tile for team, tile in self.engine.destroyed if team == player]
        if lost:
            foes = {tile for team, tile in self.engine.destroyed if team == enemy}
            foes.update(tuple(unit["pos"]) for unit in obs["units"][enemy].values())
            stats["units_lost"] += len(lost)
            stats["friendly_losses"] += sum(tile not in foes for tile in lost)  # no enemy had a part in it


def make_vector_env(args, map_seeds):
    """A process per entry of `map_seeds`: None for training maps, or the maps that it shall play."""
    return gym.vector.AsyncVectorEnv(
        [lambda seeds=seeds: LuxEnv(args, seeds) for seeds in map_seeds],
        shared_memory=True,
        copy=False,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )


# ==============================================================================================
# The network
# ==============================================================================================


def layer_init(layer, std=np.sqrt(2), bias_const=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class ConvBlock(nn.Sequential):
    """A convolution, or the linear layer that it is at single pixels; norm; LeakyReLU."""

    def __init__(self, conv, norm):
        layer_init(conv)
        if norm != "none":
            conv = nn.utils.parametrizations.spectral_norm(conv)
        batch_norm = nn.BatchNorm2d if isinstance(conv, nn.Conv2d) else nn.BatchNorm1d
        super().__init__(conv, *([batch_norm(len(conv.bias))] if norm == "poster" else []), nn.LeakyReLU(inplace=True))


class ResidualBlock(nn.Module):
    """Two convolutions, then squeeze-and-excitation: the gates see the whole map."""

    def __init__(self, channels, norm):
        super().__init__()
        self.convs = nn.Sequential(*[ConvBlock(nn.Conv2d(channels, channels, 3, padding=1), norm) for _ in range(2)])
        self.squeeze = layer_init(nn.Linear(channels, channels // 4))
        self.excite = layer_init(nn.Linear(channels // 4, channels), std=1.0)

    def forward(self, x):
        y = self.convs(x)
        gate = torch.sigmoid(self.excite(F.leaky_relu(self.squeeze(y.mean(dim=(2, 3))))))
        return x + y * gate[:, :, None, None]


class Trunk(nn.Module):
    """The poster's backbone: planes (B, 18, H, W) to features at tiles (B, K), (B * K, channels).

    The last convolution is computed at those tiles only: the same numbers for less work.
    """

    def __init__(self, channels, num_blocks, norm):
        super().__init__()
        self.stem = ConvBlock(nn.Conv2d(NUM_PLANES, channels, 3, padding=1), norm)
        self.blocks = nn.Sequential(*[ResidualBlock(channels, norm) for _ in range(num_blocks)])
        self.last = ConvBlock(nn.Linear(9 * channels, channels), norm)

    def forward(self, planes, pixel):
        x = F.pad(self.blocks(self.stem(planes)), (1, 1, 1, 1))  # (B, C, H + 2, W + 2)
        size = planes.shape[-1]
        row = torch.arange(len(x), device=x.device)[:, None] * (size + 2) + pixel // size  # (B, K)
        corner = (row * (size + 2) + pixel % size).flatten()  # of the 3x3 patch around the pixel
        patch = torch.arange(3, device=x.device)[:, None] * (size + 2) + torch.arange(3, device=x.device)
        tiles = (corner[:, None] + patch.flatten()).flatten()  # (B * K * 9,)
        return self.last(x.permute(0, 2, 3, 1).flatten(0, 2)[tiles].view(len(corner), -1))

    # Added to ppo_trajsep_lux: the critic looks at the whole map
    def everywhere(self, planes):
        """The same features at every tile: (B * H * W, channels)."""
        linear = self.last[0]
        kernel = linear.weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        x = F.conv2d(self.blocks(self.stem(planes)), kernel, linear.bias, padding=1)  # (B, C, H, W)
        return nn.Sequential(*list(self.last)[1:])(x.permute(0, 2, 3, 1).flatten(0, 2))


def of_kind(outputs, kind):
    """From head outputs (B, num_slots, 3, ...), those of each slot's kind (light, heavy, factory)."""
    index = (kind.long() - 1).clamp(min=0).reshape(*kind.shape, *[1] * (outputs.dim() - 2))
    return outputs.gather(2, index.expand(*outputs.shape[:2], 1, *outputs.shape[3:])).squeeze(2)


class Agent(nn.Module):
    """Actor and critic: one architecture, separate weights; pixel to pixel, so any map size fits.

    Batch norm always uses its running statistics and spectral norm never moves in a forward pass,
    so that rollout and update compute the same function; `refresh_batch_norm` and
    `power_iteration` move them in between.
    """

    # Differs from ppo_trajsep_lux: one value for the whole map
    def __init__(self, channels, num_blocks, norm, bf16=False):
        super().__init__()
        self.bf16 = bf16
        self.actor = Trunk(channels, num_blocks, norm)
        self.actor_head = layer_init(nn.Linear(channels, 3 * NUM_ACTIONS), std=0.01)
        self.critic = Trunk(channels, num_blocks, norm)
        self.critic_pixel = ConvBlock(nn.Linear(channels, channels), norm)  # a 1x1 convolution
        self.critic_head = layer_init(nn.Linear(channels, 1), std=1.0)
        self.value_scale = 0.1 if norm == "poster" else 1.0  # normed features are large beside the first returns
        self.to(memory_format=torch.channels_last).eval()

    def entity_features(self, trunk, obs):
        """The trunk's feature vector at every entity's pixel: float32 (B * num_slots, channels)."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        planes = obs["planes"].to(dtype, memory_format=torch.channels_last)
        with torch.autocast(planes.device.type, torch.bfloat16, enabled=self.bf16):
            return trunk(planes, obs["pixel"]).float()

    # Differs from ppo_trajsep_lux: one value for the whole map
    def get_value(self, obs):
        """Value of the whole map, from the mean of the critic's last features: (B, 1)."""
        planes = obs["planes"].to(torch.bfloat16 if self.bf16 else torch.float32, memory_format=torch.channels_last)
        with torch.autocast(planes.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.critic_pixel(self.critic.everywhere(planes)).float()  # (B * H * W, channels)
        return self.value_scale * self.critic_head(features.unflatten(0, (len(planes), -1)).mean(1))

    def get_distribution(self, obs):
        """Action distribution of every entity, at its pixel: Categorical (B, num_slots)."""
        logits = self.actor_head(self.entity_features(self.actor, obs))  # (B * num_slots, 3 * NUM_ACTIONS)
        logits = of_kind(logits.view(*obs["kind"].shape, 3, NUM_ACTIONS), obs["kind"]).masked_fill(
            ~obs["action_mask"].bool(), -1e8
        )
        return Categorical(logits=logits, validate_args=False)

    @torch.no_grad()
    def power_iteration(self):
        """One power iteration of each spectral norm (reading a weight in training mode makes it)."""
        self.train()
        for module in self.modules():
            if nn.utils.parametrize.is_parametrized(module):
                _ = module.weight
        self.eval()

    @torch.no_grad()
    def refresh_batch_norm(self, batches):
        """Move the running statistics of batch norm towards those of the given observations, at all tiles.

        They are the plain average over the first 40 batches, then a moving one: statistics of the
        newest batches alone would move the policy as much as an update does.
        """
        norms = [module for module in self.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
        for module in norms:
            module.train()
        for obs in batches if norms else ():
            for module in norms:
                module.momentum = max(1 / 40, 1 / (1 + module.num_batches_tracked.item()))
            tiles = torch.arange(obs["planes"][0, 0].numel(), device=obs["planes"].device)
            everywhere = {"planes": obs["planes"], "pixel": tiles.expand(len(obs["planes"]), -1)}
            self.entity_features(self.actor, everywhere)
            self.critic_pixel(self.entity_features(self.critic, everywhere))
        self.eval()


# ==============================================================================================
# Trajectories: groups, GAE and losses
# ==============================================================================================

# Shapes: T steps, B environments (times sides), K slots, G groups; a cell is one (step,
# environment, group). dones[t] says that the group ended in the step that took obs[t] to
# obs[t + 1]: nothing after it may flow back over it.


def group_index(unit_id, max_units, num_groups):
    """The trajectory of every slot: long (..., K). Factories keep one each, after the units'."""
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
    dones: torch.Tensor  # 1 where no member that acted survived the step
    values: torch.Tensor  # sum of the members'
    next_values: torch.Tensor  # of the members that acted and survived, at their new pixels
    active: torch.Tensor  # the group had a member
    choice: torch.Tensor  # ... that had more than one legal action


# Differs from ppo_trajsep_lux: the map's value is every cell's
def separate_trajectories(rewards, dones, values, group, entity_mask, action_mask, total_groups):
    """Reduce per-slot rollout tensors to trajectories of groups (paper, section Trajectory Separation).

    `rewards`, `dones`, `group` and `entity_mask` have shape (T, B, K), `values` (T + 1, B, 1),
    `action_mask` (T, B, K, NUM_ACTIONS). A group is done when all members that acted are (Fig. 2).
    """
    survived = entity_mask & ~dones.bool()
    active = group_sum(entity_mask.float(), group, entity_mask, total_groups) > 0
    alive = group_sum(survived.float(), group, entity_mask, total_groups) > 0
    free = (action_mask.sum(-1) > 1).float()
    return Trajectories(
        rewards=group_sum(rewards, group, entity_mask, total_groups),
        dones=(active & ~alive).float(),
        values=values[:-1].expand(active.shape),
        next_values=values[1:].expand(active.shape),
        active=active,
        choice=group_sum(free, group, entity_mask, total_groups) > 0,
    )


def compute_gae(trajectories, gamma, gae_lambda):
    """Generalised advantage estimates of every cell, zero in inactive ones: (T, B, G)."""
    rewards, dones, values, next_values, active, _ = trajectories
    advantages = torch.zeros_like(rewards)
    lastgaelam = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1.0 - dones[t]
        delta = rewards[t] + gamma * next_values[t] * nextnonterminal - values[t]
        lastgaelam = active[t] * (delta + gamma * gae_lambda * nextnonterminal * lastgaelam)
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
# Evaluation
# ==============================================================================================


def to_tensors(obs, device):
    """Observation arrays (num_envs, sides, ...) as tensors (num_envs * sides, ...) on the device."""
    return {key: torch.from_numpy(value).flatten(0, 1).to(device) for key, value in obs.items()}


@torch.no_grad()
def evaluate(agent, args, device, greedy):
    """Play the first `eval_episodes` evaluation maps once: {statistic: array (eval_episodes,)}."""
    num_envs = min(args.num_envs, args.eval_episodes)
    maps = [range(i, args.eval_episodes, num_envs) for i in range(num_envs)]
    envs = make_vector_env(args, maps)
    finished = [[] for _ in maps]  # per environment, its episodes' statistics
    next_obs, _ = envs.reset(seed=args.seed)
    while any(len(done) < len(seeds) for done, seeds in zip(finished, maps, strict=True)):
        distribution = agent.get_distribution(to_tensors(next_obs, device))
        action = distribution.probs.argmax(-1) if greedy else distribution.sample()
        next_obs, _, terminations, _, infos = envs.step(action.cpu().numpy().reshape(envs.action_space.shape))
        for i in np.flatnonzero(terminations):
            finished[i].append([infos["final_info"]["episode"][name][i] for name in EPISODE_STATS])
    envs.close()
    rows = [row for done, seeds in zip(finished, maps, strict=True) for row in done[: len(seeds)]]
    return dict(zip(EPISODE_STATS, np.array(rows).T, strict=True))


def load_checkpoint(path):
    """Settings and weights of a model.pt; ValueError with one sentence if it is missing or damaged."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return Args(**checkpoint["args"]), checkpoint["model"]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give --evaluate the path of a model.pt.") from None
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        raise ValueError(
            f"{path} is damaged or not a model.pt of this script ({type(error).__name__}): give --evaluate another."
        ) from None


def evaluate_checkpoint(args, weights, device):
    """Print the mean and standard deviation over episodes of every statistic, sampled and greedy."""
    agent = Agent(args.channels, args.num_blocks, args.norm, args.bf16).to(device)
    try:
        agent.load_state_dict(weights)
    except RuntimeError:
        raise ValueError("The weights do not fit: keep their script, --channels, --num-blocks and --norm.") from None
    print(f"{args.evaluate}: {args.eval_episodes} evaluation maps of size {args.map_size}, mean +- std over maps")
    print("| actions | " + " | ".join(EPISODE_STATS) + " |")
    print("|---" * (1 + len(EPISODE_STATS)) + "|")
    for greedy in (False, True):
        torch.manual_seed(args.seed)
        stats = evaluate(agent, args, device, greedy)
        cells = [f"{values.mean():,.2f} +- {values.std():,.2f}" for values in stats.values()]
        print(f"| {'greedy' if greedy else 'sampled'} | " + " | ".join(cells) + " |")


# ==============================================================================================
# Training
# ==============================================================================================


SMALL_RUN = "--map-size 32 --factories-per-team 2 --max-units 30 --channels 24 --total-timesteps 24576"


def estimate_minutes(agent, args, obs):
    """About how long the run will take on this CPU, from timing the network on one observation."""
    obs = {key: value.repeat_interleave(16, 0) for key, value in obs.items()}
    rows, seconds = len(obs["planes"]), []
    for _ in range(3):
        start = time.time()
        (agent.get_value(obs).sum() + agent.get_distribution(obs).logits.sum()).backward()
        seconds.append((time.time() - start) / rows)
    agent.zero_grad()
    maps = args.num_iterations * args.batch_size
    return maps * (min(seconds) * (args.update_epochs + 0.4) + 0.003) / 60  # a rollout step adds a forward and 3 ms


if __name__ == "__main__":
    # ---- setup
    args = tyro.cli(Args)
    try:
        if args.evaluate is not None:
            saved, weights = load_checkpoint(args.evaluate)
            args = tyro.cli(Args, default=saved)
        check_args(args)
        first_obs, _ = LuxEnv(args).reset(seed=args.seed)  # fails here if no map can hold the factories
    except (ValueError, MapError) as error:
        sys.exit(str(error))
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    if args.evaluate is not None:
        try:
            evaluate_checkpoint(args, weights, device)
        except ValueError as error:
            sys.exit(str(error))
        sys.exit()

    run_name = args.run_name or f"{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = os.path.join("runs", run_name)
    if os.path.exists(run_dir):
        sys.exit(f"{run_dir} exists already: choose another --run-name, or move the folder away.")
    os.makedirs(run_dir)
    with open(os.path.join(run_dir, "args.json"), "w") as file:
        json.dump(asdict(args), file, indent=2)
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_name}
        wandb.init(**names, config=vars(args), sync_tensorboard=True, save_code=True)
    writer = SummaryWriter(run_dir)
    table = "\n".join([f"|{key}|{value}|" for key, value in vars(args).items()])
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    # ---- environments and agent
    envs = make_vector_env(args, [None] * args.num_envs)
    agent = Agent(args.channels, args.num_blocks, args.norm, args.bf16).to(device)
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-8)
    print(f"{run_dir}: {sum(p.numel() for p in agent.parameters()):,} parameters on {device}")
    if device.type == "cpu":
        minutes = estimate_minutes(agent, args, {key: torch.from_numpy(value) for key, value in first_obs.items()})
        print(f"On this CPU the run takes about {minutes:.0f} minutes; a run of minutes has these flags: {SMALL_RUN}")

    # ---- storage
    # Differs from ppo_trajsep_lux: the value is of the whole map
    num_rows = args.batch_size // args.num_steps  # environments times sides
    num_slots = args.max_units + args.factories_per_team
    num_groups = (args.num_groups or args.max_units) + args.factories_per_team
    shape = (args.num_steps, num_rows, num_slots)
    obs = {  # of the same types as the environment's arrays
        key: torch.zeros(args.num_steps, num_rows, *value.shape[1:], dtype=torch.from_numpy(value).dtype, device=device)
        for key, value in first_obs.items()
        if key not in ("reward", "done")
    }
    actions = torch.zeros(shape, dtype=torch.int64).to(device)
    entity_logprobs = torch.zeros(shape).to(device)
    entity_reward = torch.zeros(shape).to(device)
    entity_dones = torch.zeros(shape).to(device)
    entity_values = torch.zeros(args.num_steps + 1, num_rows, 1).to(device)

    # ---- start the game
    global_step, start_time, num_threads = 0, time.time(), torch.get_num_threads()
    seeds = np.random.SeedSequence(args.seed).generate_state(args.num_envs)
    next_obs = to_tensors(envs.reset(seed=[int(seed) for seed in seeds])[0], device)
    agent.refresh_batch_norm([next_obs])
    csv_file = open(os.path.join(run_dir, "progress.csv"), "w", newline="")
    csv_writer = None  # until the first row says what the columns are
    model_path = os.path.join(run_dir, "model.pt")
    progress = tqdm(total=args.num_iterations * args.num_envs * args.num_steps, unit="step", disable=None)

    for iteration in range(1, args.num_iterations + 1):
        frac = 1.0 - (iteration - 1.0) / args.num_iterations
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = frac * args.learning_rate
        ent_coef = frac * args.ent_coef if args.anneal_ent else args.ent_coef

        # ---- rollout
        rollout_start = time.time()
        torch.set_num_threads(max(1, num_threads // 2))  # the environments' processes need cores as well
        episodes = {name: [] for name in EPISODE_STATS}
        for step in range(args.num_steps):
            global_step += args.num_envs
            for key, buffer in obs.items():
                buffer[step] = next_obs[key]
            with torch.no_grad():
                distribution = agent.get_distribution(next_obs)
                actions[step] = distribution.sample()
                entity_logprobs[step] = distribution.log_prob(actions[step])
                envs.step_async(actions[step].cpu().numpy().reshape(envs.action_space.shape))
                # while the environments step; they overwrite next_obs meanwhile
                entity_values[step] = agent.get_value({key: buffer[step] for key, buffer in obs.items()})
            next_obs, _, terminations, _, infos = envs.step_wait()
            last = {key: next_obs[key].copy() for key in ("reward", "done")}
            for i in np.flatnonzero(terminations):
                for key in last:  # the reset in the same step has overwritten these
                    last[key][i] = infos["final_obs"][i][key]
                for name in EPISODE_STATS:
                    episodes[name].append(infos["final_info"]["episode"][name][i])
            last, next_obs = to_tensors(last, device), to_tensors(next_obs, device)
            entity_reward[step], entity_dones[step] = last["reward"], last["done"]
            progress.update(args.num_envs)
        with torch.no_grad():
            entity_values[args.num_steps] = agent.get_value(next_obs)
        torch.set_num_threads(num_threads)

        # ---- trajectories
        update_start = time.time()
        entity_mask = obs["kind"] != EMPTY  # (num_steps, num_rows, num_slots)
        group = group_index(obs["unit_id"], args.max_units, args.num_groups)
        trajectories = separate_trajectories(
            entity_reward, entity_dones, entity_values, group, entity_mask, obs["action_mask"], num_groups
        )
        advantages = compute_gae(trajectories, args.gamma, args.gae_lambda)  # (num_steps, num_rows, num_groups)
        batch = {  # a row is the map of one (step, environment) with all its cells
            **obs,
            "actions": actions,
            "group": group,
            "entity_mask": entity_mask,
            "logprobs": group_sum(entity_logprobs, group, entity_mask, num_groups),
            "advantages": advantages,
            "returns": advantages + trajectories.values,
            "values": trajectories.values,
            "active": trajectories.active,
            "choice": trajectories.choice,
        }
        batch = {key: value.flatten(0, 1) for key, value in batch.items()}  # (batch_size, ...)

        # ---- update
        # Differs from ppo_trajsep_lux: the value is of the whole map
        losses = defaultdict(list)
        for _ in range(args.update_epochs):
            b_inds = torch.randperm(args.batch_size, device=device)
            for mb_inds in b_inds.split(args.minibatch_size):
                mb = {key: value[mb_inds] for key, value in batch.items()}  # (minibatch_size, ...)
                distribution = agent.get_distribution(mb)
                members = (mb["group"], mb["entity_mask"], num_groups)
                newlogprob = group_sum(distribution.log_prob(mb["actions"]), *members)
                entropy = group_sum(distribution.entropy(), *members)
                newvalue = agent.get_value(mb).expand_as(entropy)
                logratio = newlogprob - mb["logprobs"]
                ratio = logratio.exp()

                mb_advantages = mb["advantages"]
                if args.norm_adv:
                    mb_advantages = normalize(mb_advantages, mb["choice"])
                pg_loss = policy_loss(ratio, mb_advantages, mb["choice"], args.clip_coef)
                v_clip = args.clip_coef if args.clip_vloss else None
                v_loss = value_loss(newvalue, mb["values"], mb["returns"], mb["active"], v_clip)
                entropy_loss = masked_mean(entropy, mb["choice"])
                loss = pg_loss - ent_coef * entropy_loss + args.vf_coef * v_loss

                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                agent.power_iteration()

                with torch.no_grad():
                    losses["policy_loss"].append(pg_loss.detach())
                    losses["value_loss"].append(v_loss.detach())
                    losses["entropy"].append(entropy_loss.detach())
                    losses["approx_kl"].append(masked_mean((ratio - 1) - logratio, mb["choice"]))
                    clipped = ((ratio - 1.0).abs() > args.clip_coef).float()
                    losses["clipfrac"].append(masked_mean(clipped, mb["choice"]))
                    losses["grad_norm"].append(grad_norm)
            if args.target_kl is not None and losses["approx_kl"][-1] > args.target_kl:
                break
        refresh_inds = b_inds.split(args.minibatch_size)[:4]
        agent.refresh_batch_norm({key: batch[key][inds] for key in obs} for inds in refresh_inds)

        # ---- logging
        update_end = time.time()
        full = [length >= EPISODE_STEPS for length in episodes["episodic_length"]]
        seconds = time.time() - start_time
        row = {"global_step": global_step, "charts/seconds": seconds, "charts/SPS": global_step / seconds}
        row["charts/rollout_seconds"] = update_start - rollout_start
        row["charts/update_seconds"] = update_end - update_start
        row["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        row["charts/episodes"] = len(full)  # that ended in this iteration; the next are their means
        for name, values in {**episodes, "full_episodes": full}.items():
            row[f"charts/{name}"] = np.mean(values) if values else None  # blank where no episode ended
        row["charts/active_cells"] = (batch["active"].sum() / args.batch_size).item()
        for name, values in losses.items():
            row[f"losses/{name}"] = torch.stack(values).mean().item()
        errors = (batch["returns"] - batch["values"])[batch["active"]]
        row["losses/explained_variance"] = (1 - errors.var() / batch["returns"][batch["active"]].var()).item()
        for name, value in row.items():
            if value is not None:
                writer.add_scalar(name, value, global_step)
        if csv_writer is None:
            csv_writer = csv.DictWriter(csv_file, row.keys())
            csv_writer.writeheader()
        csv_writer.writerow(row)
        csv_file.flush()
        if args.save_model:  # also of a run that is stopped before its end, and never half a file
            torch.save({"args": asdict(args), "model": agent.state_dict()}, model_path + ".tmp")
            os.replace(model_path + ".tmp", model_path)
        if full:
            shown = ("episodic_return", "episodic_length", "ice_transferred")
            progress.set_postfix({name: f"{row[f'charts/{name}']:.1f}" for name in shown})

    # ---- the end
    progress.close()
    if args.save_model:
        print(f"model saved to {model_path}")
    csv_file.close()
    envs.close()
    writer.close()
