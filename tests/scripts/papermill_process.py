"`python -m papermill` in a process of its own that does not import papermill again, with a kernel that need not import torch again: see tests/conftest.py"
import io
import multiprocessing
import os
import runpy
import sys
import time

PRELOAD = ['papermill.__main__', 'ipykernel.kernelapp', 'torch', 'torch._dynamo', 'accelerate', 'papermill_process']


class Kernel:
    "A process forked before papermill runs; called as jupyter_client calls `subprocess.Popen`, it becomes the kernel, a child of papermill"
    stdin, stdout, stderr, returncode = io.BytesIO(), None, None, None

    def __init__(self):
        self.order, orders = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid: orders.close(); self.order.recv()                  # it has a session of its own: a signal to its group is none to ours
        else: self.order.close(); begin_kernel(orders)

    def __call__(self, command, *, cwd, env, **_): self.order.send((command, cwd or os.getcwd(), env)); return self

    def poll(self):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended: self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        while self.poll() is None: time.sleep(.01)
        return self.returncode


def begin_kernel(orders):
    "Wait for `python -m ipykernel_launcher ARGUMENTS` with its folder and environment, and do what it does"
    os.setsid(); orders.send('ready')
    try: command, folder, environment = orders.recv()
    except EOFError: os._exit(0)                                        # papermill has ended without a kernel
    os.chdir(folder); os.environ.clear(); os.environ.update(environment)
    import random

    import numpy
    import torch
    random.seed(); numpy.random.seed(); torch.seed()                    # from the system, as in a process that is not forked
    sys.argv = command[2:]
    runpy.run_module('ipykernel_launcher', run_name='__main__', alter_sys=True)
    sys.exit()


def main(arguments, folder, environment, stderr, forked):
    "What `python -m papermill ARGUMENTS` in this folder and environment does, with its exit code; stderr goes to a file. `forked`: the kernel, too"
    os.chdir(folder); os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2); os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if forked:
        from jupyter_client import launcher
        launcher.Popen = Kernel()
    sys.argv = ['papermill', *arguments]
    runpy.run_module('papermill', run_name='__main__', alter_sys=True)
