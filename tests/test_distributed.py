"""Two processes on this machine's CPU (gloo, through torchrun) compute what one process computes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inpaint_lib import training
from inpaint_lib.data import images

SCRIPTS = Path(__file__).parent/'scripts'
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']


def launch(launcher, script, *args):
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(SCRIPTS.parent.parent))
    r = subprocess.run([sys.executable, *launcher, str(SCRIPTS/script), *map(str, args)], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]


def relative(a, b): return abs(a - b)/max(abs(a), abs(b), 1e-12)


def photos_with_a_truncated_file(folder):
    "Four photographs in batches of four, one of them cut off: the two processes have different numbers of pictures"
    from PIL import Image
    folder.mkdir()
    for n in range(4): Image.fromarray(images.builtin_photograph('coffee')[n*60:n*60+64, n*90:n*90+64]).save(folder/f'{n}.png')
    (folder/'1.png').write_bytes((folder/'1.png').read_bytes()[:900])
    return folder


CASES = [('edge_connect.edge', False), ('edge_connect.inpaint', False), ('edge_connect.inpaint', True), ('context_encoder', False),
         ('structural_inpainting', False), ('partial_conv', False)]


@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    "(case, number of processes) -> what `three_steps.py` wrote; all cases after each other, as a start costs more than the steps"
    folder, out = tmp_path_factory.mktemp('steps'), {}
    cut = photos_with_a_truncated_file(folder/'photos')
    for world, launcher in ((1, []), (2, TORCHRUN)):
        files = {case: folder/f'{n}_{world}.pt' for n, case in enumerate(CASES)}
        launch(launcher, 'three_steps.py', *(a for case, file in files.items() for a in (case[0], file, cut if case[1] else 'builtin')))
        out |= {(case, world): torch.load(file, weights_only=True) for case, file in files.items()}
    return out


@pytest.mark.parametrize('name, cut', CASES)
def test_two_processes_equal_one(name, cut, steps):
    """L1 / mean(mask) divides by a statistic of the whole batch: `inpaint` fails if it is not averaged over processes first.
    Context Encoder and partial convolution run with frozen batch norm statistics"""
    one, two = (steps[(name, cut), world] for world in (1, 2))
    assert (one['world'], two['world']) == (1, 2)
    for a, b in zip(one['terms'], two['terms']):
        trained = [k for k in a if not k.startswith('m_')]
        assert len(trained) >= 2 and max(relative(a[k], b[k]) for k in trained) < 1e-9
    for part in ('weights', 'ema'):
        for k, v in one[part].items():
            if v.is_floating_point():
                assert (v - two[part][k]).abs().max() <= 1e-9*max(1., v.abs().max().item()), k


def test_a_run_under_torchrun_leaves_one_log_and_resumes_exactly(tmp_path):
    "Two processes, 3 + 3 steps = 6 steps; only the first process writes"
    launch(TORCHRUN, 'train_run.py', tmp_path/'whole', 6, tmp_path/'parts', 3)
    launch(TORCHRUN, 'train_run.py', tmp_path/'parts', 6)
    a, b = (training.read_checkpoint(tmp_path/k/'checkpoint.pt') for k in ('whole', 'parts'))
    assert all(torch.equal(a[n][k], b[n][k]) for n in ('G', 'D', 'ema') for k in a[n])
    log = [json.loads(line) for line in (tmp_path/'parts'/'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in log] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path/'parts'/'run.json').read_text())['processes'] == 2
