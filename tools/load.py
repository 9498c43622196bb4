"""A run's script and policy, for the programs in this folder: a model file is checked before it is used."""

import importlib.util
import inspect
import os
import stat
import sys
import types
import typing
import zipfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tools play on the CPU, one map at a time
import torch  # noqa: E402

torch.set_num_threads(1)  # on one small map more of them mostly wait: beside a training five times as long


class Refusal(Exception):
    """What the user can mend; the message says how."""


def add_arguments(parser):
    """The flags that say which policy, the same in every tool."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or a model file")
    parser.add_argument("--best", action="store_true", help="play best.pt of the folder, not its newest policy")
    parser.add_argument("--script", type=Path, help="the script that made the model (default: script.py beside it)")


def load(run, best=False, script=None, map_size=None):
    """The script of a run as a module, its settings and its policy; Refusal says what is wrong with them."""
    path = run / ("best.pt" if best else "model.pt") if run.is_dir() else run
    model = read(path)
    source = script or path.with_name("script.py")
    if not source.is_file():
        raise Refusal(f"There is no {source}: say with --script where {model['script'][:80]}.py is, which made {path}.")
    # a run's own copy is called script.py, whichever it is; its settings and tensors are compared all the same
    if source.stem not in ("script", model["script"]):
        raise Refusal(f"{path} was made by {model['script'][:80]}.py, not by {source.name}: give that to --script.")
    module = import_script(source)
    args = check_settings(model["args"], module, path)
    check_tensors(model["model"], module.Agent, args, path)
    cpu = torch.cpu.get_capabilities()  # the tools play on the CPU
    args.bf16 = args.bf16 and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    args.map_size = args.map_size if map_size is None else map_size
    try:
        module.check_args(args)
    except module.Refusal as error:
        raise Refusal(str(error)) from None
    agent = module.Agent(args)
    agent.load_state_dict(model["model"])
    return module, args, agent.eval().requires_grad_(False)


def refuse_taken(*paths):
    """Refuse files that a tool is to write and that are there, or have no folder to be in; None for no file."""
    paths = [path for path in paths if path]
    if len({path.absolute() for path in paths}) < len(paths):
        raise Refusal(f"Two things cannot be written to {max(paths, key=paths.count)}: give another name to one.")
    for path in paths:
        if path.exists() or not path.absolute().parent.is_dir():
            what = "exists already" if path.exists() else "is in a folder that does not exist"
            raise Refusal(f"{path} {what}: give another name.")


def import_script(path):
    """The script at a path as a module; an error in it keeps its traceback."""
    name = f"script at {path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if missing := {"Args", "Agent", "LuxEnv", "Refusal", "check_args"} - set(vars(module)):
        raise Refusal(f"{path} is not a training script: it has no {min(missing)}.")
    return module


def read(path):
    """The content of a model file: no code in it is run, no memory taken that the file does not fill."""
    if not path.exists():
        raise Refusal(f"There is no {path}: give a run's folder that has one, or a model file.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise Refusal(f"{path} is not a regular file: give a run's folder, or a model file.")
    size = path.stat().st_size
    if size == 0:
        raise Refusal(f"{path} is empty: give another model file.")
    with open(path, "rb") as file:
        packed = zipfile.is_zipfile(path) or file.read(2) == b"PK"
    if not packed:
        raise Refusal(f"{path} is not a model file: give one that a training script wrote.")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise Refusal(f"{path} unpacks to more than it holds: no training script wrote it.")
            if archive.testzip():  # PyTorch does not look at the checksums
                raise ValueError
        model = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {key: type(model[key]) for key in ("script", "args", "model")}
    except Refusal:
        raise
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        raise Refusal(f"{path} is damaged, or no model file: give another.") from error
    if kinds["script"] is not str or not issubclass(kinds["args"], dict) or not issubclass(kinds["model"], dict):
        raise Refusal(f"{path} is not a model file: give one that a training script wrote.")
    return model


def check_settings(settings, module, path):
    """The script's Args from the settings of a model file: all of them, each of its type and in its range."""
    hints = typing.get_type_hints(module.Args)
    for name in hints.keys() ^ settings.keys():
        what = "lacks the setting" if name in hints else "has an unknown setting"
        raise Refusal(f"{path} {what} {str(name)[:80]}: play it with the script that made it (--script).")
    for name, hint in hints.items():
        if not fits(settings[name], hint):
            raise Refusal(f"{path}: the setting {name} is wrong: play a model file that nobody has edited.")
    try:
        args = module.Args(**settings)
        module.check_args(args)
    except module.Refusal as error:
        raise Refusal(f"{path}: {error}") from None
    return args


def fits(value, hint):
    """Whether a setting is one of its field's choices, or of its type, or of one of its types."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    return type(value) is (origin or hint) or (type(value), hint) == (int, float)


def check_tensors(tensors, network, args, path):
    """Refuse tensors that are not those of the network that the settings ask for, or not finite."""
    with torch.device("meta"):  # shapes without memory, however many channels
        expected = network(args).state_dict()
    for name in expected.keys() ^ tensors.keys():
        what = "lacks the tensor" if name in expected else "has an unknown tensor"
        raise Refusal(f"{path} {what} {str(name)[:80]}: play it with the script that made it (--script).")
    for name, tensor in tensors.items():
        kinds = [(x.shape, x.dtype, x.layout) for x in (tensor, expected[name]) if isinstance(x, torch.Tensor)]
        if len(kinds) < 2 or kinds[0] != kinds[1] or tensor.device.type != "cpu":
            raise Refusal(f"{path}: the tensor {name} does not fit the settings: play it with the script that made it.")
        if not tensor.isfinite().all():
            raise Refusal(f"{path}: the tensor {name} is not finite: play an earlier model of the run, as best.pt.")


def call(function, known):
    """Call a script's function with what its parameters are named after, since scripts differ in these."""
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in known:
            given[name] = known[name]
        elif parameter.default is parameter.empty:
            raise Refusal(f"{function.__name__} of this script needs {name!r}, which this tool has not.")
    return function(**given)


def act(agent, obs, generator, greedy=False):
    """A policy's answer to an environment's observation: probabilities and the actions (sides, num_slots)."""
    probs = agent.get_distribution({key: torch.from_numpy(value) for key, value in obs.items()}).probs
    if greedy:
        return probs, probs.argmax(-1)
    return probs, probs.flatten(0, 1).multinomial(1, generator=generator).view(probs.shape[:2])
