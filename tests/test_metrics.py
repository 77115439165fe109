"""Metrics against scikit-image, torchmetrics and hand-worked values; what averages refuse"""
import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from inpaint_lib.core import InputError
from inpaint_lib.metrics import (bootstrap_ci, edge_precision_recall, image_metrics, l1, psnr, ssim,
                                 ssim_map, summarize_metrics)


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 40, 33, generator=g)
    image = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    pred = (image + .1*torch.randn(image.shape, generator=g)).clamp(0, 1)
    mask = torch.zeros(2, 1, 40, 33)
    mask[0, :, 5:20, 8:25] = 1
    mask[1, :, 20:, :10] = 1
    return pred, image, mask


def as_numpy(x): return x.permute(1, 2, 0).double().numpy()


def test_whole_image_equals_the_libraries(pair):
    from torchmetrics.functional.image import structural_similarity_index_measure
    pred, image, _ = pair
    theirs = structural_similarity_index_measure(pred, image, data_range=1., reduction='none')
    assert torch.allclose(ssim(pred, image).float(), theirs, atol=1e-6)
    for n in range(2):
        a, b = as_numpy(pred[n]), as_numpy(image[n])
        assert abs(l1(pred, image)[n] - np.abs(a - b).mean()) < 1e-9
        assert abs(psnr(pred, image)[n] - peak_signal_noise_ratio(b, a, data_range=1)) < 1e-6
        full = structural_similarity(a, b, channel_axis=2, data_range=1., gaussian_weights=True, sigma=1.5,
                                     use_sample_covariance=False, full=True)[1].transpose(2, 0, 1)
        inner = np.s_[:, 5:-5, 5:-5]
        assert np.abs(ssim_map(pred, image)[n].numpy()[inner] - full[inner]).max() < 2e-3
        assert abs(ssim_map(pred, image)[n].numpy()[inner].mean() - full[inner].mean()) < 1e-5


def test_hole_only_counts_the_hole_only(pair):
    pred, image, mask = pair
    outside = torch.where(mask > 0, pred, 1 - image)       # anything may happen outside
    for f in (l1, psnr):
        assert torch.equal(f(pred, image, mask), f(outside, image, mask))
    for n in range(2):
        a, b = (x[n][:, mask[n, 0] > 0].double() for x in (pred, image))
        assert abs(l1(pred, image, mask)[n] - (a - b).abs().mean()) < 1e-12
        assert abs(psnr(pred, image, mask)[n] + 10*((a - b)**2).mean().log10()) < 1e-9
        where = mask[n, 0] > 0
        assert abs(ssim(pred, image, mask)[n] - ssim_map(pred, image)[n][:, where].mean()) < 1e-9
    known = 1 - mask                                       # whole = weighted mean of hole and rest
    share = mask.double().mean((1, 2, 3))
    whole = share*ssim(pred, image, mask) + (1 - share)*ssim(pred, image, known)
    assert torch.allclose(ssim(pred, image), whole, atol=1e-9)


def test_hand_worked_2x2():
    a, b = torch.tensor([[[[.1, .5], [.9, .3]]]]), torch.tensor([[[[.1, .3], [.5, .5]]]])
    lower = torch.tensor([[[[0., 0], [1, 1]]]])
    assert l1(a, b).item() == pytest.approx(.2) and l1(a, b, lower).item() == pytest.approx(.3)
    assert psnr(a, b).item() == pytest.approx(-10*math.log10((.04 + .16 + .04)/4), abs=1e-5)


def test_equal_pictures_and_empty_masks(pair):
    _, image, mask = pair
    assert psnr(image, image).isinf().all() and (l1(image, image) == 0).all()
    assert torch.allclose(ssim(image, image), torch.ones(2).double(), atol=1e-5)
    for f in (l1, psnr, ssim): assert f(image, image, 0*mask).isnan().all()


