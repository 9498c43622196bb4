"""Make a folder of a trained policy that plays in the official kit of Lux AI Season 2.

The folder holds main.py (tools/submission.py), and the run's script.py and model.pt. It needs Python 3.10 or later
and what the script imports; the competition's own image is older and cannot load it.

    python tools/export.py runs/NAME FOLDER
"""

import argparse
import shutil
import sys
from pathlib import Path

import load
import torch

TEMPLATE = Path(__file__).with_name("submission.py")


def export(flags):
    if flags.folder.exists():
        raise load.Refusal(f"{flags.folder} exists already: give the name of a new folder.")
    script, _, _ = load.load(flags.run, flags.best, flags.script)
    path = flags.run / ("best.pt" if flags.best else "model.pt") if flags.run.is_dir() else flags.run
    model = load.read(path)
    flags.folder.mkdir(parents=True)
    main = TEMPLATE.read_text()
    (flags.folder / "main.py").write_text(main.replace("GREEDY = False", "GREEDY = True") if flags.greedy else main)
    shutil.copy(script.__file__, flags.folder / "script.py")
    # of a checkpoint only what it takes to play
    torch.save({key: model[key] for key in ("script", "args", "model")}, flags.folder / "model.pt")
    print(f"{flags.folder} is written; on Python 3.10 it plays by: luxai-s2 {flags.folder}/main.py OTHER/main.py")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    load.add_arguments(parser)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write it; must not exist")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest action instead of sampling")
    try:
        export(parser.parse_args())
    except (load.Refusal, OSError) as error:
        sys.exit(str(error))
