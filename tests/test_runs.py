"The list of runs: what is told of finished, interrupted and running ones, of damaged folders, and at what price; `inpaint runs`; the page of 46_runs"
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from inpaint_lib import recipes, training
from inpaint_lib.core import InputError
from inpaint_lib.data import images, masks
from inpaint_lib.runs import as_rows, find_runs, last_records, read_run, runs_table

ROOT = Path(__file__).resolve().parent.parent


def go(folder, steps, *, stop=0, seed=0):
    "A run of EdgeConnect's first stage, narrow and small; stopped as by Ctrl+C after `stop` steps"
    recipe, c, data = recipes.build('edge_connect.edge', 'tiny', config=dict(width=.05),
                                    run=dict(steps=steps, batch_size=2, device='cpu', save_every=2, picture_every=3, seed=seed))
    photos = images.PhotoDataset(images.open_source('builtin'), 24, masks.mask_sampler('bins'))
    def watch(record, draws):
        if record['step'] == stop: raise KeyboardInterrupt
    samples = images.collate([photos[0, i] for i in range(2)])
    try: training.train(recipe, photos, c, folder, samples=samples, meta=dict(preset='tiny'), watch=watch, progress=False)
    except KeyboardInterrupt: assert stop
    return folder


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Two runs that are only looked at"
    n = torch.get_num_threads(); torch.set_num_threads(1)
    top = tmp_path_factory.mktemp('runs')
    go(top/'done', 6); go(top/'nested'/'cut', 9, stop=5, seed=1)
    torch.set_num_threads(n)
    return top


@pytest.fixture()
def top(made, tmp_path):
    "A copy of them"
    return Path(shutil.copytree(made, tmp_path/'runs'))


def log(folder): return [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]


def contents(folder): return {f.relative_to(folder): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in folder.rglob('*') if f.is_file()}


def test_what_is_told_of_a_finished_run(made):
    run, last, info = read_run(made/'done'), log(made/'done')[-1], json.loads((made/'done'/'run.json').read_text())
    assert (run.recipe, run.preset, run.state, run.step, run.steps) == ('edge_connect.edge', 'tiny', 'finished', 6, 6) and not run.problems
    assert run.terms == {k: last[k] for k in ('d_adv', 'g_adv', 'fm', 'g_total')} and run.metrics == {k: last[f'm_{k}'] for k in ('precision', 'recall')}
    assert (run.seconds, run.device, run.processes, run.starts) == (info['seconds'], info['device'], 1, 1)
    assert run.speed == pytest.approx(6/sum(r['data_s'] + r['step_s'] for r in log(made/'done')))
    assert (run.picture, run.weights, run.curves) == (made/'done'/'samples'/'step_0000006.png', made/'done'/'weights.safetensors', None)


def test_what_is_told_of_an_interrupted_one_that_goes_on(top):
    cut = top/'nested'/'cut'; run = read_run(cut)
    assert (run.state, run.step, run.steps, run.starts, run.seconds, run.weights) == ('interrupted', 5, 9, 1, None, None)
    assert run.picture.name == 'step_0000003.png' and run.recipe == 'edge_connect.edge' and run.device.startswith('cpu')
    Image.new('RGB', (9, 9)).save(cut/'samples.png'); os.utime(cut/'samples.png', (1, 1))              # of an earlier end
    go(cut, 9, seed=1)
    run = read_run(cut)
    assert (run.state, run.step, run.starts, run.picture.name, run.problems) == ('finished', 9, 2, 'step_0000009.png', [])
    assert [r.path for r in find_runs(top)] == [cut, top/'done']                                       # the one written last comes first


def test_runs_of_an_older_trainer(top):
    for name in ('done', 'nested/cut'):
        for file in ('started.json', '.lock'): (top/name/file).unlink()
    done, cut = read_run(top/'done'), read_run(top/'nested'/'cut')
    assert (done.state, done.recipe, done.preset, done.step, done.steps, done.starts, done.problems) == ('finished', 'edge_connect.edge', 'tiny', 6, 6, None, [])
    assert (cut.state, cut.recipe, cut.step, cut.steps) == ('interrupted', '', 5, None) and 'recipe unknown' in cut.problems[0]


