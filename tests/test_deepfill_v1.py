"DeepFill v1: rows and shapes, critics and their windows, the losses by an independent formula, the recipe, what may not have an influence"
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from inpaint_lib.core import InputError, count_params, keyed_rng, set_seed
from inpaint_lib.data.masks import composite, mask_sampler
from inpaint_lib.layers import SameConv2d
from inpaint_lib.papers import deepfill_v1 as df
from inpaint_lib.training import TrainConfig, Updater, load_checkpoint, save_checkpoint

KEYS = Path(__file__).resolve().parent/'golden'/'keys'
TINY = dict(width=.03, size=16)


def listed(name): return [k['shape'] for k in json.loads((KEYS/f'{name}.json').read_text())['keys']]


def holes(kind, n, size):
    f = mask_sampler(kind)
    return torch.stack([torch.from_numpy(f(keyed_rng(0, i), i, size)).float()[None] for i in range(n)])


def toy(n=2, size=16, dtype=torch.float64, start=0):
    gen = torch.Generator().manual_seed(start)
    return dict(image=torch.rand(n, 3, size, size, generator=gen, dtype=torch.float64).to(dtype),
                mask=holes('deepfill_rectangle', n + start, size)[start:].to(dtype),
                epoch=torch.zeros(n, dtype=torch.long), index=torch.arange(n))


# -- networks

def test_shapes_of_every_layer():
    G, D = df.DeepFillV1Generator(), df.Critics()
    for port in ('daa233_deepfillv1_generator', 'mmagic_deepfillv1_generator'):
        theirs = [s for s in listed(port) if s != [1, 1, 3, 3]]     # a fuse kernel, which never changes
        assert sorted(map(str, theirs)) == sorted(str(list(v.shape)) for v in G.state_dict().values())
    assert [list(v.shape) for v in G.state_dict().values()] == listed('daa233_deepfillv1_generator')
    assert [list(v.shape) for v in D.state_dict().values()] == listed('mmagic_deepfillv1_discriminators')
    assert (count_params(G), count_params(D.whole), count_params(D.local)) == (3_601_542, 2_733_441, 4_339_329)


def test_rows_have_the_dilations_and_strides_of_the_code():
    convs = {n: m for n, m in df.DeepFillV1Generator(.05).named_modules() if isinstance(m, SameConv2d)}
    assert len(convs) == 42
    for n, m in convs.items():
        name = n.split('.')[-2]
        atrous = {'conv7_atrous': 2, 'conv8_atrous': 4, 'conv9_atrous': 8, 'conv10_atrous': 16}
        assert m.dilation[0] == atrous.get(name.removeprefix('x'), 1), n
        assert m.stride[0] == (2 if 'downsample' in name else 1), n
        assert m.kernel_size[0] == (5 if name in ('conv1', 'xconv1', 'pmconv1') else 3), n


def test_activations():
    G = df.DeepFillV1Generator(.05)
    acts = {n: b.act for part in (G.coarse, *(m for m in G.refine.children() if isinstance(m, torch.nn.Sequential)))
            for n, b in part.named_children()}
    assert acts.pop('pmconv6') is F.relu and acts.pop('conv17') is None and acts.pop('allconv17') is None
    assert set(acts.values()) == {F.elu}
    assert df.DeepFillV1Generator(.05, attention_relu=False).refine.pmconv.pmconv6.act is F.elu


def test_plain_conv_is_enlarge_convolve_activate():
    set_seed(0)
    block, x = df.PlainConv(3, 5, up=True, dilation=2).double(), torch.randn(2, 3, 6, 7).double()
    big = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(block(x), F.elu(F.conv2d(big, block.conv.weight, block.conv.bias, padding=2, dilation=2)))


