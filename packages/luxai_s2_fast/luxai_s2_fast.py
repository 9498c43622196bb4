"""The engine of Lux AI Season 2, faster: a drop-in for `luxai_s2.env.LuxAI_S2` of luxai-s2 3.0.1.

    from luxai_s2_fast import LuxAI_S2  # or luxai_s2.env: the same game, slower

It is a subclass that keeps the stock engine's objects and its phases, and replaces what is slow:
the check of the action space builds no space, lichen is searched only where it matters, and moves
are worked out in Python's integers. What the fast way does not take (malformed actions, statistics,
warnings, bids and placements) goes the stock engine's own way, so it ends as it does there.
"""

from collections import defaultdict
from functools import cached_property

import numpy as np
from luxai_s2 import actions as lux
from luxai_s2 import env as stock
from luxai_s2.factory import Factory
from luxai_s2.map.position import Position
from luxai_s2.unit import Unit
from luxai_s2.utils.utils import is_day
from scipy.ndimage import label

__all__ = ["LuxAI_S2"]

STEPS = lux.move_deltas.tolist()  # stay, up, right, down, left
# Tiles, and their neighbours on one side: the map without one edge and without the opposite edge
SIDES = [(np.s_[1:], np.s_[:-1]), (np.s_[:-1], np.s_[1:]), (np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :-1], np.s_[:, 1:])]

PLUS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])  # a tile and its neighbours


class Ground:
    """The map as it was in the middle of a step, and where lichen would grow on it; worked out when asked for."""

    def __init__(self, board, min_lichen_to_spread):
        for layer in ("rubble", "ice", "ore", "lichen", "lichen_strains", "factory_occupancy_map"):
            setattr(self, layer, getattr(board, layer).copy())
        self.min_lichen_to_spread = min_lichen_to_spread

    @cached_property
    def free(self):
        """Where lichen may stand."""
        return (self.rubble <= 0) & (self.factory_occupancy_map == -1) & (self.ice <= 0) & (self.ore <= 0)

    @cached_property
    def bare(self):
        """Where lichen may come."""
        return (self.lichen_strains == -1) & self.free

    @cached_property
    def rich(self):
        """Where there is enough lichen to spread."""
        return self.lichen >= self.min_lichen_to_spread

    @cached_property
    def bordered_owner(self):
        """The factory that stands on a tile or has lichen there, -1 for nobody; with a border of -1."""
        factories = self.factory_occupancy_map
        return np.pad(np.where(factories != -1, factories, self.lichen_strains), 1, constant_values=-1)

    @cached_property
    def connected(self):
        """Which lichen reaches its own factory, for all factories at once."""
        strains, lichen = self.lichen_strains, (self.lichen_strains != -1) & self.free
        if not lichen.any():
            return lichen
        roots = np.zeros_like(lichen)
        for here, there in SIDES:
            roots[here] |= strains[here] == self.factory_occupancy_map[there]
        # every second row and column holds the passages between tiles: none where two factories' lichen touches
        passages = np.zeros(np.multiply(lichen.shape, 2) - 1, dtype=bool)
        passages[::2, ::2] = lichen
        passages[1::2, ::2] = lichen[1:] & (strains[1:] == strains[:-1])
        passages[::2, 1::2] = lichen[:, 1:] & (strains[:, 1:] == strains[:, :-1])
        labels, n = label(passages, PLUS)
        labels = labels[::2, ::2]
        hit = np.zeros(n + 1, dtype=bool)
        hit[labels[roots & lichen]] = True
        return hit[labels]

    def tiles_of(self, factory):
        """The tiles of a factory's lichen that reaches it: set of (x, y)."""
        x, y = (self.connected & (self.lichen_strains == factory.num_id)).nonzero()
        return set(zip(x.tolist(), y.tolist(), strict=True))

    def grows(self, factory):
        """The tiles that grow if the factory waters: set of (x, y)."""
        own = self.connected & (self.lichen_strains == factory.num_id)
        reached, (x, y) = own.copy(), factory.pos.pos
        # the 12 tiles around the factory, where lichen starts; its own nine are not free
        for around in (np.s_[max(x - 2, 0) : x + 3, y - 1 : y + 2], np.s_[x - 1 : x + 2, max(y - 2, 0) : y + 3]):
            reached[around] |= self.free[around]
        spreads = reached & self.rich
        while spreads.any():  # once, unless bare ground spreads as well (MIN_LICHEN_TO_SPREAD = 0)
            new = np.zeros_like(reached)
            for here, there in SIDES:
                new[here] |= spreads[there]
            new &= self.bare & ~reached
            reached |= new
            spreads = new & self.rich
        x, y = reached.nonzero()
        around = self.bordered_owner[x[:, None] + lux.move_deltas[1:, 0] + 1, y[:, None] + lux.move_deltas[1:, 1] + 1]
        grows = own[x, y] | ((around == -1) | (around == factory.num_id)).all(1)
        return set(zip(x[grows].tolist(), y[grows].tolist(), strict=True))