def test_a_run_of_another_process_is_running_until_it_is_killed(tmp_path):
    code = f'import sys; sys.path.insert(0, {str(ROOT/"tests")!r}); import test_runs; test_runs.go(test_runs.Path(sys.argv[1]), 100000)'
    p = subprocess.Popen([sys.executable, '-c', code, tmp_path/'r'], start_new_session=True)
    try:
        end = time.time() + 90
        while time.time() < end and not ((run := read_run(tmp_path/'r') if (tmp_path/'r').exists() else None) and run.step >= 2): time.sleep(.1)
        assert (run.state, run.steps, run.problems) == ('running', 100000, []) and run.step >= 2
        assert ' left ' in runs_table([run]) and as_rows([run])[0]['state'] == 'running'
        with pytest.raises(InputError, match='another process'), training.locked(tmp_path/'r', wait=.2): pass
        assert p.poll() is None                                                      # looking on has disturbed nobody
    finally: os.killpg(p.pid, signal.SIGKILL); p.wait()
    assert read_run(tmp_path/'r').state == 'interrupted'


@pytest.mark.parametrize('file, text, step, problem', [
    ('log.jsonl', '{"step": 1, "l1": 2}\n{"step": 2, "l', 1, None),
    ('log.jsonl', '', 0, None),
    ('log.jsonl', '{"step": 1\n{"step": 2}\n', 0, 'log.jsonl: a line that is not JSON'),
    ('log.jsonl', '{"step": "1"}\n', 0, "log.jsonl: a line without 'step'"),
    ('log.jsonl', b'\xff\xfe\x00\n\n', 0, 'log.jsonl: a line that is not JSON'),
    ('log.jsonl', None, 0, 'log.jsonl: missing'),
    ('started.json', '{"recipe": "edge_', 5, 'started.json: damaged'),
    ('started.json', '"words"', 5, 'started.json: damaged'),
    ('started.json', '{"recipe": "edge_connect.edge", "run": {"steps": "9"}}', 5, 'steps in started.json or run.json is "9"'),
    ('started.json', '{"recipe": "edge_connect.edge", "starts": [3]}', 5, None),
    ('run.json', '', 5, 'run.json: damaged'),
    ('warnings.jsonl', '{"line": 3\n{}\n', 5, 'warnings.jsonl: damaged'),
    ('warnings.jsonl', '[]\n', 5, 'warnings.jsonl: damaged'),
])
def test_damage_is_a_line_and_the_other_runs_are_there(file, text, step, problem, top):
    path = top/'nested'/'cut'/file
    path.write_bytes(text if isinstance(text, bytes) else text.encode()) if text is not None else path.unlink()
    found = find_runs(top); run = next(r for r in found if r.path.name == 'cut')
    assert len(found) == 2 and (run.state, run.step) == ('interrupted', step)
    assert bool(run.problems) == bool(problem or not run.recipe) and (not problem or problem in run.problems[0])
    assert json.loads(json.dumps(as_rows(found), allow_nan=False)) and (not problem or problem in runs_table(found))


def test_values_that_are_no_numbers(top):
    with open(top/'nested'/'cut'/'log.jsonl', 'a') as f: f.write('{"step": 6, "g_total": NaN, "d_adv": null, "m_recall": Infinity, "lr": 1, "deviations": ["x"]}\n')
    run = read_run(top/'nested'/'cut')
    assert run.step == 6 and run.terms == dict(g_total=None, d_adv=None) and run.metrics == dict(recall=None)
    assert 'recall not finite' in runs_table([run]) and json.dumps(as_rows([run]), allow_nan=False)


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    line = json.dumps(dict(step=1, g_total=.5)) + '\n'
    with open(tmp_path/'log.jsonl', 'w') as f:
        f.write('no JSON at all\n'); f.writelines([line]*30_000); f.write(line.replace('1,', '30001,'))
    assert last_records(tmp_path/'log.jsonl')[-1]['step'] == 30_001 and len(last_records(tmp_path/'log.jsonl')) < 3000
    with pytest.raises(InputError): last_records(tmp_path/'log.jsonl', size=10**8)