@pytest.mark.parametrize('padding', ['same', 'symmetric', 'reflect'])
def test_stages(padding):
    set_seed(0)
    G = df.DeepFillV1Generator(.05, padding=padding, attention=dict(fuse=False)).double()
    assert (G.padding, G.attention_options, G.attention_relu, G.width) == (padding, dict(fuse=False), True, .05)
    x, m = torch.rand(2, 3, 72, 80).double()*2 - 1, torch.zeros(2, 1, 72, 80).double()
    m[0, :, 8:40, 16:48] = 1; m[1, :, 30:60, 5:20] = 1
    out = G.stages(G.input(x, m), m)
    assert out['coarse'].dtype == torch.float64 and out['offsets'].shape == (2, 2, 9, 10)
    assert torch.equal(out['composite'], composite(out['coarse'], x, m))
    coarse, refined = G(torch.where(m > 0, torch.full_like(x, math.nan), x), m)
    assert torch.equal(coarse, out['coarse']) and torch.equal(refined, out['refined'])
    alone = G(x[1:], m[1:])[1]                                     # pictures of a batch don't see each other
    assert torch.allclose(alone, refined[1:], atol=1e-12)


def test_second_stage_sees_ones_and_mask():
    G = df.DeepFillV1Generator(.05)
    seen = []
    G.refine.xconv.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x, m = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32); m[..., 8:20, 8:20] = 1
    G(x, m)
    assert seen[0].shape[1] == 5 and (seen[0][:, 3] == 1).all() and torch.equal(seen[0][:, 4:], m)
    alone = df.TwoStage(base=24, width=.05)                         # DeepFill v2's: the composite, nothing else
    alone.refine.pmconv.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    out = alone.stages(G.input(x, m), m)
    assert torch.equal(seen[1], out['composite']) and seen[1].shape[1] == 3 and not torch.equal(out['composite'], out['coarse'])


def test_gradient_goes_through_both_stages_and_stops_at_the_clip():
    set_seed(0)
    G, b = df.DeepFillV1Generator(.05), toy(1, 32, torch.float32)
    out = G.stages(G.input(b['image'], b['mask']), b['mask'])
    out['refined'].sum().backward()
    assert G.coarse.conv5.conv.weight.grad.abs().sum() > 0
    G.refine.allconv.allconv17.conv.bias.data.fill_(9.); G.zero_grad()
    refined = G(b['image'], b['mask'])[1]
    assert (refined == 1).all()
    refined.sum().backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in G.parameters())


@pytest.mark.parametrize('x,m,says', [
    ((1, 3, 60, 64), (1, 1, 60, 64), '60x64 pixels; expected multiples of 8'), ((1, 3, 8, 16), (1, 1, 8, 16), '16 or more'),
    ((2, 3, 32, 32), (1, 1, 32, 32), r'expected \(B,3,32,32\) with \(B,1,32,32\)'), ((1, 4, 32, 32), (1, 1, 32, 32), '1 = hole'),
    ((1, 3, 32, 32), (1, 3, 32, 32), '1 = hole')])
def test_bad_input(x, m, says):
    with pytest.raises(InputError, match=says): df.DeepFillV1Generator(.03)(torch.zeros(x), torch.zeros(m))


def test_width_below_nothing():
    with pytest.raises(InputError, match='width'): df.DeepFillV1Generator(0)
    with pytest.raises(InputError, match='padding'): df.DeepFillV1Generator(.05, padding='valid')


# -- critics

def test_critic_is_one_affine_number_per_picture():
    set_seed(0)
    D, x = df.Critic((4, 8, 8, 8), 32).double(), torch.randn(3, 3, 32, 32).double()
    h = x
    for conv in D.convs:                                            # 1 zero before, 2 after: TensorFlow's
        h = F.leaky_relu(F.conv2d(F.pad(h, (1, 2, 1, 2)), conv.conv.weight, conv.conv.bias, stride=2), .2)
    assert torch.allclose(D(x), h.flatten(1) @ D.linear.weight.T + D.linear.bias, atol=1e-12) and D(x).shape == (3, 1)
    with pytest.raises(InputError, match='expected \\(B,3,32,32\\)'): D(x[..., :24])


@pytest.mark.parametrize('rows,cols,corner', [
    ((10, 20), (30, 40), (7, 27)), ((0, 4), (60, 64), (0, 48)), ((0, 64), (0, 64), (24, 24)), ((63, 64), (0, 1), (48, 0))])
