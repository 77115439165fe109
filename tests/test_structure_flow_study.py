"StructureFlow's protocols (which structure a network gets at test), their committed measurement, the committed ablation"
import math

import pytest
import torch

from inpaint_lib.core import InputError
from inpaint_lib.data.images import BuiltinImages, PhotoDataset, builtin_photograph, collate
from inpaint_lib.data.masks import mask_sampler, sample_bin_mask
from inpaint_lib.data.structure import damaged_structure, rtv_smooth
from inpaint_lib.experiments import judge, read_ledger
from inpaint_lib.metrics import verdict
from inpaint_lib.papers import structure_flow as sf

SIZE = 64


@pytest.fixture(scope='module')
def photo():
    rgb = builtin_photograph('chelsea')[40:40 + SIZE, 120:120 + SIZE]
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float()/255


@pytest.fixture(scope='module')
def hole(): return torch.from_numpy(sample_bin_mask(2, 1, size=SIZE)).float()[None, None]


def negative(photo, hole): return torch.where(hole > 0, 1 - photo, photo)


@pytest.mark.parametrize('protocol', sf.PROTOCOLS)
def test_protocols_hand_over_nothing_in_the_hole(protocol, photo, hole):
    s = sf.protocol_structure(photo, hole, protocol)
    inside = hole.expand_as(s) > 0
    assert s.shape == photo.shape and s.dtype == photo.dtype and (s[inside] == .5).all()
    assert -.01 < s.min() and s.max() < 1.01 and s[~inside].std() > .02


@pytest.mark.parametrize('protocol, tells', [('truth', True), ('damaged', False), ('extended', False)])
def test_only_the_first_protocol_knows_the_hole(protocol, tells, photo, hole):
    a, b = (sf.protocol_structure(x, hole, protocol) for x in (photo, negative(photo, hole)))
    assert torch.equal(a, b) != tells
    nan = photo.clone(); nan[hole.expand_as(nan) > 0] = torch.nan
    if protocol == 'extended': assert torch.equal(sf.protocol_structure(nan, hole, protocol), a)


def test_protocols_are_what_they_are_called(photo, hole):
    out = hole.expand_as(photo) == 0
    for protocol, s in (('truth', rtv_smooth(photo)), ('damaged', damaged_structure(photo, hole))):
        assert torch.equal(sf.protocol_structure(photo, hole, protocol)[out], s[out])
    rough = sf.protocol_structure(photo, hole, 'truth', lam=.001)
    assert torch.equal(rough[out], rtv_smooth(photo, lam=.001)[out])                  # parameters reach the smoother
    assert (rough - photo)[out].abs().mean() < .7*(sf.protocol_structure(photo, hole, 'truth') - photo)[out].abs().mean()


def test_extended_has_the_cleanest_rim(photo, hole):
    truth = sf.protocol_structure(photo, hole, 'truth')
    error = {p: (sf.protocol_structure(photo, hole, p) - truth).abs().sum().item() for p in ('damaged', 'extended')}
    assert 0 < error['extended'] < .3*error['damaged']


def test_a_batch_is_its_pictures(photo, hole):
    x, m = torch.cat([photo, 1 - photo]), torch.cat([hole, hole.flip(-1)])
    for p in sf.PROTOCOLS:
        one = torch.cat([sf.protocol_structure(x[i:i + 1], m[i:i + 1], p) for i in range(2)])
        assert torch.allclose(sf.protocol_structure(x, m, p), one, atol=2e-3)         # the fast solver's tolerance


def test_without_a_hole_the_protocols_agree(photo):
    none = torch.zeros(1, 1, SIZE, SIZE)
    a, b, c = (sf.protocol_structure(photo, none, p) for p in sf.PROTOCOLS)
    assert torch.equal(a, c) and (a - b).abs().max() < 2e-3


def test_unknown_protocol_is_told(photo, hole):
    with pytest.raises(InputError, match="protocol 'gt'; expected one of truth, damaged, extended"):
        sf.protocol_structure(photo, hole, 'gt')


