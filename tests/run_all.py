"""Everything that must hold, in four parts: notebooks in step, notebooks run, tests pass, the browser's tests pass.

Notebooks run as many at a time as there are cores, each in a process of its own, then pytest with as many workers, one file at a time each. The tests in
a browser come last, alone: they draw with a mouse while a kernel works, and measure the way from one to the other.
Prints why tests were skipped, and the ten slowest.
"""
import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import browser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tests'/'scripts'))
import notebook_process

BIN = Path(sys.executable).parent
BROWSER = ROOT/'tests'/'test_browser.py'


def run_notebook(processes, path):
    "One notebook's code cells as nbdev_test runs them, in a process forked from one that has torch -> (seconds, passed, output)"
    start = time.time()
    with tempfile.TemporaryDirectory() as d:
        p = processes.Process(target=notebook_process.main, args=(path, ROOT, Path(d)/'output'))
        p.start(); p.join()
        output = (Path(d)/'output').read_text(errors='replace') if (Path(d)/'output').exists() else ''
    return time.time() - start, p.exitcode == 0, output


def notebooks():
    "All notebooks, as many at a time as there are cores, longest numbers first -> [(seconds, name)], failures"
    paths = sorted((ROOT/'nbs').glob('*.ipynb'), reverse=True)
    times, failed = [], []
    os.environ.update(OMP_NUM_THREADS='1', MPLBACKEND='Agg')
    processes = multiprocessing.get_context('forkserver'); processes.set_forkserver_preload(notebook_process.PRELOAD)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, (seconds, passed, output) in zip(paths, pool.map(functools.partial(run_notebook, processes), paths)):
            times.append((seconds, f'nbs/{path.name}'))
            print(f'{"passed" if passed else "FAILED"} {seconds:5.1f} s  nbs/{path.name}', flush=True)
            if not passed: failed.append(path.name); print(output[-3000:])
    return times, failed


def tests(report, *which):
    "pytest with these arguments, shown while it runs and added to the file `report` -> passed, lines"
    command = [sys.executable, '-m', 'pytest', '-rfEs', '--durations=10', '--durations-min=0.5', *map(str, which)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as p, open(report, 'a') as f:
        lines = []
        for line in p.stdout: print(line, end='', flush=True); f.write(line); lines.append(line)
    return p.returncode == 0, lines


def painting(since):
    "What became of the browser tests: the round trip that they measured, or why they were skipped"
    if browser.missing(): return f'browser tests skipped: {browser.missing()}'
    report = browser.SHOTS/'round_trip.json'
    if not report.exists() or report.stat().st_mtime < since: return 'browser tests: no round trip measured'
    r = json.loads(report.read_text())
    return f'mouse-up to mask in the kernel: median {r["median_ms"]:.0f} ms, 9 of 10 within {r["p90_ms"]:.0f} ms ({r["strokes"]} strokes)'


def main():
    start = time.time()
    in_step = subprocess.run([sys.executable, ROOT/'tests'/'in_step.py']).returncode == 0
    style = subprocess.run([BIN/'ruff', 'check', '--quiet', 'nbs', 'tests'], cwd=ROOT).returncode == 0
    times, failed = notebooks()
    report = ROOT/'runs'/'pytest.txt'; report.parent.mkdir(exist_ok=True); report.write_text('')
    at_once = ['-n', os.cpu_count(), '--dist', 'loadfile', '--no-loadscope-reorder', f'--ignore={BROWSER}']
    runs = [tests(report, *at_once), tests(report, BROWSER)]
    lines = [line for r in runs for line in r[1]]
    for line in lines:
        m = re.match(r'([\d.]+)s (?:call|setup) +(\S.*)', line)
        if m: times.append((float(m[1]), m[2]))
    print('\nThe ten slowest:')
    for seconds, name in sorted(times, reverse=True)[:10]: print(f'{seconds:7.1f} s  {name}')
    print(f'{len(times and list((ROOT/"nbs").glob("*.ipynb"))) - len(failed)} notebooks passed, {len(failed)} failed'
          + (f' ({", ".join(failed)})' if failed else '') + f'; library {"in step" if in_step else "NOT IN STEP"}; ruff {"clean" if style else "FAILED"}')
    print(painting(start))
    sys.exit(0 if all(r[0] for r in runs) and not failed and in_step and style else 1)


if __name__ == '__main__': main()