def test_window_sits_on_the_hole(rows, cols, corner):
    m = torch.zeros(1, 1, 64, 64); m[:, :, slice(*rows), slice(*cols)] = 1
    assert df.local_window(m, 16).tolist() == [list(corner)]


def test_window_without_a_hole_and_too_large():
    assert df.local_window(torch.zeros(2, 1, 32, 48), 16).tolist() == [[8, 16]]*2
    with pytest.raises(InputError, match='window of 40'): df.local_window(torch.zeros(1, 1, 32, 48), 40)


def test_window_is_the_box_that_the_rectangle_was_placed_in():
    m = holes('deepfill_rectangle', 100, 64)
    for hole, (top, left) in zip(m, df.local_window(m, 32).tolist()):
        rows, cols = (np.flatnonzero(hole[0].amax(d).numpy()) for d in (1, 0))
        assert rows[0] - top == top + 31 - rows[-1] >= 0 and cols[0] - left == left + 31 - cols[-1] >= 0


def test_crops():
    x, corner = torch.arange(2*3*8*8.).view(2, 3, 8, 8), torch.tensor([[0, 3], [4, 1]])
    y = df.crop_local(x, corner, 4)
    assert torch.equal(y[0], x[0, :, 0:4, 3:7]) and torch.equal(y[1], x[1, :, 4:8, 1:5])


# -- losses

@pytest.mark.parametrize('n,gamma', [(8, .9), (7, .5), (32, .99), (4, 1.)])
def test_discount_by_its_definition(n, gamma):
    want = [[max(gamma**min(i, n - i), gamma**min(j, n - j)) for j in range(n)] for i in range(n)]
    assert np.allclose(df.discount_mask(n, gamma)[0, 0].numpy(), want, rtol=1e-5)


def test_l1_terms_by_their_definition():
    c, b = df.DeepFillV1Config(gamma=.7, coarse_alpha=1.5, lambda_l1=2., lambda_valid=3.), toy(3, 32)
    x, m = b['image'], b['mask']
    coarse, refined = torch.rand_like(x), torch.rand_like(x)
    got = df.l1_terms(c, coarse, refined, x, m, side=16)
    e = 1.5*(coarse - x).abs() + (refined - x).abs()
    local = sum((df.discount_mask(16, .7).double()*e[k:k+1, :, t:t+16, s:s+16]).mean()
                for k, (t, s) in enumerate(df.local_window(m, 16).tolist()))/3
    assert abs(got['l1_local'] - 2*local) < 1e-9
    assert abs(got['l1_valid'] - 3*e[(m == 0).expand_as(e)].sum()/3/(m == 0).sum()) < 1e-9   # three channels
    assert abs(df.l1_terms(c, coarse, refined, x, m, side=16, mean=torch.tensor(.5))['l1_valid']
               - 3*((1 - m)*e).mean()/.5) < 1e-9


def test_critic_terms_by_their_definition():
    set_seed(0)
    c, b = df.DeepFillV1Config(**TINY, lambda_gp=7.), toy(2)
    D = df.glorot(df.Critics(16, .1)).double()
    real, fake, m = b['image']*2 - 1, torch.rand_like(b['image']), b['mask']
    set_seed(3); terms = df.critic_terms(c, D, real, fake, m)
    assert set(terms) == {'d_global', 'gp_global', 'd_local', 'gp_local'}
    set_seed(3)
    corner = df.local_window(m, 8)
    for name, critic, pictures in (('global', D.whole, (real, fake, m)), ('local', D.local, [df.crop_local(x, corner, 8) for x in (real, fake, m)])):
        x, y, hole = pictures
        assert torch.allclose(terms[f'd_{name}'], critic(y).mean() - critic(x).mean())
        t = torch.rand(2, dtype=torch.float64).view(2, 1, 1, 1)
        mixed = (t*x + (1 - t)*y).requires_grad_()
        slope, = torch.autograd.grad(critic(mixed).sum(), mixed)
        assert torch.allclose(terms[f'gp_{name}'], 7*(((slope*hole).square().sum((1, 2, 3)).sqrt() - 1)**2).mean())
    assert set(df.critic_terms(df.DeepFillV1Config(**TINY, lambda_gp=0), D, real, fake, m)) == {'d_global', 'd_local'}


