"""Health: bands with known answers, the committed bands, the provoked failures, the watch that 40_train has, its lines."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import one_line
from inpaint_lib import health, recipes
from inpaint_lib.data.images import PhotoDataset, open_source
from inpaint_lib.training import TrainConfig, TrainingStopped, train

ROOT = Path(__file__).resolve().parent.parent
BANDS, FAILURES = ROOT/'figures'/'health.json', ROOT/'figures'/'health_failures.json'
NOTEBOOK = [(c['cell_type'], ''.join(c['source'])) for c in json.loads((ROOT/'nbs'/'45_health.ipynb').read_text())['cells']]


@pytest.fixture(scope='module')
def study():
    "The failures as 45_health defines them: its cells from the imports on, without those that read or train"
    names, wanted = {}, ('import dataclasses, io', 'strokes, boxes =', 'def inverted', 'class LoopedMatching', 'class LeakyCritic')
    for kind, source in NOTEBOOK:
        if kind == 'code' and source.startswith(wanted): exec(source, names)
    return names


@pytest.fixture(scope='module')
def recorded():
    "name -> records of the runs that 45_health recorded"
    runs = json.loads(FAILURES.read_text())['runs']
    return {n: [dict(zip(r['log'], row)) for row in zip(*r['log'].values())] for n, r in runs.items()}


def committed(stage, vgg=False):
    "The bands of a stage at preset tiny as it is, 64 pixels, masks in bins"
    made = dict(preset='tiny', size=64, masks='bins', changed=[], begun_from=[])
    return next(g for g in health.read_health(BANDS)[stage] if all(g.facts[k] == v for k, v in made.items()) and bool(g.facts['vgg']) == vgg)


def lived(recipe, masks, steps, size=32):
    watch = health.Watch(health.critic_of(recipe), run=recipe.name, quiet=True)
    train(recipe, PhotoDataset(open_source('builtin'), size, masks), TrainConfig(steps=steps, batch_size=2, device='cpu'), watch=watch, progress=False)
    return watch.lines


def sections(lines): return [re.search(r'read 45_health, "(.+)"$', line)[1] for line in lines]


# bands

def test_bands_of_made_up_logs():
    "Three runs at 1, 2 and 4, the last one of 10 steps: known bands, widened by the stated rule"
    log = lambda v, n: [dict(step=t, lr=.1, loss=v, shift=v - 2.) for t in range(1, n + 1)]
    bands = health.measured_bands([log(1., 40), log(2., 40), log(4., 10)])
    assert bands['loss'] == [[1., 4., 3], [1., 4., 3], [1., 2., 2]] and 'lr' not in bands
    e = health.Expected('toy', dict(steps=[40, 40, 10]), bands)
    assert e.range('loss', 2) == pytest.approx((.25, 16.)) and e.range('loss', 30) == pytest.approx((.5, 4.))
    assert e.range('shift', 2) == pytest.approx((-4., 5.)) and e.range('loss', 41) is None and e.range('other', 2) is None


def test_running_median_ignores_one_bad_batch_and_goes_back():
    m, found = health.Medians(), {}
    for t in range(1, 101): found[t] = m.add(dict(step=t, loss=1e6 if t == 95 else float(t), m_x=None if t % 2 else 1.))
    assert found[100]['loss'] == 83.5 and found[99] is None and found[100]['m_x'] == 1.
    assert m.add(dict(step=90, loss=0.))['loss'] == 77.5                      # 67 to 89 and the new one


def test_next_look_is_eight_a_decade_and_always_later():
    steps = [1]
    while steps[-1] < 10**6: steps.append(health.next_look(steps[-1]))
    assert sorted(set(steps)) == steps and {10, 100, 1000, 10**6} <= set(steps) and len(steps) == 6*8 - 1


@pytest.mark.parametrize('text', ['', '{"format": 1}', '[1]', '{"format": 9, "stages": {}}', '{"format": 1, "stages": {"a": [{"facts": {}, "bands": {}}]}}',
                                  '{"format": 1, "stages": {"a": [3]}}', '{"format": 1, "stages": {"a": 3}}'])
def test_a_damaged_file_gives_one_line(text, tmp_path):
    (tmp_path/'health.json').write_text(text)
    assert str(tmp_path) in one_line(health.read_health, tmp_path/'health.json')


def test_a_cut_or_falsified_copy_of_the_committed_file_gives_one_line(tmp_path):
    text = BANDS.read_text()
    number, changed = re.compile(r'\[(-?[\d.e-]+), -?[\d.e-]+, (\d+)\]'), text.index('"bands"')
    for bad in (text[:len(text)//2], text.replace('"preset"', '"prest"', 1), re.sub(r'"steps": \[\d+', '"steps": ["many"', text, count=1),
                text[:changed] + number.sub(r'[\1, "x", \2]', text[changed:], count=1)):
        assert bad != text
        (tmp_path/'health.json').write_text(bad); one_line(health.read_health, tmp_path/'health.json')


# the committed bands

def test_committed_bands_belong_to_stages_and_say_what_stood_behind_them():
    stages = health.read_health(BANDS)
    assert set(stages) <= set(recipes.RECIPES) and len(stages) >= 12
    for name, groups in stages.items():
        for g in groups:
            stage = recipes.RECIPES[name]
            assert g.facts['preset'] in stage.presets and g.facts['runs'] >= 1 and len(g.facts['steps']) == g.facts['runs'] and g.bands
            assert (ROOT/'figures'/'health.json').stat().st_size <= 150_000 and '/' not in g.facts['vgg']
            critic = health.CRITICS.get(name.split('.')[0])
            if critic and critic.d in g.bands: assert critic.g in g.bands


def test_healthy_twins_stay_inside(recorded):
    "The recorded healthy runs, which the bands don't know"
    for name, stage, vgg in (('edge', 'edge_connect.edge', False), ('style', 'edge_connect.inpaint', True)):
        e = committed(stage, vgg)
        assert any(e.range(t, 30) for t in health.term_names(recorded[name]))
        assert not health.check_log(recorded[name], health.CRITICS['edge_connect'], e)


def test_a_run_made_here_stays_inside(study):
    "Preset tiny on the four built-in photographs, a few steps"
    recipe, run, data = recipes.build('edge_connect.edge', 'tiny', run=dict(steps=4, device='cpu', precision='bf16'))
    watch = health.watch_run(recipe, data, 'tiny')
    assert watch.expected is not None
    result = train(recipe, PhotoDataset(open_source('builtin'), data.size, study['strokes']), run, watch=watch, progress=False)
    assert len(result.records) == 4 and watch.lines == []


# failures

def test_sections_that_warnings_name_exist():
    headings = re.findall(r'^##+ (.+)$', '\n'.join(s for k, s in NOTEBOOK if k == 'markdown'), re.M)
    assert set(health.SECTIONS.values()) <= set(headings)


def test_an_inverted_mask_is_told_and_a_proper_one_is_not(study):
    recipe = lambda: study['ec'].InpaintRecipe(study['ec'].EdgeConnectConfig(width=.05, vgg_weights='none'))
    found = lived(recipe(), study['inverted'], 3)
    assert sections(found) == [health.SECTIONS['mask']] and 'hole ratio 0.' in found[0]
    assert lived(recipe(), study['strokes'], 4) == []


def test_a_grey_mask_is_told_at_once(study):
    found = lived(study['ec'].InpaintRecipe(study['ec'].EdgeConnectConfig(width=.05, vgg_weights='none')), study['as_jpeg'], 2)
    assert sections(found) == [health.SECTIONS['grey']] and 'step 1: share of grey' in found[0]


def test_looped_feature_matching_is_told_at_once(study):
    make = lambda kind: kind(study['ec'].EdgeConnectConfig(width=.05))
    found = lived(make(study['LoopedMatching']), study['strokes'], 2)
    assert sections(found) == [health.SECTIONS['looped']] and 'step 1:' in found[0]
    assert lived(make(study['ec'].EdgeRecipe), study['strokes'], 2) == []


def test_the_leak_is_the_gradient_of_both_losses(study):
    "D's gradient of a LeakyCritic = that of its own loss + that of G's through D; the logged value is its own"
    ec, torch_ = study['ec'], torch
    torch_.manual_seed(0); leaky = study['LeakyCritic'](ec.EdgeConnectConfig(width=.05, lambda_fm=0.)).eval()
    batch = study['collate']([PhotoDataset(open_source('builtin'), 32, study['strokes'])[0, k] for k in range(2)]); batch.pop('skipped')
    out = {k: v.detach() for k, v in leaky(batch).items()}
    grads = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaky.D.parameters()))])
    both = leaky.d_terms(batch, dict(out))['d_adv']; own = ec.EdgeRecipe.d_terms(leaky, batch, plain := dict(out))['d_adv']
    gs = sum(ec.EdgeRecipe.g_terms(leaky, batch, plain).values())
    assert both.item() == pytest.approx(own.item(), abs=1e-6) and torch.allclose(grads(both), grads(own) + grads(gs), atol=1e-6)


@pytest.mark.parametrize('name, symptom', [('looped', 'looped'), ('leaky', 'leak'), ('collapsed', 'won'), ('style_1', 'style')])
def test_recorded_failures_get_their_line(name, symptom, recorded):
    stage = 'edge_connect.inpaint' if name == 'style_1' else 'edge_connect.edge'
    found = health.check_log(recorded[name], health.CRITICS['edge_connect'], committed(stage, name == 'style_1'), f'{stage}, preset tiny')
    assert symptom in [f.symptom for f in found]
    line = next(f.line for f in found if f.symptom == symptom)
    assert re.fullmatch(rf'WARNING step \d+: \w+ \S+, expected .+ \({stage}, preset tiny\): read 45_health, "{re.escape(health.SECTIONS[symptom])}"', line)


def test_a_collapsing_critic_is_told_without_bands(study):
    "A generator that can't follow: the Context Encoder's critic wins within 75 steps, by a wide margin at any seed"
    recipe, _, data = recipes.build('context_encoder', 'smoke', config=dict(width=.1, d2g=1000., lr=6e-6))
    assert sections(lived(recipe, lambda rng, i, size: _box(size), 75, data.size)) == [health.SECTIONS['won']]


def test_critics_of_all_methods_are_known():
    "Each recipe with a critic logs the terms that its `Critic` names, and is blind at the value that its loss says"
    for name in ('edge_connect.edge', 'context_encoder', 'structure_flow.structure', 'deepfill_v2', 'deepfill_v1'):
        config = dict(width=.05) | (dict(size=64) if name == 'deepfill_v1' else {})
        recipe, run, data = recipes.build(name, 'smoke', config={k: v for k, v in config.items() if k != 'size'}, run=dict(steps=1, batch_size=2, device='cpu'))
        critic = health.critic_of(recipe)
        result = train(recipe, PhotoDataset(open_source('builtin'), data.size, lambda rng, i, size: _box(size)), run, progress=False)
        assert {critic.d, critic.g} <= set(result.records[0]), name
    assert set(health.CRITICS) == {'edge_connect', 'context_encoder', 'structural_inpainting', 'deepfill_v1', 'deepfill_v2', 'structure_flow'}


def _box(size):
    m = np.zeros((size, size), bool); m[size//4:size//2, size//4:size//2] = True
    return m


# looking on

def smoke(folder, study, steps, masks='strokes', watch=True, **kw):
    "A small run of the edge stage in `folder`, as 40_train makes it"
    recipe, run, data = recipes.build('edge_connect.edge', 'smoke', config=dict(width=.05), run=dict(steps=steps, batch_size=2, device='cpu', save_every=2) | kw)
    data.size = 32
    w = health.watch_run(recipe, data, 'smoke', folder) if watch else None
    return train(recipe, PhotoDataset(open_source('builtin'), 32, study[masks]), run, folder, watch=w, progress=False)


def test_looking_on_changes_nothing(study, tmp_path):
    a, b = (smoke(tmp_path/str(w), study, 4, watch=w).recipe.state_dict() for w in (True, False))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_resumed_run_does_not_repeat_itself(study, tmp_path, capsys):
    smoke(tmp_path/'run', study, 4, 'inverted'); first = capsys.readouterr().out
    assert first.count('WARNING') == 1 and len(health.said(tmp_path/'run')) == 1
    smoke(tmp_path/'run', study, 8, 'inverted'); second = capsys.readouterr().out
    assert 'WARNING' not in second and len(health.said(tmp_path/'run')) == 1
    (tmp_path/'run'/'checkpoint.pt').unlink(); smoke(tmp_path/'run', study, 4, 'strokes')       # begun anew: what was said before is gone
    assert health.said(tmp_path/'run') == []


def test_without_bands_only_what_holds_for_every_run(study, tmp_path, capsys, monkeypatch):
    "An installed package has no figures/"
    monkeypatch.setattr(health, 'checkout', lambda: None)
    recipe, run, data = recipes.build('edge_connect.edge', 'tiny', run=dict(steps=1, device='cpu'))
    watch = health.watch_run(recipe, data, 'tiny', tmp_path/'run')
    out = capsys.readouterr().out
    assert watch.expected is None and out.count('\n') == 1 and 'figures/health.json is missing' in out
    smoke(tmp_path/'run', study, 3, 'inverted'); out = capsys.readouterr().out
    assert out.count('only what holds for every run') == 1 and out.count('WARNING') == 1


def test_damaged_bands_are_told_and_stop_no_training(study, tmp_path, capsys):
    (tmp_path/'health.json').write_text(BANDS.read_text()[:500])
    recipe, run, data = recipes.build('edge_connect.edge', 'tiny', run=dict(steps=1, device='cpu'))
    assert health.watch_run(recipe, data, 'tiny', figures=tmp_path).expected is None
    line = capsys.readouterr().out
    assert line.count('\n') == 1 and 'health.json' in line and 'only what holds for every run' in line


@pytest.mark.parametrize('change, word', [(dict(config=dict(lr=2e-3)), 'lr=0.002'), (dict(data=dict(size=96)), '96'), (dict(data=dict(masks='center')), 'center')])
def test_a_run_that_is_made_differently_has_no_bands(change, word, capsys):
    recipe, run, data = recipes.build('edge_connect.edge', 'tiny', run=dict(steps=1, device='cpu'), **change)
    assert health.watch_run(recipe, data, 'tiny').expected is None
    line = capsys.readouterr().out
    assert line.count('\n') == 1 and word in line and 'only what holds for every run' in line


def test_a_loss_that_is_not_a_number_stops_and_a_log_with_one_is_told(study):
    recipe = study['ec'].InpaintRecipe(study['ec'].EdgeConnectConfig(width=.05, vgg_weights='none', lr=1e20))
    with pytest.raises(TrainingStopped) as e:
        train(recipe, PhotoDataset(open_source('builtin'), 32, study['strokes']), TrainConfig(steps=3, batch_size=2, device='cpu'), progress=False)
    assert 'loss term' in str(e.value) and 'is nan' in str(e.value)
    assert [f.symptom for f in health.check_log([dict(step=1, l1=None, m_precision=None)])] == ['nan']


def test_of_two_processes_the_first_one_looks_on(tmp_path):
    "Under torchrun: one line, one file"
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(ROOT/'tests'/'scripts'/'watched_run.py'),
                        str(tmp_path/'run')], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('WARNING step 3: hole ratio') == 1 and r.stdout.count('only what holds for every run') == 1
    assert len(health.said(tmp_path/'run')) == 1


def test_a_healthy_smoke_run_of_40_train_is_not_warned(papermill, tmp_path):
    "The notebook as a scheduler runs it: no line, an empty list in run.json; an inverted mask: one line in both"
    (tmp_path/'masks').mkdir()
    for n in range(2): Image.fromarray(255 - 255*_box(64).astype('uint8')).save(tmp_path/'masks'/f'{n}.png')
    runs, printed = {}, {}
    for name, extra in dict(healthy={}, inverted=dict(masks='files', mask_dir=tmp_path/'masks')).items():
        code, err, target = papermill('40_train', tmp_path, steps=4, options='width=0.05', size=32, out_dir=tmp_path/name, **extra)
        assert code == 0, err
        runs[name] = json.loads((tmp_path/name/'run.json').read_text())
        printed[name] = ''.join(str(c.get('outputs', '')) for c in json.loads(target.read_text())['cells'])
    assert runs['healthy']['warnings'] == [] and 'WARNING' not in printed['healthy']
    assert printed['healthy'].count('only what holds for every run') == 1
    assert sections(runs['inverted']['warnings']) == [health.SECTIONS['mask']] and printed['inverted'].count('WARNING step 3') == 1
