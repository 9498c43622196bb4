"""Every script but the original, started as a user would start it: two iterations, and a run that goes on."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_script import ROOT, SCRIPT, curve, one_sentence, read_csv, run, together

FLAGS = "--map-size 24 --factories-per-team 1 --max-units 8 --channels 4 --num-envs 2 --num-steps 32 "
FLAGS += "--num-minibatches 2 --update-epochs 1 --total-timesteps 128 --no-cuda --run-name test"
OTHERS = {  # flags that make a script differ from its parent, or that are worth a try
    "ablations/gpae_lux.py": "--reuse 2",
    "mappo_lux.py": "--opponent self",
    "ablations/trajsep_own_reward_lux.py": "--own-reward 0.5",
    "ablations/trajsep_mixed_lux.py": "--no-separate-factories",
    "ablations/trajsep_grouping_lux.py": "--grouping closest-heavy",
    "ablations/trajsep_poster_norms_lux.py": "--small",
    "ablations/trajsep_sample_reduction_lux.py": "--keep top-advantage",
}
SCRIPTS = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*_lux.py"), *ROOT.glob("ablations/*_lux.py"))]
SCRIPTS = sorted({*SCRIPTS} - {SCRIPT.name, "ablations/trajsep_multigpu_lux.py"})  # which have tests of their own


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a run of two iterations of each script, by its path."""

    def start(script):
        cwd = tmp_path_factory.mktemp(Path(script).stem)
        run(cwd, f"{FLAGS} {OTHERS.get(script, '')}", ROOT / script)
        return cwd / "runs/test"

    scripts = [*SCRIPTS, SCRIPT.name]
    return dict(zip(scripts, together(*[partial(start, script) for script in scripts]), strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_trains(folders, script):
    folder = folders[script]
    rows = read_csv(folder / "progress.csv")
    assert [row["global_step"] for row in rows] == ["64", "128"]
    for row in rows:
        assert all(np.isfinite(float(row[key])) for key in row if key.startswith("losses/"))
        assert float(row["losses/grad_norm"]) > 0
    if "sample_reduction" in script:  # of each step one cell
        assert all(0 < float(row["charts/active_cells"]) <= 1 for row in rows)
    model = torch.load(folder / "model.pt", weights_only=True)
    assert model["script"] == Path(script).stem and model["args"]["channels"] == 4
    assert all(tensor.isfinite().all() for tensor in model["model"].values())
    assert (folder / "script.py").read_bytes() == (ROOT / script).read_bytes()


def test_checkpoints_hold_no_more_than_their_tensors(folders):
    """Of a tensor that is a view of a larger one, torch would save the whole."""
    for script, folder in folders.items():
        held, stack = [], [torch.load(folder / "checkpoint.pt", weights_only=True)]
        while stack:
            item = stack.pop()
            if isinstance(item, torch.Tensor):
                held.append(item)
            elif isinstance(item, (dict, list, tuple)):
                stack.extend(item.values() if isinstance(item, dict) else item)
        assert len(held) > 20
        for tensor in held:
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), script


def test_all_cells_keep_their_values_in_the_loss_if_asked(tmp_path):
    run(
        tmp_path, f"{FLAGS} --keep top-advantage --no-reduce-values", ROOT / "ablations/trajsep_sample_reduction_lux.py"
    )
    # the factory acts in every step; the first unit comes in the second
    assert all(float(row["charts/active_cells"]) > 1 for row in read_csv(tmp_path / "runs/test/progress.csv"))


def test_as_many_samples_as_groups_are_the_parent_to_the_bit(folders, tmp_path):
    parent = curve(folders[SCRIPT.name])
    script = ROOT / "ablations/trajsep_sample_reduction_lux.py"
    run(tmp_path, f"{FLAGS} --keep top-return --samples-per-step 9", script)
    assert curve(tmp_path / "runs/test") == parent and len(parent) == 2


def test_a_run_with_norms_goes_on_to_the_bit(folders, tmp_path):
    """Batch norm's statistics and spectral norm's vectors are part of what a run has to know to go on."""
    script = "ablations/trajsep_poster_norms_lux.py"
    source, anchor = (ROOT / script).read_text(), "                optimizer.step()\n"
    assert source.count(anchor) == 1
    cut = tmp_path / Path(script).name
    cut.write_text(source.replace(anchor, f"                if iteration == 2: os.kill(os.getpid(), 9)\n{anchor}"))
    flags = f"{FLAGS} {OTHERS[script]} --resume"
    assert run(tmp_path, flags, cut, check=False).returncode == -9
    assert len(read_csv(tmp_path / "runs/test/progress.csv")) == 1
    run(tmp_path, flags, ROOT / script)
    whole, continued = folders[script], tmp_path / "runs/test"
    assert curve(whole) == curve(continued) and len(curve(whole)) == 2
    a, b = (torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (whole, continued))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_of_another_script_is_refused(folders):
    """One global trajectory has the same settings and the same network: only the name tells them apart."""
    folder = folders["ppo_global_lux.py"]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for script in (SCRIPT.name, "ippo_lux.py"):
        done = run(folder.parents[1], f"{FLAGS} --resume --total-timesteps 192", ROOT / script, check=False)
        one_sentence(done, "runs/test", "ppo_global_lux")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
