"Losses: every golden value to 1e-9 in float64, gradients, half precision, what is refused"
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from inpaint_lib.core import InputError
from inpaint_lib.features import VGGFeatures, vgg_shapes
from inpaint_lib.losses import (ADVERSARIAL, CONTENT_LAYERS, STYLE_LAYERS, adversarial_loss, feature_matching,
                                feature_reconstruction, gram,
                                gradient_penalty, l1_over_mean_mask, masked_l1, mean_abs, perceptual_loss, style_loss,
                                tv_loss, vgg_terms)

GOLDEN = Path(__file__).parent/'golden'
sys.path.insert(0, str(GOLDEN))
from fill import fill, sine  # noqa: E402

LOSSES = json.loads((GOLDEN/'edge_connect_losses.json').read_text())


def equal(ours, golden): assert abs(float(ours)/golden - 1) < 1e-9, (float(ours), golden)


@pytest.mark.parametrize('kind', ['nsgan', 'lsgan', 'hinge'])
def test_adversarial_golden(kind):
    how = LOSSES['adversarial']
    p, s = (torch.tensor(how[k], dtype=torch.float64) for k in ('probabilities', 'hinge_logits'))
    scores = dict(nsgan=p.logit(), lsgan=p, hinge=s)[kind]
    equal(adversarial_loss(scores, True, kind=kind), how['values'][kind]['D_real'])
    equal(adversarial_loss(scores, False, kind=kind), how['values'][kind]['D_fake'])
    equal(adversarial_loss(scores, True, kind=kind, for_D=False), how['values'][kind]['G'])


def test_nsgan_is_binary_cross_entropy_on_logits():
    s = torch.tensor([-80., -3, 0, 2, 80])
    for real in (True, False):
        want = torch.nn.functional.binary_cross_entropy_with_logits(s, torch.full_like(s, float(real)))
        torch.testing.assert_close(adversarial_loss(s, real), want)


def test_wgan_signs():
    s = torch.tensor([1., 3])
    assert adversarial_loss(s, True, kind='wgan') == -2 and adversarial_loss(s, False, kind='wgan') == 2
    assert adversarial_loss(s, True, kind='wgan', for_D=False) == -2


@pytest.mark.parametrize('kind', ADVERSARIAL)
def test_adversarial_gradients_pull_the_right_way(kind):
    for real, for_D, sign in ((True, True, -1), (False, True, 1), (True, False, -1)):
        s = torch.full((2, 1, 3, 3), .3, dtype=torch.float64, requires_grad=True)
        adversarial_loss(s, real, kind=kind, for_D=for_D).backward()
        assert (s.grad*sign > 0).all()


@pytest.mark.parametrize('kind', ADVERSARIAL)
def test_adversarial_half_precision(kind):
    s = torch.linspace(-3, 3, 50)
    half, full = (adversarial_loss(t, True, kind=kind) for t in (s.bfloat16(), s))
    assert half.dtype == torch.float32 and abs(half - full) < 1e-2*max(1, abs(full))


def test_adversarial_refuses():
    with pytest.raises(InputError, match="no adversarial loss 'wgan-gp'; expected one of nsgan, lsgan, hinge, wgan"):
        adversarial_loss(torch.zeros(1), True, kind='wgan-gp')


def test_gradient_penalty():
    real, fake = torch.rand(2, 4, 1, 2, 2, dtype=torch.float64)
    equal(gradient_penalty(lambda x: 3*x.sum((1, 2, 3)), real, fake), 25.)          # |grad| = 6
    equal(gradient_penalty(lambda x: .25*x.sum((1, 2, 3)), real, fake), .25)        # |grad| = .5
    g = lambda seed: torch.Generator().manual_seed(seed)
    D = lambda x: x.square().sum((1, 2, 3))
    assert gradient_penalty(D, real, fake, generator=g(1)) == gradient_penalty(D, real, fake, generator=g(1))
    assert gradient_penalty(D, real, fake, generator=g(1)) != gradient_penalty(D, real, fake, generator=g(2))
    w = torch.tensor(3., requires_grad=True)
    fake.requires_grad_()
    gradient_penalty(lambda x: w*x.sum((1, 2, 3)), real, fake).backward()
    equal(w.grad, 20.)                                                              # d(2w-1)^2/dw = 4(2w-1)
    assert fake.grad is None                                                        # nothing for G


