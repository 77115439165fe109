"Partial convolution: the definition, half precision, what may not have an influence, the documented network, the six terms"
import ast
import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT/'tests'/'golden'
sys.path.insert(0, str(GOLDEN))
from fill import fill as fill_state, sine  # noqa: E402

from inpaint_lib.core import InputError, count_params, set_seed  # noqa: E402
from inpaint_lib.data.images import builtin_photograph  # noqa: E402
from inpaint_lib.data.masks import composite, dilate, sample_bin_mask  # noqa: E402
from inpaint_lib.features import VGGFeatures, vgg_shapes  # noqa: E402
from inpaint_lib.losses import gram  # noqa: E402
from inpaint_lib.papers import partial_conv as pc  # noqa: E402
from inpaint_lib.training import TrainConfig, Updater, load_checkpoint, save_checkpoint  # noqa: E402

SMALL = dict(width=.0625, n_layers=4)
VGG_KEYS = {k: s for k, s in vgg_shapes('vgg16').items() if int(k.split('.')[1]) < 17}


def spread(valid, groups): return torch.cat([m.expand(-1, c, -1, -1) for m, c in zip(valid.split(1, 1), groups)], 1)


def toy(n=2, size=32, dtype=torch.float64, bin=3):
    mask = torch.stack([torch.from_numpy(sample_bin_mask(bin, i, size=size)) for i in range(n)])[:, None].to(dtype)
    return dict(image=sine((n, 3, size, size), .5, .45, .013).to(dtype), mask=mask,
                epoch=torch.zeros(n, dtype=torch.long), index=torch.arange(n))


@pytest.fixture(scope='module')
def vgg(): return VGGFeatures('vgg16', ('pool1', 'pool2', 'pool3'), fill_state(VGG_KEYS, 'he'), normalize=True).double()


@pytest.mark.parametrize('k,stride,padding', [(3, 1, 1), (3, 2, 1), (5, 2, 2), (7, 2, 3), (3, 1, 0), (3, 1, 3), (1, 1, 0), (4, 2, 1)])
@pytest.mark.parametrize('groups', [(5,), (3, 2), (1, 1, 3)])
@pytest.mark.parametrize('bias,dilation', [(True, 1), (False, 1), (True, 2)])
def test_equals_the_multichannel_definition(k, stride, padding, groups, bias, dilation):
    set_seed(k + stride); padding *= dilation
    x, v = torch.randn(2, 5, 13, 11).double(), (torch.rand(2, len(groups), 13, 11) > .85).double()
    layer = pc.PartialConv2d(5, 4, k, stride, padding, bias=bias, groups=groups, dilation=dilation).double()
    if bias: nn.init.normal_(layer.bias)
    y, new = layer(x, v)
    ref, ref_new = pc.multichannel_partial_conv(x, spread(v, groups), layer.weight, layer.bias, stride, padding, dilation)
    assert (y - ref).abs().max() < 1e-12 and new.shape[1] == 1 and torch.equal(new.expand_as(ref_new), ref_new)
    assert torch.equal(layer.grow(v), new) and set(new.unique().tolist()) <= {0., 1.}


def test_dilation_counts_where_the_filter_looks():
    "A known pixel between the taps neither adds to the result nor marks it as known"
    layer = pc.PartialConv2d(2, 3, 3, padding=3, dilation=3).double(); nn.init.normal_(layer.bias)
    x, v = torch.randn(1, 2, 9, 9).double(), torch.zeros(1, 1, 9, 9).double(); v[..., 4, 4] = 1
    y, new = layer(x, v)
    assert new.sum() == 9 and torch.equal(new[0, 0, 1::3, 1::3], torch.ones(3, 3).double())
    by_hand = 9*layer.weight[:, :, 2, 1]@x[0, :, 4, 4] + layer.bias          # seen from three rows above
    assert torch.allclose(y[0, :, 1, 4], by_hand, atol=1e-12)
    assert torch.allclose(layer(x, torch.ones_like(v))[0][..., 3:6, 3:6],
                          F.conv2d(x, layer.weight, layer.bias, padding=3, dilation=3)[..., 3:6, 3:6], atol=1e-12)


