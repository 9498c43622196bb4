"""Play one map and write a page that shows who gets credit for what, for any browser.

The page is one file that needs nothing else. Advantages are computed over the whole episode by the
functions of the script that made the run, then normalised as in its loss; beside them stands what
every entity would have got from one trajectory for the whole team ("What if shared?").
The script beside the model is run as a program: watch only runs that you trust.

    python tools/watch.py runs/NAME
"""

import argparse
import base64
import gzip
import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import load
import numpy as np
import torch
from branches import QUICK, quick_truth
from load import call
from PIL import Image, ImageColor, ImageDraw
from replay import Tape

ACTIONS = (  # the scripts' names of what units and factories do
    ("NO_OP", "UP", "RIGHT", "DOWN", "LEFT", "DIG", "DELIVER", "PICK_UP"),
    ("NO_OP", "BUILD_LIGHT", "BUILD_HEAVY", "WATER"),
)
APART = {"slot", "id", "kind", "queued", "pos"}  # what a row of a View holds beside stocks


# ---- playing


def play(script, args, agent, map_seed, steps, tape, truths=0):
    """One game, the same as in tools/evaluate.py: a dictionary per step, and the rollout of the first side."""
    env, frames, rollout, over = script.LuxEnv(args), [], defaultdict(list), False
    tape = Tape(env.engine) if tape else None
    generator = torch.Generator().manual_seed(map_seed)
    obs, _ = env.reset(options={"map_seed": map_seed}, seed=map_seed)

    def note_values():  # they jitter with the symmetry of the view: the mean over all eight
        eight = [script.observe(env.views[0], env.masks[0], symmetry) for symmetry in range(8)]
        batch = {key: torch.from_numpy(np.stack([view[key] for view in eight])) for key in eight[0]}
        rollout["values"].append(call(agent.get_value, {"obs": batch}).mean(0, keepdim=True))  # (1, num_slots or 1)
        return eight[0].keys()

    while not over and len(frames) < steps:
        seen = note_values()
        for key in seen - {"planes"}:
            rollout[key].append(torch.from_numpy(obs[key][:1]))
        view, mask, symmetry = env.views[0], env.masks[0], env.symmetry
        probs, action = load.act(agent, obs, generator)
        due = truths and len(frames) % -(-steps // truths) == 0
        truth = quick_truth(agent, env, obs, action[0], probs[0], args.gamma) if due else None
        # from the directions that the network saw to the map's
        units, probs, chosen = slice(args.max_units), probs[0].numpy().copy(), action[0].numpy().copy()
        chosen[units] = script.TURNED_BACK[symmetry][chosen[units]]
        probs[units] = probs[units][:, script.TURNED[symmetry]]
        before = env.ids[0]
        obs, _, over, _, _ = env.step(action.numpy())
        for key in obs.keys() - seen:  # of the step before: reward, done ...
            rollout[f"{key}s"].append(torch.from_numpy(obs[key][:1]).float())
        percent = np.where(mask, np.rint(100 * probs), -1).astype(int)  # -1: masked
        frame = {"view": view, "percent": percent, "action": chosen, "meters": env.engine.meters, "truth": truth}
        lost = [name is not None and name not in env.ids[0] for name in before]
        frames.append(frame | {"ice": int(env.stats[0]["ice_transferred"]), "lost": lost})
    note_values()
    return frames, {key: torch.stack(values) for key, values in rollout.items()}, env.engine.env_cfg, tape


# ---- credit


def credit(script, args, rollout):
    """What each slot was paid, its value, its own advantage and that of a shared trajectory: (steps, num_slots)."""
    known = {**rollout, **asdict(args), "entity_mask": rollout["kind"] != script.EMPTY}
    known["group"] = call(script.group_index, known)
    for name in (
        "team_reward",
        "blend_rewards",
        "decoupled_rewards",
    ):  # some scripts pay for more than one's own
        if hasattr(script, name):
            known["rewards"] = call(getattr(script, name), known)
    known["reward"], advantages = known["rewards"], []
    for group in (known["group"], torch.zeros_like(known["group"])):
        groups = {"group": group, "total_groups": int(group.max()) + 1}
        trajectories = call(script.separate_trajectories, known | groups)
        x = call(script.compute_gae, known | {"trajectories": trajectories})  # (steps, 1, groups or 1)
        x = script.normalize(x, trajectories.choice)
        advantages.append(x.expand(group.shape) if x.shape[-1] == 1 else x.gather(-1, group))
    columns = {"reward": known["rewards"], "value": known["values"][:-1]}
    columns |= {"own": advantages[0], "shared": advantages[1]}
    return {name: x.expand(group.shape)[:, 0].numpy() for name, x in columns.items()}


def entities(script, frames, columns):
    """A dictionary for each entity that ever was, with a list per quantity over the steps of its life."""
    ours, theirs = {}, {}
    for t, frame in enumerate(frames):
        view = frame["view"]
        for row in (*view.units, *view.factories):
            slot, stocks = int(row["slot"]), [name for name in row.dtype.names if name not in APART]
            name, kind = view.ids[slot], int(row["kind"]) if "kind" in row.dtype.names else script.FACTORY
            new = {"kind": kind, "slot": slot, "born": t, "did": {}, "truth": {}, "stock": {key: [] for key in stocks}}
            new |= {key: [] for key in ("tile", "action", "probs", *columns)}
            entity = ours.setdefault(name, new)
            entity["tile"].append(int(row["pos"] @ (view.size, 1)))
            entity["action"].append(int(frame["action"][slot]))
            entity["probs"].append(frame["percent"][slot].tolist())
            entity["lost"] = bool(frame["lost"][slot])
            if frame["truth"] is not None and np.isfinite(frame["truth"][0, slot]):
                entity["truth"][t] = [round(float(x), 5) for x in frame["truth"][:, slot]]
            for key in stocks:
                entity["stock"][key].append(int(row[key]))
            for key, column in columns.items():
                entity[key].append(round(float(column[t, slot]), 4))
            for key, meter in frame["meters"].items():
                if meter.get(name):
                    entity["did"].setdefault(key, {})[t] = int(meter[name])
        for name, foe in {**view.obs["units"][view.enemy], **view.obs["factories"][view.enemy]}.items():
            kind = {"LIGHT": script.LIGHT, "HEAVY": script.HEAVY}.get(foe.get("unit_type"), script.FACTORY)
            foe_row = theirs.setdefault(name, {"kind": kind, "born": t, "tile": []})
            foe_row["tile"].append(int(np.array(foe["pos"]) @ (view.size, 1)))
    for name, entity in ours.items():
        entity["name"] = f"{('', 'light', 'heavy', 'factory')[entity['kind']]} {name.split('_')[-1]}"
    return list(ours.values()), list(theirs.values())


def moments(entities, shared):
    """Where one shared trajectory goes wrong most: at most eight of each kind, by step."""
    found, owner = {"posthumous": [], "inherited": [], "diluted": []}, {}
    for index, entity in enumerate(entities):  # in the order of their births
        name, born, last = entity["name"], entity["born"], entity["born"] + len(entity["own"]) - 1
        heir = f"{name}, in the place of {owner[entity['slot']]}" if entity["slot"] in owner else f"{name}, newly built"
        owner[entity["slot"]] = name
        for t, own in enumerate(entity["own"], start=born):
            team, worked = shared[t], any(t in steps for steps in entity["did"].values())
            both = f"own {own:+.2f}, shared {team:+.2f}"
            if entity["lost"] and t > last - 10 and team > max(own, 0):
                text = f"{name}, lost in step {last}, is praised for what others do: {both}"
                found["posthumous"].append((team - own, t, index, text))
            if born and t == born and abs(team) > abs(own) + 0.5:
                text = f"{heir}, makes its first move, which gets what others had begun: {both}"
                found["inherited"].append((abs(team) - abs(own), t, index, text))
            if worked and own > max(1, 2 * team):
                found["diluted"].append((own - team, t, index, f"{name} earns, and all get the same: {both}"))
    best = []
    for kind, rows in found.items():
        kept = []
        for row in sorted(rows, reverse=True):
            if len(kept) < 8 and all(abs(row[1] - other[1]) > 10 for other in kept):
                kept.append(row)
        best += [(kind, *row[1:]) for row in kept]
    return sorted(best, key=lambda row: row[1])


# ---- files


def changes(layers):
    """What changed from one layer to the next, flat: [tile, value, tile, value ...] for each step."""
    pairs = zip(layers[:1] + layers, layers, strict=False)
    at = [(np.flatnonzero(old != new), new.ravel()) for old, new in pairs]
    return [np.stack((tiles, new[tiles]), 1).ravel().tolist() for tiles, new in at]


def page(content):
    """The page with its data in it: JSON, gzipped, base64."""
    packed = gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)
    template = Path(__file__).with_name("watch.html").read_text(encoding="utf-8")
    return template.replace("@DATA@", base64.b64encode(packed).decode())