def test_gradient_penalty_of_the_hole_only():
    real, fake = torch.rand(2, 4, 3, 8, 8, dtype=torch.float64)
    mask = torch.zeros(4, 1, 8, 8, dtype=torch.float64)
    for i in range(4): mask[i, :, :i + 1, :2] = 1                                   # 2, 4, 6, 8 pixels of 3 channels
    lengths = [math.sqrt(3*2*(i + 1)) for i in range(4)]
    equal(gradient_penalty(lambda x: x.sum((1, 2, 3)), real, fake, mask=mask).detach(), sum((n - 1)**2 for n in lengths)/4)
    D = lambda x: x.square().sum((1, 2, 3)); g = lambda: torch.Generator().manual_seed(3)
    whole = gradient_penalty(D, real, fake, mask=torch.ones_like(mask), generator=g())
    equal(whole.detach(), gradient_penalty(D, real, fake, generator=g()).item())
    seen = gradient_penalty(D, real, fake, mask=mask, generator=g()).item()
    real2 = torch.where(mask > 0, real, real + 100)                                 # D's slope outside does not matter
    equal(gradient_penalty(D, real2, fake, mask=mask, generator=g()).detach(), seen)


def test_feature_matching_golden_and_the_slip():
    how = LOSSES['feature_matching']
    real = [sine(s, 0, 1, .1, i) for i, s in enumerate(how['shapes'])]
    fake = [sine(s, 0, .7, .13, i + .5) for i, s in enumerate(how['shapes'])]
    each = [mean_abs(f, r).item() for f, r in zip(fake, real)]
    for a, b in zip(each, how['per_map_l1']): equal(a, b)
    equal(10*feature_matching(fake, real), how['official_weight10'])
    assert f'{10*feature_matching(fake, real):.5f}' == '31.41339'
    fm, total = 0., 0.
    for a in each: fm = (fm + a)*10; total += fm       # the note's indentation: NOT what is computed here
    equal(total, how['seed003_as_printed_contribution_to_gen_loss']); equal(fm, how['seed003_as_printed_logged_fm'])
    assert int(total) == 89567


def test_feature_matching_detaches_the_real_side():
    fake, real = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    feature_matching([fake], [real]).backward()
    assert real.grad is None and fake.grad.abs().sum() > 0
    with pytest.raises(InputError, match='1 feature maps against 2'): feature_matching([fake], [real, real])


def l1_inputs():
    image, pred = sine((2, 3, 8, 8), w=.05), sine((2, 3, 8, 8), b=.4, w=.07, phase=.3)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    mask[0, :, 2:6, 2:6] = 1; mask[1, :, 0:3, 1:8] = 1
    return pred, image, mask


def test_l1_golden():
    pred, image, mask = l1_inputs()
    how = LOSSES['l1_over_mean_mask']
    equal(mask.mean(), how['mean_mask']); equal(mean_abs(pred, image), how['plain_l1'])
    equal(l1_over_mean_mask(pred, image, mask), how['value'])
    hole, valid = masked_l1(pred, image, mask), masked_l1(pred, image, 1 - mask)
    equal(hole + valid, how['plain_l1'])
    assert abs(hole/mask.mean() - how['value']) > .01            # it is not a masked L1


def test_masked_l1_sees_only_where():
    pred, image, mask = l1_inputs(); pred.requires_grad_()
    masked_l1(pred, image, mask).backward()
    assert (pred.grad*(1 - mask)).eq(0).all() and (pred.grad*mask != 0).sum() == 3*mask.sum()


