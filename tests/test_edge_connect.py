"EdgeConnect: parity with the published code, layer tables, what flows where, what the hole may not influence"
import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).parent/'golden'
sys.path.insert(0, str(GOLDEN))
from fill import fill as fill_state, sine  # noqa: E402

from inpaint_lib.core import InputError, compare_table, conv_macs, count_params, layer_rows, set_seed  # noqa: E402
from inpaint_lib.data.edges import edge_maps, rgb_to_gray  # noqa: E402
from inpaint_lib.papers import edge_connect as ec  # noqa: E402
from inpaint_lib.training import TrainConfig, Updater  # noqa: E402

NETWORKS = json.loads((GOLDEN/'edge_connect_networks.json').read_text())
STEPS = json.loads((GOLDEN/'edge_connect_training_steps.json').read_text())['runs']
MAKE = dict(EdgeGenerator=(ec.EdgeGenerator, 3), InpaintGenerator=(ec.InpaintGenerator, 4),
            Discriminator_in2=(lambda: ec.Discriminator(2), 2), Discriminator_in3=(lambda: ec.Discriminator(3), 3))
TABLES = dict(EdgeGenerator='EdgeGenerator', InpaintGenerator='InpaintGenerator',
              Discriminator_in2='Discriminator_edge', Discriminator_in3='Discriminator_inpaint')


def official_state(key, rule='hash'):
    sd = fill_state({k: s for k, s, _ in NETWORKS[key]['state_dict']}, rule)
    for k in [k for k in sd if k.startswith('features.')]: sd[k.replace('features', 'conv1')] = sd.pop(k)
    return sd


def gap(x, g):
    "Largest difference at the sampled positions, relative where the map is large"
    assert list(x.shape) == g['shape']
    diff = x.detach().double().flatten()[g['idx']] - torch.tensor(g['values'], dtype=torch.float64)
    return diff.abs().max().item()/max(1., abs(g['min']), abs(g['max']))


def set_true_singular_vectors(net):
    for m in net.modules():
        if hasattr(m, 'weight_orig'):
            W = (m.weight_orig.transpose(0, 1) if isinstance(m, nn.ConvTranspose2d) else m.weight_orig).detach().flatten(1)
            U, _, Vh = torch.linalg.svd(W, full_matrices=False)
            m.weight_u.copy_(U[:, 0]); m.weight_v.copy_(Vh[0])


def tiny_batch(n=2, size=32, dtype=torch.float64, edge=True):
    image = sine((n, 3, size, size), .5, .45, .013).to(dtype)
    mask = torch.zeros(n, 1, size, size, dtype=dtype); mask[:, :, 8:22, 10:20] = 1
    batch = dict(image=image, mask=mask, epoch=torch.zeros(n, dtype=torch.long), index=torch.arange(n))
    return batch | dict(edge=(sine((n, 1, size, size), 0, 1, .37, 1.) > .8).to(dtype)) if edge else batch


CONFIG = dict(width=.0625, vgg_weights='none', edge_nms=False)      # the tests' edges are invented, not Canny's


def settled(recipe, in_ch):
    "A few power iterations for the critic, so that its logits have a usual size; then eval mode"
    recipe.double().train()
    with torch.no_grad():
        for _ in range(5): recipe.D(torch.rand(1, in_ch, 32, 32, dtype=torch.float64))
    return recipe.eval()


def recipes():
    set_seed(0)
    c = ec.EdgeConnectConfig(**CONFIG)
    return dict(edge=ec.EdgeRecipe(c), canny=ec.InpaintRecipe(c), joint=ec.JointRecipe(c),
                hallucinated=ec.InpaintRecipe(c, edges='hallucinated', edge_generator=ec.EdgeGenerator(.0625)))


# parity with the published networks

@pytest.mark.parametrize('key,mode', [(k, m) for k in MAKE for m in ('eval', 'svd_eval', 'train1')
                                      if f'hash_{m}' in NETWORKS[k]['runs']])  # without spectral norm: one mode
