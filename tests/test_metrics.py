"""Metrics against scikit-image, torchmetrics and hand-worked values; what averages refuse"""
import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from inpaint_lib.core import InputError
from inpaint_lib.metrics import (bootstrap_ci, edge_f1, edge_precision_recall, gradient_error, image_metrics, l1, paired_interval,
                                 psnr, sobel_gradient, ssim, ssim_map, summarize_metrics, verdict)


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


def test_sobel_equals_scipy(pair):
    from scipy.ndimage import sobel
    x = pair[1].double()
    ours = sobel_gradient(x)
    for n in range(2):
        for c in range(3):
            for k, axis in enumerate((0, 1)):
                np.testing.assert_allclose(ours[n, 2*c + k].numpy(), sobel(x[n, c].numpy(), axis, mode='nearest')/8, atol=1e-12)


def test_gradient_error(pair):
    pred, image, mask = pair
    assert (gradient_error(image, image, mask) == 0).all() and gradient_error(pred, image, 0*mask).isnan().all()
    assert (gradient_error(pred, image, mask) > 0).all()
    far = torch.where(torch.nn.functional.max_pool2d(mask, 3, 1, 1) > 0, image, pred)         # differs far from the hole only
    assert (gradient_error(far, image, mask) == 0).all()
    grey = [x.mean(1, keepdim=True) for x in (pred, image)]
    assert torch.allclose(gradient_error(*grey), gradient_error(*(g.expand(-1, 3, -1, -1) for g in grey)), atol=1e-4)


def test_edge_f1():
    line = lambda x: (torch.arange(40) >= x).float().expand(1, 3, 40, 40)*.8 + .1
    flat, both = torch.full((1, 3, 40, 40), .5), torch.cat([line(12), line(20)])
    assert edge_f1(line(20), line(20)).item() == 1 and edge_f1(line(21), line(20)).item() == 1
    assert edge_f1(line(24), line(20)).item() == 0 and edge_f1(line(24), line(20), tolerance=4).item() == 1
    assert edge_f1(flat, line(20)).item() == 0                                # nothing drawn
    assert edge_f1(line(20), flat).isnan().all() and edge_f1(flat, flat).isnan().all()
    right = torch.zeros(1, 1, 40, 40); right[..., 30:] = 1
    assert edge_f1(line(20), line(20), right).isnan().all()                   # no edge in this hole
    assert edge_f1(both, torch.cat([line(12), line(12)])).tolist() == [1, 0]  # each picture for itself


def test_edge_f1_by_hand():
    "Half of a line is drawn: precision 1, recall 1/2; the other way round 1/2 and 1"
    image, pred = torch.zeros(1, 1, 80, 80), torch.zeros(1, 1, 80, 80)
    image[..., 20:] = 1; pred[..., :40, 20:] = 1
    rows = torch.zeros(1, 1, 80, 80); rows[:, :, 10:30] = 1; rows[:, :, 50:70] = 1
    assert edge_f1(pred, image, rows).item() == pytest.approx(2/3)
    assert edge_f1(image, pred, rows).item() == pytest.approx(2/3)


def test_paired_interval_by_hand():
    "Two seeds, three pictures: variances of both means, Satterthwaite's degrees of freedom, Student's t"
    from scipy.stats import t
    d = np.array([[1., 2, 6], [2, 5, 8]])
    u = ((3 - 4)**2 + (5 - 4)**2)/1/2                                          # seed means 3 and 5
    v = ((1.5 - 4)**2 + (3.5 - 4)**2 + (7 - 4)**2)/2/3                         # picture means 1.5, 3.5, 7
    freedom = (u + v)**2/(u**2/1 + v**2/2)
    half = t.ppf(.975, freedom)*math.sqrt(u + v)
    assert paired_interval(d, 0*d) == pytest.approx((4, 4 - half, 4 + half))
    wide = paired_interval(d, 0*d, level=.99)
    assert wide[1] < 4 - half and wide[2] > 4 + half


def test_paired_interval():
    rng = np.random.default_rng(0)
    b = rng.normal(size=(4, 50)); a = b + .3 + .01*rng.normal(size=(4, 50))
    mean, lo, hi = paired_interval(a, b)
    assert mean == pytest.approx((a - b).mean()) and lo < mean < hi and hi - lo < .02           # hard pictures are paired out
    assert paired_interval(b, a) == pytest.approx((-mean, -hi, -lo)) and paired_interval(a, a) == (0, 0, 0)
    seeds = b + np.arange(4)[:, None]                                          # methods differ by the seed alone: t with 3
    assert np.allclose(paired_interval(seeds, b)[1:], 1.5 + 3.182*np.std(range(4), ddof=1)/2*np.array([-1, 1]), atol=.01)
    pictures = b + np.arange(50)                                               # by the picture alone
    lo, hi = paired_interval(pictures, b)[1:]
    assert hi - lo == pytest.approx(2*2.01*np.arange(50).std(ddof=1)/50**.5, rel=.01)
    assert paired_interval(pictures[:1], b[:1])[1:] == pytest.approx((lo, hi))                   # one seed: pictures only
    gap = a.copy(); gap[:, 3] = np.nan; gap_b = b.copy(); gap_b[:, 3] = np.nan
    assert paired_interval(gap, gap_b) == pytest.approx(paired_interval(*(np.delete(x, 3, 1) for x in (a, b))))


@pytest.mark.parametrize('seeds', [0., .2, 2.])
def test_paired_interval_keeps_its_promise_with_three_seeds(seeds):
    rng, held = np.random.default_rng(1), 0
    for _ in range(500):
        d = seeds*rng.normal(size=(3, 1)) + .5*rng.normal(size=(1, 40)) + .5*rng.normal(size=(3, 40))
        _, lo, hi = paired_interval(d, 0*d); held += lo <= 0 <= hi
    assert .92 < held/500 < .995


def test_paired_interval_refuses():
    ok, gap = np.ones((2, 3)), np.array([[1, np.nan, 1], [1, 1, 1]])
    for a, b, says in ((ok, ok[:1], r'\(2, 3\) and \(1, 3\)'), (ok[0], ok[0], 'expected the same'), (gap, gap, '1 of 6'),
                       (ok, gap, '1 of 6'), (ok*math.inf, ok, '6 of 6'), (ok*math.nan, ok*math.nan, 'at least two'),
                       (ok[:1, :1], ok[:1, :1], 'at least two')):
        with pytest.raises(InputError, match=says): paired_interval(a, b)


@pytest.mark.parametrize('lo, hi, word', [(.1, .2, 'reproduced'), (.001, .002, 'reproduced'), (-.2, -.1, 'not reproduced'), (-.05, .05, 'not reproduced'),
                                          (-.002, -.001, 'not reproduced'), (-.06, .01, 'undecided'), (0, .2, 'undecided'), (0, 0, 'not reproduced')])
def test_verdict(lo, hi, word):
    assert verdict(lo, hi, margin=.05) == word == verdict(-hi, -lo, margin=.05, direction=-1)


def test_verdict_refuses():
    for lo, hi, kw in ((1, 0, {}), (math.nan, 1, {}), (0, 1, dict(margin=-1)), (0, 1, dict(direction=0))):
        with pytest.raises(InputError, match='expected lo <= hi'): verdict(lo, hi, **dict(margin=.1) | kw)
