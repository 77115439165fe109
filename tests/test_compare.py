"""42_compare: equal budgets, refused input, what is committed, and README's table of it"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inpaint_lib import inference, protocol
from inpaint_lib.data.images import builtin_photograph
from inpaint_lib.recipes import PLANS, RECIPES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tests'))
import readme  # noqa: E402

SMALL = dict(methods='context_encoder, edge_connect, telea', seeds=2, images_seen=40, batch_size=4, seconds=.8)


@pytest.fixture(scope='module')
def compared(papermill, tmp_path_factory):
    "A folder with a small comparison"
    out = tmp_path_factory.mktemp('compare')
    code, err, _ = papermill('42_compare', out, out_dir=out/'runs', **SMALL)
    assert code == 0, err
    return out/'runs'


def test_budgets_are_equal(compared):
    report = json.loads((compared/'compare.json').read_text())
    images, seconds = report['tables']['images'], report['tables']['seconds']
    assert set(images['methods']) == set(seconds['methods']) == {'context_encoder', 'edge_connect', 'telea'}
    for m in ('context_encoder', 'edge_connect'):
        assert abs(images['methods'][m]['pictures'] - 40) <= 2*len(PLANS[m])       # half a batch for each stage
        paces = {p.stage: json.loads((compared/'pace'/f'{p.stage}.json').read_text())['seconds'] for p in PLANS[m]}
        for part, told in zip(PLANS[m], seconds['methods'][m]['stages']):
            assert told['steps'] == max(1, round(part.share*SMALL['seconds']/paces[part.stage]))
    steps = {m: sum(s['steps'] for s in r['stages']) for m, r in seconds['methods'].items()}
    assert steps['context_encoder'] > steps['edge_connect'] > 0 and images['methods']['telea']['pictures'] == 0


def test_numbers_are_of_the_set(compared):
    report, held = json.loads((compared/'compare.json').read_text()), protocol.EvaluationSet.load(compared/'manifest.json', 'builtin')
    assert report['protocol'] == held.hash and report['pictures'] == len(held)
    files = list((compared/'measured').rglob('*.json'))
    assert len(files) == 2*2*2 + 1                                                 # methods x seeds x budgets, and Telea once
    assert all(json.loads(f.read_text())['ids'] == [i.id for i in held.items] for f in files)
    telea, item = inference.load_inpainter('telea'), held[0]
    comp = telea(item['image'], item['mask']).image
    error = float(((comp - item['image']).abs()*item['mask']).sum()/(3*item['mask'].sum()))
    kept = json.loads((compared/'measured'/'telea.json').read_text())['values']['l1_hole'][0]
    assert abs(error - kept) < 1e-6
    for rows in report['pairs'].values():
        assert all(abs(r['value'] - (r['means'][0] - r['means'][1])) < 1e-4*max(1, abs(r['means'][0])) for r in rows)


def test_goes_on_and_refuses_other_settings(papermill, compared, tmp_path):
    one = compared/'images'/'context_encoder_seed1.json'
    weights = (compared/'images'/'context_encoder_seed1'/'context_encoder'/'weights.safetensors').read_bytes()
    kept = json.loads(one.read_text()); one.unlink(); shutil.rmtree(one.with_suffix(''))          # as if it had been killed before it
    code, err, _ = papermill('42_compare', tmp_path, out_dir=compared, **SMALL)
    assert code == 0, err
    assert json.loads(one.read_text())['stages'][0]['steps'] == kept['stages'][0]['steps']
    assert (one.with_suffix('')/'context_encoder'/'weights.safetensors').read_bytes() == weights  # the same network, bit for bit
    code, err, _ = papermill('42_compare', tmp_path, out_dir=compared, **(SMALL | dict(batch_size=2)))
    assert code and 'InputError' in err and 'batch_size' in err and 'Traceback' not in err.splitlines()[-1]


@pytest.mark.parametrize('given,says', [(dict(seads=3), "did you mean 'seeds'"), (dict(methods='lama'), "variant 'lama'"),
                                        (dict(options='edge_konnect:lr=1'), "stage 'edge_konnect' is unknown")])
def test_one_line_for_bad_input(papermill, tmp_path, given, says):
    code, err, _ = papermill('42_compare', tmp_path, **given)
    assert code and says in err, err


def test_refuses_to_fill_what_it_learned_from(papermill, tmp_path):
    for folder in ('learn', 'fill'): (tmp_path/folder).mkdir()
    Image.fromarray(np.asarray(builtin_photograph('chelsea'))).save(tmp_path/'learn'/'a.png')
    shutil.copy(tmp_path/'learn'/'a.png', tmp_path/'fill'/'other_name.png')
    code, err, _ = papermill('42_compare', tmp_path, data_dir=tmp_path/'learn', test_dir=tmp_path/'fill')
    assert code and 'are in the training data too' in err, err


@pytest.fixture(scope='module')
def committed(): return json.loads((ROOT/'figures'/'compare.json').read_text())


def test_committed_comparison_is_whole(committed):
    assert set(committed['tables']) == {'images', 'seconds'} and set(committed['shipped']['methods']) == set(inference.METHODS)
    for b, t in committed['tables'].items():
        assert set(t['methods']) == set(inference.METHODS) and t['seeds'] >= 3
        for m, r in t['methods'].items():
            assert r['seeds'] == (t['seeds'] if m in PLANS else 1)
            assert set(committed['costs'][m]) >= {'parameters', 'gmac', 'seconds_per_picture', 'peak_mib'}
            for s in (s for bin in r['bins'].values() for s in bin.values()): assert s['lo'] <= s['mean'] <= s['hi'] and s['n'] > 1
            assert {s['stage'] for s in r['stages']} <= set(RECIPES) and len(r['bins']) == 7       # six bins and all
    for m in PLANS:
        told = committed['tables']['images']['methods'][m]
        assert abs(told['pictures'] - committed['tables']['images']['amount']) <= 4*len(told['stages'])
    assert len(committed['protocol']) == 12 and committed['device'] and committed['settings']['photographs']


def test_committed_pictures():
    for name in ('compare', 'compare_seconds', 'compare_shipped', 'compare_failures'):
        file = ROOT/'figures'/f'{name}.png'
        assert file.stat().st_size < 900_000 and Image.open(file).size[0] >= 400


def test_readme_shows_the_committed_tables(committed):
    text, claims = (ROOT/'README.md').read_text(), readme.committed('claims')
    assert readme.written(text, compare=readme.block(committed), claims=readme.verdicts(claims)) == text, 'run: python tests/readme.py'
    other = json.loads(json.dumps(committed)); other['tables']['images']['methods']['telea']['bins']['all']['l1_hole']['mean'] += .01
    assert readme.block(other) not in text and readme.verdicts([r | dict(overall='denied') for r in claims]) not in text


def test_last_weights_are_of_the_same_comparison(committed):
    last, text = readme.committed('compare_last'), (ROOT/'README.md').read_text()
    assert last['protocol'] == committed['protocol'] and last['settings'] == committed['settings'] | dict(ema=0.)
    for m, said in (('edge_connect', 'EdgeConnect'), ('structure_flow', 'StructureFlow')):
        got = last['tables']['images']['methods'][m]['bins']['all']['l1_hole']
        assert got['mean'] < committed['tables']['images']['methods'][m]['bins']['all']['l1_hole']['mean']
        assert f"{said} {100*got['mean']:.1f} %" in text