def test_networks_equal_the_published_ones(key, mode):
    make, in_ch = MAKE[key]
    net = make().double(); net.load_state_dict(official_state(key))
    if mode == 'svd_eval': set_true_singular_vectors(net)
    net.train(mode == 'train1')
    with torch.no_grad(): out = net(sine((1, in_ch, 128, 128)))
    run = NETWORKS[key]['runs'][f'hash_{mode}']['float64']
    if torch.is_tensor(out): assert gap(out, run['output']) < 1e-9
    else:
        assert all(gap(f, g) < 1e-9 for f, g in zip(out[1], run['features'], strict=True))
        # with arbitrary u, v the logits are astronomical and their sigmoid saturates: only the maps tell
        if mode != 'eval': assert gap(out[0], run['output']) < 1e-9
        assert torch.equal(out[0], out[1][-1].sigmoid())


def test_a_wrong_dilation_is_noticed():
    net = ec.EdgeGenerator().double(); net.load_state_dict(official_state('EdgeGenerator'))
    pad, conv = net.middle[3].conv_block[:2]
    conv.dilation, net.middle[3].conv_block[0] = (1, 1), nn.ReflectionPad2d(1)
    with torch.no_grad(): out = net.eval()(sine((1, 3, 128, 128)))
    assert gap(out, NETWORKS['EdgeGenerator']['runs']['hash_eval']['float64']['output']) > 1e-3


@pytest.mark.parametrize('key', MAKE)
def test_documented_tables(key):
    make, in_ch = MAKE[key]; net = make()
    table = json.loads((GOLDEN/'tables'/f'003_{TABLES[key]}.json').read_text())
    totals = json.loads((GOLDEN/'tables'/f'003_{TABLES[key]}.totals.json').read_text())
    assert compare_table(layer_rows(net, (1, in_ch, 256, 256), depth=max(r['depth'] for r in table)), table) == []
    assert f'{count_params(net):,}' == totals['Total params']
    assert len(table) == (37 if 'Generator' in key else 14)


def test_true_multiply_adds():
    "A quarter of the documented side costs a sixteenth in a generator"
    macs = [round(16*conv_macs(make(), (1, c, 64, 64))/1e9, 3) for make, c in (MAKE['EdgeGenerator'], MAKE['InpaintGenerator'])]
    assert macs == [48.067, 48.683]


# parity with the published training steps

@pytest.fixture(scope='module')
def golden_start():
    recipe = ec.EdgeRecipe(ec.EdgeConnectConfig(edge_nms=False)).double()
    recipe.G.load_state_dict(official_state('EdgeGenerator', 'init'))
    recipe.D.load_state_dict(official_state('Discriminator_in2', 'init'))
    batch = tiny_batch(size=64); batch['mask'] = torch.zeros(2, 1, 64, 64, dtype=torch.float64)
    batch['mask'][0, :, 16:48, 16:48] = 1; batch['mask'][1, :, 8:40, 20:52] = 1
    return recipe, batch


def test_training_steps_equal_the_published_ones(golden_start):
    "Three updates by the project's own loop: every logged term to 1e-7, weights and final output too"
    recipe, batch = copy.deepcopy(golden_start[0]), golden_start[1]
    update, run, seen = Updater(recipe, TrainConfig(device='cpu')), STEPS['EdgeModel_float64'], []
    exact = dict(d_terms=recipe.d_terms, g_terms=recipe.g_terms)      # the loop logs float32, so listen to the recipe
    for name, terms in exact.items():
        setattr(recipe, name, lambda *a, terms=terms: (lambda t: (seen.append({k: v.item() for k, v in t.items()}), t)[1])(terms(*a)))
    for step in run['steps']:
        seen.clear(); update.update([[batch]])
        mine = seen[0] | seen[1]
        for ours, theirs in (('d_adv', 'l_d1'), ('g_adv', 'l_g1'), ('fm', 'l_fm')):
            assert mine[ours] == pytest.approx(step['logs'][theirs], rel=1e-7)
    for net, key in ((recipe.G, 'generator'), (recipe.D, 'discriminator')):
        norm = math.sqrt(sum((p.detach()**2).sum().item() for p in net.parameters()))
        assert norm == pytest.approx(run[f'{key}_params_after']['l2'], rel=1e-9)
    with torch.no_grad(): assert gap(recipe.eval()(batch)['pred'], run['final_eval_output']) < 1e-7


