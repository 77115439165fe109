"Guidance of DeepFill v2: lines as a hand draws them, whether a result follows them, committed measurements"
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from inpaint_lib.core import InputError, keyed_rng, set_seed
from inpaint_lib.data.edges import edge_maps, rgb_to_gray
from inpaint_lib.data.images import BUILTIN_HELD_OUT, BuiltinImages, PhotoDataset, builtin_photograph, collate
from inpaint_lib.data.masks import composite, dilate, mask_sampler, sample_bin_mask
from inpaint_lib.metrics import edge_f1, verdict
from inpaint_lib.papers import deepfill_v2 as df
from inpaint_lib.training import load_weights

ROOT = Path(__file__).resolve().parent.parent
SIZE = 96


@pytest.fixture(scope='module')
def photo():
    rgb = builtin_photograph('chelsea')[20:20 + SIZE, 120:120 + SIZE]
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float()/255


@pytest.fixture(scope='module')
def hole(): return torch.from_numpy(sample_bin_mask(5, 1, size=SIZE)).float()[None, None]


@pytest.fixture(scope='module')
def edge(photo): return edge_maps(rgb_to_gray(photo), 1.)


NOTHING = dict(wobble=0., shift=0., drop=0., thicken=0.)


def test_sketch_lies_in_the_hole_and_is_binary(edge, hole):
    soft = edge*.61 + .1*(1 - edge)
    s = df.sketch_channel(soft, hole, .6)
    assert torch.equal(s, edge*hole) and s.sum() > 20
    assert df.sketch_channel(.6*edge, hole, .6).sum() == 0                   # above, not at the threshold
    assert df.sketch_channel(soft.double(), hole.double(), .6).dtype == torch.float64


@pytest.mark.parametrize('name', df.SKETCH_STRENGTHS)
def test_drawings_stay_in_the_hole_and_repeat(name, edge, hole):
    s = df.SKETCH_STRENGTHS[name]
    a, b, other = (df.perturb_sketch(edge, hole, seed=n, **s) for n in (3, 3, 4))
    assert torch.equal(a, b) and set(a.unique().tolist()) == {0., 1.} and (a*(1 - hole)).sum() == 0
    assert torch.equal(a, edge*hole) == (name == 'true') == torch.equal(a, other)


def test_a_drawing_does_not_depend_on_its_batch(edge, hole):
    e, m = edge.expand(5, -1, -1, -1), hole.expand(5, -1, -1, -1)
    whole = df.perturb_sketch(e, m, seed=10)
    parts = torch.cat([df.perturb_sketch(e[a:b], m[a:b], seed=10 + a) for a, b in ((0, 2), (2, 5))])
    assert torch.equal(whole, parts) and not torch.equal(whole[0], whole[1])


def test_global_random_state_is_left_alone(edge, hole):
    set_seed(5); want = torch.rand(3), np.random.rand(3)
    set_seed(5); df.perturb_sketch(edge, hole); got = torch.rand(3), np.random.rand(3)
    assert torch.equal(want[0], got[0]) and (want[1] == got[1]).all()


@pytest.mark.parametrize('share', [0., .25, .5, 1.])
def test_drop_leaves_out_the_share_that_was_asked_for(share, edge, hole):
    a, all_ = df.perturb_sketch(edge, hole, **NOTHING | dict(drop=share)), edge*hole
    assert (a*(1 - all_)).sum() == 0 and a.sum() == all_.sum() - round(share*int(all_.sum()))


def test_drop_takes_pieces_not_dust(edge):
    everywhere = torch.ones_like(edge)
    dropped = edge - df.perturb_sketch(edge, everywhere, **NOTHING | dict(drop=.4))
    neighbours = lambda x: (x*torch.nn.functional.conv2d(x, torch.ones(1, 1, 3, 3), padding=1)).sum()/x.sum()
    rng = keyed_rng(0, 'dust'); dust = edge*torch.from_numpy(rng.random(edge.shape) < .4).float()
    assert neighbours(dropped) > 1.15*neighbours(dust)