def pictures(frames, scale=8):
    """The map alone, every tenth step: units blue (heavy ones dark), factories orange, the other side black."""
    ice, ore, lichen, own, light, heavy = colours = ["#96d7e6", "#967864", "#78be6e", "#d95f02", "#6aaed6", "#08306b"]
    palette = Image.new("P", (1, 1))
    greys = [v for v in range(131, 240, 4) for _ in "rgb"]
    palette.putpalette([v for colour in (*colours, "black", "white") for v in ImageColor.getrgb(colour)] + greys)
    for frame in frames[::10]:
        view, board = frame["view"], frame["view"].board
        ground = np.repeat(235 - board["rubble"].astype(int)[..., None], 3, 2)
        for name, colour in (("ice", ice), ("ore", ore), ("lichen", lichen)):
            ground[board[name] > 0] = ImageColor.getrgb(colour)
        image = Image.fromarray(np.uint8(ground).transpose(1, 0, 2)).resize([view.size * scale] * 2, Image.NEAREST)
        draw = ImageDraw.Draw(image)
        things = [(foe["pos"], 1, "black") for foe in view.obs["factories"][view.enemy].values()]
        things += [(foe["pos"], 0, "black") for foe in view.obs["units"][view.enemy].values()]
        things += [(row["pos"], 1, own) for row in view.factories]
        things += [(row["pos"], 0, ("", light, heavy)[row["kind"]]) for row in view.units]
        for pos, r, colour in things:
            box = [(int(v) - r) * scale for v in pos] + [(int(v) + r + 1) * scale - 1 for v in pos]
            (draw.rectangle if r else draw.ellipse)(box, fill=colour, outline="white")
        yield image.quantize(palette=palette, dither=Image.Dither.NONE)