def test_reference_is_the_formula_in_words():
    "Window by window, in plain Python"
    set_seed(0)
    x, m = torch.randn(1, 2, 5, 5).double(), (torch.rand(1, 2, 5, 5) > .7).double()
    w, b = torch.randn(3, 2, 3, 3).double(), torch.randn(3).double()
    y, new = pc.multichannel_partial_conv(x, m, w, b)
    for i in range(3):
        for j in range(3):
            X, M = x[0, :, i:i+3, j:j+3], m[0, :, i:i+3, j:j+3]
            for o in range(3):
                want = (w[o]*X*M).sum()*18/M.sum() + b[o] if M.sum() > 0 else torch.zeros(()).double()
                assert abs(y[0, o, i, j] - want) < 1e-12 and new[0, o, i, j] == (M.sum() > 0)


def test_gradients():
    x, v = torch.randn(1, 3, 6, 6).double().requires_grad_(), (torch.rand(1, 2, 6, 6) > .6).double()
    layer = pc.PartialConv2d(3, 2, 3, 2, 1, groups=(2, 1)).double()
    def run(x, w, b):
        return torch.func.functional_call(layer, dict(weight=w, bias=b), (x, v))[0]
    args = (x, layer.weight.detach().requires_grad_(), torch.randn(2).double().requires_grad_())
    assert torch.autograd.gradcheck(run, args)


def test_what_is_invalid_has_no_influence_not_even_nan():
    x, v = torch.randn(2, 3, 9, 9), (torch.rand(2, 1, 9, 9) > .5).float()
    layer = pc.PartialConv2d(3, 4, 3, padding=1)
    for junk in (math.nan, math.inf, 1e30):
        bad = torch.where(v > 0, x, junk).requires_grad_()
        y, _ = layer(bad, v); layer.zero_grad(); y.square().sum().backward()
        assert torch.equal(y, layer(x, v)[0]) and (bad.grad[(v == 0).expand_as(x)] == 0).all()
        assert bad.grad.isfinite().all() and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
def test_half_precision(kind):
    "The epsilon of 1e-8 gives NaN here; counts beyond 2048 are exact; empty windows are 0 without the bias"
    layer = pc.PartialConv2d(600, 4, 3, padding=1, groups=(350, 250)).to(kind)
    nn.init.ones_(layer.bias)
    x, v = torch.randn(1, 600, 12, 12).to(kind), torch.zeros(1, 2, 12, 12).to(kind); v[:, 0, :3] = 1; v[:, 1, :2] = 1
    y, new = layer(x, v); y.sum().backward()
    assert y.dtype == kind and y.isfinite().all() and layer.weight.grad.isfinite().all()
    assert (y[..., 5:, :] == 0).all() and (new[..., 5:, :] == 0).all() and (new[..., :4, :] == 1).all()
    counts = pc.count_known(v, (350, 250), kernel_size=3, padding=1)
    assert counts.dtype == torch.float32 and counts[0, 0, 1, 5] == 3*(3*350 + 2*250)
    with torch.autocast('cpu', kind): assert pc.count_known(v, (350, 250), kernel_size=3, padding=1)[0, 0, 1, 5] == 4650
    exact = copy.deepcopy(layer).float()(x.float(), v.float())[0]
    assert (y.float() - exact).abs().max() < .02*exact.abs().max()


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('groups', [None, (1399, 1)])
def test_half_precision_of_a_wide_layer(kind, groups):
    "k*k*C = 68,600 is beyond float16: an empty window gave NaN, a lonely channel -inf"
    set_seed(0)
    layer = pc.PartialConv2d(1400, 2, 7, groups=groups).to(kind); nn.init.constant_(layer.bias, .5)
    x, v = torch.ones(1, 1400, 7, 7).to(kind), torch.zeros(1, len(layer.groups), 7, 7)
    y, new = layer(x, v); y.sum().backward()
    assert (y == 0).all() and y.dtype == kind and new.item() == 0 and layer.weight.grad.isfinite().all()
    v[0, -1, 2, 5] = 1
    y, new = layer(x, v); exact = copy.deepcopy(layer).double()(x.double(), v.double())[0]
    assert y.dtype == kind and new.item() == 1 and torch.allclose(y.double(), exact, rtol=.02, atol=.1)


