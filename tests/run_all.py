"""Everything that must hold, in three parts: notebooks in step, notebooks run, tests pass. Prints the ten slowest."""
import concurrent.futures
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def run_notebook(path):
    "One notebook's code cells in a fresh process, as nbdev_test runs them -> (seconds, passed, output)"
    start = time.time()
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='Agg')
    r = subprocess.run([BIN/'nbdev_test', '--path', path, '--n_workers', '0'], cwd=ROOT, env=env,
                       capture_output=True, text=True)
    return time.time() - start, r.returncode == 0, r.stdout + r.stderr


def notebooks():
    "All notebooks, as many at a time as there are cores, longest numbers first -> [(seconds, name)], failures"
    paths = sorted((ROOT/'nbs').glob('*.ipynb'), reverse=True)
    times, failed = [], []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, (seconds, passed, output) in zip(paths, pool.map(run_notebook, paths)):
            times.append((seconds, f'nbs/{path.name}'))
            print(f'{"passed" if passed else "FAILED"} {seconds:5.1f} s  nbs/{path.name}', flush=True)
            if not passed: failed.append(path.name); print(output[-3000:])
    return times, failed


def main():
    in_step = subprocess.run([sys.executable, ROOT/'tests'/'in_step.py']).returncode == 0
    style = subprocess.run([BIN/'ruff', 'check', '--quiet', 'nbs', 'tests'], cwd=ROOT).returncode == 0
    times, failed = notebooks()
    report = ROOT/'runs'/'pytest.txt'; report.parent.mkdir(exist_ok=True)
    with open(report, 'w') as f:
        p = subprocess.Popen([sys.executable, '-m', 'pytest', '-rs', '--durations=10', '--durations-min=0.5'], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        lines = []
        for line in p.stdout: print(line, end='', flush=True); f.write(line); lines.append(line)
    for line in lines:
        part = line.split()
        if len(part) == 3 and part[0].endswith('s') and part[1] in ('call', 'setup'): times.append((float(part[0][:-1]), part[2]))
    print('\nThe ten slowest:')
    for seconds, name in sorted(times, reverse=True)[:10]: print(f'{seconds:7.1f} s  {name}')
    print(f'{len(times and list((ROOT/"nbs").glob("*.ipynb"))) - len(failed)} notebooks passed, {len(failed)} failed'
          + (f' ({", ".join(failed)})' if failed else '') + f'; library {"in step" if in_step else "NOT IN STEP"}; ruff {"clean" if style else "FAILED"}')
    sys.exit(0 if p.wait() == 0 and not failed and in_step and style else 1)


if __name__ == '__main__': main()
