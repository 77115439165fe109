"""Execute notebooks in place, so that a reader sees results: python tests/execute_notebooks.py nbs/00_core.ipynb ...

Each runs in the folder nbs/ with its default parameters, as `nbdev_test` runs it. A notebook that raises is left as it was.
"""
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

LIMIT_KB = 300
WIDGET = 'application/vnd.jupyter.widget-view+json'


def without_widgets(nb):
    "A stored widget needs the kernel that made it: readers get the picture and the text that stand beside it"
    nb.metadata.pop('widgets', None)
    for cell in nb.cells:
        for output in cell.get('outputs', []): output.get('data', {}).pop(WIDGET, None)
    return nb


def execute(path):
    "Run one notebook and store its outputs; returns (seconds, kilobytes)"
    nb, start = nbformat.read(path, as_version=4), time.time()
    NotebookClient(nb, timeout=600, kernel_name='python3',
                   resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in nb.cells: cell.metadata.pop('execution', None)
    nb.metadata.pop('language_info', None)
    text = nbformat.writes(without_widgets(nb))
    found = re.search(r'/(tmp|work|root|home)/[A-Za-z][^"\\]*', text)
    if found: raise SystemExit(f'{path}: its outputs name a folder of this machine: {found[0]}')
    path.write_text(text + '\n', encoding='utf-8')
    return time.time() - start, len(text)//1000


if __name__ == '__main__':
    os.environ.setdefault('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    if os.environ['MPLBACKEND'] == 'Agg': os.environ['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline'
    for path in map(Path, sys.argv[1:]):
        seconds, kb = execute(path)
        print(f'{path}: {seconds:.1f} s, {kb} kB' + ('  TOO LARGE' if kb > LIMIT_KB else ''), flush=True)