def test_type_of_the_result():
    x, v = torch.randn(1, 3, 6, 6), torch.ones(1, 1, 6, 6)
    for kind in torch.float16, torch.bfloat16, torch.float32, torch.float64:
        assert pc.PartialConv2d(3, 2).to(kind)(x.to(kind), v)[0].dtype == kind
    with torch.autocast('cpu', torch.bfloat16): assert pc.PartialConv2d(3, 2)(x, v)[0].dtype == torch.bfloat16


def test_mask_is_binary_and_without_gradient():
    v = torch.rand(1, 1, 9, 9, requires_grad=True)
    y, new = pc.PartialConv2d(1, 1, 3, padding=1)(torch.randn(1, 1, 9, 9), v)
    assert not new.requires_grad and (new == 1).all()
    assert list(pc.PartialConv2d(3, 4).state_dict()) == ['weight', 'bias']


@pytest.mark.parametrize('shape', [(1, 1, 8, 8), (2, 3, 8, 8), (2, 1, 8, 7), (2, 8, 8)])
def test_layer_refuses(shape):
    with pytest.raises(InputError, match=r'features \(2, 3, 8, 8\) with masks .*expected \(B,3,H,W\) with \(B,1,H,W\), 1 = known'):
        pc.PartialConv2d(3, 4)(torch.randn(2, 3, 8, 8), torch.ones(shape))
    with pytest.raises(InputError, match=r'groups \(4, 3\) for 8 channels'): pc.PartialConv2d(8, 4, groups=(4, 3))


@pytest.mark.parametrize('kw,message', [(dict(groups=(4, -1)), r'groups \(4, -1\)'), (dict(groups=3), 'groups 3 for 3 channels'), (dict(groups=()), 'groups'),
    (dict(groups=(3, 0)), 'groups'), (dict(groups=(1.5, 1.5)), 'groups'), (dict(kernel_size=(3, 3)), r'kernel_size is \(3, 3\); expected a whole number'),
    (dict(kernel_size=0), 'kernel_size'), (dict(stride=0), 'stride is 0'), (dict(padding=-1), 'padding is -1'), (dict(dilation=0), 'dilation is 0'), (dict(out_ch=2.), 'out_ch')])
def test_layer_refuses_its_own_sizes(kw, message):
    with pytest.raises(InputError, match=message) as e: pc.PartialConv2d(**dict(in_ch=3, out_ch=4) | kw)
    assert '\n' not in str(e.value)


def test_network_is_the_documented_one():
    seven, eight = pc.PConvUNet(n_layers=7), pc.PConvUNet(n_layers=8)
    assert (count_params(seven), count_params(eight)) == (25_779_796, 32_859_732)
    port = json.loads((GOLDEN/'keys'/'naoto0804_PConvUNet.json').read_text())['keys']
    theirs = {k.replace('.input_conv', ''): tuple(s) for k, s in port.items() if 'mask_conv' not in k}
    assert {k: tuple(v.shape) for k, v in seven.state_dict().items()} == theirs
    assert {b.conv.window['dilation'] for _, b in eight.blocks('enc') + eight.blocks('dec')} == {1}
    windows = {n: tuple(b.conv.window.values())[:3] for n, b in eight.blocks('enc') + eight.blocks('dec')}
    assert windows == {'enc_1': (7, 2, 3), 'enc_2': (5, 2, 2), 'enc_3': (5, 2, 2)} | {f'enc_{i}': (3, 2, 1) for i in range(4, 9)} | {
        f'dec_{i}': (3, 1, 1) for i in range(1, 9)}
    acts = [type(b.act) for _, b in seven.blocks('enc')] + [type(b.act) for _, b in seven.blocks('dec')]
    assert acts == [nn.ReLU]*7 + [nn.LeakyReLU]*6 + [type(None)] and seven.dec_7.act.negative_slope == .2


def test_network_equals_full_masks_layer_by_layer():
    "The whole U-Net with a mask for every channel, written out"
    set_seed(1)
    net, b = pc.PConvUNet(**SMALL).double().train(), toy()
    x, v = b['image'], (b['mask'] == 0).double().expand(-1, 3, -1, -1)
    levels = [(x, v)]
    def step(block, x, v):
        c = block.conv
        y, new = pc.multichannel_partial_conv(x, v, c.weight, c.bias, c.window['stride'], c.window['padding'])
        if block.bn is not None: y = F.batch_norm(y, None, None, block.bn.weight, block.bn.bias, training=True)
        return (y if block.act is None else block.act(y)), new
    for _, block in net.blocks('enc'): levels.append(step(block, *levels[-1]))
    h = levels[-1]
    for (_, block), skip in zip(net.blocks('dec'), levels[-2::-1]):
        h = step(block, *(torch.cat([F.interpolate(a, scale_factor=2), s], 1) for a, s in zip(h, skip)))
    assert (net(x, b['mask']) - h[0]).abs().max() < 1e-10


