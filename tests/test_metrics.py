"""Metrics against scikit-image, torchmetrics, definitions and hand-worked values; what averages and sets of pictures refuse"""
import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2gray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from inpaint_lib.core import InputError
from inpaint_lib.metrics import (HISTORICAL, LPIPS_NETS, Extractor, bootstrap_ci, boundary_jump, distance_names, distribution_report, edge_f1,
                                 edge_precision_recall, frechet_distance, gradient_error, historical, image_metrics, kernel_mmd, kid, l1,
                                 linear_svm, load_inception, load_lpips, lpips, p_ids_u_ids, paired_interval, psnr, sobel_gradient, ssim,
                                 ssim_map, summarize_metrics, verdict, why_refused)


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


# --- the seam

def test_boundary_jump_lives_here_and_in_deepfill():
    from inpaint_lib.papers import deepfill_v1
    assert deepfill_v1.boundary_jump is boundary_jump
    ramp, box = torch.linspace(0, 1, 20).expand(2, 3, 20, 20), torch.zeros(2, 1, 20, 20)
    box[..., 6:12, 6:12] = 1
    assert boundary_jump(ramp, box).abs().max() < 1e-6 and boundary_jump(ramp + .2*box, box).min() > .15
    assert boundary_jump(ramp, 0*box).isnan().all() and boundary_jump(ramp, 0*box + 1).isnan().all()


# --- LPIPS

@pytest.fixture(scope='module')
def squeeze():
    from torchvision.models import squeezenet1_1
    torch.manual_seed(0)
    return squeezenet1_1(weights=None).state_dict()


def test_lpips_is_torchmetrics(squeeze, tmp_path, monkeypatch, pair):
    "From a file, a state dict and torchvision's cache alike, equal to torchmetrics' own function"
    import torchvision
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity as theirs
    pred, image, _ = pair

    def cached(weights=None):
        net = torchvision.models.SqueezeNet('1_1'); net.load_state_dict(squeeze)
        return net
    monkeypatch.setattr(torchvision.models, 'squeezenet1_1', cached)
    want = theirs(pred, image, net_type='squeeze', reduction='none', normalize=True)
    torch.save(squeeze, tmp_path/'squeeze.pth')
    for weights in (squeeze, tmp_path/'squeeze.pth', str(tmp_path/'squeeze.pth')):
        got = lpips(pred, image, net=load_lpips('squeeze', weights))
        assert got.shape == (2,) and torch.allclose(got.float(), want, rtol=1e-5)
    monkeypatch.setattr(torchvision.models.SqueezeNet1_1_Weights.DEFAULT.__class__, 'get_state_dict', lambda *a, **kw: squeeze)
    assert torch.allclose(lpips(pred, image, net='squeeze').float(), want, rtol=1e-5)


def test_lpips_is_a_distance_that_grows_with_noise(squeeze, pair):
    net, image = load_lpips('squeeze', squeeze), pair[1]
    assert (lpips(image, image, net=net) == 0).all()
    noise = torch.randn(image.shape)
    worse = torch.stack([lpips((image + s*noise).clamp(0, 1), image, net=net) for s in (.01, .03, .1, .3)])
    assert (worse[0] > 0).all() and (worse.diff(dim=0) > 0).all()
    other = (image + .1*noise).clamp(0, 1)
    assert torch.allclose(lpips(other, image, net=net), lpips(image, other, net=net))
    assert torch.allclose(lpips(other, image, net=net)[1:], lpips(other[1:], image[1:], net=net))      # each picture for itself
    with torch.autocast('cpu', torch.bfloat16): assert torch.allclose(lpips(other, image, net=net), worse[2])
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_lpips_with_a_network_of_ones_own(pair):
    pred, image, _ = pair
    own = lambda a, b, normalize: ((a - b)**2).mean((1, 2, 3), keepdim=True)
    assert torch.allclose(lpips(pred, image, net=own), ((pred - image)**2).mean((1, 2, 3)).double())


