"""02_data.masks: hole ratios that are exact, masks that can be drawn again, and wrong masks that are told"""
import hashlib
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from inpaint_lib.core import InputError, keyed_rng
from inpaint_lib.data.masks import (
    DRAWN_MASKS, FILE_MASKS, HOLE_BINS, MASK_KINDS, MaskFolder, MaskWarning, PartialConvMasks, _grown, _view, bin_of, block_mask,
    center_mask, check_mask, composite, deepfill_rectangle, deepfill_strokes, dilate, fill_hole, free_form, half_mask, hole_ratio, load_mask, mask_sampler, random_region,
    sample_bin_mask, touches_border)


def one_line(f, *args, **kw):
    "The message of the InputError that `f` must raise"
    with pytest.raises(InputError) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)


def warned(f, *args, **kw):
    "(result, texts of the MaskWarnings)"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always'); out = f(*args, **kw)
    return out, [str(w.message) for w in told if issubclass(w.category, MaskWarning)]


@pytest.fixture
def folder(tmp_path):
    "Three mask files of 48 x 64"
    (tmp_path/'m').mkdir()
    for i in range(3): Image.fromarray(free_form(keyed_rng(9, i), (48, 64))).save(tmp_path/'m'/f'{i}.png')
    return tmp_path/'m'


# ---- drawn

@pytest.mark.parametrize('size', [32, 33, (24, 40), 64])
@pytest.mark.parametrize('border', [None, True, False])
@pytest.mark.parametrize('bin', range(6))
def test_bins_are_exact(size, border, bin):
    lo, hi = HOLE_BINS[bin]
    seen = set()
    for index in range(25):
        m = sample_bin_mask(bin, index, size=size, border=border)
        assert m.dtype == bool and m.shape == ((size, size) if isinstance(size, int) else size)
        assert lo < m.sum()/m.size <= hi and bin_of(hole_ratio(m)) == bin
        if border is not None: assert touches_border(m) == border
        assert (m == sample_bin_mask(bin, index, size=size, border=border)).all()
        seen.add(m.tobytes())
    assert len(seen) == 25


@pytest.mark.parametrize('size', [7, 8, 12])
def test_bins_of_tiny_pictures(size):
    for bin in range(6):
        for border in None, True: assert bin_of(hole_ratio(sample_bin_mask(bin, 0, size=size, border=border))) == bin
    assert bin_of(hole_ratio(sample_bin_mask(0, 0, size=size, border=False))) == 0
    assert 'expected a larger picture' in one_line(sample_bin_mask, 5, 0, size=5, border=False)     # 9 of 25 pixels are inside


def test_published_set_stays_the_same():
    "An evaluation set is three integers: a change of the drawing code would change every published number"
    digest = hashlib.sha256(b''.join(np.packbits(sample_bin_mask(b, i, size=s)).tobytes()
                                     for b in range(6) for i in range(3) for s in (64, 256))).hexdigest()
    assert digest[:16] == '13638704d14dfd92'


def test_bins_use_every_integer_and_refuse_others():
    a = sample_bin_mask(1, 2, size=32, seed=3)
    for kw in dict(bin=1, index=3, seed=3), dict(bin=1, index=2, seed=4), dict(bin=2, index=2, seed=3):
        assert (sample_bin_mask(kw['bin'], kw['index'], size=32, seed=kw['seed']) != a).any()
    for bad in -1, 6, 1.5: assert 'expected 0 to 5' in one_line(sample_bin_mask, bad, 0, size=32)


