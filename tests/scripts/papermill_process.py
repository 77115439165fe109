"`python -m papermill` in a process of its own that does not import papermill again: see tests/test_papermill.py"
import os
import runpy
import sys


def main(arguments, folder, environment, stderr):
    "What `python -m papermill ARGUMENTS` in this folder and environment does, with its exit code; stderr goes to a file"
    os.chdir(folder); os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2); os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ['papermill', *arguments]
    runpy.run_module('papermill', run_name='__main__', alter_sys=True)