def test_nearest_known_is_nearest():
    m = torch.zeros(1, 1, 9, 11); m[..., 2:7, 3:9] = 1
    x = torch.arange(99.).view(1, 1, 9, 11).repeat(1, 2, 1, 1); x[:, 1] += 1000
    y = sf.nearest_known(x.double(), m)
    assert y.dtype == torch.float64 and torch.equal(y[(m == 0).expand_as(y)], x.double()[(m == 0).expand_as(x)])
    known = (m[0, 0] == 0).nonzero().double()
    for i, j in (m[0, 0] > 0).nonzero().tolist():
        k = int(y[0, 0, i, j]); best = (known - torch.tensor([i, j])).norm(dim=1).min().item()
        assert math.isclose(math.dist((i, j), divmod(k, 11)), best) and y[0, 1, i, j] == k + 1000


def test_nearest_known_needs_known_pixels(photo):
    m = torch.zeros(2, 1, SIZE, SIZE); m[1] = 1
    with pytest.raises(InputError, match='covers its whole picture'): sf.nearest_known(photo.repeat(2, 1, 1, 1), m)
    with pytest.raises(InputError, match='covers its whole picture'): sf.protocol_structure(photo, m[1:])


def test_fill_takes_the_protocols(photo, hole):
    torch.manual_seed(0)
    S, G = sf.StructureGen(.0625).eval(), sf.FlowGen(.0625).eval()
    by = {p: sf.fill(S, G, photo, hole, structure=sf.protocol_structure(photo, hole, p))['comp'] for p in sf.PROTOCOLS}
    assert torch.equal(sf.fill(S, G, photo, hole)['comp'], by['extended'])            # the default
    assert not torch.equal(by['truth'], by['extended']) and not torch.equal(by['damaged'], by['extended'])
    assert torch.equal(sf.fill(S, G, negative(photo, hole), hole)['comp']*hole, by['extended']*hole)


def ledger(name):
    rows = read_ledger(name)
    if not rows: pytest.skip(f'{name} is not committed')
    return rows


def test_committed_protocols_ask_all_questions():
    rows = ledger('protocols_structure_flow')
    asked = [(r['experiment'], r['direction']) for r in rows if r['decides']]
    assert asked == [(f'{a} minus {b}', -1) for a, b in (('truth', 'damaged'), ('truth', 'extended'), ('extended', 'damaged'),
                                                         ('complete', 'truth'))]
    for r in rows:
        assert r['verdict'] == verdict(*r['interval'], margin=r['margin'], direction=r['direction']) and r['seeds'] == 1
        assert math.isclose(r['means'][0] - r['means'][1], r['value'], abs_tol=1e-9) and r['n'] + r['left_out'] >= 100
        assert r['decides'] == (r['measure'] == 'l1')


def test_committed_ablation_asks_all_claims():
    rows = ledger('ablation_structure_flow')
    assert [r['experiment'] for r in rows if r['decides']] == [f'gaussian minus {v}' for v in ('bilinear', 'none', 'none_wide', 'canny')]
    assert len(rows) == 16 and {r['seeds'] for r in rows} >= {3} and all('guide' in r and 'mean_colour' in r for r in rows)
    for r in rows:
        said = judge(*r['interval'], margin=r['margin'], direction=r['direction'], seeds=r['seeds'], trained=r['trained'])
        assert r['verdict'] == said and r['decides'] == (r['measure'] == 'l1')


@pytest.mark.parametrize('how', [dict(sampling='bilinear'), dict(sampling='none'), dict(guide='canny'), {}])
def test_every_variant_of_the_ablation_trains_and_has_the_same_parameters_elsewhere(how):
    torch.manual_seed(0); base = sf.FlowRecipe(sf.StructureFlowConfig(width=.0625, vgg_weights='none'))
    torch.manual_seed(0); recipe = sf.FlowRecipe(sf.StructureFlowConfig(width=.0625, vgg_weights='none', **how))
    theirs, ours = base.G.state_dict(), recipe.G.state_dict()
    conv = [k for k in theirs if k.startswith('conv_column')]
    assert all(ours[k].shape == theirs[k].shape for k in conv) and any('flow_column' in k for k in ours) == (how != dict(sampling='none'))
    one = PhotoDataset(BuiltinImages(['chelsea']), SIZE, masks=mask_sampler('center'), train=False)
    batch = collate([one[0, 0]]); batch['mask_mean'] = batch['mask'].mean()
    out = recipe(batch); loss = sum(recipe.g_terms(batch, out).values()); loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in recipe.G.parameters())
