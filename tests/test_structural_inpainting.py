"""Structural Inpainting: networks, losses re-derived by hand, the two phases, filling, and the claims experiment at toy size."""
import dataclasses
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from inpaint_lib.core import InputError, count_params
from inpaint_lib.data.images import BuiltinImages, PhotoDataset, builtin_photograph
from inpaint_lib.data.masks import mask_sampler
from inpaint_lib.features import VGGFeatures, vgg_shapes
from inpaint_lib.papers.context_encoder import OutOfProtocol, center_hole
from inpaint_lib.papers.structural_inpainting import (ResizeConv, StructuralDiscriminator, StructuralEncoder,
                                                      StructuralInpaintingConfig, StructuralInpaintingRecipe, fill)
from inpaint_lib.training import TrainConfig, load_weights, train

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(width=.05, bottleneck=8)
Config = StructuralInpaintingConfig


def vgg_state(arch='vgg16', last=14):
    "Random weights of a VGG up to conv3_1, torchvision's keys"
    g = torch.Generator().manual_seed(0)
    return {k: .2*torch.randn(s, generator=g) for k, s in list(vgg_shapes(arch).items())[:last]}


@pytest.fixture(scope='module')
def vgg(): return VGGFeatures('vgg16', ('relu1_1', 'relu2_1', 'relu3_1'), vgg_state())


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = center_hole(torch.zeros(2, 1, 128, 128), 4)
    return dict(image=torch.rand(2, 3, 128, 128), mask=mask)


def refused(what, *args, **kw):
    with pytest.raises(InputError) as e: what(*args, **kw)
    return str(e.value)


# --- networks

def test_parameter_counts_of_the_published_code():
    assert count_params(StructuralEncoder()) == 38_348_691
    assert count_params(StructuralEncoder(region='random')) == 38_348_691 + 65_600
    assert count_params(StructuralDiscriminator()) == 694_241
    assert count_params(StructuralDiscriminator(128)) == 694_241 + 3*4096


@pytest.mark.parametrize('region, side', [('center', 64), ('random', 128)])
def test_shapes_and_range_of_the_generator(region, side):
    torch.manual_seed(0)
    G = StructuralEncoder(**TINY, region=region)
    out = G(torch.rand(3, 3, 128, 128))
    assert out.shape == (3, 3, side, side) and (out < 0).any()          # linear: a ReLU would forbid this
    assert StructuralDiscriminator(side, .05)(out).shape == (3, 1)


def test_logits_may_be_negative():
    torch.manual_seed(0)
    D = StructuralDiscriminator(64, .25)
    scores = torch.cat([D(torch.rand(4, 3, 64, 64)), -D(torch.rand(4, 3, 64, 64))])
    assert (scores < 0).any() and (scores > 0).any()


def test_resize_conv_repeats_pixels_first():
    torch.manual_seed(0)
    layer, x = ResizeConv(2, 3, 4), torch.rand(1, 2, 3, 3)
    big = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    padded = F.pad(big, (1, 2, 1, 2))                              # TensorFlow's SAME; against a loop in test_layers
    assert torch.allclose(layer(x), F.conv2d(padded, layer.conv.weight, layer.conv.bias)) and layer(x).shape == (1, 3, 12, 12)


def test_weights_start_uniform_after_glorot_and_biases_at_zero():
    torch.manual_seed(0)
    for net in (StructuralEncoder(.25, bottleneck=50), StructuralDiscriminator(64, .5)):
        for m in net.modules():
            if not isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)): continue
            receptive = m.weight[0, 0].numel()
            bound = math.sqrt(6/((m.weight.shape[0] + m.weight.shape[1])*receptive))
            assert m.weight.abs().max() <= bound and not m.bias.any()
            assert abs(m.weight.std().item()/(bound/math.sqrt(3)) - 1) < .1