def test_lpips_says_what_is_missing(squeeze, tmp_path, monkeypatch, pair):
    import torchvision.models as tv
    pred, image, _ = pair

    def offline(*a, **kw): raise OSError('<urlopen error [Errno -2] Name or service not known>')
    monkeypatch.setattr(tv.SqueezeNet1_1_Weights, 'get_state_dict', offline)
    (tmp_path/'bad.pth').write_bytes(b'no weights')
    wrong = {k: v[:1] if k == 'features.0.weight' else v for k, v in squeeze.items()}
    small = load_lpips('squeeze', squeeze)
    for f, says in ((lambda: lpips(pred, image, net='squeeze'), "squeezenet1_1 can't be downloaded"), (lambda: load_lpips('resnet'), 'expected one of alex, vgg, squeeze'),
                    (lambda: load_lpips('squeeze', 'nowhere.pth'), 'no such file'), (lambda: load_lpips('squeeze', tmp_path/'bad.pth'), 'squeezenet1_1 keys'),
                    (lambda: load_lpips('alex', squeeze), "don't fit alexnet"), (lambda: load_lpips('squeeze', wrong), "don't fit squeezenet1_1"),
                    (lambda: lpips(pred[:, :1], image[:, :1], net=small), r'\(2, 1, 40, 33\)'), (lambda: lpips(pred[..., :16], image[..., :16], net=small), '17 or more'),
                    (lambda: lpips(pred*255, image, net=small), r'\[0,1\]')):
        with pytest.raises(InputError, match=says) as e: f()
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('net', ['squeeze', 'alex', 'vgg'])
def test_lpips_knows_the_smallest_picture(net):
    from torchmetrics.functional.image.lpips import _NoTrainLpips
    side, model = LPIPS_NETS[net][1], _NoTrainLpips(net=net, pnet_rand=True)
    x = torch.rand(1, 3, side, side)
    assert model(x, x).isfinite().all()
    with pytest.raises(RuntimeError): model(x[..., 1:], x[..., 1:])


# --- sets of pictures

def normal(n, d, *key): return torch.from_numpy(np.random.default_rng(key).normal(size=(n, d)))


def test_frechet_distance():
    from scipy.linalg import sqrtm
    a, b = normal(200, 5, 0) @ normal(5, 5, 1), normal(300, 5, 2) + .5
    A, B = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    want = ((a.mean(0) - b.mean(0))**2).sum().item() + np.trace(A + B - 2*sqrtm(A @ B).real)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9) == frechet_distance(b.numpy(), a.numpy())
    assert frechet_distance(a.float(), a.float()) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 2) == pytest.approx(5*4, rel=1e-6)


def test_kernel_mmd_is_its_definition():
    a, b = normal(7, 3, 0), normal(7, 3, 1) + .3
    k = lambda x, y: (float(x @ y)/3 + 1)**3
    m = range(7)
    inner = sum(k(a[i], a[j]) + k(b[i], b[j]) for i in m for j in m if i != j)/42
    every, apart = sum(k(a[i], b[j]) for i in m for j in m)/49, sum(k(a[i], b[j]) for i in m for j in m if i != j)/42
    assert kernel_mmd(a, b) == pytest.approx(inner - 2*every) and kernel_mmd(a, b, paired=True) == pytest.approx(inner - 2*apart)
    with pytest.raises(InputError, match='equal numbers'): kernel_mmd(a, b[1:])


def test_kid_is_torchmetrics_mean():
    from torchmetrics.image.kid import KernelInceptionDistance
    a, b = normal(60, 4, 0), normal(60, 4, 1) + .4
    net = torch.nn.Identity(); metric = KernelInceptionDistance(net, subsets=400, subset_size=20)
    metric.update(a, real=True); metric.update(b, real=False)
    ours = kid(a, b, 20, subsets=400)
    assert ours['value'] == pytest.approx(metric.compute()[0].item(), rel=.05) and ours['lo'] < ours['value'] < ours['hi']
    assert ours == kid(a, b, 20, subsets=400) != kid(a, b, 20, subsets=400, seed=1)
    assert (ours['subset_size'], ours['subsets'], ours['n']) == (20, 400, 60)
    wide = kid(a, b, 20, subsets=400, level=.99)
    assert wide['lo'] < ours['lo'] and wide['value'] == ours['value']
    assert all(type(ours[k]) is float for k in ('value', 'lo', 'hi'))                     # JSON takes them


