"""What holds across notebooks: floors, imports, cell sizes, sizes of files, metadata."""
import ast
import configparser
import json
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
name = lambda p: p.name


def cells(path, kind='code'): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def source(cell): return ''.join(cell['source'])


def exported():
    "module path -> number of its notebook, for every notebook that exports"
    out = {}
    for p in NOTEBOOKS:
        m = re.search(r'^#\| default_exp (\S+)', '\n'.join(map(source, cells(p))), re.M)
        if m: out[m[1]] = int(p.name[:2])
    return out


FLOORS = exported()


def imported(path, module):
    "Modules of inpaint_lib that a generated module imports, as dotted names below inpaint_lib"
    package = ['inpaint_lib', *module.split('.')[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package) - node.level + 1] if node.level else [])
            base = '.'.join(filter(None, [base, node.module]))
            found = [base] + [f'{base}.{a.name}' for a in node.names]
        else: continue
        for f in found:
            if f.startswith('inpaint_lib.') and f.removeprefix('inpaint_lib.') in FLOORS: yield f.removeprefix('inpaint_lib.')


@pytest.mark.parametrize('module', FLOORS)
def test_imports_only_lower_numbers(module):
    path = ROOT/'inpaint_lib'/f"{module.replace('.', '/')}.py"
    upward = [m for m in imported(path, module) if FLOORS[m] >= FLOORS[module] and m != 'demo']
    assert not upward, f'{module} ({FLOORS[module]}) imports {upward}'


def test_the_import_check_sees_imports():
    "A check that finds nothing anywhere would pass everything"
    assert 'core' in set(imported(ROOT/'inpaint_lib'/'training.py', 'training'))
    assert 'layers' in set(imported(ROOT/'inpaint_lib'/'papers'/'edge_connect.py', 'papers.edge_connect'))


def test_one_notebook_one_module_and_no_leftovers():
    modules = {str(p.relative_to(ROOT/'inpaint_lib'))[:-3].replace('/', '.') for p in (ROOT/'inpaint_lib').rglob('*.py')
               if not p.name.startswith('_')}
    assert modules == set(FLOORS)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_notebook_reads_well(path):
    code, text = [source(c) for c in cells(path)], cells(path, 'markdown')
    lines = [len(c.splitlines()) for c in code]
    assert max(lines) <= 25, f'a cell of {max(lines)} lines'
    assert statistics.median(lines) <= 8
    assert .5 <= len(text)/len(code) <= 2, f'{len(text)} text cells to {len(code)} code cells'
    assert not re.search(r'^\s*from \S+ import \*', '\n'.join(code), re.M)
    assert sum('assert' in c or 'must_fail' in c or 'refusal(' in c for c in code) >= (.5*sum(c.startswith('#| export') for c in code) - 1)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_notebook_file(path):
    nb = json.loads(path.read_text())
    assert path.stat().st_size <= 300_000
    assert (nb['nbformat'], nb['nbformat_minor']) == (4, 5) and all(c['id'] for c in nb['cells'])
    assert nb['metadata']['kernelspec'] == dict(display_name='python3', language='python', name='python3')
    outputs = [o for c in cells(path) for o in c['outputs']]
    assert outputs, 'committed without outputs: make notebooks'
    assert not [o for o in outputs if o['output_type'] == 'error']
    assert not re.search(r'/(tmp|work|root|home)/[A-Za-z]', path.read_text()), 'holds a machine path'


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.name[0] in '24'], ids=name)
def test_papermill_tag(path):
    assert ['parameters'] in [c['metadata'].get('tags') for c in cells(path)]



@pytest.mark.parametrize('module', FLOORS)
def test_functions_are_short_and_public_ones_documented(module):
    tree = ast.parse((ROOT/'inpaint_lib'/f"{module.replace('.', '/')}.py").read_text())
    long = [f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.end_lineno - f.body[0].lineno + 1 > 25]
    bare = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')
            and not ast.get_docstring(n)]
    assert not long and not bare


def test_import_needs_no_heavy_or_development_package():
    "The widget alone needs Jupyter's: it is one"
    code = ("import sys, importlib\n"
            f"for m in {sorted(set(FLOORS) - {'demo'})}: importlib.import_module('inpaint_lib.' + m)\n"
            "print(sorted({'nbdev', 'fastcore', 'execnb', 'torchvision', 'torchmetrics', 'papermill', 'IPython'} & set(sys.modules)))")
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert r.stdout.strip() == '[]', r.stdout + r.stderr


def test_version_stands_in_two_files():
    ini = configparser.ConfigParser(); ini.read(ROOT/'settings.ini')
    toml = tomllib.loads((ROOT/'pyproject.toml').read_text())
    import inpaint_lib
    assert ini['DEFAULT']['version'] == toml['project']['version'] == inpaint_lib.__version__
    assert toml['project']['requires-python'] == '>=' + ini['DEFAULT']['min_python']


def test_parameters_of_the_papermill_notebooks_match_their_schema():
    import dataclasses

    from inpaint_lib.recipes import EvaluateParameters, TrainParameters
    for stem, schema in (('40_train', TrainParameters), ('41_evaluate', EvaluateParameters)):
        cell = next(c for c in cells(ROOT/'nbs'/f'{stem}.ipynb') if c['metadata'].get('tags') == ['parameters'])
        given = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(source(cell)).body}
        assert given == {f.name: f.default for f in dataclasses.fields(schema)}


def test_modules_import_only_what_they_use():
    "An import for a cell that is not exported belongs into a cell that is not exported"
    r = subprocess.run([Path(sys.executable).parent/'ruff', 'check', '--quiet', '--select', 'F401', ROOT/'inpaint_lib'], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