def test_networks_refuse_what_they_are_not_made_for():
    assert 'expected (B,3,128,128)' in refused(StructuralEncoder(**TINY), torch.rand(1, 3, 128, 96))
    assert "region 'middle'" in refused(StructuralEncoder, region='middle')
    assert 'bottleneck 0' in refused(StructuralEncoder, bottleneck=0) and 'bottleneck 2.5' in refused(StructuralEncoder, bottleneck=2.5)
    assert 'size 96' in refused(StructuralDiscriminator, 96)
    assert 'expected (B,3,64,64)' in refused(StructuralDiscriminator(64, .05), torch.rand(1, 3, 128, 128))


# --- config and recipe

@pytest.mark.parametrize('wrong, says', [
    (dict(region='left'), "region 'left'"), (dict(rec_on='all'), "rec_on 'all'"), (dict(overlap=32), 'overlap 32'),
    (dict(overlap=-1), 'overlap -1'), (dict(lambda_mse=-1), 'lambda_mse -1'), (dict(lambda_adv=float('nan')), 'lambda_adv nan'),
    (dict(joint_from=-5), 'joint_from -5'), (dict(band_weight=-1), 'band_weight -1'), (dict(bottleneck=0), 'bottleneck 0'),
    (dict(bottleneck=8.5), 'bottleneck 8.5'), (dict(overlap=4.), 'overlap 4.0'), (dict(overlap=float('nan')), 'overlap nan'),
    (dict(joint_rate=0), 'joint_rate 0'), (dict(joint_rate=-.1), 'joint_rate -0.1'), (dict(feature_scale=0), 'feature_scale 0'),
    (dict(feature_scale=float('nan')), 'feature_scale nan'), (dict(hole_value=1.1), 'hole_value 1.1'), (dict(hole_value=-.1), 'hole_value -0.1'),
    (dict(width=0), 'width 0'), (dict(lr=0), 'lr 0'), (dict(d2g=-1), 'd2g -1'),
    (dict(lambda_mse=0, lambda_feat=0), 'nothing to minimise'), (dict(lambda_mse=0, feature_layers=(), lambda_adv=0), 'nothing to minimise')])
def test_config_refuses(wrong, says): assert says in refused(Config, **wrong)


def test_an_adversary_alone_is_allowed_from_the_first_step_on():
    assert Config(lambda_mse=0, lambda_feat=0, joint_from=0).lambda_adv == .1


def test_names_and_vgg(vgg):
    recipe = StructuralInpaintingRecipe(Config(**TINY), vgg)
    assert (recipe.method, recipe.name, recipe.update) == ('structural_inpainting', 'structural_inpainting.center', 'alternating')
    assert StructuralInpaintingRecipe(Config(**TINY, region='random', vgg_weights='none')).name == 'structural_inpainting'
    assert 'no VGG network' in refused(StructuralInpaintingRecipe, Config(**TINY))
    assert "'none' and a VGG network is given" in refused(StructuralInpaintingRecipe, Config(**TINY, vgg_weights='none'), vgg)
    assert 'without relu2_2' in refused(StructuralInpaintingRecipe, Config(**TINY, feature_layers=('relu2_2',)), vgg)
    assert StructuralInpaintingRecipe(Config(**TINY, lambda_feat=0.)).vgg is None         # nothing needs it
    assert not any(k.startswith('vgg') for k in recipe.state_dict())


def test_deviations_name_a_missing_and_an_unfit_feature_term(vgg):
    named = lambda v=None, **kw: StructuralInpaintingRecipe(Config(**TINY, **kw), v).deviations
    assert named(vgg_weights='none') == ['no feature term: vgg_weights=none'] and named(lambda_feat=0.) == []
    oxford = VGGFeatures('vgg16', vgg.layers, {k: v*(57.6 if k.startswith('features.0.') else 1) for k, v in vgg_state().items()})
    for v, fits, wrong in ((vgg, .226, 1/255), (oxford, 1/255, .226)):          # the weights tell, whatever they are called
        for name in ('auto', 'a file'):
            assert named(v, vgg_weights=name, feature_scale=fits) == []
            note, = named(v, vgg_weights=name, feature_scale=wrong)
            assert f'{wrong:.4g}' in note and f'{fits:.4g}' in note and '\n' not in note


