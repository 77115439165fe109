"Fillers without learning: what is known stays, what the hole holds has no influence, worked values, odd sizes, bad input"
import math
import warnings

import numpy as np
import pytest
import torch

from inpaint_lib.core import InputError, keyed_rng
from inpaint_lib.data.images import builtin_photograph, to_tensor
from inpaint_lib.data.masks import center_mask, sample_bin_mask
from inpaint_lib.metrics import psnr
from inpaint_lib.papers import classical as C

FILLERS = (C.copy_mean, C.telea, C.navier_stokes, C.biharmonic, C.patch)
each_filler = pytest.mark.parametrize('fill', FILLERS, ids=lambda f: f.__name__)
as_mask = lambda hole: torch.from_numpy(hole)[None, None].float()


def photo(size=48, name='chelsea', y=30, x=120):
    return to_tensor(builtin_photograph(name)[y:y+size, x:x+size])[None]


def holes(size=48):
    "A centred block, a free form, several holes of which two lie on the border and one in a corner"
    many = np.zeros((size, size), bool); many[:9, 20:30] = many[-7:, -8:] = many[20:24, 20:24] = many[30:40, :3] = True
    return dict(block=center_mask(size, size//3), free=sample_bin_mask(2, 5, size=size), many=many)


@each_filler
@pytest.mark.parametrize('hole', holes(), ids=str)
def test_fills_the_hole_only_and_reads_nothing_below_it(fill, hole):
    image, mask = photo(), as_mask(holes()[hole])
    outside = (mask == 0).expand_as(image)
    pred = fill(image, mask)['pred']
    assert pred.shape == image.shape and pred.dtype == image.dtype
    assert torch.equal(pred[outside], image[outside])
    assert 0 <= pred.min() and pred.max() <= 1 and pred.isfinite().all()
    assert not torch.equal(pred, image)
    for other in (0., 1., float('nan'), 7.):
        assert torch.equal(fill(torch.where(mask > 0, other, image), mask)['pred'], pred)


@each_filler
def test_a_batch_is_its_pictures(fill):
    image = torch.cat([photo(), photo(name='coffee')]); mask = torch.cat([as_mask(h) for h in list(holes().values())[:2]])
    together = fill(image, mask)
    for n in range(2):
        alone = fill(image[n:n+1], mask[n:n+1])
        assert together.keys() == alone.keys()
        for k in alone: assert torch.equal(together[k][n], alone[k][0]), k


@each_filler
@pytest.mark.parametrize('dtype', (torch.float64, torch.float16, torch.bfloat16), ids=str)
def test_types(fill, dtype):
    image, mask = photo().to(dtype), as_mask(holes()['block'])
    pred = fill(image, mask.bool())['pred']                                 # a bool mask is as good
    assert pred.dtype == dtype and torch.equal(pred, fill(image, mask.to(dtype))['pred'])
    assert torch.equal(pred[(mask == 0).expand_as(image)], image[(mask == 0).expand_as(image)])


@each_filler
def test_arguments_are_left_alone_and_nothing_is_tracked(fill):
    image, mask = photo().requires_grad_(), as_mask(holes()['many'])
    before, m = image.detach().clone(), mask.clone()
    assert not fill(image, mask)['pred'].requires_grad
    assert torch.equal(image.detach(), before) and torch.equal(mask, m)


@each_filler
@pytest.mark.parametrize('size', ((1, 6), (6, 1), (2, 2), (3, 3), (5, 40), (9, 8)), ids=str)
def test_small_and_narrow_pictures(fill, size):
    image, mask = torch.linspace(0, 1, 3*size[0]*size[1]).reshape(1, 3, *size), torch.zeros(1, 1, *size)
    mask[..., -1, -1] = 1
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', C.PatchWarning)
        pred = fill(image, mask)['pred']
    assert pred.isfinite().all() and torch.equal(pred[(mask == 0).expand_as(image)], image[(mask == 0).expand_as(image)])


@each_filler
def test_one_colour_is_continued(fill):
    image = torch.tensor([51, 102, 204]).div(255).view(1, 3, 1, 1).expand(1, 3, 40, 40)
    levels = 8 if fill is C.telea else 0                                    # OpenCV's Telea drifts, even on a flat colour
    assert (fill(image, as_mask(holes(40)['many']))['pred'] - image).abs().max()*255 < levels + 1e-3


def test_copy_mean_is_the_mean_of_the_known():
    image, mask = photo(), as_mask(holes()['free'])
    known, inside = ((mask == v).expand_as(image) for v in (0, 1))
    mean = image[known].reshape(3, -1).double().mean(1)
    pred = C.copy_mean(image, mask)['pred'][inside].reshape(3, -1)
    assert (pred - mean[:, None]).abs().max() < 1e-6
    assert (mean - image.mean((0, 2, 3))).abs().max() > 1e-3                # not the mean of everything


def test_opencv_gets_rounded_pixels_and_the_radius():
    import cv2
    image, hole = photo(), holes()['free']
    known = (torch.where(torch.from_numpy(hole), 0, image)[0].permute(1, 2, 0)*255).round().byte().numpy()
    for fill, flag in ((C.telea, cv2.INPAINT_TELEA), (C.navier_stokes, cv2.INPAINT_NS)):
        for radius in (2., 5.):
            want = cv2.inpaint(known, hole.astype(np.uint8), radius, flag)
            got = (fill(image, as_mask(hole), radius=radius)['pred'][0].permute(1, 2, 0)*255).round().byte().numpy()
            assert np.array_equal(got, want)
    assert not torch.equal(C.telea(image, as_mask(hole), radius=2)['pred'], C.telea(image, as_mask(hole), radius=5)['pred'])


def test_biharmonic_solves_its_equation():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 33), torch.linspace(-1, 1, 33), indexing='ij')
    u = .5 + .2*x**3 - .1*y**2*x + .1*y                                     # its bilaplacian is zero
    image, mask = u.double().expand(1, 3, 33, 33), as_mask(center_mask(33, 9))
    assert (C.biharmonic(image, mask)['pred'] - image).abs().max() < 1e-6