@pytest.mark.parametrize('bad,says', [
    (dict(gamma=1.2), 'gamma'), (dict(d_steps=2.5), 'whole number'), (dict(size=20), 'multiple of 8'), (dict(size=8), '16 or more'),
    (dict(lambda_adv=float('nan')), 'lambda_adv'), (dict(lambda_gp='x'), 'lambda_gp'), (dict(lambda_l1=0, lambda_valid=0, lambda_adv=0), 'no loss term')])
def test_bad_config(bad, says):
    with pytest.raises(InputError, match=says): df.DeepFillV1Config(**bad)


# -- recipe

def test_recipe_terms():
    set_seed(0)
    r, b = df.DeepFillV1Recipe(df.DeepFillV1Config(**TINY)).double(), toy()
    out = r(b); seen = {k: v.detach() for k, v in out.items()}
    image, m = b['image'], b['mask']
    assert torch.equal(out['comp'], torch.where(m > 0, out['pred'], image)) and torch.allclose(out['pred'], (out['refined'] + 1)/2)
    g = r.g_terms(b, out)
    assert set(g) == {'l1_local', 'l1_valid', 'g_global', 'g_local'} and r.d_steps == 5 and r.separate_batches
    assert torch.allclose(g['g_global'], -.001*r.D.whole(2*out['comp'] - 1).mean())
    l1 = df.l1_terms(r.config, out['coarse'], out['refined'], 2*image - 1, m, side=8)      # raw pictures, in [-1,1]
    assert all(torch.equal(g[k], l1[k]) for k in l1)
    assert set(r.d_terms(b, seen)) == {'d_global', 'd_local', 'gp_global', 'gp_local'}
    assert list(r.pictures(b, out)) == ['image', 'masked', 'coarse', 'pred', 'comp'] and r.metrics(b, out)['psnr_hole'] > 0


def test_without_critics_and_wrong_size():
    r = df.DeepFillV1Recipe(df.DeepFillV1Config(**TINY, lambda_adv=0))
    b = toy(dtype=torch.float32)
    assert r.D is None and set(r.g_terms(b, r(b))) == {'l1_local', 'l1_valid'}
    up = Updater(r, TrainConfig(batch_size=2, device='cpu'))
    assert up.update([[b]])['g_total'] > 0
    big = toy(size=32, dtype=torch.float32); r = df.DeepFillV1Recipe(df.DeepFillV1Config(**TINY))
    with pytest.raises(InputError, match='size'): r.g_terms(big, r(big))


def updater(**kw):
    set_seed(0)
    return Updater(df.DeepFillV1Recipe(df.DeepFillV1Config(**TINY, lr=1e-3, **kw)).double(), TrainConfig(batch_size=4, device='cpu'))


def weights(up): return torch.cat([p.detach().flatten() for net in (up.recipe.G, up.recipe.D) for p in net.parameters()])


def test_accumulated_halves_are_the_whole():
    one, two = updater(lambda_gp=0), updater(lambda_gp=0)
    draws = [toy(4, start=k) for k in range(6)]
    part = lambda b, s: {k: v[s] for k, v in b.items()}
    a = one.update([[b] for b in draws])
    b = two.update([[part(b, slice(0, 1)), part(b, slice(1, 4))] for b in draws])
    assert all(abs(a[k] - b[k]) < 1e-9*max(1, abs(a[k])) for k in a if not k.startswith('m_'))
    assert (weights(one) - weights(two)).abs().max() < 1e-7         # Adam divides rounding by rounding in the first steps


def test_resume_is_exact(tmp_path):
    draws = [[[toy(2, start=6*s + k)] for k in range(6)] for s in range(3)]
    whole, first, rest = updater(), updater(), updater()
    for d in draws: whole.update(d)
    first.update(draws[0]); save_checkpoint(first, tmp_path/'c.pt'); load_checkpoint(rest, tmp_path/'c.pt')
    for d in draws[1:]: rest.update(d)
    assert torch.equal(weights(whole), weights(rest)) and not torch.equal(weights(whole), weights(first))


