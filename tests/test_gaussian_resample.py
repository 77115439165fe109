"Sampling by flow: golden values, the literal loop, gradients, precision, memory, what is refused"
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inpaint_lib.core import InputError
from inpaint_lib.papers import structure_flow as sf
from inpaint_lib.papers.structure_flow import (Resample2d, bilinear_resample, gaussian_resample,
                                               gaussian_resample_loop, tap_sum, tap_sum_grad)

GOLDEN = Path(__file__).parent/'golden'
sys.path.insert(0, str(GOLDEN))
from fill import sine  # noqa: E402

CASE = json.loads((GOLDEN/'gaussian_resample.json').read_text())['cases']['k4_sigma2']
WINDOWS = [(2, 1., 1), (4, 2., 1), (16, 4., 1), (4, 1.5, 3)]


def golden_input():
    k = torch.arange(256, dtype=torch.float64)
    flow = torch.stack([4.3*torch.sin(.21*k + .3) + .37, 3.7*torch.cos(.13*k + 1.1) - .21]).view(1, 2, 16, 16)
    return sine((1, 4, 16, 16), 0, 1, .05).requires_grad_(), flow.requires_grad_(), sine((1, 4, 16, 16), 0, 1, .07, 1.)


def maps(B=2, C=3, H=7, W=9, spread=4., seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, C, H, W, generator=g, dtype=torch.float64),
            torch.randn(B, 2, H, W, generator=g, dtype=torch.float64)*spread)


@pytest.fixture(params=['sparse', 'embedding_bag'])
def product(request, monkeypatch):
    "Both ways to add up taps"
    if request.param == 'embedding_bag': monkeypatch.setattr(sf, 'has_sparse', lambda x: False)
    elif not torch.backends.mkl.is_available(): pytest.skip('torch without MKL')


@pytest.mark.parametrize('f', [gaussian_resample, gaussian_resample_loop])
def test_golden(f, product):
    features, flow, grad = golden_input(); out = f(features, flow, 4, 2.)
    got = dict(out=out, **dict(zip(('grad1_true', 'grad_flow'), torch.autograd.grad(out, (features, flow), grad))))
    for name, v in got.items():
        want = torch.tensor(CASE[name]['values'], dtype=torch.float64)
        assert list(v.shape) == CASE[name]['shape']
        assert (v.flatten()[CASE[name]['idx']] - want).abs().max() < 1e-9
        assert abs(v.mean().item() - CASE[name]['mean']) < 1e-9


def test_the_gradient_is_the_true_one_not_the_published():
    features, flow, grad = golden_input()
    got, = torch.autograd.grad(gaussian_resample(features, flow, 4, 2.), features, grad)
    official = torch.tensor(CASE['grad1_official']['values'], dtype=torch.float64)
    assert (got.flatten()[CASE['grad1_official']['idx']] - official).abs().max() > .05


@pytest.mark.parametrize('window', WINDOWS)
def test_equals_the_loop(window, product):
    (K, s, d), (features, flow) = window, maps()
    features.requires_grad_(); flow.requires_grad_()
    a, b = (f(features, flow, K, s, dilation=d) for f in (gaussian_resample, gaussian_resample_loop))
    assert (a - b).abs().max() < 1e-12
    g = torch.randn_like(a)
    for x, y in zip(*(torch.autograd.grad(v, (features, flow), g) for v in (a, b))): assert (x - y).abs().max() < 1e-11


@pytest.mark.parametrize('window', WINDOWS)
def test_gradcheck(window, product):
    (K, s, d), (features, flow) = window, maps(1, 2, 3, 4)
    f = lambda a, b: gaussian_resample(a, b, K, s, dilation=d)
    assert torch.autograd.gradcheck(f, (features.requires_grad_(), flow.requires_grad_()))


def test_only_one_gradient_asked_for(product):
    features, flow = maps(); g = torch.randn_like(features)
    both = torch.autograd.grad(gaussian_resample(a := features.clone().requires_grad_(), b := flow.clone().requires_grad_()), (a, b), g)
    torch.testing.assert_close(torch.autograd.grad(gaussian_resample(a, flow), a, g)[0], both[0])
    torch.testing.assert_close(torch.autograd.grad(gaussian_resample(features, b), b, g)[0], both[1])


def test_each_picture_by_itself(product):
    features, flow = maps(3)
    alone = torch.cat([gaussian_resample(f[None], w[None], 16, 4.) for f, w in zip(features, flow)])
    torch.testing.assert_close(gaussian_resample(features, flow, 16, 4.), alone, rtol=0, atol=1e-14)


def test_chunks_change_nothing(monkeypatch, product):
    features, flow = maps(); features.requires_grad_(); flow.requires_grad_(); g = torch.randn_like(features)
    def run():
        out = gaussian_resample(features, flow)
        return out, *torch.autograd.grad(out, (features, flow), g)
    whole = run(); monkeypatch.setattr(sf, 'CHUNK', 5*16)
    for a, b in zip(whole, run()): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    "Remembers the elements of the largest dense tensor that any operation returned"
    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for v in tree_leaves(out):
            if isinstance(v, torch.Tensor) and v.layout == torch.strided: self.found = max(self.found, v.numel())
        return out


def test_memory_is_bounded(monkeypatch):
    "All taps would be 48*48*256 = 590,000; with small chunks no tensor is larger than the padded map"
    monkeypatch.setattr(sf, 'CHUNK', 4096)
    features, flow = torch.randn(1, 8, 48, 48, requires_grad=True), (5*torch.randn(1, 2, 48, 48)).requires_grad_()
    with Largest() as seen: gaussian_resample(features, flow, 16, 4.).sum().backward()
    assert seen.found <= 8*(48 + 30)**2 < 48*48*256