def test_golden_step_needs_a_white_hole(golden_start):
    recipe, batch = copy.deepcopy(golden_start[0]).train(), golden_start[1]
    step = STEPS['EdgeModel_float64']['steps'][0]
    with torch.no_grad(): assert gap(recipe(batch)['pred'], step['output']) < 1e-9
    G, gray, m = copy.deepcopy(golden_start[0].G).train(), rgb_to_gray(batch['image']), batch['mask']
    with torch.no_grad(): black = G(torch.cat([gray*(1-m), batch['edge']*(1-m), m], 1))
    assert gap(black, step['output']) > 1e-3


def test_the_critic_runs_three_times_in_order(golden_start):
    recipe, batch, calls = recipes()['edge'].double(), tiny_batch(), []
    recipe.D.register_forward_pre_hook(lambda m, args: calls.append(args[0].detach()))
    Updater(recipe, TrainConfig(device='cpu')).update([[batch]])
    assert len(calls) == 3 and torch.equal(calls[0][:, 1:], batch['edge'])
    assert torch.equal(calls[1], calls[2]) and not torch.equal(calls[0], calls[1])


# what flows where

@pytest.mark.parametrize('stage', ['edge', 'canny', 'hallucinated', 'joint'])
def test_gradients_reach_the_generator_and_not_the_image(stage):
    recipe, batch = recipes()[stage].double().train(), tiny_batch()
    for k in ('image', 'mask', 'edge'): batch[k].requires_grad_()
    out = recipe(batch); seen = {k: v.detach() for k, v in out.items()}
    sum(recipe.d_terms(batch, seen).values()).backward()
    extra = {k: v for k, v in seen.items() if k not in out}
    assert all(p.grad is None for p in recipe.G.parameters()) and all(p.grad is not None for p in recipe.D.parameters())
    sum(recipe.g_terms(batch, {**out, **extra}).values()).backward()
    assert all(p.grad is not None for p in recipe.G.parameters())
    # a bias right before an instance norm is subtracted again: zero but for rounding
    assert all(p.grad.abs().max() > 1e-9 for p in recipe.G.parameters() if p.dim() > 1)
    assert all(batch[k].grad is None for k in ('image', 'mask', 'edge'))
    if stage == 'hallucinated': assert not any(p.requires_grad for p in recipe.edge_generator.parameters())


@pytest.mark.parametrize('stage', ['edge', 'canny', 'hallucinated', 'joint'])
def test_forward_keeps_known_pixels_and_pictures_fit(stage):
    recipe, batch = recipes()[stage].double(), tiny_batch()
    out = recipe(batch); known = batch['mask'] == 0
    truth = batch['edge'] if stage == 'edge' else batch['image']
    assert out['comp'].shape == truth.shape and torch.equal(out['comp'][known.expand_as(truth)], truth[known.expand_as(truth)])
    pictures = recipe.pictures(batch, out)
    assert all(p.shape[0] == 2 and p.shape[1] in (1, 3) and p.shape[2:] == (32, 32) for p in pictures.values())
    assert list(pictures)[:3] == ['image', 'masked', 'edges']
    expected = {'edge': {'precision', 'recall'}, 'canny': {'psnr_hole'}}.get(stage, {'precision', 'recall', 'psnr_hole'})
    assert set(recipe.metrics(batch, out)) == expected
    names = dict(edge=['edge'], canny=['inpaint'], hallucinated=['inpaint'], joint=['edge', 'inpaint'])[stage]
    assert list(recipe.generators()) == names and recipe.method == 'edge_connect'
    assert recipe.update == 'simultaneous'


