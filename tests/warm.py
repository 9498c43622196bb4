"""Programs started from a process that has imported torch already, which saves each of them some six seconds.

A server, one a test process, imports what the scripts import and computes nothing. Each program is a fork of it, in
a session of its own, that runs the file as `__main__`. Else it is as one that was started with `python FILE`: its
signals, processes and exit status are its own. What has to be said before Python starts (`OMP_NUM_THREADS`,
`PYTHONHASHSEED`) needs a real start.
"""

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


class Warm:
    """What `subprocess.Popen` is for a program with these arguments; it has ended when no process of it lives."""

    server, lock = None, threading.Lock()

    def __init__(self, args, cwd):
        with Warm.lock:
            Warm.server = Warm.server or Warm.begin()
        self.args, self.returncode = [str(word) for word in args], None
        self.files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
        self.socket, there = socket.socketpair()
        job = json.dumps({"args": self.args, "cwd": str(cwd or os.getcwd()), "env": dict(os.environ)}).encode()
        socket.send_fds(Warm.server, [job], [there.fileno(), *[file.fileno() for file in self.files]])
        there.close()
        self.lines = self.socket.makefile()
        self.pid = int(self.lines.readline())

    @staticmethod
    def begin():
        """Start the server, and have it end with this process."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(there.fileno())]
        process = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
        there.close()
        atexit.register(lambda: (here.close(), process.wait()))
        return here

    def poll(self, timeout=0.0):
        if self.returncode is None and select.select([self.socket], [], [], timeout)[0]:
            self.returncode = int(self.lines.readline())
        return self.returncode

    def communicate(self, timeout=None):
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(os.pread(file.fileno(), 1 << 30, 0).decode() for file in self.files)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


def start(args, cwd=None, timeout=900):
    """What `subprocess.run` returns for `python` with these arguments."""
    process = Warm(args, cwd)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def serve(jobs):
    """Wait for programs; return in the process of each, as its `sys.argv`. Ends with the test process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who see to a program
    while True:
        job, fds, _, _ = socket.recv_fds(jobs, 1 << 20, 3)
        if not job:
            os._exit(0)
        if os.fork() == 0:
            break
        for fd in fds:
            os.close(fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    said, out, err = fds
    living, held = os.pipe()  # the program and its workers hold the second end
    if pid := os.fork():
        for fd in (held, out, err):
            os.close(fd)
        os.write(said, b"%d\n" % pid)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.read(living, 1)  # nothing, when the last one is gone
        os.write(said, b"%d\n" % status)
        os._exit(0)
    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in (living, said, out, err, jobs.fileno()):
        os.close(fd)
    jobs.detach()
    job = json.loads(job)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    return job["args"]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch._dynamo  # an optimiser imports it
    import torch.utils.tensorboard  # noqa: F401

    import ppo_trajsep_lux  # noqa: F401

    del sys.modules["ppo_trajsep_lux"]
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[:2] = [str(Path(sys.argv[0]).resolve().parent)]  # in the place of this file's folder and the one above
    runpy.run_path(sys.argv[0], run_name="__main__")