def test_tv_by_hand():
    x = torch.tensor([[[[0., 1, 3], [1, 1, 1]]]])
    assert tv_loss(x) == (1 + 0 + 2)/3 + (1 + 2 + 0 + 0)/4 and tv_loss(x + 7) == tv_loss(x)


@pytest.fixture(scope='module')
def vgg(): return VGGFeatures(weights=fill(vgg_shapes(), 'he'))


@pytest.fixture(scope='module')
def pictures():
    x, y = sine((2, 3, 64, 64)), sine((2, 3, 64, 64), b=.4, w=.013, phase=.7)
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.float64)
    mask[0, :, 16:48, 16:48] = 1; mask[1, :, 8:40, 20:52] = 1
    return x, y, mask


def test_perceptual_and_style_golden(vgg, pictures):
    x, y, mask = pictures
    how = LOSSES['vgg_he']
    with torch.no_grad(): fx, fy = vgg(x), vgg(y)
    equal(perceptual_loss(fx, fy), how['perceptual(x,y)']); equal(style_loss(fx, fy), how['style(x,y)'])
    for l in CONTENT_LAYERS: equal(perceptual_loss(fx, fy, (l,)), how['perceptual_terms'][l])
    for l in STYLE_LAYERS: equal(style_loss(fx, fy, (l,)), how['style_terms'][l])
    terms = [perceptual_loss(fx, fy, (l,)).item() for l in CONTENT_LAYERS]
    equal(perceptual_loss(fx, fy, weights=[1, 2, 3, 4, 5]), sum(w*t for w, t in enumerate(terms, 1)))
    with torch.no_grad(): perc, style = vgg_terms(vgg, x, y, mask)
    equal(perc, how['perceptual(x,y)']); equal(style, how['style(x*m,y*m)'])


def test_normalised_contrast(pictures):
    x, y, _ = pictures
    vgg = VGGFeatures(weights=fill(vgg_shapes(), 'he'), normalize=True)
    how = LOSSES['vgg_he']['CONTRAST_if_imagenet_normalised']
    with torch.no_grad(): fx, fy = vgg(x), vgg(y)
    equal(perceptual_loss(fx, fy), how['perceptual(x,y)']); equal(style_loss(fx, fy), how['style(x,y)'])


def test_vgg_runs_once_per_distinct_input(pictures):
    x, y, mask = (t[:, :, 16:32, 20:36].float() for t in pictures)
    vgg = VGGFeatures(weights={k: v.float() for k, v in fill(vgg_shapes(), 'he').items()})
    calls = []
    vgg.register_forward_pre_hook(lambda m, args: calls.append((len(args[0]), torch.is_grad_enabled())))
    pred = x.clone().requires_grad_()
    for kw, batch in ((dict(), 4), (dict(style=()), 2), (dict(content=()), 2)):
        calls.clear(); perc, style = vgg_terms(vgg, pred, y, mask, **kw)
        assert calls == [(batch, False), (batch, True)]
        assert (perc == 0) == ('content' in kw) and (style == 0) == ('style' in kw)
    calls.clear()
    assert vgg_terms(vgg, pred, y, mask, content=(), style=()) == (0, 0) and not calls


def test_vgg_terms_gradients(pictures):
    x, y, mask = (t[:1, :, 8:40, 8:40].clone() for t in pictures)
    vgg = VGGFeatures(layers=('relu1_1', 'relu2_2'), weights=fill(vgg_shapes(), 'he'))
    pred, image = x.requires_grad_(), y.requires_grad_()
    perc, style = vgg_terms(vgg, pred, image, mask, content=('relu1_1',), style=('relu2_2',))
    gs, = torch.autograd.grad(style, pred, retain_graph=True)
    gp, = torch.autograd.grad(perc, pred, retain_graph=True)
    assert (gs*(1 - mask)).eq(0).all() and (gs*mask).abs().sum() > 0 and (gp*(1 - mask)).abs().sum() > 0
    (perc + style).backward()
    assert image.grad is None
    d, h = torch.randn_like(pred), 1e-6                            # a difference quotient along one direction
    f = lambda t: sum(vgg_terms(vgg, (x + t*d).detach(), y, mask, content=('relu1_1',), style=('relu2_2',))).item()
    assert math.isclose((f(h) - f(-h))/(2*h), (pred.grad*d).sum().item(), rel_tol=1e-4)


