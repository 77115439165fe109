"What every test may rely on, in whichever process and order it runs (`pytest`, `pytest -n 2 --dist loadfile`)"
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')        # as in `make test`: two workers share two cores, and sums depend on the number of threads

import multiprocessing
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SLOW = ('test_scheduled.py', 'test_campaign.py', 'test_compare.py', 'test_claims.py', 'test_papermill.py', 'test_runs.py', 'test_official.py', 'test_distributed.py', 'test_edge_connect.py', 'test_training.py', 'test_inference.py', 'test_recipes.py')


def pytest_collection_modifyitems(items):
    "Files that take long come first: the last one to run keeps a single worker busy"
    place = {name: n for n, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.name, len(SLOW)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    "Each test starts from the same random numbers, whatever ran before it in its process"
    import numpy
    import torch
    random.seed(0); numpy.random.seed(0); torch.manual_seed(0)


def one_line(f, *args, error=None, **kw):
    "The message of the error (`InputError`, or another) that `f` must raise"
    from inpaint_lib.core import InputError
    with pytest.raises(error or InputError) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)


@pytest.fixture()
def run(capsys):
    "A function: arguments -> (exit code, stdout, stderr) of the command `inpaint`; bad input is one line"
    from inpaint_lib import cli
    def run(*argv):
        try: code = cli.main([str(a) for a in argv])
        except SystemExit as e: code = e.code
        out, err = capsys.readouterr()
        assert code != 2 or (err.count('\n') == 1 and 'Traceback' not in err), err
        return code, out, err
    return run


@pytest.fixture(scope='session')
def begin_papermill():
    """A function: notebook, output, file for stderr, working folder, parameters -> a process that has just begun, forked from one that has papermill.
    `forked_kernel`: its kernel is forked from one that has torch (3 s of processor less), else started as ever"""
    sys.path.insert(0, str(ROOT/'tests'/'scripts'))
    import papermill_process
    processes = multiprocessing.get_context('forkserver'); processes.set_forkserver_preload(papermill_process.PRELOAD)
    def begin(stem, target, err, folder, forked_kernel=False, **parameters):
        command = ['--cwd', ROOT/'nbs', '--no-progress-bar', '--log-level', 'ERROR', ROOT/'nbs'/f'{stem}.ipynb', target]
        for k, v in parameters.items(): command += ['-p', k, v]
        env = dict(MPLBACKEND='module://matplotlib_inline.backend_inline', OMP_NUM_THREADS=os.environ['OMP_NUM_THREADS'])
        p = processes.Process(target=papermill_process.main, args=(list(map(str, command)), folder, env, err, forked_kernel))
        p.start()
        return p
    return begin


@pytest.fixture(scope='module')
def papermill(begin_papermill):
    "A function: notebook, folder, parameters -> (exit code, stderr, executed notebook)"
    def call(stem, out, forked_kernel=True, **parameters):
        target, err = out/f'{stem}.ipynb', out/f'{stem}.stderr'
        p = begin_papermill(stem, target, err, out, forked_kernel, **parameters); p.join()
        return p.exitcode, err.read_text(), target
    return call
