"""Several measurements of tools/credit_truth.py as one, say of policies of several training runs.

States stay apart, so that intervals are over all states; numbers are those of that program, but that
the shares near a death or birth are of what is left when each measurement's means are taken off.

    python tools/pool_truth.py truth-1.json truth-2.json truth-3.json --picture pooled.png
"""

import argparse
import sys
from pathlib import Path

import load
import numpy as np
from credit_truth import measured, report, stored
from estimates import ROOT

APART = 10**6  # states and games of each measurement are numbered from a multiple of this


def centred(rows):
    """Rows (game, n, part, whole, product, square) of sums over n numbers, with the means over all rows off."""
    game, n, part, whole, product, square = np.reshape(rows, (-1, 6)).T
    p, w = part.sum() / max(n.sum(), 1), whole.sum() / max(n.sum(), 1)
    product, square = product - p * whole - w * part + n * p * w, square - 2 * w * whole + n * w**2
    return np.stack((game, n, part - n * p, whole - n * w, product, square), axis=1).tolist()


def pooled(contents):
    """The truths and estimates of several measurements one after the other, as one of them has them."""
    truths = [one["truth"] | {"state": one["truth"]["state"] + APART * n} for n, one in enumerate(contents)]
    result = {"truth": {key: np.concatenate([truth[key] for truth in truths]) for key in truths[0]}, "estimates": {}}
    for name in contents[0]["estimates"]:
        several = [one["estimates"][name] for one in contents]
        fits = result["estimates"][name] = []
        for parts in zip(*several, strict=False):  # as many fits as each of them has
            fit = {key: np.concatenate([one[key] for one in parts]) for key in ("raw", "normal")}
            games = [
                (stood, game + APART * n, *gap) for n, one in enumerate(parts) for stood, game, *gap in one["gaps"]
            ]
            fit |= {"gaps": games, "parts": {}, "explained": np.mean([one["explained"] for one in parts])}
            for key in parts[0]["parts"]:
                several = [centred(one["parts"][key]) for one in parts]
                fit["parts"][key] = [(game + APART * n, *row) for n, rows in enumerate(several) for game, *row in rows]
            fits.append(fit)
    return result


def pool_truth(flags):
    load.refuse_taken(flags.json, flags.picture)
    contents = [stored(file) for file in flags.files]
    for file, one in zip(flags.files, contents, strict=True):
        if not all(type(fits) is list for fits in one.get("estimates", {"": None}).values()):
            raise load.Refusal(f"{file} is of an earlier version, without what pooling needs: measure again.")
    if len({str(measured(one["args"])) for one in contents}) > 1:
        raise load.Refusal("These files are of runs with other settings: pool runs that differ by their seed only.")
    if len({(one["flags"]["steps"], one["flags"]["near_steps"], one["flags"]["long_steps"]) for one in contents}) > 1:
        raise load.Refusal("These files look ahead by other numbers of steps: pool those with the same --steps.")
    content = pooled(contents) | {"flags": contents[0]["flags"], "run": ", ".join(one["run"] for one in contents)}
    content["events"] = sum(one["events"] for one in contents)
    report(load.import_script(ROOT / "ppo_trajsep_lux.py"), content, flags.json, flags.picture)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path, help="what credit_truth.py --json wrote", metavar="FILE.json")
    parser.add_argument("--json", type=Path, help="write all numbers", metavar="FILE")
    parser.add_argument("--picture", type=Path, help="draw truth and estimates", metavar="FILE.png")
    try:
        pool_truth(parser.parse_args())
    except (load.Refusal, OSError) as error:
        sys.exit(str(error))
