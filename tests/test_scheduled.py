"""Runs that a clock starts: a line of a crontab, killed and started again, and jobs made in JupyterLab (jupyter-scheduler).

Processes, kernels and the server are real ones. Whatever happens to a run, its end must equal, bit for bit, that of the
same run made here in one piece, by plain Python.
"""
import functools
import json
import random
import re
import time
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest
import torch

from browser import Server, eventually
from inpaint_lib import recipes, training
from inpaint_lib.data import images, masks

ROOT = Path(__file__).resolve().parent.parent
STEPS, KILLS = 100, 20
RUN = dict(batch_size=4, save_every=2, ema=.9, device='cpu')
LINE = dict(RUN, recipe='edge_connect.edge', preset='smoke', size=32, options='width=0.05')      # what cron gives papermill


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A function: steps -> the folder of a run that nobody interrupted and no notebook made"
    @functools.cache
    def run(steps):
        folder, threads = tmp_path_factory.mktemp('whole'), torch.get_num_threads()
        torch.set_num_threads(1)                                                                 # as in the kernels
        recipe, c, data = recipes.build(LINE['recipe'], LINE['preset'], config=dict(width=.05), run=dict(RUN, steps=steps), data=dict(size=32))
        dataset = images.PhotoDataset(images.open_source('builtin', 'train'), 32, masks.mask_sampler(data.masks))
        training.train(recipe, dataset, c, folder, progress=False)
        torch.set_num_threads(threads)
        return folder
    return run


@pytest.fixture(scope='module')
def start(begin_papermill):
    "A function: run folder, steps -> a `papermill` process on 40_train that has just begun (see `stderr` for what it says)"
    return lambda folder, steps: begin_papermill('40_train', f'{folder}.ipynb', f'{folder}.stderr', ROOT, **dict(LINE, out_dir=folder, steps=steps))


# ---------------------------------------------------------------- what a run has left
def stderr(folder): return Path(f'{folder}.stderr').read_text()[-1500:]


def read_log(folder):
    "The complete lines of log.jsonl, without times"
    path = folder/'log.jsonl'
    lines = [x for x in path.read_text().splitlines(True) if x.endswith('\n')] if path.exists() else []
    return [{k: v for k, v in json.loads(x).items() if not k.endswith('_s')} for x in lines]


def starts(folder): return json.loads((folder/'started.json').read_text())['starts']


def equal(a, b):
    "The same structure with the same bits"
    if torch.is_tensor(a): return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def check_end(folder, whole, steps):
    "Weights, checkpoint and log are those of the uninterrupted run; the rest is complete, and nothing else lies about"
    whole = whole(steps)
    here, there = (training.read_checkpoint(f/'checkpoint.pt') for f in (folder, whole))
    for k in ('step', 'config', 'run', 'G', 'D', 'opt_G', 'opt_D', 'plateau', 'window', 'ema'): assert equal(here[k], there[k]), k
    assert equal(*(training.load_weights(f/'weights.safetensors')[0] for f in (folder, whole)))
    assert read_log(folder) == read_log(whole) and [r['step'] for r in read_log(folder)] == list(range(1, steps + 1))
    run = json.loads((folder/'run.json').read_text())
    assert run['steps'] == run['last']['step'] == run['parameters']['steps'] == steps and run['warnings'] == []
    assert not list(folder.rglob('*.tmp')) and {'samples.png', 'curves.png'} <= {f.name for f in folder.iterdir()}


# ---------------------------------------------------------------- cron
def until(true, process):
    "Looks every millisecond, as long as the process lives"
    while not true() and process.is_alive(): time.sleep(.001)


def ended(p):
    "Whether a process is no more, or waits only to be buried by its parent"
    try: return p.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True


def at_moment(moment, process, folder, rng):
    "Waits for a random moment of a kind in the life of a run that has just been started; returns what else to wait for"
    if moment == 'starting': time.sleep(rng.uniform(.1, 3)); return lambda: True
    path, more = folder/'log.jsonl', rng.randint(1, 3)
    which = lambda: path.stat().st_ino if path.exists() else 0
    before = which()
    until(lambda: which() != before, process)                    # a start writes the log anew, up to where it goes on
    wanted = STEPS if moment == 'closing' else min(STEPS, len(read_log(folder)) + more)
    until(lambda: len(read_log(folder)) >= wanted, process)
    if moment == 'writing': return lambda: list(folder.glob('.checkpoint.pt.*'))
    time.sleep(rng.uniform(0, dict(training=.1, closing=1.5)[moment])); return lambda: True