def test_lengths_scale_with_the_picture():
    line = torch.zeros(1, 1, 256, 256); line[..., 128, :] = 1
    far = df.perturb_sketch(line, torch.ones_like(line), **NOTHING | dict(shift=40.), seed=1)
    rows = far[0, 0].nonzero()[:, 0].unique()
    small = df.perturb_sketch(line[..., ::4, ::4], torch.ones(1, 1, 64, 64), **NOTHING | dict(shift=40.), seed=1)
    assert len(rows) == 1 and abs(int(rows) - 128) <= 40 and int(rows) != 128
    assert abs(int(small[0, 0].nonzero()[0, 0]) - int(rows)/4) <= 1


def test_thicken_and_wobble(edge):
    everywhere = torch.ones(1, 1, 128, 128)
    dot = torch.zeros_like(everywhere); dot[..., 60, 70] = 1
    assert torch.equal(df.perturb_sketch(dot, everywhere, **NOTHING | dict(thicken=4.)), dilate(dot, 2))
    field = df.smooth_noise(keyed_rng(0, 'x'), (128, 128), step=16)
    assert math.isclose((field**2).sum(0).mean().item(), 1, rel_tol=1e-9) and field.diff(dim=-1).abs().max() < .5
    moved = df.displaced(dot, torch.full((2, 128, 128), 3.))
    assert moved[..., 63, 73].item() == 1 == moved.sum().item()


@pytest.mark.parametrize('wrong', [dict(drop=-.1), dict(drop=1.1), dict(wobble=-1), dict(shift=math.nan), dict(thicken=-1), dict(smooth=0),
                                   dict(smooth=1e-9), dict(smooth='a'), dict(wobble=math.inf), dict(wobble='a'), dict(shift=None), dict(drop='x'), dict(thicken=True),
                                   dict(thicken=1e6)])
def test_wrong_strengths_are_told(wrong, edge, hole):
    with pytest.raises(InputError, match=next(iter(wrong))): df.perturb_sketch(edge, hole, **wrong)


def test_wrong_shapes_are_told(edge, hole):
    for e, m in ((edge, hole.expand(2, -1, -1, -1)), (edge[0], hole[0]), (edge.expand(-1, 3, -1, -1), hole)):
        with pytest.raises(InputError, match=r'expected the same \(B,1,H,W\)'): df.perturb_sketch(e, m)


def test_agreement_by_hand():
    image = torch.zeros(1, 1, 40, 40); image[..., 20:] = 1; image[..., 20] = .5      # one vertical edge, one pixel wide
    where = edge_maps(image, 1.)
    everywhere, column = torch.ones_like(image), int(where[0, 0, 20].nonzero()[0])
    for off, want in ((0, 1.), (1, 1.), (2, 0.), (-1, 1.), (-3, 0.)):
        lines = torch.zeros_like(image); lines[..., column + off] = 1
        said = df.line_agreement(image, everywhere, lines, sigma=1.)
        assert said['precision'].item() == want and (said['recall'].item() > .9) == (want == 1.)
    half = torch.zeros_like(image); half[..., :20, column] = 1
    said = df.line_agreement(image, everywhere, half, sigma=1.)
    assert abs(said['precision'].item() - .5) < .1 and said['recall'].item() > .9


def test_agreement_is_edge_f1_for_true_lines(photo, hole, edge):
    other = composite(photo.roll(4, -1), photo, hole)
    said = df.line_agreement(other, hole, edge, sigma=1.)
    f1 = 2*said['precision']*said['recall']/(said['precision'] + said['recall'])
    assert torch.allclose(f1.double(), edge_f1(other, photo, hole, 1.), atol=1e-6)


def test_undefined_shares_are_nan(photo, hole):
    flat = torch.full_like(photo, .5)
    said = df.line_agreement(flat, hole, 0*hole)
    assert said['precision'].isnan().all() and said['recall'].isnan().all()