def test_deviations_name_region_and_comparison():
    named = lambda **kw: StructuralInpaintingRecipe(Config(**TINY, lambda_feat=0., **kw)).deviations
    assert named(region='random') == ['random regions instead of the centre (ours)']
    assert 'composite' in named(rec_on='hole')[0] and len(named(rec_on='hole', region='random')) == 2


def test_batches_of_another_size_or_hole_are_refused(batch):
    recipe = StructuralInpaintingRecipe(Config(**TINY, vgg_weights='none'))
    assert '64x64' in refused(recipe, dict(image=torch.rand(1, 3, 64, 64), mask=torch.zeros(1, 1, 64, 64)))
    assert 'middle 56 pixels' in refused(recipe, batch | dict(mask=batch['mask'].roll(3, 2)))
    free = StructuralInpaintingRecipe(Config(**TINY, vgg_weights='none', region='random'))
    assert free(batch | dict(mask=batch['mask'].roll(3, 2)))['comp'].shape == (2, 3, 128, 128)


@pytest.mark.parametrize('region', ['center', 'random'])
def test_what_lies_in_the_hole_reaches_no_prediction(batch, region):
    recipe = StructuralInpaintingRecipe(Config(**TINY, vgg_weights='none', region=region)).eval()
    nan = torch.where(batch['mask'] > 0, torch.full_like(batch['image'], math.nan), batch['image'])
    a, b = recipe(batch), recipe(batch | dict(image=nan))
    known = (batch['mask'] == 0).expand_as(nan)
    assert torch.equal(a['region'], b['region']) and torch.equal(a['comp'][known], batch['image'][known])
    assert a['pred'].min() >= 0 and a['pred'].max() <= 1


