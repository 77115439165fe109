"The sampling correctness loss: golden value, gradients, chunks, masks, precision, what is refused"
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from inpaint_lib.core import InputError
from inpaint_lib.features import VGGFeatures, vgg_shapes
from inpaint_lib.papers.structure_flow import (best_cosine, bilinear_resample, gaussian_resample,
                                               sampling_correctness_loss)

GOLDEN = Path(__file__).parent/'golden'
sys.path.insert(0, str(GOLDEN))
from fill import fill, sine  # noqa: E402

CASE = json.loads((GOLDEN/'sampling_correctness.json').read_text())['he']


@pytest.fixture(scope='module')
def case():
    "Features of truth and input, flow, mask"
    gt = sine((1, 3, 64, 64), 0, .7, .01) + sine((1, 3, 64, 64), 0, .3, .31, .4)
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.float64); mask[..., 20:44, 16:48] = 1
    k = torch.arange(256, dtype=torch.float64)
    flow = torch.stack([3.1*torch.sin(.19*k + .2) + .4, 2.6*torch.cos(.11*k + .9) - .3]).view(1, 2, 16, 16)
    vgg = VGGFeatures(layers=('relu3_1',), weights=fill(vgg_shapes(), 'he'))
    with torch.no_grad(): return *(vgg(x)['relu3_1'] for x in (gt, gt*(1 - mask))), flow, mask


def maps(B=2, C=6, h=5, w=7, seed=0):
    g = torch.Generator().manual_seed(seed); r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    return r(B, C, h, w), r(B, C, h, w), 2*r(B, 2, h, w), (r(B, 1, 4*h, 4*w) > 0).double()


def test_golden(case):
    target, source, flow, mask = case; flow = flow.clone().requires_grad_()
    loss = sampling_correctness_loss(target, source, flow, mask)
    assert abs(loss.item() - CASE['loss']) < 1e-9
    assert abs(sampling_correctness_loss(target, source, 0*flow, mask).item() - CASE['loss_zero_flow']) < 1e-9
    large = F.interpolate(flow, scale_factor=2)
    assert abs(sampling_correctness_loss(target, source, large, mask).item() - CASE['loss_with_32x32_nearest_upsampled_flow']) < 1e-9
    grad, = torch.autograd.grad(loss, flow); want = torch.tensor(CASE['grad_flow']['values'], dtype=torch.float64)
    assert (grad.flatten()[CASE['grad_flow']['idx']] - want).abs().max() < 1e-9
    assert abs(F.interpolate(mask, (16, 16)).mean().item() - CASE['mean_mask_at_feature_res']) < 1e-12


def test_the_best_match_costs_one_over_e():
    "The target is a shift of the source: the flow that undoes it reaches the best everywhere inside"
    source = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)); target = source.roll(-2, 3)
    flow, mask = torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 8, 8); flow[:, 0], mask[..., :6] = 2, 1
    cost = lambda v: sampling_correctness_loss(target, source, v, mask, sample=bilinear_resample).item()
    assert cost(flow) == pytest.approx(math.exp(-1), abs=1e-5) and cost(0*flow) > cost(flow) + .2


def test_by_the_formula():
    target, source, flow, mask = maps()
    cosines = F.cosine_similarity(target.flatten(2)[..., None], source.flatten(2)[:, :, None], dim=1)
    got = F.cosine_similarity(target, gaussian_resample(source, flow), dim=1).flatten(1)
    where = mask[..., ::4, ::4].flatten(1)
    want = (torch.exp(-got/cosines.amax(2))*where).sum()/where.sum()
    assert abs(sampling_correctness_loss(target, source, flow, mask) - want) < 1e-7


def test_gradcheck():
    target, source, flow, mask = maps(1, 4, 3, 4)
    f = lambda v: sampling_correctness_loss(target, source, v, mask)
    assert torch.autograd.gradcheck(f, flow.requires_grad_())


def test_the_maximum_carries_no_gradient():
    target, source, flow, mask = maps(); source.requires_grad_(); target.requires_grad_()
    assert not best_cosine(target.flatten(2), source.flatten(2)).requires_grad
    sampling_correctness_loss(target, source, flow, mask).backward()
    assert source.grad.isfinite().all() and target.grad.isfinite().all()


@pytest.mark.parametrize('chunk', [1, 3, 35, 1000, None])
def test_chunks_change_nothing(chunk):
    t, s = (v.flatten(2) for v in maps()[:2])
    want = torch.einsum('bcn,bcm->bnm', *(F.normalize(v, dim=1) for v in (t, s))).amax(2)
    torch.testing.assert_close(best_cosine(t, s, chunk=chunk), want, rtol=0, atol=1e-7)


def test_only_the_hole_counts():
    target, source, flow, mask = maps(1); flow.requires_grad_()
    grad, = torch.autograd.grad(sampling_correctness_loss(target, source, flow, mask), flow)
    assert (grad.abs().sum(1) == 0)[mask[:, 0, ::4, ::4] == 0].all() and grad.abs().sum() > 0
    assert sampling_correctness_loss(target, source, flow, 0*mask).item() == 0


def test_features_of_nothing_are_harmless():
    "Black pictures have features of length 0: a value and gradients, not NaN"
    target, source, flow, mask = maps(1); flow.requires_grad_()
    loss = sampling_correctness_loss(target, 0*source, flow, mask)
    assert loss.isfinite() and torch.autograd.grad(loss, flow)[0].isfinite().all()


def test_autocast_and_half():
    target, source, flow, mask = (v.float() for v in maps()); exact = sampling_correctness_loss(target, source, flow, mask)
    with torch.autocast('cpu', torch.bfloat16): inside = sampling_correctness_loss(target, source, flow, mask)
    assert torch.equal(exact, inside)
    half = sampling_correctness_loss(target.bfloat16(), source.bfloat16(), flow, mask)
    assert half.dtype == torch.float32 and abs(half/exact - 1) < .02


def test_other_samplers():
    args = maps(); wide = partial(gaussian_resample, kernel_size=16, sigma=4.)
    values = [sampling_correctness_loss(*args, sample=s).item() for s in (gaussian_resample, wide, bilinear_resample)]
    assert len(set(values)) == 3 and all(math.isfinite(v) for v in values)


def test_refuses():
    target, source, flow, mask = maps()
    for bad in ((target[:, :2], source, flow, mask), (target, source, flow[:, :1], mask), (target, source, flow[:1], mask),
                (target, source, flow, mask[:1]), (target, source, flow, mask.expand(-1, 3, -1, -1))):
        with pytest.raises(InputError) as e: sampling_correctness_loss(*bad)
        assert 'expected (B,C,h,w) twice' in str(e.value) and '\n' not in str(e.value)