def test_half_precision_does_not_change_the_measure(pair):
    pred, image, mask = (x.bfloat16() for x in pair)
    exact = image_metrics(pred.float(), image.float(), mask.float())
    with torch.autocast('cpu', torch.bfloat16):
        for k, v in image_metrics(pred, image, mask).items(): assert torch.allclose(v, exact[k]), k


def test_image_metrics_is_the_single_ones(pair):
    got = image_metrics(*pair)
    pred, image, mask = pair
    want = {k + e: f(pred, image, m) for e, m in (('', None), ('_hole', mask))
            for k, f in (('l1', l1), ('psnr', psnr), ('ssim', ssim))}
    assert set(got) == set(want)
    for k in want: assert got[k].shape == (2,) and torch.allclose(got[k], want[k], atol=1e-12), k


def test_edges():
    true = torch.tensor([[[[1., 1], [1, 0]]], [[[0, 0], [0, 0.]]], [[[1, 0], [0, 0.]]]])
    drawn = torch.tensor([[[[.9, .2], [.1, .8]]], [[[0, 1], [0, 0.]]], [[[0, 0], [0, 0.]]]])
    P, R = edge_precision_recall(drawn, true)
    assert P[:2].tolist() == [.5, 0] and P[2].isnan()
    assert R[0] == 1/3 and R[1].isnan() and R[2] == 0
    P, R = edge_precision_recall(drawn[:1], true[:1], torch.tensor([[[[1., 0], [0, 0]]]]))
    assert (P.item(), R.item()) == (1, 1)
    P, _ = edge_precision_recall(drawn[:1], true[:1], threshold=.15)
    assert P.item() == 2/3


@pytest.mark.parametrize('spoil, says', [
    (lambda p, i, m: (p*255, i, m), 'expected \\[0,1\\]'), (lambda p, i, m: (p, i*2 - 1, m), 'image has values'),
    (lambda p, i, m: (p*float('nan'), i, m), 'nan'), (lambda p, i, m: (p[0], i[0], m), r'expected the same \(B,C,H,W\)'),
    (lambda p, i, m: (p, i[:1], m), 'expected the same'), (lambda p, i, m: (p, i, m[:, 0]), r'expected \(B,1,H,W\)'),
    (lambda p, i, m: (p, i, m[..., 1:]), 'a mask of shape')])
def test_bad_pairs(pair, spoil, says):
    for f in (l1, psnr, ssim, image_metrics):
        with pytest.raises(InputError, match=says) as e: f(*spoil(*pair))
        assert '\n' not in str(e.value)


def test_ssim_refuses_tiny_pictures():
    with pytest.raises(InputError, match='at least 11x11'): ssim(torch.rand(1, 3, 10, 20), torch.rand(1, 3, 10, 20))


def test_bootstrap():
    v = [20, 22, 25, 21, 30.]
    mean, low, high = bootstrap_ci(v)
    assert mean == np.mean(v) and min(v) <= low < mean < high <= max(v)
    assert bootstrap_ci(v) == (mean, low, high) != bootstrap_ci(v, seed=1)
    assert bootstrap_ci(v, level=.5)[1] > low
    for bad, says in (([], '0 of 0'), ([1, math.inf, math.nan], '2 of 3')):
        with pytest.raises(InputError, match=says): bootstrap_ci(bad)


def test_summary():
    rows = [dict(bin=b, name='x', l1=torch.tensor(.1*k), psnr=20. + k) for k, b in enumerate('aabbb')]
    s = summarize_metrics(rows)
    assert list(s) == ['a', 'b', 'all'] and set(s['a']) == {'l1', 'psnr'}
    assert s['b']['psnr'] == dict(zip(('mean', 'lo', 'hi'), bootstrap_ci([22, 23, 24.])), n=3)
    assert s['all']['l1']['mean'] == pytest.approx(.2) and s['all']['l1']['n'] == 5
    with pytest.raises(InputError, match='psnr, bin b: 1 of 4'):
        summarize_metrics(rows + [dict(bin='b', l1=.1, psnr=math.inf)])
    with pytest.raises(InputError, match='no rows'): summarize_metrics([])