@pytest.mark.parametrize('f', [gaussian_resample, bilinear_resample, gaussian_resample_loop])
def test_constants_stay(f):
    flow = maps(1, 1, spread=50.)[1]
    torch.testing.assert_close(f(torch.full((1, 2, 7, 9), .3, dtype=torch.float64), flow), torch.full((1, 2, 7, 9), .3, dtype=torch.float64))


@pytest.mark.parametrize('f', [gaussian_resample, partial(gaussian_resample, kernel_size=16, sigma=4.), bilinear_resample])
def test_far_outside_reads_the_border(f, product):
    row = torch.arange(9.).expand(1, 1, 7, 9)
    for far, want in ((-1e4, 0.), (1e4, 8.), (-3e30, 0.), (3e30, 8.)):
        flow = torch.zeros(1, 2, 7, 9); flow[:, 0] = far
        torch.testing.assert_close(f(row, flow), torch.full_like(row, want))


def test_nan_in_the_flow_stays_where_it_is(product):
    features, flow = maps(1, 1); flow[0, 0, 3, 4] = float('nan')
    bad = gaussian_resample(features, flow).isnan()[0, 0]
    assert bad[3, 4] and bad.sum() == 1


def test_channel_0_is_x_in_pixels():
    x, y = torch.arange(9.).expand(1, 1, 7, 9), torch.arange(7.)[:, None].expand(1, 1, 7, 9)
    flow = torch.zeros(1, 2, 7, 9); flow[:, 0], flow[:, 1] = 2, -1
    assert torch.allclose(bilinear_resample(x, flow)[0, 0, 3, :6], torch.arange(2., 8), atol=1e-5)
    assert torch.allclose(bilinear_resample(y, flow)[0, 0, 2:, 3], torch.arange(1., 6), atol=1e-5)
    assert (gaussian_resample(x, flow) - gaussian_resample(x, 0*flow))[0, 0, 3, 3].item() == pytest.approx(2, abs=1e-5)


def test_a_narrow_bell_is_the_nearest_pixel():
    features, flow = maps(1, 2)
    tight, near = gaussian_resample(features, flow, 4, 1e-3), bilinear_resample(features, (flow + .5).floor())
    away = (flow - flow.round()).abs().max(1, keepdim=True).values < .45          # not halfway between two
    assert tight.isfinite().all() and ((tight - near).abs()*away).max() < 1e-9


def test_bilinear_gradcheck():
    features, flow = maps(1, 2, 4, 5, spread=.8)
    assert torch.autograd.gradcheck(bilinear_resample, (features.requires_grad_(), (flow + .013).requires_grad_()))


@pytest.mark.parametrize('f', [gaussian_resample, bilinear_resample])
def test_half_precision_and_autocast(f):
    features, flow = (v.float() for v in maps()); exact = f(features, flow)
    half = f(features.bfloat16(), flow)
    assert half.dtype == torch.bfloat16 and (half - exact).abs().max() < .05
    with torch.autocast('cpu', torch.bfloat16): inside = f(features, flow)
    assert torch.equal(inside, exact)
    leaf = features.bfloat16().requires_grad_(); f(leaf, flow).float().sum().backward()
    assert leaf.grad.dtype == torch.bfloat16 and leaf.grad.isfinite().all()


def test_block():
    features, flow = maps()
    assert torch.equal(Resample2d(16, 1, 4.)(features, flow), gaussian_resample(features, flow, 16, 4.))
    assert torch.equal(Resample2d(4, 2)(features, flow), gaussian_resample(features, flow, 4, 2., dilation=2))
    assert torch.equal(Resample2d(sampling='bilinear')(features, flow), bilinear_resample(features, flow))
    assert not list(Resample2d().parameters()) and not Resample2d().state_dict()
    assert 'kernel_size=16' in repr(Resample2d(16, 1, 4.))


def test_tap_sums(product):
    table, index, weights = torch.randn(9, 3), torch.tensor([[0, 1, 8], [2, 3, 4]]), torch.rand(2, 3)
    g = torch.randn(2, 3)
    torch.testing.assert_close(tap_sum(table, index, weights), (weights[..., None]*table[index]).sum(1))
    to_table, to_weights = tap_sum_grad(g, table, index, weights)
    torch.testing.assert_close(to_weights, (table[index] @ g[..., None])[..., 0])
    want = torch.zeros(9, 3).index_add_(0, index.flatten(), (weights[..., None]*g[:, None]).flatten(0, 1))
    torch.testing.assert_close(to_table, want)
    assert tap_sum_grad(g, table, index, weights, needed=(False, True))[0] is None


BAD = [(dict(flow=torch.zeros(2, 2, 7, 8)), 'expected (B,2,H,W)'), (dict(flow=torch.zeros(2, 3, 7, 9)), 'flow (2, 3, 7, 9)'),
       (dict(features=torch.zeros(3, 7, 9)), 'features (3, 7, 9)'), (dict(kernel_size=5), 'an even number of taps'),
       (dict(kernel_size=0), 'kernel_size 0'), (dict(sigma=0.), 'sigma 0.0'), (dict(sigma=float('nan')), 'sigma nan'),
       (dict(dilation=0), 'dilation 0')]


@pytest.mark.parametrize('change, says', BAD, ids=[s for _, s in BAD])
def test_refuses(change, says):
    args = dict(features=torch.zeros(2, 3, 7, 9), flow=torch.zeros(2, 2, 7, 9)) | change
    with pytest.raises(InputError) as e: gaussian_resample(**args)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_block_refuses():
    with pytest.raises(InputError, match="no sampling 'cubic'; expected one of gaussian, bilinear"): Resample2d(sampling='cubic')
    with pytest.raises(InputError, match='kernel_size 3'): Resample2d(3)