def test_training_does_not_see_the_hole_through_the_generator():
    "Other pixels in the hole, same edges outside: the same prediction (the loss may differ, the input may not)"
    batch = tiny_batch(); noisy = dict(batch, image=torch.where(batch['mask'] > 0, torch.rand_like(batch['image']), batch['image']),
                                       edge=torch.where(batch['mask'] > 0, 1-batch['edge'], batch['edge']))
    for stage in ('edge', 'hallucinated', 'joint'):
        recipe = recipes()[stage].double().eval()
        assert torch.equal(recipe(batch)['pred'], recipe(noisy)['pred'])


def test_frozen_edge_generator_stays_as_it_is():
    recipe = recipes()['hallucinated'].double()
    before = copy.deepcopy(recipe.edge_generator.state_dict())
    update = Updater(recipe, TrainConfig(device='cpu'))
    for _ in range(2): update.update([[tiny_batch()]])
    assert not recipe.edge_generator.training and recipe.G.training
    assert all(torch.equal(v, before[k]) for k, v in recipe.edge_generator.state_dict().items())


def test_joint_trains_both_generators_and_copies():
    recipe = recipes()['joint'].double()
    before = {k: copy.deepcopy(g.state_dict()) for k, g in recipe.generators().items()}
    Updater(recipe, TrainConfig(device='cpu')).update([[tiny_batch()]])
    for name, G in copy.deepcopy(recipe).generators().items():
        assert all(not torch.equal(p, before[name][k]) for k, p in G.named_parameters() if p.dim() > 1)


# inference

def noise_pair(dtype=torch.float32):
    batch = tiny_batch(1, 64, dtype, edge=False)
    batch['mask'][:, :, 20:44, 16:30] = 1
    noisy = torch.where(batch['mask'] > 0, torch.rand_like(batch['image']), batch['image'])
    return batch['image'], noisy, batch['mask']


@pytest.mark.parametrize('composite_edges', [True, False])
@pytest.mark.parametrize('external', [False, True])
def test_what_lies_below_the_mask_has_no_influence(composite_edges, external):
    set_seed(0)
    G1, G2 = ec.EdgeGenerator(.0625).eval(), ec.InpaintGenerator(.0625).eval()
    image, noisy, mask = noise_pair()
    edge = edge_maps(rgb_to_gray(image)) if external else None
    other = torch.where(mask > 0, torch.rand_like(mask), edge) if external else None
    a = ec.fill(G1, G2, image, mask, composite_edges=composite_edges, edge=edge)
    b = ec.fill(G1, G2, noisy, mask, composite_edges=composite_edges, edge=other)
    assert set(a) == {'pred', 'comp', 'edges_known', 'edges_hallucinated', 'edges'}
    assert all(torch.equal(a[k], b[k]) for k in a)
    known = mask == 0
    assert torch.equal(a['comp'][known.expand_as(image)], image[known.expand_as(image)])
    assert a['edges_known'][~known].sum() == 0 and a['edges_known'].sum() > 0
    assert torch.equal(a['edges'], torch.where(known, a['edges_known'], a['edges_hallucinated']) if composite_edges else a['edges_hallucinated'])


def test_nan_below_the_mask_does_not_spread():
    G1, G2 = ec.EdgeGenerator(.0625).eval(), ec.InpaintGenerator(.0625).eval()
    image, _, mask = noise_pair()
    out = ec.fill(G1, G2, torch.where(mask > 0, torch.nan, image), mask)
    assert all(v.isfinite().all() for v in out.values())


