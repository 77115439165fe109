"""The ledger of claims: every claim has its rows, verdicts follow from their numbers, proofs are made again, and the experiments run."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from inpaint_lib.data.images import builtin_photograph
from inpaint_lib.data.masks import sample_bin_mask
from inpaint_lib.experiments import judge, read_ledger
from inpaint_lib.features import vgg_shapes
from inpaint_lib.papers.edge_connect import EdgeGenerator
from inpaint_lib.papers.partial_conv import PartialConv2d
from inpaint_lib.training import save_weights

ROOT = Path(__file__).resolve().parent.parent
VERDICTS = ('reproduced', 'not reproduced', 'undecided')
FIELDS = {'number', 'claim', 'source', 'experiment', 'measure', 'value', 'interval', 'n', 'seeds', 'budget', 'device', 'verdict', 'overall',
          'decides', 'denied'}
EXACT = (3, 18)
ASKED = {7: {'hallucinated own minus no_edges own', 'true_edges true minus hallucinated own'}, 8: {'own_activations minus pretrained'},
         10: {'deepfill_sketch hasty minus deepfill_sketch true', 'true_edges hasty minus true_edges true'},
         13: {'hallucinated own minus no_edges own'}, 15: {'true_edges true minus deepfill_sketch hasty'}}


@pytest.fixture(scope='module')
def rows():
    found = read_ledger('claims')
    assert found, 'figures/claims.json is not there'
    return found


def of(rows, number): return [r for r in rows if r['number'] == number]


def overall(rows):
    "The rule of the notebook, written again: all pairs speak for it, or one against, or neither; a pair that contradicts itself is silent"
    turn, said = {'reproduced': 'not reproduced', 'not reproduced': 'reproduced'}, set()
    for pair in {(r['experiment'], r['denied']) for r in rows if r['decides']}:
        words = {r['verdict'] for r in rows if r['decides'] and (r['experiment'], r['denied']) == pair}
        words = {turn.get(w, w) for w in words} if pair[1] else words
        said |= {'undecided'} if len(words - {'undecided'}) == 2 else words
    return 'not reproduced' if 'not reproduced' in said else 'reproduced' if said == {'reproduced'} else 'undecided'


@pytest.mark.parametrize('number', range(1, 19))
def test_every_claim_is_there(rows, number):
    mine = of(rows, number)
    assert mine and any(r['decides'] for r in mine)
    assert len({(r['claim'], r['source'], r['overall']) for r in mine}) == 1 and mine[0]['overall'] == overall(mine)
    assert re.match(r'00\d', mine[0]['source'])
    for r in mine: assert FIELDS <= r.keys() and r['verdict'] in VERDICTS


def test_nothing_else_is_there(rows):
    assert {r['number'] for r in rows} == set(range(1, 19))
    assert [r['number'] for r in rows] == sorted(r['number'] for r in rows)


def test_verdicts_follow_from_numbers(rows):
    measured = [r for r in rows if r['interval']]
    assert len(measured) > 40
    for r in measured:
        lo, hi = r['interval']
        assert lo <= r['value'] <= hi and r['margin'] > 0 and r['direction'] in (1, -1) and r['n'] > 0 and r['budget'] and r['device'], r
        assert r['verdict'] == judge(lo, hi, margin=r['margin'], direction=r['direction'], seeds=r['seeds'], trained=r.get('trained')), r
        if r['verdict'] != 'undecided': assert r['seeds'] >= 3 and r.get('trained') is not False
    for r in rows:
        assert ('reason' in r) == (r['verdict'] == 'undecided')
        assert sum([bool(r['interval']), r.get('exact') is True, 'missing' in r]) == 1          # measured, proved or missing


def test_proofs_are_made_again(rows):
    exact = [r for r in rows if r.get('exact')]
    assert {r['number'] for r in exact} == set(EXACT) and {r['verdict'] for r in exact} == {'reproduced'}
    layer, closed = PartialConv2d(1, 1, 3, padding=1), []
    for seed in range(3):
        hole = torch.from_numpy(sample_bin_mask(3, seed, size=48)).float()[None, None]; valid, n = 1 - hole, 0
        known = (hole[0, 0] == 0).nonzero().double()
        far = max(torch.cdist(p[None].double(), known, p=math.inf).min().item() for p in (hole[0, 0] > 0).nonzero())
        while not valid.all(): valid, n = layer.grow(valid), n + 1
        closed.append((n, far))
    assert all(n == far for n, far in closed)
    for k in range(9):
        one = torch.zeros(9); one[k] = 1
        assert PartialConv2d(1, 1, 3)(torch.rand(1, 1, 3, 3), one.view(1, 1, 3, 3))[1].item() == 1


def test_a_sketch_in_the_hole_is_not_seen_and_a_declared_one_is():
    hole = torch.zeros(1, 1, 24, 24); hole[..., 6:18, 5:15] = 1
    for seed in range(4):
        torch.manual_seed(seed); layer = PartialConv2d(4, 6, 3, padding=1)
        a = torch.rand(1, 4, 24, 24); b = torch.where(hole > 0, torch.rand_like(a)*100, a)
        assert torch.equal(layer(a, 1 - hole)[0], layer(b, 1 - hole)[0])
        own = PartialConv2d(4, 6, 3, padding=1, groups=(3, 1)); masks = torch.cat([1 - hole, torch.ones_like(hole)], 1)
        assert not torch.equal(own(a, masks)[0], own(b, masks)[0])


def test_what_was_to_be_asked_was_asked(rows):
    for number, experiments in ASKED.items():
        mine = [r for r in of(rows, number) if r['decides']]
        assert 'missing' in mine[0] or {r['experiment'] for r in mine} == experiments
    denied = {r['number'] for r in rows if r['denied']}
    assert denied <= {5, 17} and 5 in denied


def test_rows_of_other_ledgers_are_as_there(rows):
    "A number is copied, never retyped"
    origins = {r['origin'] for r in rows if 'origin' in r} - {'compare'}
    assert len(origins) >= 5
    for name in origins:
        theirs = {(r['experiment'], r['measure'], r['value'], tuple(r['interval'])) for r in read_ledger(name)}
        ours = {(r['experiment'], r['measure'], r['value'], tuple(r['interval'])) for r in rows if r.get('origin') == name}
        assert ours and ours <= theirs, name


def test_one_network_decides_no_claim(rows):
    single = [r for r in rows if r['interval'] and r['seeds'] < 3]
    assert single and {r['verdict'] for r in single} == {'undecided'}


# the experiments themselves, at the smallest size

SMALL = dict(claims_steps=2, claims_edge_steps=2, claims_batch=2, claims_seeds=2, claims_width=.0625, claims_size=32)


@pytest.fixture(scope='module')
def given(tmp_path_factory):
    "Held-out photographs, a VGG19 with random weights, an edge network"
    folder = tmp_path_factory.mktemp('given'); (folder/'test').mkdir(); torch.manual_seed(0)
    for i in range(3): Image.fromarray(builtin_photograph('chelsea')[40*i:150 + 40*i, 100:250]).save(folder/'test'/f'{i}.png')
    shapes = [(k, s) for k, s in vgg_shapes('vgg19').items() if int(k.split('.')[1]) <= 16]
    save_file({k: torch.randn(s)*(2/math.prod(s[1:]))**.5 if len(s) > 1 else torch.zeros(s) for k, s in shapes}, folder/'vgg.safetensors')
    save_weights(folder/'edge.safetensors', dict(edge=EdgeGenerator(.0625).state_dict()), dict(config=dict(width=.0625)))
    return dict(SMALL, test_dir=folder/'test', vgg_weights=folder/'vgg.safetensors', edge_weights=folder/'edge.safetensors')


def started(out, **parameters):
    "The notebook in a process group of its own, to be killed"
    command = [sys.executable, '-m', 'papermill', '--cwd', ROOT/'nbs', '--no-progress-bar', '--log-level', 'ERROR', ROOT/'nbs'/'43_claims.ipynb',
               out/'killed.ipynb']
    for k, v in (parameters | dict(claims_dir=out)).items(): command += ['-p', k, v]
    return subprocess.Popen(list(map(str, command)), start_new_session=True, stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS='1'))


def killed_after(p, path):
    "Kill the process, kernel included, once `path` is there"
    end = time.time() + 120
    while not path.exists() and time.time() < end and p.poll() is None: time.sleep(.02)
    try: children = subprocess.run(['pgrep', '-P', str(p.pid)], capture_output=True, text=True).stdout.split()
    finally: os.killpg(p.pid, signal.SIGKILL)
    for c in children: os.kill(int(c), signal.SIGKILL)
    p.wait(); p.stderr.close()
    assert path.exists(), 'no run was finished within two minutes'


@pytest.fixture(scope='module')
def made(papermill, given, tmp_path_factory):
    "Everything, after a first process was killed in the middle"
    out = tmp_path_factory.mktemp('claims'); first = out/'edges'/'own_activations_seed0.json'
    killed_after(started(out, **given), first); before = first.stat().st_mtime_ns
    assert not (out/'sketch'/'deepfill_sketch_seed1.json').exists()
    code, err, target = papermill('43_claims', out, claims_dir=out, **given)
    assert code == 0, err
    return out, target, before == first.stat().st_mtime_ns


def test_a_killed_run_goes_on(made):
    out, target, untouched = made
    assert untouched, 'a finished run was made again'
    for name, variants in dict(edges=('own_activations', 'pretrained'), colours=('no_edges', 'hallucinated', 'true_edges'),
                               sketch=('deepfill_sketch',)).items():
        for job in (f'{v}_seed{s}' for v in variants for s in range(2)):
            run = json.loads((out/name/f'{job}.json').read_text())
            assert run['settings']['steps'] == 1 + (name != 'sketch') and all(len(v) == 3 for v in run['values'].values())
            assert len((out/name/job/'log.jsonl').read_text().splitlines()) >= 1
    text = str(nbformat.read(target, as_version=4))
    assert 'edges: 4 of 4 runs are there' in text and 'sketch: 2 of 2 runs are there' in text


def test_a_tiny_run_leaves_rows(made):
    out, *_ = made; tiny = read_ledger('claims', out); measured = read_ledger('claims_measured', out)
    assert {r['number'] for r in tiny} == set(range(1, 19)) and {7, 8, 10, 13, 15} <= {r['number'] for r in measured}
    for number, experiments in ASKED.items():
        mine = [r for r in of(tiny, number) if r['decides']]
        assert {r['experiment'] for r in mine} == experiments
        assert all(r['seeds'] == 2 and r['verdict'] == 'undecided' and '2 crops of 32 pixels' in r['budget'] for r in mine)
        assert all(('1 steps of 2 x 2 crops' in r['budget']) == ('sketch' in r['experiment']) for r in mine)
    for name in ('claims.png', 'claims_edges.png'): assert Image.open(out/name).size[0] > 400


def test_variants_differ_in_their_lines_only(made):
    out, *_ = made
    value = lambda v, m: json.loads((out/'colours'/f'{v}_seed0.json').read_text())['values'][m]
    assert len({tuple(value('no_edges', f'l1 {c}')) for c in ('own', 'none', 'true', 'hasty')}) == 1           # it is given none
    assert len({tuple(value('true_edges', f'l1 {c}')) for c in ('own', 'none', 'true', 'hasty')}) == 4
    sketch = json.loads((out/'sketch'/'deepfill_sketch_seed0.json').read_text())['values']
    assert sketch['l1 own'] == sketch['l1 none'] != sketch['l1 true']


def test_other_settings_are_refused(papermill, made, given, tmp_path):
    code, err, _ = papermill('43_claims', tmp_path, claims_dir=made[0], **given | dict(claims_steps=3))
    assert code and 'no_edges_seed0.json was made with steps 2 (now 3); expected the same, or another folder' in err


@pytest.mark.parametrize('wrong, says', [(dict(claims_variants='no_edgse'), "variant 'no_edgse'; expected some of own_activations, pretrained"),
                                         (dict(claims_variants='no_edges', claims_part='3/2'), "part '3/2'; expected '1/2' and '2/2'"),
                                         (dict(claims_variants='hallucinated', edge_weights='none.safetensors'), 'none.safetensors: not a readable weights file')])
def test_wrong_parameters_are_one_line(papermill, given, tmp_path, wrong, says):
    code, err, _ = papermill('43_claims', tmp_path, **given | dict(claims_dir=tmp_path/'runs') | wrong)
    assert code and [line for line in err.splitlines() if line.startswith('InputError')] and says in err
    assert not list((tmp_path/'runs').rglob('*.json'))
