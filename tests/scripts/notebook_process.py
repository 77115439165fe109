"`nbdev_test --path NOTEBOOK --n_workers 0` in a process of its own that imports nothing heavy again: see tests/run_all.py"
import os

PRELOAD = ['torch', 'torch._dynamo', 'matplotlib.pyplot', 'skimage.metrics', 'scipy.stats', 'torchmetrics.functional.image', 'nbdev.test', 'inpaint_lib.inference', 'inpaint_lib.recipes', 'notebook_process']


def main(path, folder, output):
    "Exit code 0 or 1, what is printed goes to the file `output`"
    os.chdir(folder)
    for stream in (1, 2): os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    from nbdev.test import nbdev_test
    nbdev_test(path=str(path), n_workers=0)
