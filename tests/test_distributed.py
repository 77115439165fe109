"""Two processes on this machine's CPU (gloo, through torchrun) compute what one process computes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inpaint_lib import training

SCRIPTS = Path(__file__).parent/'scripts'
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']


def launch(launcher, script, *args):
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(SCRIPTS.parent.parent))
    r = subprocess.run([sys.executable, *launcher, str(SCRIPTS/script), *map(str, args)], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]


def run(launcher, name, out):
    launch(launcher, 'three_steps.py', name, out)
    return torch.load(out, weights_only=True)


def relative(a, b): return abs(a - b)/max(abs(a), abs(b), 1e-12)


@pytest.mark.parametrize('name', ['edge_connect.edge', 'edge_connect.inpaint'])
def test_two_processes_equal_one(name, tmp_path):
    "L1 / mean(mask) divides by a statistic of the whole batch: `inpaint` fails if it is not averaged over processes first"
    one = run([], name, tmp_path/'one.pt')
    two = run(TORCHRUN, name, tmp_path/'two.pt')
    assert (one['world'], two['world']) == (1, 2)
    for a, b in zip(one['terms'], two['terms']):
        trained = [k for k in a if not k.startswith('m_')]
        assert len(trained) >= 4 and max(relative(a[k], b[k]) for k in trained) < 1e-9
    for part in ('weights', 'ema'):
        for k, v in one[part].items():
            if v.is_floating_point():
                assert (v - two[part][k]).abs().max() <= 1e-9*max(1., v.abs().max().item()), k


def test_a_run_under_torchrun_leaves_one_log_and_resumes_exactly(tmp_path):
    "Two processes, 3 + 3 steps = 6 steps; only the first process writes"
    launch(TORCHRUN, 'train_run.py', tmp_path/'whole', 6)
    launch(TORCHRUN, 'train_run.py', tmp_path/'parts', 3)
    launch(TORCHRUN, 'train_run.py', tmp_path/'parts', 6)
    a, b = (training.read_checkpoint(tmp_path/k/'checkpoint.pt') for k in ('whole', 'parts'))
    assert all(torch.equal(a[n][k], b[n][k]) for n in ('G', 'D', 'ema') for k in a[n])
    log = [json.loads(line) for line in (tmp_path/'parts'/'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in log] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path/'parts'/'run.json').read_text())['processes'] == 2