class FastFactory(Factory):
    """Asks where its lichen grows only when that matters: where lichen is, or water is being spent.

    The stock engine floods the map from every factory in every step. It judges the cost of watering
    by the step before, so the map of that step has to be kept.
    """

    def cache_water_info(self, board, env_cfg):
        self.keep(Ground(board, env_cfg.MIN_LICHEN_TO_SPREAD))

    def keep(self, ground):
        self.ground = ground
        self.__dict__.pop("grow_lichen_positions", None)
        self.__dict__.pop("connected_lichen_positions", None)

    @cached_property
    def grow_lichen_positions(self):
        return self.ground.grows(self)

    @cached_property
    def connected_lichen_positions(self):
        return self.ground.tiles_of(self)


class FastPosition(Position):
    """Python's integers, because numpy's are slow one by one; the array is made when asked for."""

    x = y = None

    def __init__(self, x, y):
        self.x, self.y, self.array = x, y, None

    @property
    def pos(self):
        if self.array is None:
            self.array = np.array((self.x, self.y))
            self.array.flags.writeable = False  # written to, it would not move the unit: assign a new one
        return self.array

    @pos.setter
    def pos(self, pos):
        self.x, self.y, self.array = int(pos[0]), int(pos[1]), None


class FastUnit(Unit):
    def state_dict(self):
        cargo = self.cargo
        return {
            "team_id": self.team_id,
            "unit_id": self.unit_id,
            "power": self.power,
            "unit_type": self.unit_type._name_,
            "pos": self.pos.pos,
            "cargo": {"ice": cargo.ice, "ore": cargo.ore, "water": cargo.water, "metal": cargo.metal},
            "action_queue": [action.state_dict() for action in self.action_queue],
        }


def make_action(kind, direction, resource, amount, repeat, n):
    """One row of a unit's queue as the engine's object."""
    if kind == 0:
        return lux.MoveAction(direction, 1, repeat, n)
    if kind == 1:
        return lux.TransferAction(direction, resource, amount, repeat, n)
    if kind == 2:
        return lux.PickupAction(resource, amount, repeat, n)
    if kind == 3:
        return lux.DigAction(repeat, n)
    if kind == 4:
        return lux.SelfDestructAction(repeat, n)
    return lux.RechargeAction(amount, repeat, n)


