"""Is inpaint_lib/ what nbdev_export writes, and are the notebooks clean? Checked in a copy: nothing here changes."""
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CHECKED = ('nbs/*.ipynb', 'inpaint_lib/**/*.py')


def differences():
    "Files that nbdev_export and nbdev_clean would change, add or remove"
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d)
        for f in ('settings.ini', 'pyproject.toml', 'README.md'): shutil.copy(ROOT/f, copy)
        for f in ('nbs', 'inpaint_lib'):
            shutil.copytree(ROOT/f, copy/f, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        for tool in ('nbdev_export', 'nbdev_clean'): subprocess.run([BIN/tool], cwd=copy, check=True, capture_output=True)
        names = {p.relative_to(top) for top in (ROOT, copy) for pattern in CHECKED for p in top.glob(pattern)}
        same = lambda n: (ROOT/n).exists() and (copy/n).exists() and filecmp.cmp(ROOT/n, copy/n, shallow=False)
        return sorted(str(n) for n in names if not same(n))


if __name__ == '__main__':
    changed = differences()
    print('in step: nbdev_export and nbdev_clean leave no difference' if not changed else
          'Not in step, run nbdev_export and nbdev_clean: ' + ', '.join(changed))
    sys.exit(bool(changed))
