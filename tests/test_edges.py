"""Canny, batched and single, against scikit-image; bad input"""
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2gray
from skimage.feature import canny as reference

from inpaint_lib.core import InputError, keyed_rng
from inpaint_lib.data.edges import (canny, canny_batch, edge_maps, load_edges, nms_by_canny,
                                    rgb_to_gray)
from inpaint_lib.data.images import builtin_photograph


def photo(name, size=(150, 131)):
    return rgb2gray(builtin_photograph(name)[60:60 + size[0], 90:90 + size[1]])


def batch_of(*maps): return torch.tensor(np.stack(maps))[:, None]


@pytest.mark.parametrize('sigma', [0, .6, 1, 2, 3.3])
@pytest.mark.parametrize('name', ['astronaut', 'motorcycle_left'])
def test_batch_equals_scikit_image(name, sigma):
    gray = photo(name)
    rng = keyed_rng(7, name)
    hole = np.ones(gray.shape, bool)
    hole[40:90, 30:70] = False
    masks = [np.ones(gray.shape, bool), hole, rng.random(gray.shape) > .003]
    got = canny_batch(batch_of(gray, gray, gray), sigma, batch_of(*masks).double())[:, 0].numpy()
    for mask, edges in zip(masks, got):
        assert (edges == reference(gray, sigma=sigma, mask=mask)).all()
    assert (canny_batch(batch_of(gray), sigma)[0, 0].numpy() == reference(gray, sigma=sigma)).all()
    assert got[0].any()


def test_ties_of_synthetic_pictures():
    yy, xx = np.mgrid[:61, :47]
    for gray in (xx*0., ((xx + yy) % 16 < 8)*1., (xx > 20)*.3, (xx*yy % 7)/6., ((xx//8 + yy//8) % 2)*1.):
        for sigma in (0, 1, 2):
            assert (canny_batch(batch_of(gray), sigma)[0, 0].numpy() == reference(gray, sigma=sigma)).all()


def test_a_sigma_per_picture_and_none_for_negative():
    gray, sigmas = photo('coffee'), [1, 4, -1, 2]
    x = batch_of(*[gray]*4)
    for f in (canny_batch, edge_maps):
        for form in (sigmas, np.array(sigmas), torch.tensor(sigmas)):
            got = f(x, form)
            for edges, s in zip(got[:, 0].numpy(), sigmas):
                assert (edges == (reference(gray, sigma=s) if s > 0 else 0)).all()
    assert not canny(gray, -1).any()


def test_long_contour_is_followed_to_its_end():
    "Hysteresis must not stop early: one strong pixel, a weak spiral hundreds of pixels long"
    from inpaint_lib.data.edges import link
    weak, i, j, step = torch.zeros(1, 1, 41, 41, dtype=torch.bool), 0, 0, [(0, 1), (1, 0), (0, -1), (-1, 0)]
    for turn, run in enumerate([40] + [n for k in range(40, 2, -2) for n in (k, k)][:34]):
        for _ in range(run):
            if 0 <= i < 41 and 0 <= j < 41: weak[0, 0, i, j] = True
            i, j = i + step[turn % 4][0], j + step[turn % 4][1]
    strong = torch.zeros_like(weak)
    strong[0, 0, 0, 0] = True
    assert weak.sum() > 500 and torch.equal(link(strong, weak), weak)
    assert not link(torch.zeros_like(weak), weak).any()


def test_edge_maps_are_the_same_on_both_paths():
    x = batch_of(photo('rocket'), photo('astronaut')).float()
    use = torch.ones_like(x)
    use[..., 30:80, 40:90] = 0
    for mask in (None, use):
        assert torch.equal(edge_maps(x, 1.5, mask), canny_batch(x, 1.5, mask))
    assert edge_maps(x).dtype == torch.float32 and edge_maps(x).shape == x.shape


def test_gray():
    rgb = builtin_photograph('astronaut')[:40, :50]
    x = torch.tensor(rgb).permute(2, 0, 1).double()/255
    assert np.abs(rgb_to_gray(x)[0].numpy() - rgb2gray(rgb)).max() < 1e-15
    assert rgb_to_gray(x[None].float()).shape == (1, 1, 40, 50)
    with pytest.raises(InputError, match='expected 3 channels'): rgb_to_gray(x[:1])


def test_external_edges(tmp_path):
    edge = (keyed_rng(0, 'e').random((30, 20))*255).astype(np.uint8)
    for kind in ('L', 'RGB'):
        Image.fromarray(edge).convert(kind).save(tmp_path/'e.png')
        assert np.abs(load_edges(tmp_path/'e.png') - edge/255).max() < 1e-6
    assert load_edges(tmp_path/'e.png', 16).shape == (16, 16)
    assert load_edges(tmp_path/'e.png', (16, 24)).shape == (16, 24)
    thin = edge > 200
    assert (nms_by_canny(edge/255., thin) == np.where(thin, edge/255., 0)).all()
    with pytest.raises(InputError, match='expected the same'): nms_by_canny(edge, thin[1:])
    with pytest.raises(InputError, match='none.png'): load_edges(tmp_path/'none.png')


@pytest.mark.parametrize('bad, says', [
    (np.zeros((8, 8), np.uint8), 'uint8'), (np.zeros((3, 8, 8)), r'\(3, 8, 8\)'),
    (np.full((8, 8), 200.), '200'), (np.full((8, 8), np.nan), 'nan')])
def test_canny_refuses(bad, says):
    with pytest.raises(InputError, match=says): canny(bad)


@pytest.mark.parametrize('f', [canny_batch, edge_maps])
def test_batches_refused(f):
    x = torch.rand(2, 1, 16, 16)
    for args, says in [((x[0],), 'expected'), ((x.expand(-1, 3, -1, -1),), 'expected'),
                       ((x.mul(255).byte(),), 'uint8'), ((x*255,), 'grey values'),
                       ((x, [1, 2, 3]), '3 sigmas for 2'), ((x, 2, x[:1]), 'masks of shape')]:
        with pytest.raises(InputError, match=says): f(*args)
    with pytest.raises(InputError, match='a mask of shape'): canny(x[0, 0].numpy(), mask=np.ones((4, 4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_equals_scikit_image():
    gray = photo('motorcycle_left')
    assert (canny_batch(batch_of(gray).cuda())[0, 0].cpu().numpy() == reference(gray, sigma=2)).all()