def test_gradient_of_the_generator_by_hand(batch, vgg):
    "1 inside, 10 in the band of 4 pixels, features over 255, a tenth of the adversary"
    recipe = StructuralInpaintingRecipe(Config(**TINY, joint_from=0, feature_scale=1/3), vgg).double()
    image, region = batch['image'].double(), torch.rand(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    terms = recipe.g_terms(dict(image=image, mask=batch['mask'].double()), dict(region=region))
    ours, = torch.autograd.grad(sum(terms.values()), region)
    g, weight = image[..., 32:96, 32:96], torch.full((64, 64), 10., dtype=torch.float64)
    weight[4:-4, 4:-4] = 1
    y = region.detach().clone().requires_grad_()
    fy, fg = recipe.vgg(y), recipe.vgg(g)
    feature, = torch.autograd.grad(sum(((fy[k] - fg[k])**2).mean()/9 for k in fy), y)
    s = recipe.D(y)
    adversary, = torch.autograd.grad(s, y, (torch.sigmoid(s) - 1)/len(s)*.1)
    by_hand = 2*weight*(region.detach() - g)/g.numel() + feature + adversary
    assert torch.allclose(ours, by_hand, rtol=1e-9, atol=1e-14) and adversary.abs().max() > 0 and set(terms) == {'mse', 'feat', 'g_adv'}


def test_critic_sees_truth_and_prediction(batch):
    recipe = StructuralInpaintingRecipe(Config(**TINY, vgg_weights='none', joint_from=0))
    out = recipe(batch)
    real, fake = recipe.D(batch['image'][..., 32:96, 32:96]), recipe.D(out['region'])
    expected = (F.softplus(-real) + F.softplus(fake)).mean()
    assert torch.isclose(recipe.d_terms(batch, out)['d_adv'], expected)


def test_vgg_runs_once_on_each_picture(batch, vgg):
    recipe, calls = StructuralInpaintingRecipe(Config(**TINY), vgg), []
    hook = vgg.register_forward_pre_hook(lambda m, x: calls.append((len(x[0]), torch.is_grad_enabled())))
    recipe.g_terms(batch, recipe(batch)); hook.remove()
    assert sorted(calls) == [(2, False), (2, True)]


@pytest.mark.parametrize('region', ['center', 'random'])
def test_on_the_hole_only_the_hole_learns(batch, vgg, region):
    recipe = StructuralInpaintingRecipe(Config(**TINY, rec_on='hole', region=region, joint_from=0), vgg)
    out = recipe(batch); out['region'].retain_grad()
    sum(recipe.g_terms(batch, out).values()).backward()
    hole = batch['mask'] if region == 'random' else batch['mask'][..., 32:96, 32:96]
    grad = out['region'].grad
    assert (grad[(hole == 0).expand_as(grad)] == 0).all() and (grad != 0).any()


def test_bfloat16(batch, vgg):
    recipe = StructuralInpaintingRecipe(Config(**TINY, joint_from=0), vgg)
    full = recipe.g_terms(batch, recipe(batch))
    with torch.autocast('cpu', torch.bfloat16):
        out = recipe(batch); terms = recipe.g_terms(batch, out)
    assert all(abs(terms[k].item()/v.item() - 1) < .03 for k, v in full.items())
    known = (batch['mask'] == 0).expand_as(batch['image'])
    assert torch.equal(out['comp'][known], batch['image'][known])


# --- two phases

def photographs(): return PhotoDataset(BuiltinImages(('coffee', 'rocket')), 128, masks=mask_sampler('context_encoder'))


def short_run(steps, run_dir=None, **kw):
    torch.manual_seed(0)
    recipe = StructuralInpaintingRecipe(Config(**TINY | dict(vgg_weights='none', joint_from=2) | kw))
    return train(recipe, photographs(), TrainConfig(steps=steps, batch_size=2, device='cpu', save_every=2), run_dir, progress=False)


def test_critic_rates_and_memory_of_the_two_phases():
    torch.manual_seed(0)
    first = {k: v.clone() for k, v in StructuralInpaintingRecipe(Config(**TINY, vgg_weights='none')).D.state_dict().items()}
    before, after = short_run(2), short_run(4)
    assert all(torch.equal(v, first[k]) for k, v in before.recipe.D.state_dict().items())
    assert not all(torch.equal(v, first[k]) for k, v in after.recipe.D.state_dict().items())
    assert [r['lr'] for r in after.records] == pytest.approx([2e-4, 2e-4, 2e-5, 2e-5])
    assert [('d_adv' in r, 'g_adv' in r) for r in after.records] == [(False, False)]*2 + [(True, True)]*2


def test_second_phase_forgets_adams_averages():
    recipe = StructuralInpaintingRecipe(Config(**TINY, vgg_weights='none', joint_from=1, d2g=.5))
    opt_G, opt_D = recipe.optimizers()
    for p in recipe.G.parameters(): p.grad = torch.ones_like(p)
    opt_G.step(); assert opt_G.state
    recipe.schedule(0, opt_G, opt_D); assert opt_G.state and opt_G.param_groups[0]['lr'] == 2e-4
    recipe.schedule(1, opt_G, opt_D)
    assert not opt_G.state and opt_G.param_groups[0]['lr'] == pytest.approx(2e-5) and opt_D.param_groups[0]['lr'] == pytest.approx(1e-5)


@pytest.mark.parametrize('pause', [2, 3])
def test_resumed_run_is_the_same_run(tmp_path, pause):
    "also when it is killed just before the second phase begins"
    short_run(pause, tmp_path)
    a, b = short_run(5, tmp_path), short_run(5)
    assert all(torch.equal(v, b.recipe.G.state_dict()[k]) for k, v in a.recipe.G.state_dict().items())
    assert [r['mse'] for r in a.records] == [r['mse'] for r in b.records]
    nets, _ = load_weights(tmp_path/'weights.safetensors')
    StructuralEncoder(**TINY).load_state_dict(nets['generator'])


def test_without_an_adversary_there_is_no_critic():
    run = short_run(3, lambda_adv=0.)
    assert run.recipe.D is None and [r['lr'] for r in run.records] == [2e-4]*3 and 'd_adv' not in run.records[-1]


# --- filling

@pytest.mark.parametrize('region', ['center', 'random'])
@pytest.mark.parametrize('shape, holes', [((200, 320), [(70, 120, 80, 120)]), ((150, 150), [(0, 20, 0, 25), (100, 150, 140, 150)]),
                                          ((20, 300), [(5, 15, 100, 180)]), ((260, 260), [(40, 220, 30, 200)])])
def test_fill_anywhere(region, shape, holes):
    torch.manual_seed(0)
    G = StructuralEncoder(**TINY, region=region).eval()
    image, mask = torch.rand(1, 3, *shape), torch.zeros(1, 1, *shape)
    for a, b, c, d in holes: mask[..., a:b, c:d] = 1
    other = torch.where(mask > 0, torch.full_like(image, math.nan), image)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', OutOfProtocol)
        one, two = fill(G, image, mask), fill(G, other, mask)
    known = (mask == 0).expand_as(image)
    assert torch.equal(one['comp'][known], image[known]) and torch.isfinite(one['comp']).all()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert all(v.shape == image.shape and v.min() >= 0 and v.max() <= 1 for v in one.values())
    assert (one['input'][~known] == np.float32(.437)).all()


def test_centre_network_sees_its_own_hole_and_warns_of_others():
    torch.manual_seed(0)
    G, image = StructuralEncoder(**TINY).eval(), torch.rand(1, 3, 128, 128)
    small, full = torch.zeros(1, 1, 128, 128), center_hole(torch.zeros(1, 1, 128, 128), 4)
    small[..., 60:68, 60:68] = 1
    with warnings.catch_warnings():
        warnings.simplefilter('error'); a, b = fill(G, image, small), fill(G, image, full)
    assert torch.allclose(a['comp'][..., 60:68, 60:68], b['comp'][..., 60:68, 60:68], atol=1e-6)
    with pytest.warns(OutOfProtocol): fill(G, image, full.roll(30, 3))


@pytest.mark.parametrize('wrong, says', [(dict(overlap=32), 'overlap 32'), (dict(overlap=4.), 'overlap 4.0'), (dict(hole_value=117), 'hole_value 117')])
def test_fill_refuses(wrong, says):
    G = StructuralEncoder(**TINY).eval()
    assert says in refused(fill, G, torch.rand(1, 3, 128, 128), center_hole(torch.zeros(1, 1, 128, 128), 4), **wrong)


# --- the claims experiment: the notebook's own cells, at toy size

def experiment(**parameters):
    "A namespace with the cells that define the experiment, and the given parameters"
    cells = [c for c in json.loads((ROOT/'nbs'/'21_papers.structural_inpainting.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    source, space = [''.join(c['source']) for c in cells], {}
    at = lambda word: next(n for n, s in enumerate(source) if s.startswith(word))
    header = [n for n, s in enumerate(source) if s.startswith('#| export') or 'parameters' in cells[n]['metadata'].get('tags', [])
              or s.startswith('import math, warnings')]
    unknown = set(parameters) - {line.split(' = ')[0] for line in source[at('steps = ')].splitlines()}
    assert not unknown
    body = [at('def mean_colour')] + [n for n in range(at('VARIANTS = '), at('rows = read_ledger'))
                                      if not source[n].startswith(('rng = ', 'a, b = ', 'shots = '))]
    for n in header + body:
        exec(compile(source[n], f'cell {n}', 'exec'), space)
        if source[n].startswith('steps = '): space.update(parameters)
    return space


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "A folder with a finished toy experiment"
    from safetensors.torch import save_file
    folder, held_out = tmp_path_factory.mktemp('claims'), tmp_path_factory.mktemp('held_out')
    save_file(vgg_state(), folder/'vgg.safetensors')
    cat = builtin_photograph('chelsea')
    for i in range(5): Image.fromarray(np.array(cat[20*i:20*i+200, 40*i:40*i+200])).save(held_out/f'{i}.png')
    parameters = dict(vgg_weights=str(folder/'vgg.safetensors'), vgg_unit=4.42, seeds=2, claim_pretrain=2, claim_pretrain_batch=2,
                      claim_steps=2, claim_batch=2, claim_device='cpu', claim_variants='mse,mse+1_1+2_1+3_1', test_dir=str(held_out))
    return folder, parameters


def test_claims_run_in_two_shares_and_resume(toy, capsys):
    folder, parameters = toy
    first = experiment(**parameters, claim_part='1/2')['claims'](folder); runs = experiment(**parameters)['run_claims'](first)
    assert (set(runs), len(first.jobs)) == ({(v, 0) for v in first.variants}, 4)             # shares are seeds: a start is trained once
    assert [p.name for p in folder.glob('start_*')] == ['start_seed0']
    started = (folder/'start_seed0'/'weights.safetensors').stat().st_mtime_ns
    times = {p: p.stat().st_mtime_ns for p in folder.glob('*.json')}
    space = experiment(**parameters); whole = space['claims'](folder); runs = space['run_claims'](whole)
    assert len(runs) == 4 and whole.complete and all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert (folder/'start_seed0'/'weights.safetensors').stat().st_mtime_ns == started and (folder/'start_seed1').is_dir()
    assert runs['mse', 0]['values'] != runs['mse+1_1+2_1+3_1', 0]['values']
    assert set(runs['mse', 0]['values']) == set(space['MEASURES']) and str(folder) not in (folder/'mse_seed0.json').read_text()

    rows = space['publish_claims'](whole)
    assert (folder/'claims_structural_inpainting.png').stat().st_size > 10_000
    assert json.loads((folder/'claims_structural_inpainting.json').read_text()) == rows and len(rows) == 6
    need = {'claim', 'source', 'experiment', 'measure', 'value', 'interval', 'n', 'seeds', 'budget', 'device', 'verdict', 'deviations'}
    assert all(need <= set(r) and r['verdict'] == r['overall'] == 'undecided' for r in rows)          # two seeds decide nothing
    for k in ('claim_steps', 'claim_pretrain'):
        changed = experiment(**parameters | {k: 3})
        assert f"{'steps' if k == 'claim_steps' else 'pretrain'} 2 (now 3)" in refused(changed['run_claims'], changed['claims'](folder))


def test_every_variant_goes_on_from_its_seeds_start(toy, tmp_path, monkeypatch):
    _, parameters = toy
    space, began = experiment(**parameters | dict(seeds=1)), {}
    real = space['train']
    def spy(recipe, dataset, config, run_dir, **kw):
        began.setdefault(run_dir.name, ({k: v.clone() for k, v in recipe.G.state_dict().items()}, config.seed))
        return real(recipe, dataset, config, run_dir, **kw)
    space['train'] = spy; monkeypatch.setattr('inpaint_lib.experiments.train', spy)
    space['run_claims'](space['claims'](tmp_path))
    start = load_weights(tmp_path/'start_seed0'/'weights.safetensors')[0]['generator']
    assert list(began) == ['start_seed0', 'mse_seed0', 'mse+1_1+2_1+3_1_seed0'] and len({began[k][1] for k in list(began)[1:]}) == 1
    for name in list(began)[1:]: assert all(torch.equal(v, start[k]) for k, v in began[name][0].items())
    assert not torch.equal(began['start_seed0'][0]['up.0.conv.weight'], start['up.0.conv.weight'])        # it has been trained


def test_claims_refuse_a_vgg_in_other_units(toy, tmp_path):
    _, parameters = toy
    auto = experiment(**parameters | dict(vgg_weights='auto', vgg_unit=255.))
    assert 'vgg_unit=4.42' in refused(auto['claims'], tmp_path)
    other = experiment(**parameters | dict(vgg_unit=255.)); assert 'mean size' in refused(other['run_claims'], other['claims'](tmp_path))
    assert "part '3/2'" in refused(experiment(**parameters | dict(claim_part='3/2'))['claims'], tmp_path)
    assert not list(tmp_path.iterdir())                                        # nothing has been trained


def test_unrelated_lines_earn_nothing_above_chance():
    space = experiment(); f, plain = space['MEASURES']['f1_above_chance'][0], space['MEASURES']['edge_f1'][0]
    x = torch.arange(128.)
    stripes = lambda period, axis: (.5 + .4*torch.sin(2*math.pi*x/period)).view((1, 1, -1, 1) if axis else (1, 1, 1, -1)).expand(1, 3, 128, 128)
    image = torch.cat([stripes(p, a) for p in (12, 17, 23) for a in (0, 1)]); mask = center_hole(torch.zeros(6, 1, 128, 128), 4)
    chance = torch.stack([plain(image, image.roll(-k, 0), mask) for k in (1, 2, 3)]).mean(0)
    assert torch.allclose(f(image, image, mask), 1 - chance) and chance.min() > 0
    assert (f(torch.full_like(image, .5), image, mask) == 0).all()             # no lines at all: nothing earned, nothing lost
    strange = image.roll(-1, 0)                                                # the next picture: worth less than chance here
    assert (f(strange, image, mask) < f(image, image, mask)).all() and f(strange, image, mask).mean() < .05
    assert '3 pictures' in refused(f, image[:3], image[:3], mask[:3])


def test_claims_refuse_unknown_variants_and_shared_pictures(toy):
    folder, parameters = toy
    space = experiment(**parameters | dict(claim_variants='mse,l2'))
    assert "variant 'l2'" in refused(space['claims'], folder)
    assert 'share pictures' in refused(space['claim_settings'], BuiltinImages(('coffee',)), BuiltinImages(('coffee', 'rocket')))


def test_all_variants_start_alike_and_train(toy):
    folder, parameters = toy
    space = experiment(**parameters)
    assert list(space['VARIANTS']) == ['mse', 'mse+adv', 'mse+1_1', 'mse+2_1', 'mse+3_1', 'mse+1_1+2_1+3_1']
    starts = {v: space['claim_recipe'](v, 1) for v in space['VARIANTS']}
    reference = starts['mse'].G.state_dict()
    assert all(torch.equal(p, reference[k]) for r in starts.values() for k, p in r.G.state_dict().items())
    assert [v for v, r in starts.items() if r.D is not None] == ['mse+adv'] and [v for v, r in starts.items() if r.vgg is None] == ['mse', 'mse+adv']
    assert starts['mse+3_1'].config.feature_layers == ('relu3_1',) and all(r.config.lambda_mse == 1 for r in starts.values())


def test_ledger_follows_the_stated_rule():
    space = experiment()
    rng, names, measures = np.random.default_rng(0), list(space['VARIANTS']), list(space['MEASURES'])
    base = rng.random((1, 50))
    def values(shift):      # OURS minus the others = shift, for measures where more is better
        noise = lambda: .002*rng.standard_normal((3, 50))
        made = {v: {m: (base + (shift if v == space['OURS'] else 0) + noise()).tolist() for m in measures} for v in names}
        return made | {'mean colour': {m: [[-9.*space['MEASURES'][m][1]]*50]*3 for m in measures}}
    for shift, expected in ((.1, 'reproduced'), (-.1, 'not reproduced'), (0., 'not reproduced')):
        rows = space['ledger'](values(shift), seeds=3)
        assert len(rows) == 5*len(measures) and {r['overall'] for r in rows} == {expected}
        assert {r['level'] for r in rows} == {.95, 1 - .05/4}
        assert all(r['ours'] - r['rival'] == pytest.approx(r['value']) for r in rows)
    less = [r for r in space['ledger'](values(.1), seeds=3) if r['measure'] == 'l1']
    assert {r['verdict'] for r in less} == {'not reproduced'}                  # less is better there
    untrained = values(.1); untrained['mean colour'] = {m: [[9.*space['MEASURES'][m][1]]*50]*3 for m in measures}
    assert {r['verdict'] for r in space['ledger'](untrained, seeds=3)} == {'undecided'}
    untrained['mean colour']['psnr'] = [[-9.]*50]*3                            # above one colour, but no lines: undecided still
    assert {r['overall'] for r in space['ledger'](untrained, seeds=3)} == {'undecided'}
    untrained['mean colour'][measures[0]] = [[-9.]*50]*3                       # above it in both
    assert {r['overall'] for r in space['ledger'](untrained, seeds=3)} == {'reproduced'}
    missing = {k: v for k, v in values(.1).items() if k != 'mse+2_1'}
    assert {r['overall'] for r in space['ledger'](missing, seeds=3)} == {'reproduced', 'undecided'}   # a rival is missing


def test_config_fields_are_what_recipes_expect():
    names = {f.name for f in dataclasses.fields(Config)}
    assert {'width', 'lr', 'd2g', 'betas', 'seed', 'vgg_arch', 'vgg_weights', 'vgg_normalize', 'feature_layers'} <= names