def test_sigma_minus_one_means_no_edges():
    G1, G2 = ec.EdgeGenerator(.0625).eval(), ec.InpaintGenerator(.0625).eval()
    image, _, mask = noise_pair()
    assert ec.fill(G1, G2, image, mask, sigma=-1)['edges_known'].sum() == 0
    recipe = ec.EdgeRecipe(ec.EdgeConnectConfig(**CONFIG, sigma=-1)).double()
    assert recipe(tiny_batch(edge=False))['edge'].sum() == 0


def test_random_sigma_belongs_to_the_picture():
    config = ec.EdgeConnectConfig(sigma=0, seed=5)
    keys = dict(epoch=torch.arange(40)//8, index=torch.arange(40) % 8)
    draws = ec.canny_sigma(config, keys)
    assert set(draws) == {1., 2., 3., 4.}
    assert ec.canny_sigma(config, {k: v[7:9] for k, v in keys.items()}) == draws[7:9]
    assert ec.canny_sigma(ec.EdgeConnectConfig(sigma=0, seed=6), keys) != draws


def test_edges_of_a_batch_are_canny_of_the_whole_picture():
    batch = tiny_batch(edge=False)
    out = ec.EdgeRecipe(ec.EdgeConnectConfig(**CONFIG)).double()(batch)
    assert torch.equal(out['edge'], edge_maps(rgb_to_gray(batch['image']), 2.).double())


def test_external_edges_are_thinned_by_canny():
    "edge_nms: a detector's map is multiplied with the picture's Canny map; without it, it is taken as it is"
    batch = tiny_batch(edge=False); thin = edge_maps(rgb_to_gray(batch['image']), 1.).double()
    assert 0 < thin.sum() < thin.numel()
    soft = torch.rand_like(thin)
    assert ec.EdgeConnectConfig().edge_nms
    for on, expect in ((True, soft*thin), (False, soft)):
        for make in (ec.EdgeRecipe, ec.InpaintRecipe, ec.JointRecipe):
            out = make(ec.EdgeConnectConfig(**CONFIG | dict(edge_nms=on, sigma=1.))).double()(dict(batch, edge=soft))
            assert torch.equal(out['edge'], expect), (make, on)
    same = ec.EdgeRecipe(ec.EdgeConnectConfig(**CONFIG | dict(edge_nms=True, sigma=1.))).double()(dict(batch, edge=thin))
    assert torch.equal(same['edge'], thin)                                # the picture's own Canny map stays as it is


# losses of the stages, put together by hand

@pytest.mark.parametrize('kind', ['nsgan', 'lsgan', 'hinge'])
def test_terms_of_the_edge_stage(kind):
    set_seed(0)
    recipe = settled(ec.EdgeRecipe(ec.EdgeConnectConfig(**CONFIG, gan_loss=kind, lambda_adv1=3., lambda_fm=7.)), 2)
    batch = tiny_batch(); out = recipe(batch); seen = dict(out)
    d, g = recipe.d_terms(batch, seen), recipe.g_terms(batch, seen)
    with torch.no_grad():
        (_, real), (_, fake) = (recipe.D(torch.cat([out['gray'], e], 1)) for e in (batch['edge'], out['pred']))
    r, f = real[-1], fake[-1]; p, q = r.sigmoid(), f.sigmoid()
    expect = dict(nsgan=(-p.log().mean() - (1-q).log().mean(), -q.log().mean()),
                  lsgan=(((p-1)**2).mean() + (q**2).mean(), ((q-1)**2).mean()),
                  hinge=((1-r).relu().mean() + (1+f).relu().mean(), -f.mean()))[kind]
    assert d['d_adv'].item() == pytest.approx(expect[0].item()/2) and g['g_adv'].item() == pytest.approx(3*expect[1].item())
    assert g['fm'].item() == pytest.approx(7*sum((a-b).abs().mean().item() for a, b in zip(real, fake)))


class FakeVGG(nn.Module):
    "Two 'layers' that are easy to compute by hand"
    layers = ('relu1_1', 'relu2_2')
    def forward(self, x): return dict(relu1_1=x, relu2_2=2*x)


def test_terms_of_the_image_stage():
    set_seed(0)
    config = ec.EdgeConnectConfig(width=.0625, edge_nms=False, content_layers=('relu1_1',), style_layers=('relu2_2',))
    recipe = settled(ec.InpaintRecipe(config, vgg=FakeVGG()), 3)
    assert not recipe.deviations
    batch = tiny_batch(); out = recipe(batch); g = recipe.g_terms(batch, out)
    image, mask, pred = batch['image'], batch['mask'], out['pred']
    gram = lambda x: (lambda f: f @ f.mT/f[0].numel())(2*(x*mask).flatten(2))
    expect = dict(g_adv=-.1*recipe.D(pred)[0].log().mean(), l1=(pred-image).abs().mean()/mask.mean(),
                  perceptual=.1*(pred-image).abs().mean(), style=250*(gram(pred)-gram(image)).abs().mean())
    assert {k: v.item() for k, v in g.items()} == pytest.approx({k: v.item() for k, v in expect.items()})
    d = -.5*(recipe.D(image)[0].log().mean() + (1-recipe.D(pred)[0]).log().mean())
    assert recipe.d_terms(batch, dict(out))['d_adv'].item() == pytest.approx(d.item())


# bad input

def message(f, *args, **kw):
    with pytest.raises(InputError) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_bad_input_is_named():
    assert 'multiples of 4' in message(ec.EdgeGenerator(.0625), torch.rand(1, 3, 30, 32))
    assert '24' in message(ec.Discriminator(2, width=.0625), torch.rand(1, 2, 16, 16))
    assert 'width 0' in message(ec.InpaintGenerator, 0)
    assert "'wgan'" in message(ec.EdgeConnectConfig, gan_loss='wgan')
    assert 'sigma -3' in message(ec.EdgeConnectConfig, sigma=-3)
    none, auto = ec.EdgeConnectConfig(**CONFIG), ec.EdgeConnectConfig(width=.0625)
    assert 'no VGG network is given' in message(ec.InpaintRecipe, auto)
    assert 'a VGG network is given' in message(ec.JointRecipe, none, vgg=FakeVGG())
    assert 'needs an edge_generator' in message(ec.InpaintRecipe, none, edges='hallucinated')
    assert 'takes no edge_generator' in message(ec.InpaintRecipe, none, edge_generator=ec.EdgeGenerator(.0625))
    assert "edges 'sketch'" in message(ec.InpaintRecipe, none, edges='sketch')
    for r in (ec.InpaintRecipe(none), ec.JointRecipe(none)):
        assert r.deviations == ['no perceptual and style loss: vgg_weights=none']


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_types_come_out_in_the_image_type(dtype):
    G1, G2 = ec.EdgeGenerator(.0625).to(dtype).eval(), ec.InpaintGenerator(.0625).to(dtype).eval()
    image, _, mask = noise_pair(dtype)
    out = ec.fill(G1, G2, image, mask, edge=torch.zeros_like(mask))
    assert all(v.dtype == dtype for v in out.values())


@pytest.mark.parametrize('stage', ['edge', 'canny', 'hallucinated', 'joint'])
def test_autocast(stage):
    "bf16: terms near those of fp32, known pixels untouched"
    recipe, batch, terms = recipes()[stage], tiny_batch(dtype=torch.float32), []
    for _ in range(5): recipe.train()(batch), recipe.D(torch.rand(1, recipe.D.conv1[0].in_channels, 32, 32))
    recipe.eval()
    for on in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=on):
            out = recipe(batch); terms.append(recipe.d_terms(batch, out) | recipe.g_terms(batch, out))
    known = (batch['mask'] == 0).expand_as(out['comp'])
    truth = batch['edge'] if stage == 'edge' else batch['image']
    assert out['comp'].dtype == torch.float32 and torch.equal(out['comp'][known], truth[known])
    for k, v in terms[0].items(): assert terms[1][k].item() == pytest.approx(v.item(), rel=.05)