class LuxAI_S2(stock.LuxAI_S2):
    def step(self, actions):
        if not getattr(self, "agents", None):
            raise RuntimeError("No game is being played: call reset() before step(), also after a game's end.")
        state, board, cfg = self.state, self.state.board, self.env_cfg
        early = self.env_steps == 0 or state.real_env_steps < 0  # bids and placements
        plain = not early and not self.collect_stats and cfg.verbose <= 1
        orders = self.read(actions) if plain and actions else None
        if orders is None:
            self.refuse(actions)
            return super().step(actions)

        for factories in state.factories.values():
            for factory in factories.values():
                if not isinstance(factory, FastFactory):  # in a state that State.from_obs made
                    self.replace(factory)

        # new orders: a unit pays for a new queue, or keeps the old one
        for entity, order in orders:
            if isinstance(entity, Factory):
                entity.action_queue.append(lux.format_factory_action(order))
            elif entity.power >= entity.unit_cfg.ACTION_QUEUE_POWER_COST:
                entity.power -= entity.unit_cfg.ACTION_QUEUE_POWER_COST
                entity.action_queue = [make_action(*row) for row in order]
        wanted = defaultdict(list)  # by type of action: (unit or factory, action)
        for player in self.agents:
            for unit in state.units[player].values():
                if unit.action_queue:
                    action = unit.action_queue[0]
                    wanted[action.act_type].append((unit, action))
            for factory in state.factories[player].values():
                if factory.action_queue:
                    action = factory.action_queue.pop(0)
                    wanted[action.act_type].append((factory, action))

        # what they can do, and the phases in which they do it
        moves = self.possible_moves(wanted.pop("move", ()))
        wanted = lux.validate_actions(cfg, state, wanted, verbose=0)
        wanted["move"] = moves
        self._handle_dig_actions(wanted)
        self._handle_self_destruct_actions(wanted)
        self._handle_factory_build_actions(wanted)
        self._handle_movement_actions(wanted)
        self._handle_recharge_actions(wanted)
        ground = Ground(board, cfg.MIN_LICHEN_TO_SPREAD)
        for player in self.agents:
            for factory in state.factories[player].values():
                factory.keep(ground)
        self._handle_factory_water_actions(wanted)
        self._handle_transfer_actions(wanted)
        self._handle_pickup_actions(wanted)

        # lichen dries, factories refine and drink, the sun shines
        board.lichen = (board.lichen - 1).clip(0, cfg.MAX_LICHEN_PER_TILE)
        board.lichen_strains[board.lichen == 0] = -1
        tiles = np.bincount(ground.lichen_strains[ground.connected], minlength=state.global_id).tolist()
        for player in self.agents:
            for factory in list(state.factories[player].values()):
                factory.refine_step(cfg)
                factory.cargo.water -= cfg.FACTORY_WATER_CONSUMPTION
                factory.power += cfg.FACTORY_CHARGE + tiles[factory.num_id] * cfg.POWER_PER_CONNECTED_LICHEN_TILE
                if factory.cargo.water < 0:
                    self.destroy_factory(factory)
        if is_day(cfg, state.real_env_steps):
            for player in self.agents:
                for unit in state.units[player].values():
                    unit.power = min(unit.power + unit.unit_cfg.CHARGE, unit.unit_cfg.BATTERY_CAPACITY)
        board.rubble[board.factory_occupancy_map != -1] = 0

        self.env_steps, state.env_steps = self.env_steps + 1, state.env_steps + 1
        agents, lost = self.agents, {player: not state.factories[player] for player in self.agents}
        over = any(lost.values()) or state.real_env_steps >= cfg.max_episode_length
        lichen = np.bincount(board.lichen_strains.ravel() + 1, board.lichen.ravel(), state.global_id + 1)[1:]
        rewards = {p: -1000 if lost[p] else int(lichen[state.teams[p].factory_strains].sum()) for p in agents}
        if over:
            self.agents = []
        observations = dict.fromkeys(agents, state.get_obs())
        return observations, rewards, dict.fromkeys(agents, over), lost, {player: {} for player in agents}

    def read(self, actions):
        """The orders as [(unit, rows) or (factory, number)]; None if any is not of the usual kind or out of range."""
        orders = []
        if not isinstance(actions, dict):
            return None
        for player, of_player in actions.items():
            if player not in self.agents or not isinstance(of_player, dict):
                return None
            units, factories = self.state.units[player], self.state.factories[player]
            for name, order in of_player.items():
                if name in factories:
                    if not isinstance(order, (int, np.integer)) or not 0 <= order <= 2:
                        return None
                    orders.append((factories[name], order))
                    continue
                rows = self.read_queue(order)
                if rows is None or name not in units:
                    return None
                orders.append((units[name], rows))
        return orders

    def read_queue(self, order):
        if isinstance(order, np.ndarray):
            if order.ndim != 2 or order.shape[1] != 6 or order.dtype.kind != "i":
                return [] if order.ndim and not len(order) else None
            rows = order.tolist()
        elif isinstance(order, list):
            if not all(isinstance(row, np.ndarray) and row.shape == (6,) and row.dtype.kind == "i" for row in order):
                return None
            rows = [row.tolist() for row in order]
        else:
            return None
        if len(rows) > self.env_cfg.UNIT_ACTION_QUEUE_SIZE:
            return None
        most = self.env_cfg.max_transfer_amount + 1
        for kind, direction, resource, amount, repeat, n in rows:
            if not (
                0 <= kind <= 5
                and 0 <= direction <= 4
                and 0 <= resource <= 4
                and 0 <= amount <= most
                and 0 <= repeat <= 9999
                and 1 <= n <= 9999
            ):
                return None
        return rows

    def refuse(self, actions):
        """Say in a sentence on what the stock engine would crash, before anything has changed."""
        if not actions:
            return  # the stock engine says it
        if not isinstance(actions, dict):
            raise ValueError(f"Actions must be a dictionary of players, got {type(actions).__name__}.")
        for player in actions:
            if player not in self.agents:
                raise ValueError(f"There is no player {player!r}: actions are those of {' and '.join(self.agents)}.")
        if self.env_cfg.BIDDING_SYSTEM and self.env_steps == 0:
            for player in self.agents:
                if player not in actions:
                    raise ValueError(f"Both players bid in the first step: the bid of {player} is missing.")
        if self.env_steps == 0 or self.state.real_env_steps < 0:
            return
        for player, of_player in actions.items():
            for name, order in of_player.items() if isinstance(of_player, dict) else ():
                if name not in self.state.units[player]:
                    continue
                if self.env_cfg.validate_action_space:
                    if not np.iterable(order):
                        kind = type(order).__name__
                        raise ValueError(f"The order of {name} must be an array or a list of rows of 6, got {kind}.")
                elif isinstance(order, (list, np.ndarray)) and np.ndim(order) > 0:
                    self.refuse_rows(name, order)

    def refuse_rows(self, name, order):
        for row in order[: self.env_cfg.UNIT_ACTION_QUEUE_SIZE]:
            try:
                with np.errstate(invalid="ignore"):
                    kind, direction, resource = np.array(row).astype(int)[:3]
            except (TypeError, ValueError, OverflowError, IndexError):
                return  # not numbers or too few: that loses the game
            if kind in (0, 1) and not -5 <= direction <= 4:
                raise ValueError(f"The order of {name} has direction {direction}: it must be 0 to 4.")
            if kind == 2 and not 0 <= resource <= 4:
                raise ValueError(f"The order of {name} picks up resource {resource}: it must be 0 to 4.")

    def possible_moves(self, wanted):
        """Those of the wanted moves that can be made."""
        board, moves = self.state.board, []
        for unit, action in wanted:
            dx, dy = STEPS[action.move_dir]
            x, y = int(unit.pos.x) + dx, int(unit.pos.y) + dy
            if 0 <= x < board.width and 0 <= y < board.height:
                owner = board.factory_occupancy_map.item(x, y)
                action.power_cost = unit.move_power_cost(board.rubble.item(x, y)) if action.move_dir else 0
                ours = owner == -1 or f"factory_{owner}" in self.state.factories[unit.team.agent]
                if ours and action.power_cost <= unit.power:
                    moves.append((unit, action))
        return moves

    def _handle_movement_actions(self, actions_by_type):
        """Make the moves; where units meet on a tile, the stock engine says who survives."""
        tiles, left, entered, movers = self.state.board.units_map, set(), {}, 0
        for unit, action in actions_by_type["move"]:
            if action.move_dir:
                x, y = unit.pos.x, unit.pos.y
                dx, dy = STEPS[action.move_dir]
                movers += 1
                left.add(f"{x},{y}")
                entered[f"{x + dx},{y + dy}"] = [unit]
        meet = len(entered) < movers or any(tile in tiles and tile not in left for tile in entered)
        if meet or any(len(units) > 1 for units in tiles.values()):
            return super()._handle_movement_actions(actions_by_type)
        for tile in left:
            del tiles[tile]
        tiles.update(entered)
        for unit, action in actions_by_type["move"]:
            if action.move_dir:
                dx, dy = STEPS[action.move_dir]
                unit.pos = FastPosition(int(unit.pos.x) + dx, int(unit.pos.y) + dy)
                unit.power -= action.power_cost
            unit.repeat_action(action)

    def add_unit(self, team, unit_type, pos):
        unit = FastUnit(team, unit_type, f"unit_{self.state.global_id}", self.env_cfg)
        unit.pos = FastPosition(int(pos[0]), int(pos[1]))
        self.state.global_id += 1
        self.state.units[team.agent][unit.unit_id] = unit
        self.state.board.units_map[self.state.board.pos_hash(unit.pos)].append(unit)
        return unit

    def add_factory(self, team, pos):
        factory = super().add_factory(team, pos)
        return None if factory is None else self.replace(factory)

    def replace(self, factory):
        """Put a factory of ours in the place of a stock one."""
        fast = FastFactory(factory.team, factory.unit_id, factory.num_id)
        fast.__dict__ = factory.__dict__  # shared, so that whoever holds the old object sees the same factory
        self.state.factories[factory.team.agent][factory.unit_id] = fast
        self.state.board.factory_map[self.state.board.pos_hash(factory.pos)] = fast
        return fast