def test_only_whole_known_patches_may_be_copied():
    hole = holes()['many']; may = C.patch_centres(hole, 5)
    for y, x in np.ndindex(hole.shape):
        inside = 2 <= y < 46 and 2 <= x < 46
        assert may[y, x] == (inside and not hole[y-2:y+3, x-2:x+3].any())


def test_targets_are_the_patches_that_touch_the_hole():
    hole = holes()['many']
    field = C.random_field(photo()[0].permute(1, 2, 0).numpy(), hole, patch_size=5, rng=keyed_rng(0))
    got = set(map(tuple, field.target.T))
    assert got == {(y, x) for y, x in np.ndindex(hole.shape) if hole[max(0, y-2):y+3, max(0, x-2):x+3].any()}
    assert field.confidence[0, 0] == 1 and field.confidence[21, 21] == 2**-2   # two pixels inside a block of four


def test_cost_is_the_weighted_mean_squared_difference():
    hole, rng = holes()['many'], keyed_rng(3)
    field = C.random_field(rng.random((48, 48, 3)).astype('f4'), hole, patch_size=3, rng=rng)
    C.improve(field, rng=rng, propagate=False, search=False)
    for n in (0, 50, field.target.shape[1] - 1):                            # the first and the last lie on the border
        (ty, tx), (sy, sx), total, sum_ = field.target[:, n], field.source[:, n], 1e-3, 0
        for dy, dx in np.ndindex(3, 3):
            y, x = ty + dy - 1, tx + dx - 1
            if not (0 <= y < 48 and 0 <= x < 48): continue
            d = field.image[y, x] - field.image[sy + dy - 1, sx + dx - 1]
            total += 3*field.confidence[y, x]; sum_ += field.confidence[y, x]*(d**2).sum()
        assert abs(field.cost[n] - sum_/total) < 1e-6


def test_rounds_never_raise_a_cost_and_keep_to_the_permitted():
    hole, rng = holes()['free'], keyed_rng(5)
    field = C.random_field(photo()[0].permute(1, 2, 0).numpy(), hole, rng=rng)
    C.improve(field, rng=rng, propagate=False, search=False); start = last = field.cost
    for how in (dict(search=False), dict(propagate=False), {}, {}):
        C.improve(field, rng=rng, **how)
        assert (field.cost <= last + 1e-7).all() and C.patch_centres(hole, 7)[tuple(field.source)].all()
        last = field.cost
    assert last.mean() < .5*start.mean()