def test_kid_of_pairs_is_unbiased_only_when_told():
    "Two equal distributions, correlated in pairs: truth 0"
    plain, paired = [], []
    for s in range(150):
        x = normal(60, 4, 5, s); y = .9*x + (1 - .81)**.5*normal(60, 4, 6, s)
        plain.append(kernel_mmd(x, y)); paired.append(kid(x, y, 30, paired=True, subsets=20))
    values = np.array([p['value'] for p in paired])
    assert abs(values.mean()) < 3*values.std()/150**.5 + .005 and np.mean(plain) < -.1
    assert np.mean([p['lo'] <= 0 <= p['hi'] for p in paired]) >= .93
    assert kid(x, x, 30, paired=True)['value'] == 0


@pytest.mark.parametrize('n, m', [(200, 50), (120, 60)])
def test_kid_interval_holds_the_known_truth(n, m):
    truth = 3*.5**2 + 3*.25**2 + (.5**3 + 3*.5*.25)**2                       # moments of N(0, 1/4) and N(1/2, 1/4)
    found = [kid(.5*normal(n, 1, n, 0, s), .5*normal(n, 1, n, 1, s) + .5, m, subsets=30) for s in range(100)]
    assert np.mean([f['value'] for f in found]) == pytest.approx(truth, abs=.1)
    assert .84 <= np.mean([f['lo'] <= truth <= f['hi'] for f in found]) <= 1
    deviation = np.mean([f['hi'] - f['lo'] for f in found])/2/1.96            # promised; below: what repeated experiments show
    assert .75 < deviation/np.std([f['value'] for f in found]) < 1.3


