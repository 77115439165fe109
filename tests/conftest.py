"What every test may rely on, in whichever process and order it runs (`pytest`, `pytest -n 2 --dist loadfile`)"
import os

if 'PYTEST_XDIST_WORKER' in os.environ:              # a worker and what it starts have one core: more threads would only spin
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import random

import pytest

SLOW = ('test_papermill.py', 'test_official.py', 'test_distributed.py', 'test_edge_connect.py', 'test_training.py', 'test_inference.py', 'test_recipes.py')


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