def test_halving_and_pyramid():
    image, hole = photo(45)[0].permute(1, 2, 0).numpy(), center_mask(45, 21)
    small, left = C.halve(image, hole)
    assert small.shape == (23, 23, 3) and left.shape == (23, 23)
    assert np.allclose(small[0, 0], image[:2, :2].mean((0, 1)), atol=1e-6)
    assert np.allclose(small[22, 22], image[44, 44])                        # an odd corner is a mean of one
    assert np.array_equal(C.halve(np.where(hole[..., None], 9, image), hole)[0], small)
    levels = C.pyramid(image, hole, patch_size=5)
    assert len(levels) > 1 and all(C.patch_centres(h, 5).any() and h.any() for _, h in levels)
    assert len(C.pyramid(image, center_mask(45, 3), patch_size=7)) == 1     # a patch sees over a small hole


def test_patch_continues_what_repeats():
    y, x = np.indices((64, 64)); image = torch.from_numpy(np.where((x + y)//6 % 2 == 0, .8, .3)).float().expand(1, 3, 64, 64)
    mask = as_mask(center_mask(64, 24))
    db = {f.__name__: psnr(f(image, mask)['pred'], image, mask).item() for f in FILLERS}
    assert db['patch'] > 40 > 20 > max(v for k, v in db.items() if k != 'patch')


def test_patch_depends_on_seed_and_options_only():
    image, mask = photo(), as_mask(holes()['free'])
    a, b, c = (C.patch(image, mask, seed=s)['pred'] for s in (0, 0, 1))
    torch.manual_seed(9); np.random.seed(9)
    assert torch.equal(a, b) and torch.equal(a, C.patch(image, mask)['pred']) and not torch.equal(a, c)
    for other in (dict(patch_size=5), dict(iterations=1), dict(gamma=1.)):
        assert not torch.equal(C.patch(image, mask, **other)['pred'], a)


def test_offsets_are_white_where_nothing_is_copied():
    image, mask = photo(), as_mask(holes()['block'])
    offsets = C.patch(image, mask)['offsets']
    assert offsets.shape == image.shape and 0 <= offsets.min() and offsets.max() <= 1
    assert (offsets[(mask == 0).expand_as(offsets)] == 1).all() and (offsets[(mask > 0).expand_as(offsets)] < 1).any()


def test_offset_colours_by_hand():
    hole = np.zeros((8, 8), bool); hole[4, 4] = True
    field = C.random_field(np.zeros((8, 8, 3), 'f4'), hole, patch_size=3, rng=keyed_rng(0))
    for step, colour in (((0, 4), (1, 0, 0)), ((0, 2), (1, .5, .5)), ((0, -4), (0, 8.5/11, 1)), ((-4, 0), (5.25/13, 0, 1)), ((0, 0), (1, 1, 1))):
        field.source = field.target + np.array(step)[:, None]
        assert np.allclose(C.copied_from(field)[4, 4], colour)              # red: to the right; full at half the side


def test_one_known_patch_is_enough():
    image, mask = photo(20), torch.ones(1, 1, 20, 20); mask[..., 3:10, 5:12] = 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pred = C.patch(image, mask)['pred']
    colours = {tuple(c) for c in image[0, :, 3:10, 5:12].flatten(1).T.tolist()}
    assert pred.isfinite().all() and pred.min() >= min(map(min, colours)) - 1e-6 and pred.max() <= max(map(max, colours)) + 1e-6


def test_no_known_patch_falls_back_and_says_so():
    image, mask = torch.cat([photo(), photo()]), torch.ones(2, 1, 48, 48)
    mask[0, ..., ::7] = 0; mask[1] = as_mask(holes()['block'])[0]
    with pytest.warns(C.PatchWarning, match='picture 0: no 7 x 7 patch is known, filled by telea') as told:
        out = C.patch(image, mask)
    assert len(told) == 1 and '\n' not in str(told[0].message)
    assert torch.equal(out['pred'][:1], C.telea(image[:1], mask[:1])['pred']) and (out['offsets'][0] == 1).all()
    assert torch.equal(out['pred'][1:], C.patch(image[1:], mask[1:])['pred'])


BAD = [(lambda x, m: (x[0], m), r'image of torch.float32 \(3, 48, 48\); expected floats \(B,3,H,W\)'),
       (lambda x, m: (x[:, :1], m), r'image of torch.float32 \(1, 1, 48, 48\)'),
       (lambda x, m: ((x*255).byte(), m), 'image of torch.uint8'),
       (lambda x, m: (x*255, m), r'image has values from .* to .*; expected \[0,1\] and no NaN'),
       (lambda x, m: (x - .9, m), r'image has values from -'),
       (lambda x, m: (x*float('nan'), m), 'image has values from nan'),
       (lambda x, m: (x, m[0]), r'mask of shape \(1, 48, 48\) for an image of \(1, 3, 48, 48\); expected \(1,1,48,48\)'),
       (lambda x, m: (x, m.repeat(2, 1, 1, 1)), r'mask of shape \(2, 1, 48, 48\)'),
       (lambda x, m: (x, m[..., 1:]), 'mask is 47 x 48 pixels, the image 48 x 48'),
       (lambda x, m: (x, m*0), 'mask is empty'),
       (lambda x, m: (x, m*0 + 1), 'mask is full'),
       (lambda x, m: (x, m/2), 'mask has values from 0 to 0.5'),
       (lambda x, m: (x.repeat(2, 1, 1, 1), torch.cat([m, m*0])), 'mask 1 is empty')]


@each_filler
@pytest.mark.parametrize('make, message', BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_input(fill, make, message):
    with pytest.raises(InputError, match=message) as e: fill(*make(photo(), as_mask(holes()['block'])))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('fill, option, message', [
    *((f, dict(radius=r), f'radius {r}: expected 1 to 100 pixels') for f in (C.telea, C.navier_stokes)
      for r in (0, -1, .01, 100.5, 1_000_000, math.nan, math.inf, '3', None, True)),
    *((C.patch, dict(patch_size=k), f'patch_size {k}: expected an odd whole number, 3 or more') for k in (4, 1, -3, 7., 5.5, '7', None)),
    *((C.patch, dict(iterations=k), f'iterations {k}: expected 1, 2, 3') for k in (0, -1, 2.5, None)),
    *((C.patch, dict(gamma=k), f'gamma {k}: expected a number, 1 or more') for k in (.5, math.nan, math.inf, '2')),
    *((C.patch, dict(seed=k), f'seed {k}: expected 0, 1, 2') for k in (-1, .5, None, True))], ids=lambda v: getattr(v, '__name__', str(v)))
def test_bad_options(fill, option, message):
    with pytest.raises(InputError, match=message.replace('.', r'\.')) as e: fill(photo(), as_mask(holes()['block']), **option)
    assert '\n' not in str(e.value)


def test_good_options():
    "The limits themselves, whole numbers of NumPy, and radii that OpenCV rounds"
    image, mask = photo(), as_mask(holes()['block'])
    for fill in (C.telea, C.navier_stokes):
        same = lambda a, b: torch.equal(fill(image, mask, radius=a)['pred'], fill(image, mask, radius=b)['pred'])
        assert same(1, 1.4) and same(3, 3.4) and same(3, np.int64(3)) and same(100, 99.9) and not same(3, 3.6)
    a, b = (C.patch(image, mask, patch_size=k(5), iterations=k(1), gamma=1, seed=k(3))['pred'] for k in (int, np.int64))
    assert torch.equal(a, b)


def test_the_pyramid_of_a_large_hole_ends_when_whole_known_patches_run_out():
    levels = C.pyramid(np.zeros((128, 128, 3), 'f4'), center_mask(128))
    image, hole = levels[-1]
    assert hole.shape == (32, 32) and hole.any(0).sum() == 16 and C.patch_centres(hole, 7).any()
    assert not C.patch_centres(C.halve(image, hole)[1], 7).any()
