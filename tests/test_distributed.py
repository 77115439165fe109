"""Two processes on this machine's CPU (gloo, through torchrun) compute what one process computes."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent/'scripts'/'three_steps.py'


def run(launcher, name, out):
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(SCRIPT.parent.parent.parent))
    r = subprocess.run([sys.executable, *launcher, str(SCRIPT), name, str(out)], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    return torch.load(out, weights_only=True)


def relative(a, b): return abs(a - b)/max(abs(a), abs(b), 1e-12)


@pytest.mark.parametrize('name', ['edge_connect.edge', 'edge_connect.inpaint'])
def test_two_processes_equal_one(name, tmp_path):
    "L1 / mean(mask) divides by a statistic of the whole batch: `inpaint` fails if it is not averaged over processes first"
    one = run([], name, tmp_path/'one.pt')
    two = run(['-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '29617'], name, tmp_path/'two.pt')
    assert (one['world'], two['world']) == (1, 2)
    for a, b in zip(one['terms'], two['terms']):
        trained = [k for k in a if not k.startswith('m_')]
        assert len(trained) >= 4 and max(relative(a[k], b[k]) for k in trained) < 1e-9
    for part in ('weights', 'ema'):
        for k, v in one[part].items():
            if v.is_floating_point():
                assert (v - two[part][k]).abs().max() <= 1e-9*max(1., v.abs().max().item()), k