@pytest.mark.parametrize('n,size,side,name', [(7, 256, 128, 'enc_6'), (7, 256, 240, 'enc_7'), (8, 512, 256, 'enc_7'), (8, 512, 400, 'enc_8')])
def test_where_squares_close(n, size, side, name):
    m, a = torch.zeros(1, 1, size, size), (size - side)//2
    m[..., a:a+side, a:a+side] = 1
    net = pc.PConvUNet(.02, n_layers=n)
    steps = net.closure(m)
    assert next(k for k, v in steps if v.min() == 1) == name and [k for k, _ in steps][:n+1] == [f'enc_{i+1}' for i in range(n)] + [f'dec_{n}']
    assert steps[0][1].shape[-1] == size//2 and steps[-1][1].shape[-1] == size


def test_closure_is_what_the_forward_uses():
    net, b = pc.PConvUNet(**SMALL).double().eval(), toy(bin=5)
    seen = {}
    for name, block in net.blocks('enc') + net.blocks('dec'):
        block.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out[1]}))
    with torch.no_grad(): net(b['image'], b['mask'])
    assert all(torch.equal(seen[name].float(), v) for name, v in net.closure(b['mask']))


def test_any_mask_closes_and_nothing_known_stays_so():
    peel = pc.PartialConv2d(1, 1, 3, padding=1)
    v = torch.zeros(1, 1, 20, 20); v[..., 19, 0] = 1
    for n in range(19): assert v.min() == 0; v = peel.grow(v)
    assert v.min() == 1 and peel.grow(torch.zeros(1, 1, 5, 5)).max() == 0
    one, nine = torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3); one[..., 0, 2] = 1
    inner = pc.PartialConv2d(1, 1, 3)
    assert inner.grow(one).item() == inner.grow(nine).item() == 1


def test_network_refuses():
    net = pc.PConvUNet(**SMALL)
    with pytest.raises(InputError, match='40x32 pixels; 4 layers need multiples of 16'): net(torch.rand(1, 3, 40, 32), torch.zeros(1, 1, 40, 32))
    with pytest.raises(InputError, match='one value per channel'): net.train()(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16))
    net.freeze_encoder_bn().train()(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16))      # nothing to average there any more
    for n in (0, 1, 11, 2.5, 3.0):
        with pytest.raises(InputError, match='expected 2 to 10'): pc.PConvUNet(n_layers=n)
    with pytest.raises(InputError, match='width'): pc.PConvUNet(0)


@pytest.mark.parametrize('changes,message', [(dict(l1_space='lab'), 'l1_space'), (dict(lambda_tv=-1.), 'lambda_tv is -1.0'),
    (dict(lambda_hole=math.nan), 'lambda_hole'), (dict(vgg_weights='none', lambda_valid=0., lambda_hole=0., lambda_tv=0.), 'no loss term is left')])
def test_config_refuses(changes, message):
    with pytest.raises(InputError, match=message): pc.PartialConvConfig(**changes)


def test_config_and_vgg_must_agree(vgg):
    with pytest.raises(InputError, match="vgg_weights is 'auto' and no VGG"): pc.PartialConvRecipe(pc.PartialConvConfig(**SMALL))
    with pytest.raises(InputError, match="vgg_weights is 'none' and a VGG"): pc.PartialConvRecipe(pc.PartialConvConfig(vgg_weights='none', **SMALL), vgg)
    assert pc.PartialConvRecipe(pc.PartialConvConfig(vgg_weights='none', **SMALL)).deviations