def test_sets_refuse():
    a = normal(20, 4, 0)
    gap = a.clone(); gap[3, 2] = math.nan
    for f, says in ((lambda: frechet_distance(a, a[:, :3]), 'same d'), (lambda: frechet_distance(a[0], a[0]), 'expected'), (lambda: kid(a, gap, 5), 'infinite or undefined'),
                    (lambda: kid(a, a, 20), 'smaller than each set'), (lambda: kid(a, a, 1), '2 or more'), (lambda: kid(a, a[:9], 5, paired=True), 'one size'),
                    (lambda: p_ids_u_ids(a, a[:9]), '20 photographs and 9 fillings'), (lambda: p_ids_u_ids(a[:1], a[:1]), 'at least 2')):
        with pytest.raises(InputError, match=says) as e: f()
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('seed', range(6))
def test_linear_svm_is_at_the_bottom(seed):
    "The gradient of the whole bowl vanishes; scipy's general minimiser finds no lower point; large and small features alike"
    from scipy.optimize import minimize
    n, d, scale, C = [(40, 3, 1, 1.), (30, 60, 1, 1.), (200, 8, 30, .1), (50, 5, .01, 10.), (80, 80, 5, 1.), (400, 2, 1, 100.)][seed]
    x, t = scale*normal(n, d, seed), torch.tensor([1., -1]).repeat(n//2).double()
    x[:, 0] += .5*scale*t
    v = linear_svm(x, t, C=C)
    one = torch.cat([x, torch.ones(n, 1)], 1)
    slack = (1 - t*(one @ v)).clamp(min=0)
    assert (v - 2*C*one.T @ (t*slack)).norm() < 1e-8*(2*C*one.T @ t).norm()
    bowl = lambda w: w @ w/2 + C*(np.maximum(0, 1 - t.numpy()*(one.numpy() @ w))**2).sum()
    assert bowl(v.numpy()) <= minimize(bowl, np.zeros(d + 1)).fun + 1e-9


def test_linear_svm_by_hand():
    for C in (.1, 1., 10.):                                                   # w^2/2 + 2 C (1 - w)^2
        assert torch.allclose(linear_svm([[1.], [-1]], [1., -1], C=C), torch.tensor([4*C/(1 + 4*C), 0]).double())


@pytest.mark.parametrize('delta, rho', [(0, 0), (.7, 0), (1.5, .5), (1, .9)])
def test_ids_on_gaussians(delta, rho):
    from scipy.stats import norm
    real = normal(8000, 3, 0); fake = rho*real + (1 - rho**2)**.5*normal(8000, 3, 1)
    fake[:, 1] += delta
    got = p_ids_u_ids(real, fake)
    assert got['p_ids'] == pytest.approx(norm.cdf(-delta/(2*(1 - rho))**.5), abs=.02) and got['u_ids'] == pytest.approx(norm.cdf(-delta/2), abs=.015)


def test_ids_of_equal_and_of_few_pictures():
    a = normal(50, 4, 0)
    assert p_ids_u_ids(a, a) == dict(p_ids=0, u_ids=.5)                       # ties are no wins; nobody is told apart
    assert p_ids_u_ids(normal(20, 64, 1), normal(20, 64, 2)) == dict(p_ids=0, u_ids=0)       # one distribution, separated


def test_names_of_distances():
    assert list(distance_names('inception-v3-compat').values()) == ['KID', 'FID', 'P-IDS', 'U-IDS']
    assert distance_names('torchvision inception_v3')['frechet'] == "FID (torchvision's Inception)"
    for name in distance_names('VGG19 relu3_1').values(): assert name.endswith('on VGG19 relu3_1') and not any(k in name for k in ('FID', 'KID', 'IDS'))


def test_report_refuses_below_5000_pairs():
    real, fake = normal(300, 16, 0), normal(300, 16, 1)
    r = distribution_report(real, fake, features='own features', subsets=10)
    assert list(r) == list(distance_names('own features').values())
    kernel = r['kernel distance on own features']
    assert kernel['subset_size'] == 150 and kernel['lo'] < 0 < kernel['hi']
    for name in list(r)[1:]: assert set(r[name]) == {'refused', 'n'} and '300 pairs (5,000 are needed)' in r[name]['refused'] and '\n' not in r[name]['refused']
    few = distribution_report(real[:10], fake[:10], features='own features', subset_size=5, subsets=10)
    assert 'rank 9 at most for 16 features' in few['Frechet distance on own features']['refused']
    assert 'probability 100%' in few['unpaired SVM score on own features']['refused'] and few['kernel distance on own features']['subset_size'] == 5
    for f, says in ((lambda: distribution_report(real, fake, features='inception-v3-compat'), 'Inception has 2048'), (lambda: distribution_report(real, fake[1:], features='x'), 'expected pairs')):
        with pytest.raises(InputError, match=says): f()


def test_report_from_5000_pairs_on():
    real, fake = normal(5000, 6, 0), normal(5000, 6, 1)
    r = distribution_report(real, fake, features='own features', subsets=3, subset_size=200)
    assert r['Frechet distance on own features'] == dict(value=frechet_distance(real, fake), n=5000)
    assert abs(r['unpaired SVM score on own features']['value'] - .5) < .03 and abs(r['paired SVM score on own features']['value'] - .5) < .03


def test_why_refused_knows_cover():
    from itertools import product
    from scipy.optimize import linprog
    from scipy.stats import binom
    x = normal(6, 2, 3).numpy()                                               # all labellings of six points in the plane
    split = lambda t: linprog(np.zeros(3), A_ub=-np.array(t)[:, None]*np.c_[x, np.ones(6)], b_ub=-np.ones(6), bounds=[(None, None)]*3).status == 0
    assert sum(map(split, product((1, -1), repeat=6)))/64 == pytest.approx(binom.cdf(2, 5, .5))
    assert 'probability 50%' in why_refused('paired', 2049, 2048) and 'rank 2,047 at most for 2,048' in why_refused('frechet', 2048, 2048)
    assert 'fitted to' in why_refused('unpaired', 4999, 2048) and '2.4 pictures for each' in why_refused('frechet', 4999, 2048)


def test_extractor(pair):
    image = pair[1]
    E = Extractor(lambda x: dict(a=x, b=torch.cat([x, 2*x], 1)), 'twice')
    assert E.name == 'twice' and E(image).shape == (2, 9) and torch.allclose(E(image)[:, :3], image.mean((2, 3)))
    net = torch.nn.Conv2d(3, 4, 3)
    assert not Extractor(net, 'conv')(image).requires_grad and not net.training
    with pytest.raises(InputError, match=r'\[0,1\]'): E(image*255)


def test_torchvisions_inception(monkeypatch):
    import torchvision
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, init_weights=False).eval()
    state, x = net.state_dict(), torch.rand(2, 3, 320, 299)
    E = load_inception(state, 'torchvision inception_v3')
    net.fc = torch.nn.Identity()
    small = torch.nn.functional.interpolate(x, (299, 299), mode='bilinear', antialias=True)
    got = E(x)
    with torch.no_grad(): assert got.shape == (2, 2048) and torch.equal(got, net(2*small - 1))
    with pytest.raises(InputError, match="don't fit torchvision inception_v3") as e: load_inception({}, 'torchvision inception_v3')
    assert '\n' not in str(e.value)