def test_folders_of_others_links_in_circles_and_hidden_folders(top):
    for name, text in (('foreign', '{"steps": 3}'), ('list', '{"run": {}}'), ('.trash', '{"recipe": "old"}')):
        (top/name).mkdir(); (top/name/'run.json').write_text(text)
    (top/'checkpoints').mkdir(); (top/'checkpoints'/'checkpoint.pt').write_text('without a log')
    (top/'loop').symlink_to(top); (top/'done'/'up').symlink_to(top/'done'); (top/'gone').symlink_to(top/'nothing'); (top/'self').symlink_to('self')
    far = top.parent/'disk'; shutil.move(top/'nested', far); (top/'far').symlink_to(far)
    assert sorted(str(r.path.relative_to(top)) for r in find_runs(top)) == ['done', 'far/cut']
    for place in (top/'nothing', top/'done'/'log.jsonl'):
        with pytest.raises(InputError, match='expected a folder of runs'): find_runs(place)


@pytest.mark.skipif(not hasattr(os, 'fork') or os.getuid() != 0, reason='needs the right to become somebody else')
def test_runs_of_somebody_else(made):
    "A folder that may not be opened is a row; a lock that may not be tried is a remark"
    with tempfile.TemporaryDirectory() as d:
        os.chmod(d, 0o755); shutil.copytree(made, Path(d)/'runs'); os.chmod(Path(d)/'runs', 0o755); (Path(d)/'runs'/'secret').mkdir(0o700)
        out = Path(d)/'rows.json'; out.touch(); os.chmod(out, 0o666)
        if (pid := os.fork()) == 0:
            try: os.setegid(65534); os.seteuid(65534); out.write_text(json.dumps(as_rows(find_runs(Path(d)/'runs'))))
            finally: os._exit(0)
        os.waitpid(pid, 0)
        rows = {Path(r['path']).name: r for r in json.loads(out.read_text())}
    assert {k: r['state'] for k, r in rows.items()} == dict(done='finished', cut='interrupted', secret='unreadable')
    assert rows['secret']['problems'] == ['not readable (Permission denied)'] and rows['done']['problems'] == [] and rows['cut']['step'] == 5


def test_nothing_is_changed_and_three_hundred_are_quick(made, tmp_path):
    "Processor seconds: the machine may have other work. No checkpoint is one, so none can have been opened"
    for n in range(150):
        for name in ('done', 'nested/cut'):
            shutil.copytree(made/name, tmp_path/f'{n}'/name, copy_function=os.link)
    for name in ('done', 'nested/cut'):
        (tmp_path/'0'/name/'checkpoint.pt').unlink(); (tmp_path/'0'/name/'checkpoint.pt').write_text('no checkpoint')
    before, start = contents(made), time.process_time()
    found = find_runs(tmp_path); table = runs_table(found, tmp_path)
    took = time.process_time() - start
    assert len(found) == 300 and took < 2 and not any(r.problems for r in found) and contents(made) == before
    assert len(table.splitlines()) == 301


def test_the_table_fits_a_terminal(top):
    strange = top/('with a very long name ' + 'x'*150)/'and\nan \x1b[31mend'
    strange.parent.mkdir(); shutil.copytree(top/'done', strange)
    (strange/'warnings.jsonl').write_text(''.join(json.dumps(dict(line=f'WARNING step {n}: ' + 'y'*200)) + '\n' for n in (1, 2)))
    table = runs_table(find_runs(top), top)
    lines = table.splitlines()
    assert len(lines) == 5 and max(map(len, lines)) <= 140 and '\x1b' not in table and '2 warnings, the last: WARNING step 2' in table
    assert all(word in table for word in ('6/6', '5/9', 'interrupted', 'steps/s', '06.png'))
    wide = runs_table(find_runs(top), top, width=500)
    assert all(word in wide for word in ('edge_connect.edge, tiny', 'x'*150, ', recall ', 'samples/step_0000006.png')) and '…' not in '\n'.join(wide.splitlines()[:2])
    assert max(map(len, runs_table(find_runs(top), top, width=100).splitlines())) <= 100