@pytest.mark.parametrize('space', ['normalized', 'unit'])
def test_terms_by_hand(vgg, space):
    set_seed(0)
    recipe, b = pc.PartialConvRecipe(pc.PartialConvConfig(l1_space=space, vgg_weights='given', **SMALL), vgg).double(), toy()
    out = recipe(b); terms = recipe.g_terms(b, out)
    image, mask = b['image'], b['mask']
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    unit = out['raw']*std + mean
    x, y = (out['raw'], (image - mean)/std) if space == 'normalized' else (unit, image)
    want = dict(valid=((1 - mask)*(x - y)).abs().mean(), hole=6*(mask*(x - y)).abs().mean())
    comp, R = mask*x + (1 - mask)*y, F.max_pool2d(mask, 3, 1, 1)
    pairs = lambda d, a, b: (d.abs()*a*b).mean()
    want['tv'] = .1*(pairs(comp[..., 1:, :] - comp[..., :-1, :], R[..., 1:, :], R[..., :-1, :])
                     + pairs(comp[..., 1:] - comp[..., :-1], R[..., 1:], R[..., :-1]))
    true, o, c = (vgg(p) for p in (image, unit, mask*unit + (1 - mask)*image))
    want['perceptual'] = .05*sum((f[p] - true[p]).abs().mean() for f in (o, c) for p in true)
    want |= {k: 120*sum((gram(f[p]) - gram(true[p])).abs().mean() for p in true) for k, f in (('style_out', o), ('style_comp', c))}
    assert list(terms) == list(want) and all(torch.isclose(terms[k], want[k], rtol=1e-7) for k in want)


def test_a_weight_of_zero_leaves_the_term_out(vgg):
    names = dict(zip(pc.LAMBDAS, ('valid', 'hole', 'perceptual', 'style_out', 'style_comp', 'tv')))
    base, b = pc.PartialConvConfig(vgg_weights='given', **SMALL), toy(size=16)
    set_seed(0); recipe = pc.PartialConvRecipe(base, vgg).double().eval(); out = recipe(b); all_terms = recipe.g_terms(b, out)
    calls = []
    hook = vgg.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    for k, name in names.items():
        recipe.config = replace(base, **{f'lambda_{k}': 0.})
        terms = recipe.g_terms(b, out)
        assert set(terms) == set(all_terms) - {name} and all(torch.isclose(terms[t], all_terms[t]) for t in terms)
    calls.clear()
    for gone, want in ((('perc', 'style_comp'), [2, 2]), (('perc', 'style_out'), [2, 2]), (('style_out', 'style_comp'), [2, 4]),
                       (('perc', 'style_out', 'style_comp'), [])):
        recipe.config = replace(base, **{f'lambda_{k}': 0. for k in gone}); calls.clear(); recipe.g_terms(b, out)
        assert calls == want, gone
    hook.remove()


def test_tv_of_the_whole_composition_has_the_same_gradient():
    "The port's deviation changes the printed number only"
    from inpaint_lib.losses import tv_loss
    b = toy(); p = torch.rand(2, 3, 32, 32).double().requires_grad_()
    g = [torch.autograd.grad(tv_loss(composite(p, b['image'], b['mask']), w), p)[0] for w in (dilate(b['mask']), None)]
    assert torch.allclose(*g, rtol=0, atol=1e-15) and g[0].abs().sum() > 0


def test_the_hole_of_the_input_has_no_influence_on_the_prediction():
    recipe, b = pc.PartialConvRecipe(pc.PartialConvConfig(vgg_weights='none', **SMALL)).double().train(), toy()
    state = copy.deepcopy(recipe.state_dict()); one = recipe(b)
    recipe.load_state_dict(state); two = recipe(b | dict(image=torch.where(b['mask'] > 0, .123, b['image'])))
    assert torch.equal(one['raw'], two['raw']) and torch.equal(one['pred'], two['pred'])


def test_fill():
    set_seed(0)
    net, b = pc.PConvUNet(**SMALL).eval(), toy(dtype=torch.float32)
    image, mask = b['image'], b['mask']
    a, c = pc.fill(net, image, mask), pc.fill(net, torch.where(mask > 0, math.nan, image), mask)
    assert all(torch.equal(a[k], c[k]) for k in a) and set(a) == {'pred', 'comp'} | {f'mask after enc_{i}' for i in range(1, 5)} | {
        f'features after enc_{i}' for i in range(1, 4)}
    known = (mask == 0).expand_as(image)
    assert torch.equal(a['comp'][known], image[known]) and torch.equal(a['comp'][~known], a['pred'][~known])
    assert all(v.shape[-2:] == image.shape[-2:] and v.min() >= 0 and v.max() <= 1 and not v.requires_grad for v in a.values())
    assert not torch.equal(a['mask after enc_1'], mask) and (a['mask after enc_4'] == 0).all()
    alone = pc.fill(net, image[1:], mask[1:])
    assert all(torch.allclose(alone[k], a[k][1:], atol=1e-6) for k in a)           # a picture does not depend on its batch
    with pytest.raises(InputError, match='multiples of 16'): pc.fill(net, image[..., :20], mask[..., :20])


