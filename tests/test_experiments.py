"""Experiments: settings, shares, resumed runs, refused mixtures, measures per picture, ledger rows, pictures and files of ledgers."""
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from inpaint_lib import experiments as ex
from inpaint_lib.core import InputError
from inpaint_lib.data.images import PhotoDataset
from inpaint_lib.data.masks import composite, mask_sampler
from inpaint_lib.metrics import l1, psnr
from inpaint_lib.training import Recipe, TrainConfig, load_weights

ROOT = Path(__file__).resolve().parent.parent


def refused(f, *args, **kw):
    with pytest.raises(InputError) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)


class Flat:
    "A source of flat pictures"
    def __init__(self, *levels): self.levels, self.names = levels, [f'{v}.png' for v in levels]
    def __len__(self): return len(self.levels)
    def read(self, i): return np.full((24, 20, 3), self.levels[i], np.uint8)


class Grey(Recipe):
    "One number per channel, times what the variant says"
    name = method = 'grey'
    def __init__(self, factor):
        super().__init__(); self.factor, self.config = factor, SimpleNamespace(lr=.05, d2g=1., betas=(.9, .999), factor=factor)
        self.G = nn.Conv2d(1, 3, 1, bias=False)
    def forward(self, batch):
        pred = torch.sigmoid(self.G(torch.ones_like(batch['mask'])))
        return dict(pred=pred, comp=composite(pred, batch['image'], batch['mask']))
    def g_terms(self, batch, out): return dict(l1=self.factor*(out['pred'] - batch['image']).abs().mean())


def data(*levels, train=False): return PhotoDataset(Flat(*levels), 16, masks=mask_sampler('center'), train=train)


def toy(folder, steps=3, **kw):
    keywords = dict(settings=dict(steps=steps, betas=(.9, .99)), variants=('full', 'weak'), seeds=2) | kw
    return ex.Experiment(folder, **keywords)


def go(e, steps=3, made=None, start=None):
    def make(variant, seed):
        if made is not None: made.append((variant, seed))
        return Grey(dict(full=1., weak=.1)[variant])
    test = data(40, 90, 200)
    return e.run(make, lambda seed: data(0, 100, 250, train=True),
                 lambda seed: TrainConfig(steps=steps, batch_size=2, seed=seed, device='cpu'),
                 lambda r: ex.measure_pictures(ex.painter(r), test, dict(l1=l1, psnr=psnr)), start=start)


def test_names_of_sets_and_files(tmp_path):
    assert ex.digest(Flat(1, 2)).startswith('2 pictures ') and len({ex.digest(Flat(*n)) for n in ((1, 2), (2, 1), (1, 2, 3))}) == 3
    assert ex.file_id('auto') == 'auto'
    (tmp_path/'a.bin').write_bytes(b'1'); one = ex.file_id(tmp_path/'a.bin'); (tmp_path/'a.bin').write_bytes(b'2')
    assert one.startswith('a.bin ') and ex.file_id(tmp_path/'a.bin') != one and str(tmp_path) not in one
    ex.check_apart(Flat(1), Flat(2)); assert 'share pictures (1 by name' in refused(ex.check_apart, Flat(1, 2), Flat(2, 3))


def test_ledgers_of_the_committed_figures_name_the_same_digests():
    "The formula is the one that the committed ledgers were made with"
    class Two(list): names = ['a', 'b']
    assert ex.digest(Two('ab')) == '2 pictures ' + hashlib.sha256(b'a\nb').hexdigest()[:12]


def test_chosen_variants():
    assert ex.chosen('', ('a', 'b')) == ['a', 'b'] and ex.chosen(' b,,b ', ('a', 'b'), always=('a',)) == ['a', 'b']
    assert ex.chosen('b', dict(a=1, b=2)) == ['b'] and "'c'; expected some of a, b" in refused(ex.chosen, 'a,c', ('a', 'b'))


@pytest.mark.parametrize('n', [1, 2, 3, 5])
@pytest.mark.parametrize('by_seed', [False, True])
def test_shares_are_a_partition(n, by_seed, tmp_path):
    parts = [toy(tmp_path, seeds=3, part=f'{k}/{n}', by_seed=by_seed) for k in range(1, n + 1)]
    assert sorted(j for p in parts for j in p.share) == sorted(parts[0].jobs) and len(parts[0].jobs) == 6
    if by_seed:
        seeds = [{s for _, s in p.share} for p in parts]
        assert sum(map(len, seeds)) == 3                    # no seed in two shares