def test_vgg_terms_half_precision(pictures):
    _, y, mask = (t.float() for t in pictures)
    vgg, grads, values = VGGFeatures(weights={k: v.float() for k, v in fill(vgg_shapes(), 'he').items()}), [], []
    x = y + .1*torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    for on in (False, True):
        pred = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=on): terms = vgg_terms(vgg, pred, y, mask)
        assert all(t.dtype == torch.float32 for t in terms)
        (terms[0] + 250*terms[1]).backward()
        grads.append(pred.grad.flatten()); values.append([t.item() for t in terms])
    for a, b in zip(*values): assert abs(b/a - 1) < 1e-2
    assert torch.cosine_similarity(*grads, dim=0) > .95


def test_vgg_terms_refuses(vgg, pictures):
    with pytest.raises(InputError, match='VGG was built without relu3_3; it has relu1_1'):
        vgg_terms(vgg, *pictures, content=('relu3_3',))
    with pytest.raises(ValueError): perceptual_loss({'a': torch.ones(1)}, {'a': torch.ones(1)}, ('a',), [1, 2])


def test_gram():
    f = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(gram(f), torch.einsum('bchw,bdhw->bcd', f, f)/60)
    assert gram(f.bfloat16()).dtype == torch.float32


def test_tv_in_a_region_counts_pairs_inside_it_only():
    x = torch.rand(2, 3, 6, 7, dtype=torch.float64)
    where = (torch.rand(2, 1, 6, 7) > .4).double()
    total = [0., 0.]
    for b, c, i, j in ((b, c, i, j) for b in range(2) for c in range(3) for i in range(6) for j in range(7)):
        for k, (y, z) in enumerate(((i + 1, j), (i, j + 1))):
            if y < 6 and z < 7 and where[b, 0, i, j]*where[b, 0, y, z]: total[k] += abs(x[b, c, y, z] - x[b, c, i, j]).item()
    equal(tv_loss(x, where), total[0]/(2*3*5*7) + total[1]/(2*3*6*6))
    assert tv_loss(x, torch.ones_like(where)) == tv_loss(x) and tv_loss(x, 0*where) == 0
    assert tv_loss(x[:, :, :1, :1].expand(-1, -1, 4, 4)) == 0


def test_tv_in_a_region_gradient_and_half_precision():
    x = torch.rand(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    where = torch.zeros(1, 1, 5, 5, dtype=torch.float64); where[..., 1:4, 1:4] = 1
    grad, = torch.autograd.grad(tv_loss(x, where), x)
    assert (grad*(1 - where) == 0).all() and grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda x: tv_loss(x, where), x)
    half = tv_loss(x.bfloat16(), where.bfloat16())
    assert half.dtype == torch.float32 and abs(half - tv_loss(x, where)) < .02


def test_feature_reconstruction(vgg, pictures):
    fx, fy = (vgg(p) for p in pictures[:2])
    layers = ('relu1_1', 'relu2_1', 'relu3_1')
    want = sum(torch.nn.functional.mse_loss(fx[l]/255, fy[l]/255).item() for l in layers)
    equal(feature_reconstruction(fx, fy, layers, 1/255), want)
    assert feature_reconstruction(fx, fx, layers) == 0
    big = {'a': torch.full((1, 1, 2, 2), 300.).half()}
    loss = feature_reconstruction(big, {'a': 0*big['a']}, ('a',))
    assert loss == 300**2 and loss.dtype == torch.float32                               # no float16 holds 90,000
    f = torch.rand(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: feature_reconstruction({'a': f}, {'a': torch.zeros_like(f)}, ('a',), .5), f)