def updater(recipe): return Updater(recipe, TrainConfig(steps=4, batch_size=2, device='cpu'))


def test_training_learns_and_a_second_stage_keeps_the_encoders_norms():
    set_seed(0)
    b, config = toy(), pc.PartialConvConfig(vgg_weights='none', lr=3e-3, **SMALL)
    up = updater(pc.PartialConvRecipe(config).double())
    losses = [up.update([[b]])['g_total'] for _ in range(12)]
    assert losses[-1] < .6*losses[0]
    second = pc.PartialConvRecipe(replace(config, freeze_bn=True)).double()
    second.G.load_state_dict(up.recipe.G.state_dict()); before = copy.deepcopy(second.G.state_dict())
    up2 = updater(second); up2.update([[b]]); up2.update([[b]])
    kept = {k for k, v in second.G.state_dict().items() if torch.equal(v, before[k])}
    assert kept == {k for k in before if k.startswith('enc') and '.bn.' in k} and second.name == 'partial_conv.finetune'
    second.G.freeze_encoder_bn(False)
    assert all(p.requires_grad for p in second.G.parameters()) and second.train().G.enc_2.bn.training


def test_two_steps_and_resume_equal_four(tmp_path):
    batches, config = [toy(bin=i) for i in range(1, 5)], pc.PartialConvConfig(vgg_weights='none', **SMALL)
    def fresh(): set_seed(3); return updater(pc.PartialConvRecipe(config).double())
    whole, half = fresh(), fresh()
    for b in batches: whole.update([[b]])
    for b in batches[:2]: half.update([[b]])
    save_checkpoint(half, tmp_path/'checkpoint.pt')
    set_seed(9); again = updater(pc.PartialConvRecipe(config).double()); load_checkpoint(again, tmp_path/'checkpoint.pt')
    for b in batches[2:]: again.update([[b]])
    a, b = whole.recipe.state_dict(), again.recipe.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)                                 # running statistics too


def test_autocast_keeps_the_losses(vgg):
    set_seed(0)
    f32 = copy.deepcopy(vgg).float()
    recipe, b = pc.PartialConvRecipe(pc.PartialConvConfig(vgg_weights='given', **SMALL), f32), toy(dtype=torch.float32)
    exact = recipe.g_terms(b, recipe(b))
    with torch.autocast('cpu', torch.bfloat16): out = recipe(b); half = recipe.g_terms(b, out)
    assert out['raw'].dtype == torch.float32 and all(torch.isclose(half[k], exact[k], rtol=.05) for k in exact)


@pytest.fixture(scope='module')
def ablation_cells():
    "The notebook's cells that the ablation needs, as source"
    nb = json.loads((ROOT/'nbs'/'22_papers.partial_conv.ipynb').read_text())
    code = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']
    start, end = (next(i for i, c in enumerate(code) if c.startswith(s)) for s in ('NONE = ', 'rows = read_ledger'))
    imports = [c for c in code if c.startswith(('import copy', '#| export\nfrom dataclasses'))]
    parameters = next(''.join(c['source']) for c in nb['cells'] if c['metadata'].get('tags') == ['parameters'])
    definitions = [c for c in code[start:end] if isinstance(ast.parse(c).body[-1], (ast.FunctionDef, ast.Assign)) and 'assert' not in c]
    return [parameters, *imports, 'from inpaint_lib.papers.partial_conv import *', *definitions, code[end]]


def ablate(cells, folder, **changes):
    scope = {}
    exec(cells[0], scope)
    scope.update(dict(ablation_dir=str(folder), vgg_arch='vgg16', seeds=1, ablation_steps=1, ablation_batch=2, ablation_device='cpu',
                      ablation_variants='no_tv,no_vgg') | changes)
    for c in cells[1:]: exec(c, scope)
    return scope