def test_blocks_and_halves():
    m = center_mask((20, 30), (4, 6))
    assert m.sum() == 24 and m[8:12, 12:18].all()
    tops = {tuple(np.argwhere(block_mask(keyed_rng(0, i), 8, 6))[0]) for i in range(60)}
    assert tops == {(y, x) for y in range(3) for x in range(3)}                        # every place, both ends included
    for size in 8, 9: assert {int(half_mask(keyed_rng(0, i), size)[0].sum()) for i in range(20)} == {size//2}
    for f, a in (center_mask, ()), (block_mask, (keyed_rng(0),)):
        assert '9 x 9 in a picture of 8 x 8' in one_line(f, *a, 8, 9)


def test_free_form_is_never_empty_or_full():
    ratios = [hole_ratio(free_form(keyed_rng(0, i), 48)) for i in range(300)]
    assert min(ratios) > 0 and max(ratios) < .8


# ---- loaded

def test_jpeg_edges_are_thresholded_with_a_warning(tmp_path):
    hole = free_form(keyed_rng(0, 5), 128)
    Image.fromarray(hole).convert('L').save(tmp_path/'m.jpg', quality=70)
    m, told = warned(load_mask, tmp_path/'m.jpg')
    assert m.dtype == bool and (m != hole).mean() < .01
    assert len(told) == 1 and 'm.jpg' in told[0] and 'neither 0 nor 255' in told[0] and '128 and above' in told[0]
    assert warned(load_mask, tmp_path/'m.jpg', quiet=True)[1] == []
    assert (load_mask(tmp_path/'m.jpg', threshold=1, quiet=True) & ~hole).mean() > .05     # EdgeConnect's > 0


def test_inverted_looking_mask_warns_with_its_ratio():
    hole = center_mask(40)
    assert warned(load_mask, hole)[1] == []
    m, told = warned(load_mask, ~hole)
    assert len(told) == 1 and 'hole ratio 0.75' in told[0] and 'inverted' in told[0]
    m, told = warned(load_mask, ~hole, invert=True)
    assert told == [] and (m == hole).all()


def test_forms_of_a_mask(tmp_path):
    hole = free_form(keyed_rng(0, 1), (20, 30))
    u8 = hole.astype(np.uint8)*255
    forms = [hole, u8, u8[..., None], u8[..., None].repeat(3, 2), hole.astype(float), hole.astype(np.int64), Image.fromarray(u8),
             Image.fromarray(u8).convert('RGBA'), torch.tensor(hole), torch.tensor(hole).byte(), torch.tensor(hole)[None, None].float()]
    for n, form in enumerate(forms): assert (load_mask(form) == hole).all(), n
    for mode in '1', 'L', 'P', 'RGB', 'RGBA', 'LA', 'I;16':
        Image.fromarray(u8 if mode != 'I;16' else u8.astype(np.uint16)*257).convert(mode).save(tmp_path/'m.png')
        got, told = warned(load_mask, tmp_path/'m.png')
        assert (got == hole).all() and told == [], mode
    levels = np.array([[0, 127], [128, 255]], np.uint8)
    assert load_mask(levels, quiet=True).tolist() == [[False, False], [True, True]]
    assert 'expected bool, uint8' in one_line(load_mask, hole*2.) and '(2, 3, 4)' in one_line(load_mask, np.zeros((2, 3, 4)))
    assert 'expected bool, uint8' in one_line(load_mask, np.full((4, 4), np.nan))


def test_nearest_resize():
    hole = np.kron(free_form(keyed_rng(0, 1), 16), np.ones((4, 4), bool))
    assert (load_mask(hole, 16) == hole[::4, ::4]).all() and load_mask(hole, (8, 32)).shape == (8, 32)


def test_a_mask_of_zeros_and_ones_as_a_file_is_told(tmp_path):
    Image.fromarray(center_mask(20).astype(np.uint8)).save(tmp_path/'m.png')
    m, told = warned(load_mask, tmp_path/'m.png')
    assert not m.any() and 'levels 0 to 1' in told[0]
    assert 'empty' in one_line(check_mask, m, name='m.png')


def test_unreadable_mask(tmp_path):
    (tmp_path/'m.png').write_bytes(b'nothing')
    assert 'm.png' in one_line(load_mask, tmp_path/'m.png') and 'no such file' in one_line(load_mask, 'none.png')
    assert 'no such folder' in one_line(MaskFolder, tmp_path/'none')
    assert 'm.png' in one_line(MaskFolder, tmp_path)
    (tmp_path/'m.png').unlink()
    assert 'no image in it' in one_line(MaskFolder, tmp_path)


@pytest.mark.parametrize('kind', ['array', 'tensor'])
def test_check_mask(kind):
    as_kind = (lambda m: m) if kind == 'array' else (lambda m: torch.tensor(m)[None, None].float())
    m = center_mask((8, 12))
    good = as_kind(m)
    assert check_mask(good, image_size=(8, 12)) is good
    assert one_line(check_mask, good, image_size=(8, 8), name='m.png') == 'm.png is 12 x 8 pixels, the image 8 x 8; expected the same size'
    assert 'm.png is empty' in one_line(check_mask, as_kind(m & False), name='m.png')
    assert 'm.png is full' in one_line(check_mask, as_kind(m | True), name='m.png')
    assert '0 to 0.5' in one_line(check_mask, as_kind(m*.5))


# ---- folders and kinds

def test_folder_in_order_and_augmented(folder):
    files = [load_mask(folder/f'{i}.png') for i in range(3)]
    in_order = mask_sampler('files', folder=folder)
    assert all((in_order(None, i, (48, 64)) == files[i % 3]).all() for i in range(7))
    plain = MaskFolder(folder, flip_x=False, flip_y=False, shift=0)
    assert all(any((plain(keyed_rng(i), i, (48, 64)) == f).all() for f in files) for i in range(10))
    flipped = MaskFolder(folder, flip_y=False, shift=0)
    draws = [flipped(keyed_rng(i), i, (48, 64)) for i in range(40)]
    assert all(any((d == f).all() or (d == f[:, ::-1]).all() for f in files) for d in draws)
    assert len({d.tobytes() for d in draws}) == 6
    assert len({MaskFolder(folder)(keyed_rng(i), i, 32).tobytes() for i in range(40)}) > 30


def test_a_shift_never_empties(tmp_path):
    m = np.zeros((32, 32), bool); m[0, 0] = True
    Image.fromarray(m).save(tmp_path/'m.png')
    f = MaskFolder(tmp_path)
    assert all(f(keyed_rng(i), i, 32).any() for i in range(60))


def test_a_folder_of_inverted_masks_is_told_once(tmp_path):
    for i in range(2): Image.fromarray(~center_mask(20)).save(tmp_path/f'{i}.png')
    f, told = warned(MaskFolder, tmp_path)
    assert len(told) == 1 and 'mean hole ratio 0.75' in told[0] and warned(f, keyed_rng(0), 0, 20)[1] == []
    assert warned(MaskFolder, tmp_path, invert=True)[1] == []


@pytest.mark.parametrize('kind', MASK_KINDS)
def test_every_kind(kind, folder):
    f = mask_sampler(kind, folder=folder if kind in FILE_MASKS else None, **({'bin': 2} if kind == 'bin' else {}))
    f2 = pickle.loads(pickle.dumps(f))                                    # for loader processes that are spawned
    for i in range(8):
        m = f(keyed_rng(0, 0, i, 'mask'), i, 40)
        assert m.dtype == bool and m.shape == (40, 40) and 0 < m.mean() < 1
        assert (m == f2(keyed_rng(0, 0, i, 'mask'), i, 40)).all()


def test_mixtures(folder):
    ratios = lambda kind: np.array([hole_ratio(mask_sampler(kind, folder=folder)(keyed_rng(0, i), i, 16)) for i in range(300)])
    four, five = ratios('edge_connect4'), ratios('edge_connect5')
    assert abs((four == .25).mean() - 1/2) < .09 and (four == .5).sum() == 0
    assert abs((five == .25).mean() - 1/3) < .09 and abs((five == .5).mean() - 1/3) < .09


def test_kinds_refuse(folder):
    m = one_line(mask_sampler, 'freeform')
    assert all(k in m for k in MASK_KINDS) and set(MASK_KINDS) == set(DRAWN_MASKS) | set(FILE_MASKS)
    for kind in FILE_MASKS: assert 'come from files' in one_line(mask_sampler, kind)
    assert 'hloe' in one_line(mask_sampler, 'block', hloe=3) and 'shfit' in one_line(mask_sampler, 'irregular', folder=folder, shfit=0)
    assert "'bin'" in one_line(mask_sampler, 'bin')
    assert 'thresh' in one_line(mask_sampler, 'edge_connect4', folder=folder, thresh=0)
    assert 'bin is 9; expected 0 to 5' in one_line(mask_sampler, 'bin', bin=9)
    assert "(mask_dir), or masks 'partial_conv_drawn'" in one_line(mask_sampler, 'partial_conv')


BAD_OPTIONS = [
    *(('deepfill', dict(box=b), 'below 1') for b in (0, 1, 1., -.5, '0.5', (.5, .5))), ('deepfill', dict(strokes=3), 'such as 1+4'),
    *(('deepfill_rectangle', dict(shrink=s), '0 to 0.5') for s in (-.1, .6, True)), ('deepfill_strokes', dict(flip_x=2), '1 (yes)'),
    *(('partial_conv_drawn', dict(dilate=d), 'such as 9+49') for d in (9, (49, 9), (-9, -3), (0, 9), (9., 49.), '9')),
    ('partial_conv', dict(dilate=9), 'such as 9+49'), ('partial_conv', dict(threshold=.6), '1 to 255'), ('partial_conv', dict(crop=0), 'above 0'),
    ('irregular', dict(shift=-1), '0 to 1'), ('irregular', dict(flip_x=2), '1 (yes)'), ('edge_connect4', dict(others=()), "no option 'others'"),
    *(('bins', dict(bins=b), "masks 'bin' with bin=1") for b in (1, (), (1, 6), (1.5, 2))), ('bins', dict(border=2), 'must touch'),
    *(('random_region', dict(ratio=r), 'such as 0.2+0.3') for r in (.2, (.3, .2), (-.1, .2), (.2, math.nan))),
    *(('free_form', dict(strokes=s), 'such as 1+4') for s in (3, (0, 0), (4, 1), (1., 4.))), ('free_form', dict(width=(-1, .1)), 'fractions'),
    ('free_form', dict(width=(3, 3)), "a trial of masks 'free_form', width (3, 3) is full"), ('free_form', dict(vertices=(0, 0)), 'such as 4+12'),
    *((k, dict(hole=h), 'pixels from 1 on') for k in ('center', 'block', 'edge_connect1') for h in (3.7, 0, -4, (3, 0), (1, 2, 3), True)),
    *(('context_encoder', dict(overlap=o), 'pixels from 0 on') for o in (7.5, -1, (3, 4))), ('bin', dict(bin=2, seed=.5), 'a whole number')]

@pytest.mark.parametrize('kind,options,expected', BAD_OPTIONS)
def test_bad_options_are_told_before_a_loader_starts(kind, options, expected, folder):
    m = one_line(mask_sampler, kind, **options, **(dict(folder=folder) if kind in FILE_MASKS else {}))
    assert f"masks '{kind}'" in m and expected in m and all(f'{k} ' in m or f"'{k}'" in m for k in options if k != 'bin')


def test_good_options_of_any_size():
    "What is measured in pixels may be larger than the trial picture"
    for kind, options, size in (('center', dict(hole=200), 256), ('block', dict(hole=(100, 300)), 512), ('context_encoder', dict(overlap=100), 512)):
        assert mask_sampler(kind, **options)(keyed_rng(0), 0, size).any()
    assert '1000000' in one_line(mask_sampler, 'center', hole=10**6)
    assert '8 x 8 in a picture of 8 x 8' in one_line(mask_sampler('center', hole=8), keyed_rng(0), 0, 8)     # nothing known is left
    touching = [touches_border(mask_sampler('bins', border=b, bins=[3])(keyed_rng(i), i, 48)) for b in (0, 1) for i in range(8)]
    assert touching == [False]*8 + [True]*8                                                     # as written on a command line


# ---- context encoder, partial convolution

def test_context_encoder_centre():
    for overlap, side in (4, 56), (7, 50), (0, 64):
        m = mask_sampler('context_encoder', overlap=overlap)(None, 0, 128)
        assert m.sum() == side**2 and m[64 - side//2:64 + side//2, 64 - side//2:64 + side//2].all()
    assert 'expected 0 to 31' in one_line(mask_sampler('context_encoder', overlap=32), None, 0, 128)


# ---- DeepFill

COVERAGE = {'deepfill_strokes': (.156, .037, .297, .401), 'deepfill_rectangle': (.191, None, None, None), 'deepfill': (.312, .211, .439, .577)}

@pytest.mark.parametrize('kind', COVERAGE)
@pytest.mark.parametrize('size', [64, 256])
def test_deepfill_covers_what_the_published_code_covers(kind, size):
    "Mean, 5 % and 95 % quantile and maximum of 600 masks of that code; the mean of ours must lie within four standard errors"
    draw = mask_sampler(kind)
    ratios = np.array([hole_ratio(draw(keyed_rng(7, i), i, size)) for i in range(400)])
    mean, low, high, most = COVERAGE[kind]
    assert abs(ratios.mean() - mean) < 4*ratios.std()*(1/400 + 1/600)**.5
    for q, want, within in ((.05, low, .2), (.95, high, .2), (1, most, .35)):
        assert want is None or abs(np.quantile(ratios, q)/want - 1) < within, q


def test_deepfill_box_at_256():
    boxes = [np.argwhere(deepfill_rectangle(keyed_rng(0, i), 256)) for i in range(300)]
    sides, tops = np.array([np.ptp(b, axis=0) + 1 for b in boxes]), np.array([b.min(0) for b in boxes])
    assert set(sides.flat) == set(range(96, 129, 2)) and (sides[:, 0] != sides[:, 1]).mean() > .8      # 0 to 16 on both sides
    assert tops.min() >= 0 and (tops + sides).max() <= 255 and (tops.max(0) > 120).all()
    assert (deepfill_rectangle(keyed_rng(0), (64, 128), shrink=0).sum()) == 32*64


def test_deepfill_strokes_run_to_the_right_unless_mirrored():
    draws = lambda **kw: [deepfill_strokes(keyed_rng(0, i), 64, **kw) for i in range(60)]
    plain, mirrored = draws(flip_x=False, flip_y=False), draws()
    same = [(a == b).all() or (a == b[:, ::-1]).all() or (a == b[::-1]).all() or (a == b[::-1, ::-1]).all() for a, b in zip(plain, mirrored)]
    assert all(same) and 30 < sum((a != b).any() for a, b in zip(plain, mirrored)) < 60
    assert np.mean([np.nonzero(m)[1].mean() for m in plain]) > 34


def test_deepfill_is_both_parts_and_never_empty_or_full():
    for kind in COVERAGE:
        draw = mask_sampler(kind)
        for size in (16, (48, 80)):
            for i in range(40):
                m = draw(keyed_rng(0, i), i, size); check_mask(m)
                assert m.flags.c_contiguous and m.shape == np.zeros(size if isinstance(size, tuple) else (size, size)).shape
    rng, both = keyed_rng(3), mask_sampler('deepfill')(keyed_rng(3), 0, 64)
    assert (both == (deepfill_rectangle(rng, 64) | deepfill_strokes(rng, 64))).all()


@pytest.mark.parametrize('size', [16, 64, (48, 80), 128])
def test_random_regions(size):
    seen = {random_region(keyed_rng(3, i), size).tobytes() for i in range(20)}
    for i in range(20):
        m = random_region(keyed_rng(3, i), size)
        assert m.dtype == bool and .2 < m.mean() < .3 and m.shape == ((size, size) if isinstance(size, int) else size)
    assert len(seen) == 20
    assert 'expected a larger picture' in one_line(random_region, keyed_rng(0), 1)


def test_random_regions_scale_with_the_picture():
    "The same draw at twice the size is the same pattern, twice as large"
    for i in range(5):
        small, large = (random_region(keyed_rng(0, i), s, ratio=(-1, 2)) for s in (64, 128))
        assert (small != large[::2, ::2]).mean() < .05


def test_views_are_the_mask_moved():
    hole = free_form(keyed_rng(0, 5), (48, 64))
    still = [_view(hole, keyed_rng(1, i), (48, 64), crop=1, shift=0, rotate=False) for i in range(20)]
    kinds = ['same' if (m == hole).all() else 'mirrored' if (m == hole[:, ::-1]).all() else 'other' for m in still]
    assert set(kinds) == {'same', 'mirrored'}
    block = center_mask(96, 32)
    areas = [_view(block, keyed_rng(1, i), 96, crop=.5, shift=0, rotate=True).sum()/32**2 for i in range(40)]
    assert .95 < min(areas) < 1.5 and 2.5 < max(areas) < 4.1                          # a window of 1 to 1/2 of the side


def test_growing():
    dot = np.zeros((512, 512), bool); dot[200, 300] = True
    sides = {int(_grown(keyed_rng(0, i), dot, (9, 49)).sum()**.5) for i in range(70)}
    assert min(sides) == 9 and max(sides) == 49
    small = np.zeros((64, 64), bool); small[30, 30] = True
    assert _grown(keyed_rng(0), small, (49, 49)).sum() == 7**2                        # 24 pixels of 512 are 3 of 64
    all_but_one = np.ones((64, 64), bool); all_but_one[0, 0] = False
    assert (_grown(keyed_rng(0), all_but_one, (49, 49)) == all_but_one).all()          # never full


def test_partial_conv_masks(tmp_path):
    grey = np.zeros((64, 64), np.uint8); grey[10:20] = 152; grey[30:40] = 153          # 0.6 of 255 is 153
    Image.fromarray(grey).save(tmp_path/'0.png')
    f = PartialConvMasks(tmp_path, dilate=(1, 1), crop=1, shift=0, rotate=False)
    assert f(keyed_rng(0), 0, 64).sum() == 10*64
    far = PartialConvMasks(tmp_path, shift=5)
    assert all(0 < far(keyed_rng(0, i), i, 32).mean() < 1 for i in range(30))          # moved out of the picture: not moved
    for level, says in (0, 'empty'), (255, 'full'):
        Image.fromarray(np.full((64, 64), level, np.uint8)).save(tmp_path/'0.png')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            m = one_line(PartialConvMasks(tmp_path), keyed_rng(0), 0, 32)
        assert says in m and '0.png' in m


# ---- on tensors

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_fill_and_composite_select(dtype):
    x, mask = torch.rand(2, 3, 5, 6).to(dtype), (torch.rand(2, 1, 5, 6) > .5).float()
    hole = mask.bool().expand_as(x)
    spoilt = torch.where(hole, torch.tensor(float('nan'), dtype=dtype), x)
    for value in .437, torch.tensor([.1, .2, .3], dtype=torch.float64).view(3, 1, 1), torch.rand(2, 3, 1, 1):
        out, want = fill_hole(spoilt, mask, value), torch.as_tensor(value, dtype=dtype).expand_as(x)
        assert out.dtype == dtype and torch.equal(out[~hole], x[~hole]) and torch.equal(out[hole], want[hole])
    out = composite(torch.rand(2, 3, 5, 6), spoilt, mask)
    assert out.dtype == dtype and torch.equal(out[~hole], x[~hole]) and not out.isnan().any()


def test_composite_gradient_stays_in_the_hole():
    pred, x = (torch.rand(1, 1, 4, 4, requires_grad=True) for _ in range(2))
    mask = torch.zeros(1, 1, 4, 4); mask[..., 1:3, 1:3] = 1
    gp, gx = torch.autograd.grad(composite(pred, x, mask).sum(), (pred, x))
    assert torch.equal(gp, mask) and torch.equal(gx, 1 - mask)


def test_dilate():
    from scipy.ndimage import binary_dilation
    m = np.stack([free_form(keyed_rng(0, i), (20, 30), width=(.02, .05)) for i in range(3)])[:, None]
    for r in 0, 1, 4, 40:
        want = np.stack([binary_dilation(a[0], np.ones((2*r + 1, 2*r + 1))) for a in m])[:, None]
        for t in torch.tensor(m), torch.tensor(m).float(), torch.tensor(m).double():
            got = dilate(t, r)
            assert got.dtype == t.dtype and (got.numpy() == want).all()
