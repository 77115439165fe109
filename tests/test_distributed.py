"""Two processes on this machine's CPU (gloo, through torchrun or the notebook launcher) compute what one process computes."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from browser import eventually
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


LAUNCHED = ("import sys; from pathlib import Path; from inpaint_lib import recipes\n"
            "for n, steps in enumerate(sys.argv[3:]):\n"
            "    p = recipes.TrainParameters(processes=2, device='cpu', seed=5, steps=int(steps), options=sys.argv[2], ema=.5, resume='auto' if n else 'never')\n"
            "    try: print(len(recipes.train_job(p, Path(sys.argv[1])).records), 'records')\n"
            "    except recipes.InputError as e: print('refused:', e)")


def launched(folder, *steps, options='width=0.05'):
    "What is printed by a process that calls the notebook launcher, as 40_train with processes=2 does, once for each number of steps"
    r = subprocess.run([sys.executable, '-c', LAUNCHED, str(folder), options, *map(str, steps)], capture_output=True, text=True, cwd=SCRIPTS.parent.parent)
    assert r.returncode == 0 and 'Traceback' not in r.stderr, r.stderr[-3000:]
    return r.stdout


@pytest.fixture(scope='module')
def commanded(tmp_path_factory):
    "A run of six steps by `torchrun ... inpaint train`: its first process executes the notebook"
    folder = tmp_path_factory.mktemp('commanded')
    line = [*TORCHRUN, str(Path(sys.executable).parent/'inpaint'), 'train', 'edge_connect.edge', '--preset', 'smoke', '--out', str(folder)]
    for k, v in dict(device='cpu', seed=5, steps=6, options='width=0.05', ema=.5).items(): line += ['-p', k, str(v)]
    r = subprocess.run([sys.executable, *line], capture_output=True, text=True, cwd=folder.parent)
    assert r.returncode == 0, r.stderr[-3000:]
    return folder


def test_torchrun_trains_and_its_first_process_makes_the_report(commanded):
    started, ended = (json.loads((commanded/name).read_text()) for name in ('started.json', 'run.json'))
    assert [s['processes'] for s in started['starts']] == [2] and ended['processes'] == 2 and ended['parameters']['steps'] == 6
    assert [json.loads(line)['step'] for line in open(commanded/'log.jsonl')] == [1, 2, 3, 4, 5, 6]
    assert {'40_train.ipynb', 'samples.png', 'weights.safetensors'} <= {p.name for p in commanded.iterdir()}


def test_the_notebook_launcher_goes_on_and_equals_torchrun(commanded, tmp_path):
    "3 + 3 steps by two forked processes, called twice in one kernel, = 6 steps by torchrun's two, bit for bit"
    printed = launched(tmp_path/'run', 3, 6)
    assert '3 records' in printed and '6 records' in printed
    a, b = (training.read_checkpoint(folder/'checkpoint.pt') for folder in (commanded, tmp_path/'run'))
    assert a['step'] == b['step'] == 6 and all(torch.equal(a[n][k], b[n][k]) for n in ('G', 'D', 'ema') for k in a[n])
    assert [s['processes'] for s in json.loads((tmp_path/'run'/'started.json').read_text())['starts']] == [2, 2]


def test_two_processes_train_like_one(commanded, tmp_path):
    "In float32, over six steps, the losses agree to rounding; batch and learning rate are the same"
    from inpaint_lib import recipes
    p = recipes.TrainParameters(device='cpu', seed=5, steps=6, options='width=0.05', ema=.5)
    one, two = recipes.train_job(p, tmp_path/'one').records, [json.loads(line) for line in open(commanded/'log.jsonl')]
    assert all(relative(a[k], b[k]) < 1e-3 and a['lr'] == b['lr'] for a, b in zip(one, two, strict=True) for k in ('d_adv', 'g_adv', 'fm'))


def test_a_bad_step_in_one_process_is_one_line(tmp_path):
    assert re.search(r"refused: step \d: loss term '\w+' is nan; stopped, the last checkpoint stays", launched(tmp_path, 4, options='width=0.05,lr=1e30'))
    assert 'nan' in json.loads((tmp_path/'started.json').read_text())['starts'][-1]['stopped']


def test_processes_end_with_the_one_that_started_them(tmp_path):
    "kill -9 of the notebook's process while its two processes train: they leave too, the folder is free, the run goes on"
    import psutil
    parent = subprocess.Popen([sys.executable, '-c', LAUNCHED, str(tmp_path), 'width=0.05', '3000'], cwd=SCRIPTS.parent.parent, stdout=subprocess.DEVNULL)
    log = tmp_path/'log.jsonl'
    assert eventually(lambda: log.exists() and log.stat().st_size, 60)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2 and training.in_use(tmp_path)
    parent.kill(); parent.wait()
    assert psutil.wait_procs(children, timeout=10)[1] == [] and not training.in_use(tmp_path)