def watch(flags):
    path = flags.run.absolute()
    title = path.name if path.is_dir() else f"{path.parent.name}-{path.stem}"
    output = flags.output or Path(f"{title}-{flags.map_seed}.html")
    load.refuse_taken(output, flags.gif, flags.replay)
    script, args, agent = load.load(flags.run, flags.best, flags.script, flags.map_size)
    if not 0 <= flags.map_seed < script.NUM_EVAL_MAPS or flags.steps < 1 or flags.truth < 0:
        raise load.Refusal(f"--map-seed must be from 0 to {script.NUM_EVAL_MAPS - 1}, --steps at least 1, --truth 0.")
    if flags.truth and args.opponent == "self":
        raise load.Refusal(f"{flags.run} was trained in self-play: --truth is for the idle opponent only.")
    if flags.truth and hasattr(agent, "hidden"):
        raise load.Refusal(f"{flags.run} has a policy with a memory, which the branches of --truth cannot share.")
    parts = {name: script for name in ("group_index", "separate_trajectories", "compute_gae", "normalize")}
    for name, part in {**parts, "get_value": agent}.items():
        if not hasattr(part, name):
            raise load.Refusal(f"The script of {flags.run} has no {name}: there is no credit of its kind to show.")
    if hasattr(script, "dist"):  # it averages over several processes; here it is the only one
        script.dist.init_process_group("gloo", store=script.dist.HashStore(), rank=0, world_size=1)
    try:
        frames, rollout, rules, tape = play(script, args, agent, flags.map_seed, flags.steps, flags.replay, flags.truth)
    except script.Refusal as error:
        raise load.Refusal(str(error)) from None
    columns = credit(script, args, rollout)
    shared = [round(float(x), 4) for x in columns.pop("shared")[:, 0]]
    ours, theirs = entities(script, frames, columns)
    view, boards = frames[0]["view"], [frame["view"].board for frame in frames]
    lichen = [np.where(frame["view"].own_lichen, 1, -1) * frame["view"].board["lichen"] for frame in frames]
    labels = []
    for kind, part in zip(ACTIONS, (slice(args.max_units), slice(args.max_units, None)), strict=True):
        names = {getattr(script, name): name.lower().replace("_", " ") for name in kind if hasattr(script, name)}
        legal = np.any([frame["percent"][part] >= 0 for frame in frames], axis=(0, 1))
        more = range(script.NUM_ACTIONS) if not labels else np.flatnonzero(legal).tolist()  # a script's own actions
        numbers = sorted({*names, *more})
        labels.append({number: names.get(number, f"action {number}") for number in numbers})
    content = {"run": title, "script": script.__doc__.splitlines()[0], "map_seed": flags.map_seed}
    content |= {"size": view.size, "steps": len(frames), "cycle": rules.CYCLE_LENGTH, "day": rules.DAY_LENGTH}
    content["alive"] = getattr(args, "reward_factory_alive", None)  # what a factory gets for nothing else
    content |= {"truths": [t for t, frame in enumerate(frames) if frame["truth"] is not None], "look": QUICK[0]}
    content |= {"rubble": boards[0]["rubble"].ravel().tolist(), "lichen_changes": changes(lichen), "labels": labels}
    content |= {f"{name}_tiles": np.flatnonzero(boards[0][name]).tolist() for name in ("ice", "ore")}
    content |= {"rubble_changes": changes([board["rubble"] for board in boards]), "entities": ours, "theirs": theirs}
    content |= {"shared": shared, "ice": [frame["ice"] for frame in frames], "moments": moments(ours, shared)}
    output.write_text(page(content), encoding="utf-8")
    print(f"{output}: {len(frames)} steps, {len(ours)} entities, {output.stat().st_size / 1000:.0f} KB")
    if flags.gif:
        first, *rest = pictures(frames)
        durations = [100] * len(rest) + [2000]  # ms: the end stays
        first.save(flags.gif, "GIF", save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)
        print(f"{flags.gif}: {flags.gif.stat().st_size / 1000:.0f} KB")
    if flags.replay:
        tape.write(flags.replay)
        print(f"{flags.replay}: {flags.replay.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    load.add_arguments(parser)
    parser.add_argument("--map-seed", type=int, default=0, help="which evaluation map (default: 0)", metavar="N")
    parser.add_argument("--map-size", type=int, help="another map size than the run's", metavar="N")
    parser.add_argument("--steps", type=int, default=1000, help="stop after so many steps", metavar="N")
    text = "simulate in N states what each action really brings (some 10 seconds a state)"
    parser.add_argument("--truth", type=int, default=0, help=text, metavar="N")
    parser.add_argument("-o", "--output", type=Path, help="the page (default: NAME-MAP.html)", metavar="FILE.html")
    parser.add_argument("--gif", type=Path, help="the map alone as well, every tenth step", metavar="FILE")
    parser.add_argument("--replay", type=Path, help="the official replay format as well", metavar="FILE.json")
    try:
        watch(parser.parse_args())
    except (load.Refusal, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