@pytest.mark.parametrize('change,message', [
    (dict(part='3/2'), "part '3/2'"), (dict(part='0/2'), "part '0/2'"), (dict(part='2'), "part '2'"), (dict(part='a/b'), "part 'a/b'"),
    (dict(seeds=0), '0 seeds'), (dict(variants=()), 'at least one'), (dict(variants=('a/b',)), 'without /')])
def test_refuses_parts_and_names(change, message, tmp_path): assert message in refused(toy, tmp_path, **change)


def test_two_shares_make_the_whole_and_nothing_twice(tmp_path):
    one, two, made = toy(tmp_path, part='1/2'), toy(tmp_path, part='2/2'), []
    assert set(go(one, made=made)) == set(one.share) == {('full', 0), ('full', 1)} and not one.complete
    assert made == [('full', 0), ('full', 0), ('full', 1)]  # built once before anything is trained, then for each run
    assert '2 of 4 runs' in refused(two.values)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob('*.json')}
    go(two); assert one.complete and all(p.stat().st_mtime_ns == t for p, t in times.items())
    go(one, made=(again := [])); assert again == []         # all is there: not even built
    values = toy(tmp_path).values()
    assert np.shape(values['weak']['l1']) == (2, 3) and list(values) == ['full', 'weak'] and set(values['full']) == {'l1', 'psnr'}
    assert values['full']['l1'] != values['weak']['l1'] and values['full']['l1'][0] != values['full']['l1'][1]
    run = json.loads((tmp_path/'full_seed1.json').read_text())
    assert set(run) == {'variant', 'seed', 'settings', 'seconds', 'skipped', 'device', 'values'} and str(tmp_path) not in json.dumps(run)
    assert (run['variant'], run['seed'], run['settings']['betas']) == ('full', 1, [.9, .99]) and run['device'].startswith('cpu')


def test_same_start_for_one_seed_whatever_was_built_before(tmp_path):
    seen = {}
    go(toy(tmp_path), start=lambda r, v, s: seen.update({(v, s): r.G.weight.detach().clone()}))
    assert all(torch.equal(seen['full', s], seen['weak', s]) for s in (0, 1)) and not torch.equal(seen['full', 0], seen['full', 1])


def test_a_common_start_is_loaded_before_training(tmp_path):
    def start(recipe, variant, seed): torch.nn.init.constant_(recipe.G.weight, 3. + seed)
    go(toy(tmp_path), steps=1, start=start)
    w = load_weights(tmp_path/'weak_seed1'/'weights.safetensors')[0]['generator']['weight']
    assert (w - 4).abs().max() <= .051 and (w - 4).abs().max() > 0       # one step of Adam away


def test_a_killed_run_goes_on(tmp_path):
    "Killed between training and measuring: the training is not made again, and the result is that of an undisturbed run"
    whole, broken = toy(tmp_path/'a'), toy(tmp_path/'b')
    go(whole)
    def kill(recipe): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        broken.run(lambda v, s: Grey(1.), lambda s: data(0, 100, 250, train=True),
                   lambda s: TrainConfig(steps=3, batch_size=2, seed=s, device='cpu'), kill)
    weights = tmp_path/'b'/'full_seed0'/'weights.safetensors'; made = weights.stat().st_mtime_ns
    assert broken.runs() == {}
    go(broken); assert broken.values() == whole.values() and weights.stat().st_mtime_ns == made