def test_fids_inception(monkeypatch):
    "torchmetrics' own network needs torch-fidelity: without it one line, with it bytes go in"
    import torchmetrics.image.fid as fid

    def absent(*a): raise ModuleNotFoundError('NoTrainInceptionV3 module requires that `Torch-fidelity` is installed.\n more')
    monkeypatch.setattr(fid, 'NoTrainInceptionV3', absent)
    with pytest.raises(InputError, match='torch-fidelity') as e: load_inception()
    assert '\n' not in str(e.value)
    seen = []

    class Net(torch.nn.Module):
        def __init__(self, name, layers, path): super().__init__(); seen.append((name, layers, path))
        def forward(self, x): seen.append(x); return x.float().flatten(1)[:, :4]
    monkeypatch.setattr(fid, 'NoTrainInceptionV3', Net)
    E = load_inception('a.pth')
    assert E.name == 'inception-v3-compat' and E(torch.full((2, 3, 4, 4), .999)).shape == (2, 4)
    assert seen[0] == ('inception-v3-compat', ['2048'], 'a.pth') and seen[1].dtype == torch.uint8 and (seen[1] == 255).all()


# --- the same word, different measure

def test_historical(pair):
    pred, image, mask = (torch.nn.functional.interpolate(x, (64, 72)) for x in pair)
    got = historical(pred, image, mask)
    assert list(got) == list(HISTORICAL) and all(r['source'] == HISTORICAL[k] for k, r in got.items())
    for n in range(2):
        a, b = as_numpy(pred[n]), as_numpy(image[n])
        ga, gb = rgb2gray(a), rgb2gray(b)
        want = {'EdgeConnect script': (np.abs(ga - gb).sum()/(ga + gb).sum(), peak_signal_noise_ratio(gb, ga, data_range=1), structural_similarity(gb, ga, data_range=1, win_size=51)),
                'EdgeConnect training': (np.abs(a - b).sum()/b.sum(), None, None),
                'StructureFlow': (np.abs(a - b).sum()/(a + b).sum(), None, structural_similarity(b, a, data_range=1, win_size=51, channel_axis=2)),
                'AOT-GAN': (np.abs(a - b).sum()/(a + b).sum(), None, structural_similarity(b, a, data_range=1, channel_axis=2)),
                'MAT': (np.abs(a - b).mean(), None, None), 'PIC': (255*np.abs(a - b).mean(), None, None),
                'mmagic': (100*np.abs(a - b)[mask[n, 0].numpy() > 0].mean(), None, None)}
        for name, row in want.items():
            for k, v in zip(('l1', 'psnr', 'ssim'), row):
                if v is not None: assert got[name][k][n].item() == pytest.approx(v, abs=1e-5), (name, k)
        full = structural_similarity(b, a, channel_axis=2, data_range=1., gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)[1]
        assert got['MAT']['ssim'][n].item() == got['mmagic']['ssim'][n].item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=2e-5)
        assert abs(got['MAT']['ssim'][n] - got['here, whole']['ssim'][n]) > 1e-4             # theirs leaves the borders out
    assert all(r[k].shape == (2,) for r in got.values() for k in ('l1', 'psnr', 'ssim') if r[k] is not None)
    assert torch.equal(got['here, hole']['psnr'], psnr(pred, image, mask))


def test_historical_extremes(pair):
    _, image, mask = pair                                                     # 40x33: smaller than a window of 51
    got = historical(image, image, mask)
    assert got['EdgeConnect script']['ssim'].isnan().all() and torch.allclose(got['AOT-GAN']['ssim'], torch.ones(2).double())
    assert (got['PIC']['psnr'] == 100).all() and got['MAT']['psnr'].isinf().all()
    near = historical(image*.9999, image, mask)
    assert (near['PIC']['psnr'] > 60).all() and torch.equal(near['PIC']['psnr'], near['MAT']['psnr'])