def kill(process, when, both):
    "`when` it is so, kill -9 to papermill, and to its kernel if `both`; returns the seconds that the kernel outlived papermill"
    family = psutil.Process(process.pid).children(recursive=True)     # looked up before, for writing takes milliseconds
    until(when, process)
    assert process.is_alive(), 'papermill ended before it could be killed'
    for p in [psutil.Process(process.pid), *(family if both else [])]: p.kill()
    killed = time.time(); process.join()
    for p in family:
        if not ended(p) and killed - p.create_time() < 2: p.kill()     # a kernel this young may not look at its parent yet: it would wait, without work
        assert eventually(lambda: ended(p), 20), f'a kernel goes on without papermill: {p}'
    return time.time() - killed


def test_a_cron_job_killed_twenty_times_ends_as_if_nothing_had_been(start, whole, tmp_path):
    "kill -9 while it starts, trains, writes and closes: each start goes on, no step is lost or made twice"
    folder, rng, died, outlived, torn = tmp_path/'run', random.Random(0), [], [], set()
    moments = ['starting']*8 + ['training']*6 + ['writing']*4
    rng.shuffle(moments)
    for n, moment in enumerate(moments + ['closing', 'closing']):
        p = start(folder, STEPS)
        when = at_moment(moment, p, folder, rng)
        assert p.is_alive(), f'start {n} ended before it could be killed ({moment}): {stderr(folder)}'
        outlived.append(kill(p, when, both=n % 2))
        died.append((moment, len(read_log(folder)))); torn.update(folder.rglob('*.tmp'))
        if (folder/'checkpoint.pt').exists(): training.read_checkpoint(folder/'checkpoint.pt')
        assert (folder/'run.json').exists() <= (len(read_log(folder)) == STEPS)
    p = start(folder, STEPS); p.join()
    assert p.exitcode == 0, stderr(folder)
    check_end(folder, whole, STEPS)
    begun, inside = [s['step'] for s in starts(folder)], [step for moment, step in died if moment in ('training', 'writing') and step < STEPS]
    assert len(died) == KILLS and sum(step > 0 for _, step in died) >= KILLS/2 and len(inside) >= KILLS/4 and torn
    assert begun == sorted(begun) and begun[0] == 0 and len(inside) <= len(begun) <= KILLS
    print(f'\n{KILLS} kills, {len(inside)} between first and last step, {len(torn)} left half-written files; died at {died}; began at {begun}; '
          f'a kernel outlived papermill by {max(outlived[::2]):.1f} s at most')


def test_a_second_start_on_the_same_folder_is_refused(start, whole, tmp_path):
    "The first is held up while the second looks: not a byte of its folder changes. It then ends as if it had been alone"
    folder, steps = tmp_path/'run', 16
    first = start(folder, steps)
    until(lambda: len(read_log(folder)) >= 2, first)
    kernel, = psutil.Process(first.pid).children()
    kernel.suspend()
    content = lambda: {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()}
    before = content()
    assert 2 <= len(read_log(folder)) < steps, stderr(folder)
    second = start(folder, steps); second.join()
    assert second.exitcode == 1 and content() == before
    last = stderr(folder).strip().splitlines()[-1]
    assert 'another process is training in this folder' in last and str(folder) in last
    kernel.resume(); first.join()
    assert first.exitcode == 0
    check_end(folder, whole, steps)
    assert [s['step'] for s in starts(folder)] == [0]