def test_other_settings_and_strange_files_are_refused(tmp_path):
    go(toy(tmp_path, seeds=1))
    more = toy(tmp_path, steps=4, seeds=1)
    for f in (more.runs, more.values, lambda: go(more, 4)): assert 'full_seed0.json was made with steps 3 (now 4)' in refused(f)
    added = toy(tmp_path, seeds=1, settings=dict(steps=3, betas=(.9, .99), size=8))
    dropped = toy(tmp_path, seeds=1, settings=dict(steps=3))
    assert 'size None (now 8)' in refused(added.runs) and 'betas [0.9, 0.99] (now None)' in refused(dropped.runs)
    for text in ('{', '[]', '{"variant": 1}'):
        (tmp_path/'full_seed0.json').write_text(text); assert 'not the file of a run' in refused(toy(tmp_path, seeds=1).runs)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    "Also when the measures were not written yet"
    go(toy(tmp_path, seeds=1)); (tmp_path/'full_seed0.json').unlink()
    assert 'batch' in refused(go, toy(tmp_path, seeds=1, variants=('full',), settings=dict(steps=3, betas=(.9, .99), batch=4)))


def test_every_variant_is_built_before_the_first_is_trained(tmp_path):
    def make(variant, seed):
        if variant == 'weak': raise InputError('no such file')
        return Grey(1.)
    assert 'no such file' in refused(toy(tmp_path).run, make, None, None, None) and not list(tmp_path.iterdir())


def test_measures_per_picture():
    test, calls = data(10, 20, 30, 40, 50), []
    def measure(comp, image, mask): calls.append(len(comp)); return (comp - image).abs().amax((1, 2, 3))
    painted = lambda b: composite(torch.zeros_like(b['image']), b['image'], b['mask'])
    found = ex.measure_pictures(painted, test, dict(m=measure), batch=2)
    assert np.allclose(found['m'], np.array([10, 20, 30, 40, 50])/255) and calls == [2, 2, 1]
    assert ex.measure_pictures(painted, test, dict(m=measure), batch=2, at_once=True) == found and calls[3:] == [5]
    odd = lambda comp, image, mask: torch.tensor([math.inf, math.nan, -math.inf, 1., 2.])
    assert ex.measure_pictures(painted, test, dict(m=odd))['m'] == [None, None, None, 1., 2.]


def test_painter_measures_in_eval_mode_without_gradient():
    recipe = Grey(1.); recipe.G = nn.Sequential(recipe.G, nn.Dropout(.5)); recipe.train()
    values = [ex.measure_pictures(ex.painter(recipe), data(10, 20), dict(l1=l1)) for _ in range(2)]
    assert values[0] == values[1] and not recipe.training


def rows(shift, spread=.01, seeds=3, **kw):
    rng = np.random.default_rng(0); base = rng.random((1, 30))
    a, b = (base + s + spread*rng.standard_normal((seeds, 30)) for s in (shift, 0))
    return ex.ledger_row('c', 's', 'A minus B', 'm', a.tolist(), b.tolist(), **dict(margin=.02, direction=1) | kw)


def test_ledger_row_follows_the_rule():
    for shift, direction, said in ((.1, 1, 'reproduced'), (.1, -1, 'not reproduced'), (-.1, -1, 'reproduced'), (0., 1, 'not reproduced')):
        assert rows(shift, direction=direction)['verdict'] == said
    assert rows(0., spread=1.)['verdict'] == 'undecided' == rows(.1, seeds=2)['verdict'] == rows(.1, trained=False)['verdict']
    assert rows(.1, seeds=2, min_seeds=2)['verdict'] == rows(.1, trained=True)['verdict'] == 'reproduced'
    r = rows(.1, level=.9, budget='b', device='cpu')
    assert list(r) == ['claim', 'source', 'experiment', 'measure', 'value', 'interval', 'level', 'means', 'n', 'left_out', 'seeds',
                       'min_seeds', 'margin', 'direction', 'verdict', 'budget', 'device'] and (r['n'], r['left_out'], r['seeds']) == (30, 0, 3)
    wide = rows(.1, level=.99)['interval']; assert wide[0] < r['interval'][0] < r['value'] < r['interval'][1] < wide[1]
    assert r['means'][0] - r['means'][1] == pytest.approx(r['value']) and rows(.1, trained=True)['trained'] is True
    assert r['min_seeds'] == 3 and [rows(.1, seeds=1, min_seeds=m)['verdict'] for m in (1, 3)] == ['reproduced', 'undecided']
    assert rows(.1, seeds=1, min_seeds=1)['min_seeds'] == 1                 # about one network: the row says so
    json.dumps(r, allow_nan=False)