def test_the_command_lists(made, run, tmp_path, monkeypatch):
    monkeypatch.setenv('COLUMNS', '90')
    code, out, err = run('runs', made)
    assert (code, err) == (0, '') and out.rstrip('\n') == runs_table(find_runs(made), made) and 'nested/cut' in out and str(made) not in out
    monkeypatch.setenv('COLUMNS', '300'); assert run('runs', made)[1].rstrip('\n') == runs_table(find_runs(made), made, width=300)
    code, out, err = run('runs', made, '--json')
    assert (code, err) == (0, '') and json.loads(out) == as_rows(find_runs(made)) and Path(json.loads(out)[0]['picture']).is_file()
    monkeypatch.chdir(made.parent); (tmp_path/'work').mkdir(); (tmp_path/'work'/'runs').symlink_to(made); monkeypatch.chdir(tmp_path/'work')
    assert run('runs')[1].splitlines()[0].startswith('run ') and 'nested/cut' in run('runs')[1]                     # runs/ of the working directory
    assert run('runs', tmp_path/'work'/'runs'/'done')[1].splitlines()[1].startswith('. ')                           # a run itself
    (tmp_path/'none').mkdir()
    assert run('runs', tmp_path/'none') == (0, f'no runs below {tmp_path/"none"}\n', '') and run('runs', tmp_path/'none', '--json')[1] == '[]\n'


def test_the_command_refuses_in_one_line(made, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for what, says in ((tmp_path/'nowhere', 'no such folder'), (made/'done'/'log.jsonl', 'a file; expected a folder of runs')):
        code, out, err = run('runs', what)
        assert code == 2 and says in err and not out
    monkeypatch.setattr('inpaint_lib.core.checkout', lambda: None)
    code, out, err = run('runs')
    assert code == 2 and 'runs: no such folder' in err and 'inpaint train' in err
    (tmp_path/'checkout'/'runs').mkdir(parents=True); monkeypatch.setattr('inpaint_lib.core.checkout', lambda: tmp_path/'checkout')
    assert run('runs') == (0, f'no runs below {tmp_path/"checkout"/"runs"}\n', '')                                 # that of the checkout


def test_the_command_packs_shards(run, tmp_path):
    (tmp_path/'photos').mkdir()
    for n in range(5): Image.new('RGB', (64, 64), (50*n, 0, 0)).save(tmp_path/'photos'/f'{n}.png')
    code, out, err = run('shards', tmp_path/'photos', tmp_path/'packed', '--per-shard', 2)
    size = sum(f.stat().st_size for f in (tmp_path/'packed').glob('*.tar'))
    assert (code, err) == (0, '') and out == f"{tmp_path/'packed'}: 3 shards, 5 pictures, {size/1e6:.1f} MB\n"
    assert len(images.open_source(tmp_path/'packed')) == 5
    for argv, says in (((tmp_path/'photos', tmp_path/'packed'), 'holds something'), ((tmp_path/'none', tmp_path/'p'), 'none'), ((tmp_path/'photos', tmp_path/'p', '--per-shard', 0), 'at least 1')):
        code, _, err = run('shards', *argv)
        assert code == 2 and says in err


def test_the_page(top, papermill, tmp_path):
    "46_runs as a scheduler runs it: damaged runs say so, names are no HTML, nothing is changed in the runs' folders"
    odd = top/'<script>alert("1")<'/'odd & end'; odd.parent.mkdir(); shutil.copytree(top/'nested'/'cut', odd)
    (odd/'log.jsonl').write_text(''); (odd/'samples'/'step_0000003.png').write_bytes(b'\x89PNG cut off')
    records = [{k: v for k, v in r.items() if k != 'fm'} for r in log(top/'nested'/'cut')]
    (top/'nested'/'cut'/'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    before = contents(top)
    code, err, executed = papermill('46_runs', tmp_path, runs_dir=top, out_dir=tmp_path/'page', recipe='edge_connect')
    assert code == 0, err
    page, shown = (tmp_path/'page'/'index.html').read_text(), executed.read_text()
    assert contents(top) == before and page.count('<h2 id="run') == 3 and page.count('<img ') == 5     # two of two runs, and the comparison
    assert '<script' not in page and '&lt;script&gt;alert(&quot;1&quot;)&lt;/odd &amp; end' in page
    assert 'no curves: the log is empty' in page and 'no sample rows: odd &amp; end/samples/step_0000003.png: not a readable image' in page
    assert 'no values of fm, which other runs of edge_connect.edge have' in page and 'edge_connect.edge: all runs' in page
    assert 'src="http' not in page and str(tmp_path) not in page and str(top) not in page
    assert shown.count('"image/') == 3 and 'step 5 of 9' in shown