def test_bf16_losses_are_close():
    set_seed(0)
    r, b = df.DeepFillV1Recipe(df.DeepFillV1Config(width=.1, size=32)), toy(2, 32, torch.float32)
    full = r.g_terms(b, r(b))
    with torch.autocast('cpu', torch.bfloat16):
        out = r(b); half = r.g_terms(b, out)
        d = r.d_terms(b, {k: v.detach() for k, v in out.items()})
    assert all(out[k].dtype == torch.float32 for k in ('pred', 'comp', 'coarse'))
    assert all(abs(half[k]/full[k] - 1) < .02 for k in ('l1_local', 'l1_valid'))
    sum(d.values()).backward()
    assert all(p.grad.isfinite().all() for p in r.D.parameters())


# -- use

def test_fill():
    set_seed(0)
    G, b = df.DeepFillV1Generator(.05).eval(), toy(2, 32, torch.float32)
    image, m = b['image'], b['mask']
    out = df.fill(G, image, m)
    assert list(out) == ['pred', 'comp', 'coarse', 'offsets', 'attention arrows'] and all(v.shape == image.shape for v in out.values())
    assert all(0 <= v.min() and v.max() <= 1 for v in out.values())
    other = df.fill(G, torch.where(m > 0, torch.rand_like(image), image), m)
    assert all(torch.equal(out[k], other[k]) for k in out)
    assert torch.equal(out['comp'], composite(out['pred'], image, m)) and not out['comp'].requires_grad
    with pytest.raises(InputError, match='multiples of 8'): df.fill(G, image[..., :30], m[..., :30])


def test_boundary_jump_by_its_definition():
    gen = np.random.default_rng(0)
    x, m = gen.random((1, 3, 12, 14)), np.zeros((12, 14), bool); m[4:8, 5:9] = True
    near = np.zeros_like(m); near[2:10, 3:11] = True
    across, known = [], []
    for i in range(12):
        for j in range(14):
            for k, l in ((i + 1, j), (i, j + 1)):
                if k > 11 or l > 13: continue
                d = np.abs(x[0, :, i, j] - x[0, :, k, l]).mean()
                if m[i, j] != m[k, l]: across.append(d)
                elif not m[i, j] and near[i, j] and near[k, l]: known.append(d)
    want = np.mean(across) - np.mean(known)
    got = df.boundary_jump(torch.from_numpy(x), torch.from_numpy(m)[None, None].double(), reach=2)
    assert abs(got.item() - want) < 1e-12 and len(across) == 16


def test_seams_names_what_it_measured():
    b = toy(2, 32, torch.float32)
    out = dict(pred=b['image'], comp=b['image'] + .5*b['mask'], offsets=b['image'])
    found = df.seams(out, b['image'], b['mask'])
    assert list(found) == ['photograph', 'pred', 'comp'] and torch.equal(found['pred'], found['photograph'])
    assert all(v.shape == (2,) for v in found.values())
    assert torch.isnan(df.boundary_jump(b['image'], torch.ones_like(b['mask']))).all()


def test_glorot_reaches_weights_under_spectral_norm():
    from inpaint_lib.layers import spectral_norm
    set_seed(0)
    conv = spectral_norm(SameConv2d(8, 8, 3)); conv.weight_orig.data.fill_(9.); conv.bias.data.fill_(1.)
    df.glorot(torch.nn.Sequential(conv))
    bound = math.sqrt(6/(72 + 72))
    assert conv.weight_orig.abs().max() <= bound and conv.weight_orig.abs().max() > .9*bound and (conv.bias == 0).all()


def test_copies_train_apart():
    r = df.DeepFillV1Recipe(df.DeepFillV1Config(**TINY)); s = copy.deepcopy(r)
    with torch.no_grad(): s.G.coarse.conv1.conv.weight.zero_()
    assert r.G.coarse.conv1.conv.weight.abs().sum() > 0
