"Any picture in, the same picture out: modes, sizes, files, leaks, and which weights are taken"
import dataclasses
import os
import re
import time
import warnings

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from inpaint_lib import inference
from inpaint_lib.core import InputError
from inpaint_lib.inference import (Inpainter, METHODS, colours, find_weights, lacks, load_inpainter, open_stored, padded, paste,
                                   save_result, settle, upright, weights_method)
from inpaint_lib.papers.edge_connect import EdgeConnectConfig, EdgeGenerator, InpaintGenerator
from inpaint_lib.training import save_weights
from tiny_weights import save_tiny, save_untrained

H, W = 45, 58
RNG = np.random.default_rng(0)
BASE = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
HOLE = np.zeros((H, W), bool)
HOLE[14:30, 38:] = True                          # touches the right edge


@pytest.fixture(scope='module')
def weights(tmp_path_factory): return save_tiny(tmp_path_factory.mktemp('w')/'w.safetensors')


@pytest.fixture(scope='module')
def inpaint(weights): return load_inpainter('edge_connect', weights, device='cpu')


def kinds():
    rgb = Image.fromarray(BASE)
    deep = RNG.integers(0, 65536, (H, W), dtype=np.uint16)
    palette, see_through = rgb.convert('P'), rgb.convert('P')
    see_through.info['transparency'] = 3
    marked = rgb.copy(); marked.info['transparency'] = tuple(BASE[0, 0].tolist())
    return {'1': rgb.convert('1'), 'L': rgb.convert('L'), 'LA': rgb.convert('LA'), 'RGB': rgb, 'CMYK': rgb.convert('CMYK'),
            'RGBA': Image.fromarray(np.dstack([BASE, 255 - BASE[..., :1]])), 'P': palette, 'P see-through': see_through,
            'RGB marked': marked, 'I;16': Image.fromarray(deep), 'I': Image.fromarray(deep.astype(np.int32)), 'YCbCr': rgb.convert('YCbCr'),
            'HSV': rgb.convert('HSV')}


@pytest.mark.parametrize('kind', kinds())
def test_every_mode_comes_back_bit_identical_outside(kind, inpaint):
    im = kinds()[kind]
    r = inpaint(im, HOLE)
    assert r.image.size == im.size and r.image.mode == {'P': 'RGB', 'P see-through': 'RGBA'}.get(kind, im.mode)
    a, b = np.asarray(settle(im)), np.asarray(r.image)
    assert a.dtype == b.dtype and (a[~HOLE] == b[~HOLE]).all() and (a[HOLE] != b[HOLE]).any()
    if r.image.mode in ('LA', 'RGBA'): assert (a[..., -1] == b[..., -1]).all()
    if kind.startswith('P'):
        assert (np.asarray(im.convert('RGBA'))[~HOLE] == np.asarray(r.image.convert('RGBA'))[~HOLE]).all()


