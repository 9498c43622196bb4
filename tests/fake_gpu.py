"""Runs a script's training on a GPU that is not there: every tensor has its shape, type and device, and no numbers.

    python tests/fake_gpu.py ppo_trajsep_lux.py --total-timesteps 1024 ...

PyTorch's fake tensors live on a device of their own, "gpu", which is registered here. An operation that
mixes it with the CPU fails as it would with CUDA, and each wait of the CPU for the device (a host sync)
is counted and printed at the end as JSON: [{"sync": what, "line": of the script, "count": n}]. What it
cannot show is whether CUDA has a kernel for each operation, and how fast it is.
"""

import json
import os
import sys
import types
from collections import Counter

import numpy as np
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only

real_save = torch.save
SYNCS = Counter()  # (what, line of the script)


class Backend(backend_registration._DummyBackendModule):
    """The least that torch.autocast asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def counted(name, result):
    """A method of tensors that counts a host sync by the line of the script that asked for it."""

    def method(self, *args, **kwargs):
        if isinstance(self, FakeTensor) and self.device.type != "cpu":
            frame = sys._getframe(1)
            while frame.f_code.co_filename != sys.argv[0]:
                frame = frame.f_back
            SYNCS[name.strip("_"), frame.f_lineno] += 1
        return result(self)

    setattr(torch.Tensor, name, method)


def autocast(operation):
    """An operation that autocast lowers to bfloat16, as on CUDA."""

    def lowered(*args):
        tensors = [x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operation(*tensors)

    return lowered


def zeros(tensor):
    """Stands in for the numbers of a tensor that has been brought to the CPU."""
    if tensor.device.type != "cpu":
        raise TypeError("only tensors on the CPU have .numpy().")
    return np.zeros(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def save(content, file):
    """torch.save, which brings every tensor to the CPU; what it writes has no numbers either."""

    def to_zeros(tensor):
        shape, dtype = tensor.cpu().shape, tensor.dtype
        with unset_fake_temporarily():
            return torch.zeros(shape, dtype=dtype)

    content = tree_map_only(FakeTensor, to_zeros, content)
    with unset_fake_temporarily():
        real_save(content, file)


def move_module(module, fn, recurse=True):
    """nn.Module.to for fake tensors, whose data cannot be swapped in place."""
    for child in module.children():
        move_module(child, fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(fn(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(torch.zeros(buffer.shape, dtype=buffer.dtype))  # not a constant
    return module


def main():
    sys.argv = sys.argv[1:]
    with open(sys.argv[0]) as file:
        source = file.read()
    if 'torch.device("cuda"' not in source:
        sys.exit(f"{sys.argv[0]} does not choose its device by torch.device(...).")

    backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
    lowered, others = library.Library("aten", "IMPL"), library.Library("_", "IMPL")
    for name in ("conv2d", "linear"):
        lowered.impl(name, autocast(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
    others.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
    torch.cuda.is_available = lambda: True
    torch.nn.Module._apply = move_module
    torch.Tensor.numpy = zeros
    torch.save = save
    # the environments' processes have no tensors but this one, which they could not send as a fake
    os.register_at_fork(after_in_child=lambda: setattr(torch, "from_numpy", np.asarray))
    to_cpu = torch.Tensor.cpu
    for name, result in {
        "cpu": to_cpu,
        "tolist": lambda tensor: zeros(to_cpu(tensor)).tolist(),
        "item": lambda tensor: 1.0,
        "__bool__": lambda tensor: True,  # all losses are finite
        "__float__": lambda tensor: 1.0,
        "__int__": lambda tensor: 1,
    }.items():
        counted(name, result)

    module = types.ModuleType("__main__")
    module.__file__ = sys.argv[0]
    sys.modules["__main__"] = module
    code = compile(source.replace('torch.device("cuda"', 'torch.device("gpu"'), sys.argv[0], "exec")
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        exec(code, module.__dict__)
    rows = [{"sync": name, "line": line, "count": count} for (name, line), count in sorted(SYNCS.items())]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