def test_follow_sketch_tells_obedience_from_chance(photo, hole, edge):
    bar = torch.zeros_like(hole); bar[..., SIZE//2] = 1; bar *= hole
    obeys = lambda image, mask, *, sketch: dict(comp=composite(sketch.cummax(-1).values.expand(-1, 3, -1, -1), image, mask))
    deaf = lambda image, mask, *, sketch: dict(comp=composite(torch.full_like(image, .4), image, mask))
    assert df.follow_sketch(obeys, photo, hole, bar)['recall'] > .95
    assert df.follow_sketch(deaf, photo, hole, bar)['recall'] < .3
    empty = df.follow_sketch(obeys, photo, hole, 0*bar, lines=bar)            # no lines given, compared with the bar
    assert empty['recall'] < .3 and torch.equal(empty['comp']*(1 - hole), photo*(1 - hole))


def lively(sketch, seed=0):
    "A small network whose signals survive its many gates"
    set_seed(seed); recipe = df.DeepFillV2Recipe(df.DeepFillV2Config(width=.125, sketch=sketch)).eval()
    with torch.no_grad(): [p.mul_(2.5) for p in recipe.G.parameters()]
    return recipe


def test_lines_reach_the_result_in_the_hole_alone(photo, hole, edge):
    G = lively(True).G
    none, empty, outside, lines = (df.fill(G, photo, hole, sketch=s)['comp'] for s in (None, 0*edge, edge*(1 - hole), edge*hole))
    assert torch.equal(none, empty) and torch.equal(none, outside)
    assert (lines - none).abs().max() > 1e-3 and torch.equal(lines*(1 - hole), photo*(1 - hole))


def test_recipe_takes_edge_files_before_canny(photo, hole, edge):
    recipe, batch = lively(True), dict(image=photo, mask=hole)
    with torch.no_grad(): drawn, found = recipe(batch | dict(edge=1 - edge))['sketch'], recipe(batch)['sketch']
    assert torch.equal(drawn, (1 - edge)*hole)
    assert torch.equal(found, edge_maps(rgb_to_gray(photo), recipe.config.sketch_sigma)*hole)
    with torch.no_grad(): assert 'sketch' not in lively(False)(batch)


def test_a_sketch_for_a_network_without_the_channel_is_told(photo, hole, edge):
    with pytest.raises(InputError, match='sketch'): df.fill(lively(False).G, photo, hole, sketch=edge)


SHIPPED = ROOT/'data'/'weights'/'deepfill_v2.sketch.safetensors'


def test_shipped_network_obeys():
    assert SHIPPED.is_file() and (SHIPPED.parent/'deepfill_v2.safetensors').is_file()
    nets, meta = load_weights(SHIPPED)
    recipe = df.DeepFillV2Recipe(df.DeepFillV2Config(**{k: v for k, v in meta['config'].items() if k in df.DeepFillV2Config.__dataclass_fields__}))
    recipe.G.load_state_dict(nets['generator'])
    cats = PhotoDataset(BuiltinImages(BUILTIN_HELD_OUT), 128, masks=mask_sampler('bins', bins=(2, 3)))
    batch = collate([cats[e, 0] for e in range(4)]); image, mask = batch['image'], batch['mask']
    lines = edge_maps(rgb_to_gray(image), recipe.config.sketch_sigma)*mask
    fill = partial(df.fill, recipe.G.eval())
    led, free = (df.follow_sketch(fill, image, mask, s, lines=lines)['recall'].nanmean() for s in (lines, 0*lines))
    assert led > free + .1


def ledger(name):
    file = ROOT/'figures'/f'{name}.json'
    assert file.is_file() and file.with_suffix('.png').is_file()
    return json.loads(file.read_text())


def test_committed_sketch_ledger_follows_its_rule():
    rows = ledger('sketch_deepfill_v2')
    assert sum(r['decides'] for r in rows) == 11 and {r['n'] + r['left_out'] for r in rows} == {224}
    for r in rows:
        assert r['verdict'] == verdict(*r['interval'], margin=r['margin'], direction=r['direction']) and r['seeds'] == 1
        assert math.isclose(r['means'][0] - r['means'][1], r['value'], abs_tol=1e-9)


def test_committed_ablation_asks_all_claims():
    "Its rule is tested with that of the other ablations, in test_experiments.py"
    rows = ledger('ablation_deepfill_v2')
    asked = [r['experiment'] for r in rows if r['decides']]
    assert asked == ['gated minus vanilla', 'gated minus vanilla_wide', 'gated minus partial', 'skip minus gated', 'skip minus gated']
    assert all(r['measure'] == 'l1' for r in rows if r['decides'])