@pytest.mark.parametrize('kind, suffix', [(k, '.png') for k in kinds() if k not in ('CMYK', 'YCbCr', 'HSV', 'I')]
                         + [(k, '.tif') for k in ('1', 'L', 'LA', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I')]
                         + [('RGB', '.webp'), ('RGBA', '.webp'), ('RGB', '.bmp'), ('L', '.bmp'), ('RGB', '.ppm'), ('L', '.pgm')])
def test_files_keep_mode_and_pixels(kind, suffix, inpaint, tmp_path):
    im = kinds()[kind]; target = tmp_path/f'out{suffix}'
    assert save_result(inpaint(im, HOLE), target) == ''
    again, want = open_stored(target), settle(im)
    assert again.mode == want.mode and (np.asarray(again)[~HOLE] == np.asarray(want)[~HOLE]).all()
    seen = lambda i: np.asarray(i.convert('RGBA')) if i.mode not in ('I', 'I;16', 'CMYK') else np.asarray(i)
    assert (seen(again)[~HOLE] == seen(im)[~HOLE]).all()            # transparent colours too


@pytest.mark.parametrize('channels', [3, 4])
@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_16_bit_colour_stays_16_bit(channels, suffix, inpaint, tmp_path):
    a = RNG.integers(0, 65536, (H, W, channels), dtype=np.uint16)
    order = [2, 1, 0, 3][:channels]
    cv2.imwrite(str(tmp_path/f'in{suffix}'), a[..., order])
    r = inpaint(tmp_path/f'in{suffix}', HOLE)
    assert r.image.dtype == np.uint16 and (r.image[~HOLE] == a[~HOLE]).all() and (r.image[HOLE] != a[HOLE]).any()
    if channels == 4: assert (r.image[..., 3] == a[..., 3]).all()
    save_result(r, tmp_path/f'out{suffix}')
    assert (cv2.imread(str(tmp_path/f'out{suffix}'), cv2.IMREAD_UNCHANGED)[..., order][~HOLE] == a[~HOLE]).all()
    with pytest.raises(InputError, match='no 16-bit colour'): save_result(r, tmp_path/'out.webp')


def test_compressed_tiff_is_not_compressed_again(inpaint, tmp_path):
    Image.fromarray(BASE).save(tmp_path/'in.tif', compression='jpeg')
    before = np.asarray(open_stored(tmp_path/'in.tif'))
    save_result(inpaint(tmp_path/'in.tif', HOLE), tmp_path/'out.tif')
    assert (np.asarray(open_stored(tmp_path/'out.tif'))[~HOLE] == before[~HOLE]).all()
    save_result(Image.open(tmp_path/'in.tif'), tmp_path/'again.tif')          # it still says 'jpeg' of itself
    assert np.array_equal(np.asarray(open_stored(tmp_path/'again.tif')), before)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_is_applied_and_dropped(orientation, inpaint, tmp_path):
    exif = Image.Exif(); exif[0x0112] = orientation
    Image.fromarray(BASE).save(tmp_path/'in.png', exif=exif, icc_profile=b'profile')
    seen = upright(BASE, orientation); hole = np.zeros(seen.shape[:2], bool); hole[:9, :11] = True
    r = inpaint(tmp_path/'in.png', hole)
    assert (np.asarray(r.image)[~hole] == seen[~hole]).all()
    save_result(r, tmp_path/'out.png')
    with Image.open(tmp_path/'out.png') as out:
        assert 0x0112 not in out.getexif() and out.info['icc_profile'] == b'profile'
        assert (np.asarray(out)[~hole] == seen[~hole]).all()


def test_16_bit_colour_with_exif(tmp_path):
    a = RNG.integers(0, 65536, (H, W, 3), dtype=np.uint16)
    exif = Image.Exif(); exif[0x0112] = 6
    ok, data = cv2.imencode('.png', a[..., ::-1]); data = data.tobytes()
    import zlib
    body = b'eXIf' + exif.tobytes().removeprefix(b'Exif\0\0')
    chunk = (len(body) - 4).to_bytes(4, 'big') + body + zlib.crc32(body).to_bytes(4, 'big')
    (tmp_path/'in.png').write_bytes(data[:33] + chunk + data[33:])         # after the header chunk
    assert np.array_equal(open_stored(tmp_path/'in.png'), np.rot90(a, -1))


@pytest.mark.parametrize('shape', [(H, W), (H, W, 1), (H, W, 2), (H, W, 3), (H, W, 4)])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_arrays(shape, dtype, inpaint):
    a = RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
    out = inpaint(a, HOLE).image
    assert out.shape == a.shape and out.dtype == a.dtype and (out[~HOLE] == a[~HOLE]).all() and (out[HOLE] != a[HOLE]).any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('batch', [None, 2])
def test_tensors(dtype, batch, inpaint):
    x = torch.rand(*(() if batch is None else (batch,)), 3, H, W).to(dtype)
    r = inpaint(x, torch.from_numpy(HOLE))
    assert r.image.shape == x.shape and r.image.dtype == dtype and r.pred.shape == x.shape
    assert torch.equal(r.image[..., ~torch.from_numpy(HOLE)], x[..., ~torch.from_numpy(HOLE)])
    assert {'edges_known', 'edges_hallucinated', 'edges'} <= set(r.views)
    assert all(v.shape == (*x.shape[:-3], 1, H, W) for v in r.views.values())


def test_a_mask_for_each_picture_of_a_batch(inpaint):
    x, m = torch.rand(2, 3, H, W), torch.zeros(2, 1, H, W)
    m[0, :, :9, :9] = 1; m[1, :, 20:, 20:] = 1
    both = inpaint(x, m)
    assert torch.equal(both.image*(1 - m), x*(1 - m))
    for i in (0, 1): assert torch.allclose(both.image[i], inpaint(x[i], m[i]).image, atol=1e-6)
    with pytest.raises(InputError, match='3 masks for 2 images'): inpaint(x, torch.ones(3, 1, H, W))


@pytest.mark.parametrize('size', [(1, 2), (5, 9), (16, 16), (17, 64), (45, 58), (3, 100)])
def test_any_size(size, inpaint):
    a = RNG.integers(0, 256, (*size, 3), dtype=np.uint8); hole = np.zeros(size, bool); hole[0, :size[1]//2] = True
    r = inpaint(a, hole)
    assert r.image.shape == a.shape and (r.image[~hole] == a[~hole]).all() and r.pred.shape == (3, *size)


def test_padding_mirrors_and_repeats():
    x = torch.arange(20.).view(1, 1, 4, 5)
    assert torch.equal(padded(x, 4, 4)[..., :, 5:], x.flip(-1)[..., 1:4])      # 5 -> 8 by mirroring
    assert padded(x, 8, 16).shape[-2:] == (16, 16) and (padded(x, 8, 16)[..., 4:, :5] == x[..., -1:, :]).all()
    assert padded(torch.zeros(1, 1, 32, 48)).shape == (1, 1, 32, 48)


@pytest.mark.parametrize('under', ['noise', 'nan', 'white'])
def test_what_lies_under_the_mask_has_no_influence(under, inpaint):
    x, hole = torch.rand(3, H, W), torch.from_numpy(HOLE)
    other = dict(noise=torch.rand(3, H, W), nan=torch.full((3, H, W), float('nan')), white=torch.ones(3, H, W))[under]
    a, b = inpaint(x, hole), inpaint(torch.where(hole, other, x), hole)
    assert torch.equal(a.image, b.image) and torch.equal(a.pred, b.pred)
    assert all(torch.equal(a.views[k], b.views[k]) for k in a.views)


def test_a_hole_at_the_edge_is_unknown_in_the_border_too():
    mean = lambda image, mask: dict(pred=((image*(1 - mask)).sum((2, 3), True)/(1 - mask).sum((2, 3), True)).expand_as(image))
    x = torch.full((3, H, W), .5)
    assert torch.equal(Inpainter(mean)(x, HOLE).pred, x)


def test_known_pixels_do_have_influence(inpaint):
    x = torch.rand(3, H, W)
    assert not torch.equal(inpaint(x, HOLE).pred, inpaint(1 - x, HOLE).pred)


def test_sigma_of_random_training_is_two(tmp_path, inpaint):
    config = dataclasses.asdict(EdgeConnectConfig(width=1/16, sigma=0))
    other = load_inpainter('edge_connect', save_tiny(tmp_path/'w.safetensors', config=config), 'cpu')
    assert torch.equal(other(BASE, HOLE).views['edges_known'], inpaint(BASE, HOLE).views['edges_known'])


def test_grey_files_as_masks_and_pictures(inpaint, tmp_path):
    Image.fromarray(BASE).save(tmp_path/'a.jpg', quality=95); Image.fromarray((HOLE*255).astype(np.uint8)).save(tmp_path/'m.png')
    r = inpaint(str(tmp_path/'a.jpg'), tmp_path/'m.png')
    assert isinstance(r.image, Image.Image) and (np.asarray(r.image)[~HOLE] == np.asarray(Image.open(tmp_path/'a.jpg'))[~HOLE]).all()
    assert 'lossy' in save_result(r, tmp_path/'o.jpg') and save_result(r, tmp_path/'o.png') == ''


@pytest.mark.parametrize('image, mask, message', [
    (BASE.astype(float), HOLE, 'image array of float64'),
    (BASE[..., :2].astype(np.int32), HOLE, 'image array of int32'),
    (torch.zeros(3, H, W, dtype=torch.uint8), HOLE, 'image tensor of torch.uint8'),
    (torch.zeros(1, H, W), HOLE, 'expected floats'),
    (torch.full((3, H, W), 2.), HOLE, 'values from'),
    (torch.full((3, H, W), float('nan')), HOLE, 'NaN'),
    (Image.new('F', (W, H)), HOLE, 'image of mode F'),
    (Image.fromarray(np.full((H, W), 70000, np.int32)), HOLE, 'expected 0..65535'),
    (None, HOLE, 'image of type NoneType'),
    (BASE, HOLE[:-1], f'{W} x {H - 1} pixels'),
    (BASE, np.zeros((H, W), bool), 'empty'),
    (BASE, np.ones((H, W), bool), 'full'),
    ('nowhere.png', HOLE, 'nowhere.png: no such file'),
    (BASE, 'nowhere.png', 'nowhere.png: no such file'),
])
def test_bad_pictures_and_masks(image, mask, message, inpaint):
    with pytest.raises(InputError, match=message) as e, warnings.catch_warnings():
        warnings.simplefilter('error')                       # one message, not a warning and then an error
        inpaint(image, mask)
    assert '\n' not in str(e.value)


def test_a_mask_that_looks_inverted_is_a_warning(inpaint):
    with pytest.warns(UserWarning, match='looks inverted') as told: inpaint(BASE, ~HOLE)
    assert len(told) == 1


def test_files_that_are_no_pictures(inpaint, tmp_path):
    (tmp_path/'text.png').write_text('not a picture'); Image.fromarray(BASE).save(tmp_path/'cut.png')
    (tmp_path/'cut.png').write_bytes((tmp_path/'cut.png').read_bytes()[:3000])
    for name in ('text', 'cut'):
        with pytest.raises(InputError, match=f'{name}.png: not a readable image'): inpaint(tmp_path/f'{name}.png', HOLE)


@pytest.mark.parametrize('kind, name, message', [('RGB', 'o.gif', "can't write '.gif'"), ('RGB', 'o', 'no suffix'), ('RGBA', 'o.jpg', 'does not hold'),
                                                 ('L', 'o.webp', 'does not keep'), ('RGBA', 'o.bmp', 'does not keep'), ('CMYK', 'o.png', 'does not hold')])
def test_formats_that_cannot_hold_it(kind, name, message, tmp_path):
    (tmp_path/name).write_bytes(b'what was there')
    with pytest.raises(InputError, match=message): save_result(kinds()[kind], tmp_path/name)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path/name).read_bytes() == b'what was there'


def test_a_batch_is_not_a_file(tmp_path):
    with pytest.raises(InputError, match='a batch of 2'): save_result(torch.zeros(2, 3, 8, 8), tmp_path/'o.png')
    save_result(torch.full((3, 8, 8), .5), tmp_path/'o.png')
    assert np.asarray(Image.open(tmp_path/'o.png')).max() == 128


def test_full_disk(tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(28, 'No space left on device')
    (tmp_path/'o.png').write_bytes(b'old'); monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(InputError, match='No space left'): save_result(Image.fromarray(BASE), tmp_path/'o.png')
    assert (tmp_path/'o.png').read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1


def test_order_in_which_weights_are_found(tmp_path):
    with pytest.raises(InputError, match='make demo') as e: find_weights('edge_connect', tmp_path)
    assert '\n' not in str(e.value)
    old, new = (save_tiny(tmp_path/'runs'/r/'weights.safetensors') for r in ('old', 'deep/new'))
    os.utime(old, (time.time() - 100,)*2)
    save_tiny(tmp_path/'runs'/'edge_only'/'weights.safetensors', nets=('edge',))
    save_tiny(tmp_path/'runs'/'other'/'weights.safetensors', method='structure_flow')
    (tmp_path/'runs'/'broken').mkdir(); (tmp_path/'runs'/'broken'/'weights.safetensors').write_bytes(b'half')
    assert find_weights('edge_connect', tmp_path) == new
    shipped = save_tiny(tmp_path/'data'/'weights'/'edge_connect.safetensors')
    assert find_weights('edge_connect', tmp_path) == shipped


def test_weights_that_do_not_serve(tmp_path, weights):
    assert lacks(weights, 'edge_connect') == '' and weights_method(weights) == 'edge_connect'
    edge_only = save_tiny(tmp_path/'run'/'weights.safetensors', nets=('edge',))
    with pytest.raises(InputError, match="no network 'inpaint', only edge"): load_inpainter('edge_connect', edge_only.parent)
    with pytest.raises(InputError, match="weights of 'shift_net'"): load_inpainter('edge_connect', save_tiny(tmp_path/'s.safetensors', method='shift_net'))
    cut = tmp_path/'cut.safetensors'; cut.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match='cut.safetensors: not a readable'): load_inpainter('edge_connect', cut)
    with pytest.raises(InputError, match='no such file'): load_inpainter('edge_connect', tmp_path/'none.safetensors')
    (tmp_path/'EdgeModel_gen.pth').write_bytes(b'x')
    with pytest.raises(InputError, match='inpaint import'): load_inpainter('edge_connect', tmp_path/'EdgeModel_gen.pth')
    with pytest.raises(InputError, match='expected one of context_encoder'): load_inpainter('magic')


def test_tensors_of_other_shapes_are_told(tmp_path):
    G1, G2 = EdgeGenerator(width=1/16).state_dict(), InpaintGenerator(width=1/16).state_dict()
    G2['decoder.7.bias'] = torch.zeros(5)
    save_weights(tmp_path/'w.safetensors', dict(edge=G1, inpaint=G2), dict(method='edge_connect'))
    with pytest.raises(InputError, match='do not fit InpaintGenerator.*decoder.7.bias') as e: load_inpainter('edge_connect', tmp_path/'w.safetensors')
    assert '\n' not in str(e.value)


def test_fp16_weights_and_what_the_inpainter_says_of_itself(tmp_path):
    torch.manual_seed(0)
    nets = dict(edge=EdgeGenerator(width=1/16).state_dict(), inpaint=InpaintGenerator(width=1/8).state_dict())
    save_weights(tmp_path/'w.safetensors', nets, dict(method='edge_connect', deviations=['no VGG']), dtype=torch.float16)
    inpainter = load_inpainter('edge_connect', tmp_path/'w.safetensors', 'cpu')       # widths come from the shapes
    assert inpainter.deviations == ['no VGG'] and inpainter.source.endswith('w.safetensors') and inpainter.meta['method'] == 'edge_connect'
    assert inpainter(BASE, HOLE).image.dtype == np.uint8


def test_paste_and_colours_agree_about_grey():
    flat = torch.full((3, H, W), 100/255)
    assert (paste(BASE[..., 0], flat, HOLE)[HOLE] == 100).all()
    assert (np.asarray(paste(Image.fromarray(BASE).convert('L'), flat, HOLE))[HOLE] == 100).all()
    assert torch.equal(colours(BASE[..., 0]), colours(BASE[..., :1].repeat(3, 2)))


def test_an_own_fill_needs_no_weights():
    inpainter = Inpainter(lambda image, mask: dict(pred=torch.full_like(image, .5), mask=mask), multiple=64)
    r = inpainter(BASE, HOLE)
    assert (r.image[HOLE] == 128).all() and np.array_equal(r.views['mask'][0].numpy() > 0, HOLE)


def test_methods_name_paper_and_command():
    assert 'edge_connect' in METHODS and all(m.paper and (m.train or not m.nets) for m in METHODS.values())
    assert [r[0] for r in inference.available()] == list(METHODS)


def test_options_of_a_method(tmp_path):
    from tiny_weights import save_tiny
    path, hole = save_tiny(tmp_path/'w.safetensors'), torch.zeros(1, 48, 64)
    hole[:, 10:30, 20:44] = 1
    image = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
    ours, same, raw = (load_inpainter('edge_connect', path, 'cpu', **o)(image, hole)
                       for o in ({}, dict(composite_edges=True), dict(composite_edges=False)))
    known = hole == 0
    assert torch.equal(ours.pred, same.pred) and not torch.equal(ours.pred, raw.pred)
    assert torch.equal(ours.views['edges'][known], ours.views['edges_known'][known])
    assert torch.equal(raw.views['edges'], raw.views['edges_hallucinated'])
    assert torch.equal(raw.image[:, known[0]], image[:, known[0]])
    for wrong, says in ((dict(composit=False), "no option 'composit'; expected one of: composite_edges (True)"),
                        (dict(composite_edges='perhaps'), "composite_edges is 'perhaps', expected bool"), (dict(composite_edges=None), 'expected bool')):
        with pytest.raises(InputError, match=re.escape(says)): load_inpainter('edge_connect', path, 'cpu', **wrong)


RECIPE = {m: m for m in ('context_encoder', 'structural_inpainting', 'partial_conv', 'deepfill_v1', 'deepfill_v2')} | dict(structure_flow='structure_flow.joint')


@pytest.fixture(scope='module')
def every(tmp_path_factory):
    "method -> inpainter, networks untrained"
    d = tmp_path_factory.mktemp('every')
    made = {m: load_inpainter(m, save_untrained(d/f'{m}.safetensors', r), 'cpu') for m, r in RECIPE.items()}
    made['edge_connect'] = load_inpainter('edge_connect', save_tiny(d/'edge_connect.safetensors'), 'cpu')
    return made | {m: load_inpainter(m, device='cpu') for m, entry in METHODS.items() if not entry.nets}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('shape', [(45, 58), (150, 133), (20, 300)], ids=str)
def test_every_method_fills_any_size_and_only_the_hole(method, shape, every):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    hole = np.zeros(shape, bool); hole[5:16, 20:shape[1] - 10] = True; hole[-3:, :4] = True
    r = every[method](image, hole)
    assert r.image.shape == image.shape and r.image.dtype == np.uint8 and (r.image[~hole] == image[~hole]).all()
    assert r.pred.shape == (3, *shape) and r.pred.isfinite().all() and 0 <= r.pred.min() and r.pred.max() <= 1
    for v in r.views.values(): assert v.shape[1:] == shape and v.shape[0] in (1, 3) and 0 <= v.min() and v.max() <= 1
    again = every[method](np.where(hole[..., None], 255 - image, image), hole)        # what lies under the hole
    assert np.array_equal(again.image, r.image)


@pytest.mark.parametrize('method', METHODS)
def test_every_method_takes_a_batch_picture_by_picture(method, every):
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    hole = torch.zeros(2, 1, 64, 64); hole[0, :, 10:30, 10:30] = 1; hole[1, :, 20:50, 40:64] = 1
    both = every[method](image, hole).image
    for i in range(2): assert (every[method](image[i], hole[i]).image - both[i]).abs().max() < 1e-4


def test_views_show_how_the_mask_closes(every):
    image, hole = np.full((128, 128, 3), 90, np.uint8), np.zeros((128, 128), bool)
    hole[40:90, 30:100] = True
    views = every['partial_conv'](image, hole).views
    left = [float(v.sum()) for k, v in views.items() if k.startswith('mask after')]
    assert len(left) == 6 and left[0] < hole.sum() and all(a >= b for a, b in zip(left, left[1:])) and left[-1] == 0
    assert any(k.startswith('features after') for k in views)


def sketched(shape=(45, 58)):
    "A picture, a hole, and two lines of which one lies in the hole"
    image = np.random.default_rng(3).integers(0, 256, (*shape, 3), dtype=np.uint8)
    hole, lines = np.zeros(shape, bool), np.zeros(shape, np.uint8)
    hole[10:34, 12:44] = True; lines[20, 5:50] = 255
    return image, hole, lines


def counted(net):
    "A list that grows by one at each forward pass of `net`"
    calls = []; net.register_forward_hook(lambda *a: calls.append(1))
    return calls


def closure(inpainter, name): return dict(zip(inpainter.fill.__code__.co_freevars, (c.cell_contents for c in inpainter.fill.__closure__)))[name]


@pytest.mark.parametrize('method, guide, first, view', [('edge_connect', 'edges', 'G1', 'edges_hallucinated'), ('structure_flow', 'structure', 'S', 'structure out')])
def test_a_guide_takes_the_place_of_the_first_network(method, guide, first, view, tmp_path):
    path = save_untrained(tmp_path/'w.safetensors', 'structure_flow.joint') if guide == 'structure' else save_tiny(tmp_path/'w.safetensors')
    inpainter = load_inpainter(method, path, 'cpu')
    calls = counted(closure(inpainter, first))
    image, hole, _ = sketched((48, 61))
    alone = inpainter(image, hole); own = alone.views[view]
    assert inpainter.guide == guide and len(calls) == 1
    again = inpainter(image, hole, **{guide: own if guide == 'structure' else own[0]})
    assert len(calls) == 1 and (again.image == alone.image).all() and torch.equal(again.pred, alone.pred)   # the network is not run; its own guide changes nothing
    changed = own.clone(); changed[:, 18:26, 20:36] = 1 - changed[:, 18:26, 20:36]
    led = inpainter(image, hole, **{guide: changed if guide == 'structure' else changed[0]})
    assert (led.pred - alone.pred).abs().max() > 1e-5 and (led.image[~hole] == image[~hole]).all() and len(calls) == 1


def test_a_guide_of_another_method_or_size_is_refused(tmp_path):
    ours, telea = load_inpainter('edge_connect', save_tiny(tmp_path/'w.safetensors'), 'cpu'), load_inpainter('telea')
    image, hole, lines = sketched((48, 61))
    with pytest.raises(InputError, match='edges take the place of the first network of --method edge_connect; found another fill'): telea(image, hole, edges=lines)
    with pytest.raises(InputError, match='a structure takes the place .* --method structure_flow; found .*w.safetensors'): ours(image, hole, structure=image)
    with pytest.raises(InputError, match=r'edges of shape \(20, 61\)'): ours(image, hole, edges=lines[:20])
    sf = load_inpainter('structure_flow', save_untrained(tmp_path/'s.safetensors', 'structure_flow.joint'), 'cpu')
    for bad in (image[:20], torch.full((3, 48, 61), 1.5), torch.full((3, 48, 61), float('nan'))):
        with pytest.raises(InputError, match=r'structure of shape .*expected the same size, values in \[0,1\]'): sf(image, hole, structure=bad)
    with pytest.raises(InputError, match='nowhere.png: no such file'): sf(image, hole, structure='nowhere.png')


def loud(path):
    "The weights of a file, three times as large: untrained gated networks answer too quietly to see a difference"
    from inpaint_lib.training import load_weights
    nets, meta = load_weights(path)
    save_weights(path, {n: {k: 3*v for k, v in state.items()} for n, state in nets.items()}, meta)
    return path


def test_a_sketch_changes_the_hole_alone_and_only_where_it_lies_in_it(tmp_path):
    guided = load_inpainter('deepfill_v2', loud(save_untrained(tmp_path/'w.safetensors', 'deepfill_v2.sketch')), 'cpu')
    image, hole, lines = sketched()
    plain, with_lines = guided(image, hole), guided(image, hole, lines)
    assert guided.guide == 'sketch' and (with_lines.image[~hole] == image[~hole]).all()
    assert (with_lines.pred - plain.pred).abs().max() > 1e-4
    outside = np.where(hole, 0, lines).astype(np.uint8)                       # the known picture says where its edges are
    with pytest.warns(UserWarning, match='no line of the sketch lies in the hole'): assert torch.equal(guided(image, hole, outside).pred, plain.pred)
    forms = lines > 0, Image.fromarray(lines), torch.from_numpy(lines)/255
    for same in forms: assert torch.equal(guided(image, hole, same).pred, with_lines.pred)
    Image.fromarray(lines).save(tmp_path/'lines.png')
    assert torch.equal(guided(image, hole, tmp_path/'lines.png').pred, with_lines.pred)
    with pytest.warns(UserWarning, match='turned round'): dark = guided(image, hole, 255 - lines)
    assert torch.equal(dark.pred, with_lines.pred)
    batch = torch.rand(2, 3, 45, 58)
    assert guided(batch, torch.from_numpy(hole), torch.from_numpy(lines)/255).image.shape == (2, 3, 45, 58)


def test_bad_sketches(tmp_path, every):
    image, hole, lines = sketched()
    with pytest.raises(InputError, match='a sketch needs weights of recipe deepfill_v2.sketch'): every['deepfill_v2'](image, hole, lines)
    guided = load_inpainter('deepfill_v2', save_untrained(tmp_path/'w.safetensors', 'deepfill_v2.sketch'), 'cpu')
    for wrong in (lines[:20], torch.rand(3, 45, 58), torch.full((45, 58), 2.), torch.full((45, 58), float('nan')), np.zeros((20, 58, 3), np.uint8),
                  np.zeros((45, 58, 5), np.uint8), np.zeros(4), np.float64(0)):
        with pytest.raises(InputError, match=r'^sketch of shape .*expected \(H,W\)') as e: guided(image, hole, wrong)
        assert '\n' not in str(e.value)
    for wrong in (np.zeros((0, 5)), torch.zeros(0, 58), Image.new('L', (0, 4)), np.array([['a']]), np.array([{}]), [[0, 1], [1]], [['line']], {},
                  np.zeros((45, 58), complex)):
        with pytest.raises(InputError, match=r'^sketch: .*expected .*\(H,W\)') as e: guided(image, hole, wrong)
        assert '\n' not in str(e.value)
    Image.fromarray(lines[:20]).save(tmp_path/'small.png'); (tmp_path/'text.png').write_text('no picture')
    for name in ('small', 'text'):
        with pytest.raises(InputError, match=f'{name}.png') as e: guided(image, hole, str(tmp_path/f'{name}.png'))
        assert str(e.value).count(f'{name}.png') == 1
    with pytest.raises(InputError, match='^sketch: image of mode La'): guided(image, hole, Image.new('La', (58, 45)))
    with pytest.raises(InputError, match='no such file'): guided(image, hole, tmp_path/'nothing.png')


def drawings(lines):
    "What drawing programs and libraries make of the same lines: title -> (sketch, is it said that it was turned round?)"
    zero, clear = 0*lines, np.dstack([lines*0]*3 + [lines])
    palette = Image.fromarray(255 - lines).convert('P', palette=Image.Palette.ADAPTIVE, colors=2)
    palette.info['transparency'] = palette.getpixel((0, 0))
    marked = Image.fromarray(np.dstack([255 - lines]*3)); marked.info['transparency'] = (255, 255, 255)
    return {'black on nothing': (Image.fromarray(clear), True), 'an array of it': (clear, True),
            'grey with alpha': (Image.fromarray(np.dstack([zero, lines]), 'LA'), True), 'palette': (palette, True), 'marked': (marked, True),
            'bytes 0 and 1': (lines//255, False), 'tensor of bytes': (torch.from_numpy(lines//255), False), 'colours': (np.dstack([lines]*3), False),
            'colours 0 and 1': (np.dstack([lines//255]*3), False), 'one channel': (lines[..., None], False), 'floats': (Image.fromarray(lines/np.float32(255)), False),
            '16 bits': (Image.fromarray(lines.astype(np.uint16)*257), False), 'mode I': (Image.fromarray(lines.astype(np.int32)*257), False),
            'list': ((lines > 0).tolist(), False), 'half': (torch.from_numpy(lines/255).bfloat16(), False)}


@pytest.mark.parametrize('kind', drawings(sketched()[2]))
@pytest.mark.parametrize('as_file', [False, True])
@pytest.mark.filterwarnings('ignore:.*mode.*:DeprecationWarning')
def test_no_form_of_a_sketch_loses_its_lines(kind, as_file, tmp_path):
    lines = sketched()[2]; form, turned = drawings(lines)[kind]
    if as_file:
        if not isinstance(form, Image.Image): pytest.skip('not a picture')
        form.save(tmp_path/('s.tif' if form.mode in ('F', 'I') else 's.png'), **{k: form.info[k] for k in form.info if k == 'transparency'})
        form = next(tmp_path.iterdir())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always'); got = inference.read_sketch(form, (2, 45, 58))
    assert torch.equal(got, torch.from_numpy(lines/255).float().expand(2, 1, 45, 58))
    assert [str(t.message) for t in told] == turned*[f'{form if as_file else "sketch"}: mostly bright, so taken for dark lines on white and turned round']


def test_a_line_is_what_training_called_one(tmp_path):
    from inpaint_lib.training import load_weights
    path = loud(save_untrained(tmp_path/'w.safetensors', 'deepfill_v2.sketch'))
    nets, meta = load_weights(path); meta['config']['sketch_threshold'] = .2
    save_weights(tmp_path/'faint.safetensors', nets, meta)
    image, hole, lines = sketched()
    strict, faint = (load_inpainter('deepfill_v2', p, 'cpu') for p in (path, tmp_path/'faint.safetensors'))
    with warnings.catch_warnings():
        warnings.simplefilter('error'); seen = faint(image, hole, lines*.4/255)
    assert torch.equal(seen.pred, strict(image, hole, lines).pred) and not torch.equal(seen.pred, faint(image, hole).pred)
    with pytest.warns(UserWarning, match=r'^sketch: no line of the sketch lies in the hole \(a line is above 0.6;'):
        assert torch.equal(strict(image, hole, lines*.4/255).pred, strict(image, hole).pred)
    two = np.stack([lines, 0*lines])[:, None]/255.                       # of a batch, one picture has no line
    with pytest.warns(UserWarning, match='no line'): faint(torch.rand(2, 3, 45, 58), torch.from_numpy(hole), two)


def test_weights_for_a_sketch_are_found_or_the_command_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match='inpaint train deepfill_v2.sketch ') as e: find_weights('deepfill_v2', tmp_path, sketch=True)
    assert 'data/weights/deepfill_v2.sketch.safetensors' in str(e.value) and '\n' not in str(e.value)
    run = save_untrained(tmp_path/'run.safetensors', 'deepfill_v2.sketch'), save_untrained(tmp_path/'plain.safetensors', 'deepfill_v2')
    for source, name in zip(run, ('guided', 'later')):
        (tmp_path/'runs'/name).mkdir(parents=True); (tmp_path/'runs'/name/'weights.safetensors').write_bytes(source.read_bytes())
    os.utime(tmp_path/'runs'/'guided'/'weights.safetensors', (time.time() - 100,)*2)
    assert find_weights('deepfill_v2', tmp_path, sketch=True).parent.name == 'guided' and find_weights('deepfill_v2', tmp_path).parent.name == 'later'
    (tmp_path/'data'/'weights').mkdir(parents=True); shipped = tmp_path/'data'/'weights'/'deepfill_v2.sketch.safetensors'
    shipped.write_bytes(run[0].read_bytes())
    assert find_weights('deepfill_v2', tmp_path, sketch=True) == shipped
    monkeypatch.setattr(inference, 'checkout', lambda: tmp_path)
    assert load_inpainter('deepfill_v2', device='cpu', sketch=True).guide == 'sketch' and not load_inpainter('deepfill_v2', device='cpu').guide
    for method in ('edge_connect', 'telea'):
        with pytest.raises(InputError, match=f'a sketch needs weights of recipe deepfill_v2.sketch.*found method {method}'): load_inpainter(method, sketch=True)
    with pytest.raises(InputError, match='a sketch needs weights .*plain.safetensors'): load_inpainter('deepfill_v2', run[1], 'cpu', sketch=True)


def test_views_of_deepfill(every):
    image, hole, _ = sketched()
    assert set(every['deepfill_v1'](image, hole).views) == {'coarse', 'offsets', 'attention arrows'}
    views = every['deepfill_v2'](image, hole).views
    assert {'coarse', 'offsets', 'attention arrows'} < set(views) and sum(k.startswith('gate ') for k in views) >= 2


def test_centre_networks_say_when_a_mask_is_out_of_protocol(tmp_path):
    fill = load_inpainter('context_encoder', save_untrained(tmp_path/'w.safetensors', 'context_encoder.center'), 'cpu')
    image, inside, beyond = np.full((128, 128, 3), 90, np.uint8), np.zeros((128, 128), bool), np.zeros((128, 128), bool)
    inside[36:92, 36:92] = True; beyond[10:120, 30:50] = True
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (fill(image, inside).image[~inside] == 90).all()
    with pytest.warns(UserWarning, match='protocol') as told: fill(image, beyond)
    assert all('\n' not in str(t.message) for t in told)


def test_weights_without_their_config_or_of_another_shape(tmp_path):
    path = save_untrained(tmp_path/'w.safetensors', 'partial_conv')
    from inpaint_lib.training import load_weights
    nets, meta = load_weights(path)
    save_weights(tmp_path/'bare.safetensors', nets, dict(method='partial_conv'))
    with pytest.raises(InputError, match='bare.safetensors: says nothing about the config'): load_inpainter('partial_conv', tmp_path/'bare.safetensors')
    save_weights(tmp_path/'other.safetensors', nets, dict(method='partial_conv', config=meta['config'] | dict(width=.125)))
    with pytest.raises(InputError, match='do not fit PConvUNet') as e: load_inpainter('partial_conv', tmp_path/'other.safetensors')
    assert '\n' not in str(e.value)
    with pytest.raises(InputError, match="weights of 'partial_conv'; expected weights of context_encoder"):
        load_inpainter('context_encoder', path)


@pytest.mark.parametrize('overlap', [0, 7])
def test_centre_networks_are_used_with_the_overlap_of_their_training(overlap, tmp_path):
    from inpaint_lib.papers import structural_inpainting as si
    from inpaint_lib.training import load_weights
    path = save_untrained(tmp_path/'w.safetensors', 'structural_inpainting.center')
    nets, meta = load_weights(path)
    save_weights(path, nets, meta | dict(config=meta['config'] | dict(overlap=overlap)))
    image, hole = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(3)), torch.zeros(128, 128, dtype=torch.bool)
    a = 32 + overlap; hole[a:128 - a, a:128 - a] = True
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        r = load_inpainter('structural_inpainting', path, 'cpu')(image, hole)
    G = si.StructuralEncoder(meta['config']['width'], bottleneck=8, region='center'); G.load_state_dict(nets['generator'])
    direct = si.fill(G.eval(), torch.where(hole, 0., image)[None], hole[None, None].float(), overlap=overlap)['pred'][0]
    assert (r.pred - direct).abs().max() < 1e-6


def test_a_filler_without_learning_takes_no_weights(tmp_path):
    with pytest.raises(InputError, match='telea learns nothing and takes no weights'): load_inpainter('telea', tmp_path/'w.safetensors')