# ---------------------------------------------------------------- jobs made in JupyterLab
class Scheduler(Server):
    "A JupyterLab whose scheduler is asked as its form does; database and staged copies are in the server's own folder"
    def ask(self, path, payload=None, method=None):
        request = urllib.request.Request(self.address(f'scheduler/{path}', token=False), method=method, headers={'Authorization': f'token {self.token}'},
                                         data=None if payload is None else json.dumps(payload).encode())
        with urllib.request.urlopen(request, timeout=30) as r: return json.loads(r.read() or 'null')

    def form(self, **parameters):
        "What the form sends for these parameters, each the text of a Python expression"
        environment, = self.ask('runtime_environments')
        return dict(name='smoke', input_uri='40_train.ipynb', runtime_environment_name=environment['name'], output_formats=['ipynb'],
                    package_input_folder=False, parameters=parameters)

    def wait(self, job, seconds=180):
        "The job, when it has ended by itself (one that has not begun yet says STOPPED)"
        finished = lambda: self.ask(f'jobs/{job}')['status'] in ('COMPLETED', 'FAILED')
        assert eventually(finished, seconds), f'{self.ask(f"jobs/{job}")}\n{self.said()}'
        return self.ask(f'jobs/{job}')

    def output(self, job):
        "The executed notebook, fetched as by the button Download"
        self.ask(f'jobs/{job}/download_files')
        assert eventually(lambda: self.ask(f'jobs/{job}')['downloaded'], 30)
        path, = (f['file_path'] for f in self.ask(f'jobs/{job}')['job_files'] if f['file_format'] == 'ipynb')
        return nbformat.read(self.folder/path, as_version=4)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lab')
    (folder/'40_train.ipynb').write_bytes((ROOT/'nbs'/'40_train.ipynb').read_bytes())
    with pytest.MonkeyPatch.context() as m:
        m.setenv('OMP_NUM_THREADS', '1')
        with Scheduler('jupyterlab', folder) as server: yield server


def quoted(v): return repr(str(v))


def test_a_job_that_is_stopped_in_jupyterlab_is_finished_by_a_schedule(lab, whole, tmp_path):
    "A job is made and stopped while it trains; a definition of the same run is made, listed, run to its end and deleted"
    folder, steps = tmp_path/'run', 60
    given = dict(LINE, steps=steps, options=LINE['options'] + ',tensorboard=false', out_dir=str(folder))
    job = lab.ask('jobs', lab.form(**{k: repr(v) for k, v in given.items()}))['job_id']                   # steps = 60
    assert eventually(lambda: len(read_log(folder)) >= 2, 180), lab.said()
    lab.ask(f'jobs/{job}', dict(status='STOPPED'), 'PATCH')
    assert lab.ask(f'jobs/{job}')['status'] == 'STOPPED' and not (folder/'run.json').exists()
    texts = {k: quoted(v) for k, v in given.items()}                                                     # steps = '60'
    made = lab.ask('job_definitions', lab.form(**texts) | dict(schedule='0 3 * * *', timezone='UTC'))['job_definition_id']
    listed, = lab.ask('job_definitions')['job_definitions']
    assert listed['job_definition_id'] == made and listed['schedule'] == '0 3 * * *' and listed['active']
    again = lab.wait(lab.ask(f'job_definitions/{made}/jobs', {})['job_id'])
    assert again['status'] == 'COMPLETED', again['status_message']
    check_end(folder, whole, steps)
    first, second = (s['step'] for s in starts(folder))
    assert first == 0 < second < steps
    check_output(lab.output(again['job_id']), folder, texts)
    lab.ask(f'job_definitions/{made}', method='DELETE')
    assert lab.ask('job_definitions')['job_definitions'] == []


def check_output(executed, folder, texts):
    "The parameters as they were given stand in the executed notebook, with the pictures; in the run they have their types"
    injected, = (c.source for c in executed.cells if 'injected-parameters' in c.metadata.get('tags', []))
    assert injected.splitlines() == [f'{k} = {v}' for k, v in texts.items()]
    assert sum('image/png' in o.get('data', {}) for c in executed.cells for o in c.get('outputs', [])) == 3
    run = json.loads((folder/'run.json').read_text())['run']
    assert [(run[k], type(run[k])) for k in ('steps', 'ema', 'tensorboard')] == [(60, int), (.9, float), (False, bool)]


def test_a_job_with_a_bad_value_fails_with_our_line(lab, tmp_path):
    job = lab.wait(lab.ask('jobs', lab.form(steps=quoted('four'), out_dir=quoted(tmp_path/'run')))['job_id'])
    last = re.sub(r'\x1b\[[\d;]*m', '', job['status_message']).strip().splitlines()[-1]                   # Jupyter writes it in colour
    assert job['status'] == 'FAILED' and last == "InputError: parameter 'steps' is 'four' (str); expected int"
    assert not (tmp_path/'run').exists()