def test_ablation_in_pieces(ablation_cells, tmp_path):
    from safetensors.torch import save_file
    save_file({k: v.half().contiguous() for k, v in fill_state(VGG_KEYS, 'he').items()}, tmp_path/'vgg.safetensors')
    file, out, photos = str(tmp_path/'vgg.safetensors'), tmp_path/'ablation', tmp_path/'photos'; photos.mkdir()
    for i in range(3): Image.fromarray(builtin_photograph('rocket')[60*i:60*i + 80, 100:180]).save(photos/f'{i}.png')
    both = dict(vgg_weights=file, test_dir=str(photos))
    first = ablate(ablation_cells, out, **both, ablation_part='1/2')
    assert sorted(p.name for p in out.glob('*.json')) == ['full_seed0.json', 'no_vgg_seed0.json'] and first['rows'] == []
    kept = (out/'full_seed0.json').stat().st_mtime_ns
    rows = ablate(ablation_cells, out, **both)['rows']
    assert (out/'full_seed0.json').stat().st_mtime_ns == kept and (out/'ablation_partial_conv.png').stat().st_size > 5000
    assert rows == json.loads((out/'ablation_partial_conv.json').read_text()) and len(rows) == 10
    need = 'claim source experiment measure value interval n left_out seeds budget device verdict deviations'.split()
    assert all(set(need) <= set(r) and r['verdict'] == 'undecided' for r in rows) and sum(r['decides'] for r in rows) == 2
    told = ' | '.join(rows[0]['deviations'])
    for part in ('VGG file vgg.safetensors ', 'scale 0.2', 'at step 1 style_out is ', 'batches of 6 of 512', '1 steps of 2 pictures of 64 pixels', 'rate 0.001 (paper: 2e-4), precision fp32'):
        assert part in told, part
    run = json.loads((out/'no_tv_seed0.json').read_text()); run['values']['psnr'][1] = None         # as an infinite PSNR is kept
    (out/'no_tv_seed0.json').write_text(json.dumps(run))
    spoilt = {(r['claim'], r['measure']): r for r in ablate(ablation_cells, out, **both)['rows']}
    tv = {m: r for (claim, m), r in spoilt.items() if "'tv'" in claim}
    assert tv['psnr']['left_out'] == 1 and tv['l1']['n'] == 3 and tv['psnr']['n'] == tv['l1']['n'] - 1 and tv['l1']['left_out'] == 0 and len(spoilt) == 10
    starts = {v: json.loads((out/f'{v}_seed0'/'log.jsonl').read_text().splitlines()[0]) for v in ('full', 'no_tv', 'no_vgg')}
    assert starts['full']['hole'] == starts['no_tv']['hole'] == starts['no_vgg']['hole']          # same start, same first batch
    assert 'tv' not in starts['no_tv'] and 'perceptual' not in starts['no_vgg'] and 'tv' in starts['full']
    for changes, message in ((dict(ablation_lr=2e-4), 'was made with lr 0.001'), (dict(ablation_variants='no_such'), "variant 'no_such'"),
                             (dict(ablation_part='3/2'), "part '3/2'"), (dict(data_dir=str(photos)), 'share pictures')):
        with pytest.raises(InputError, match=message): ablate(ablation_cells, out, **both | changes)


def test_ablation_of_one_value_and_an_infinite_psnr_publishes(ablation_cells, tmp_path):
    "One seed and one picture give no interval; neither this nor a perfect picture may end hours of training"
    from safetensors.torch import save_file
    save_file({k: v.half().contiguous() for k, v in fill_state(VGG_KEYS, 'he').items()}, tmp_path/'vgg.safetensors')
    scope = ablate(ablation_cells, tmp_path/'ablation', vgg_weights=str(tmp_path/'vgg.safetensors'), ablation_variants='no_tv')
    assert scope['rows'] == [] and (tmp_path/'ablation'/'ablation_partial_conv.json').is_file()
    perfect, test = (lambda batch: batch['image']), scope['ablation_data']('builtin', False)
    values = scope['measure_pictures'](perfect, test, scope['measures'](scope['ablation_vgg']()))
    assert values['psnr'] == [None] and values['l1'] == values['gram'] == [0.] and set(values) == set(scope['MEASURES'])