def test_ledger_row_leaves_undefined_pictures_out_and_counts_them():
    a, b = [[1., 2, None, 4], [1, 2, 3, 4]], [[0., 0, 0, math.inf], [0, 0, 0, 0]]
    make = lambda a, b: ex.ledger_row('', '', '', '', a, b, margin=0., direction=1)
    r = make(a, b); assert (r['n'], r['left_out'], r['value'], r['means']) == (2, 2, 1.5, [1.5, 0.])
    assert make([[None, 1.]], [[1., 1.]]) is None                        # one value gives no interval
    assert make([[None, 1.]]*2, [[1., 1.]]*2)['n'] == 1
    for wrong in ([[1, 2], [3]], [[1, 2]], [1, 2], 'ab'): assert 'expected' in refused(make, [[1, 2], [3, 4]], wrong)
    assert 'margin' in refused(ex.ledger_row, '', '', '', '', [[1, 2]], [[1, 3]], margin=-1, direction=1)


def test_forest_draws_what_the_rows_say():
    made = [rows(.1) | dict(experiment='first'), rows(0., spread=1.) | dict(experiment='second', margin=.3)]
    ax = ex.forest(made, 'title', 'axis').axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['first', 'second'] and (ax.get_title(), ax.get_xlabel()) == ('title', 'axis')
    grey, interval, dot = ax.lines[3:6]
    assert list(grey.get_xdata()) == [-.3, .3] and list(interval.get_xdata()) == made[1]['interval'] and list(dot.get_xdata()) == [made[1]['value']]
    assert dot.get_markerfacecolor() == 'white' != ax.lines[2].get_markerfacecolor()
    with pytest.raises(InputError): ex.forest([], 't', 'x')


def test_publish_and_read(tmp_path):
    r = [rows(.1)]
    assert ex.publish('x', r, ex.forest(r, 't', 'x'), tmp_path) == r == ex.read_ledger('x', tmp_path)
    assert (tmp_path/'x.png').stat().st_size > 1000 and ex.read_ledger('y', tmp_path) == []
    for text in ('{}', '[1]', '[{"value": 1}]', 'no'):
        (tmp_path/'x.json').write_text(text); assert 'not a ledger' in refused(ex.read_ledger, 'x', tmp_path)


OF_43 = ('claims', 'claims_measured')                   # gathered from the others, with fields of their own: tests/test_claims.py
LEDGERS = [p for p in sorted((ROOT/'figures').glob('*.json')) if p.stem not in OF_43 and isinstance(json.loads(p.read_text()), list)]
ONE_NETWORK = ('seams_', 'sketch_', 'protocols_')       # statements about one trained network, over photographs


@pytest.mark.parametrize('path', LEDGERS, ids=lambda p: p.stem)
def test_committed_ledgers_follow_the_rule(path):
    found = ex.read_ledger(path.stem)
    need = {'claim', 'source', 'experiment', 'measure', 'value', 'interval', 'n', 'seeds', 'min_seeds', 'verdict'}
    about_methods = not path.stem.startswith(ONE_NETWORK)
    if about_methods: need |= {'budget', 'device', 'deviations'}
    assert found and all(need <= set(r) for r in found)
    for r in found:
        assert r['min_seeds'] == (3 if about_methods else 1) <= r['seeds']
        if 'margin' in r:
            rule = {k: r[k] for k in ('margin', 'direction', 'seeds', 'min_seeds')}
            assert r['verdict'] == ex.judge(*r['interval'], trained=r.get('trained'), **rule)
        else: assert (r['verdict'], r['trained']) == ('undecided', False)


def test_committed_ledgers_are_found():
    assert {p.stem.split('_')[0] for p in LEDGERS} >= {'ablation', 'claims', 'seams', 'sketch'}


@pytest.mark.parametrize('stem, weights', [('seams_deepfill_v1', 'deepfill_v1'), ('sketch_deepfill_v2', 'deepfill_v2.sketch')])
def test_ledgers_of_one_network_name_the_weights_that_ship(stem, weights):
    file = ex.file_id(ROOT/'data'/'weights'/f'{weights}.safetensors')
    named = {(r['settings'] if 'settings' in r else r)['weights'].split()[-1] for r in ex.read_ledger(stem)}
    assert named == {file.split()[-1]}
