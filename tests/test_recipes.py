"Names of recipes into networks: presets, what may be changed, what a run says of itself, and resuming the earlier papers"
import dataclasses
import re
import shlex
import shutil
import types
from pathlib import Path

import pytest
import torch

from inpaint_lib import cli, recipes, training
from inpaint_lib.core import InputError, count_params
from inpaint_lib.data import images, masks
from conftest import one_line
from tiny_weights import save_tiny, save_untrained

ROOT = Path(__file__).resolve().parent.parent
EARLY = ('context_encoder', 'context_encoder.center', 'structural_inpainting', 'structural_inpainting.center', 'partial_conv',
         'partial_conv.finetune')


def without_vgg(name, **config): return config | (dict(vgg_weights='none') if recipes.RECIPES[name].vgg else {})


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    "name of a needed network -> a file that holds it"
    d = tmp_path_factory.mktemp('nets')
    ec = save_tiny(d/'ec.safetensors', width=.25)
    sf = {n: save_untrained(d/f'{n}.safetensors', f'structure_flow.{n}') for n in ('structure', 'flow')}
    return dict(edge=ec, inpaint=ec, generator=None, d=d) | sf


@pytest.mark.parametrize('preset', ['smoke', 'tiny'])
@pytest.mark.parametrize('name', recipes.RECIPES)
def test_every_recipe_builds_and_makes_one_step(name, preset, nets):
    stage = recipes.RECIPES[name]
    given = {n: nets[n] or save_untrained(nets['d']/'pc.safetensors', 'partial_conv') for n in stage.needs}
    config = without_vgg(name) | (dict(width=1/16) if {'generator', 'flow'} & given.keys() else {})
    recipe, run, data = recipes.build(name, preset, config=config, checkpoints=given)
    assert recipe.name == name and sum(map(count_params, recipe.generators().values())) <= 1_500_000
    assert (preset == 'smoke') == (run.steps == 12)
    if preset == 'tiny': return
    if hasattr(recipe.config, 'joint_from'): assert recipe.config.joint_from < run.steps       # both phases are seen
    data_set = images.PhotoDataset(images.open_source('builtin'), data.size, masks.mask_sampler(data.masks, **data.mask_options))
    result = training.train(recipe, data_set, training.TrainConfig(steps=1, batch_size=2 if data.size < 64 else 3, device='cpu'), progress=False)
    assert result.records[0]['g_total'] > 0


def test_paper_presets_hold_the_papers_numbers():
    recipe, run, data = recipes.build('context_encoder.center', 'paper')
    assert count_params(recipe.G) == 71_124_544 and (run.batch_size, data.size, recipe.config.lr, recipe.config.d2g) == (64, 128, 2e-3, .1)
    for name, lr in (('partial_conv', 2e-4), ('partial_conv.finetune', 5e-5)):
        p, stage = recipes.RECIPES[name].presets['paper'], recipes.RECIPES[name]
        assert (p['run']['batch_size'], p['data']['size'], p['data']['masks']) == (6, 512, 'partial_conv')
        assert stage.config(**p['config']).lr == lr and stage.config(**p['config']).n_layers == 8
    p = recipes.RECIPES['structural_inpainting.center'].presets['paper']
    assert p['config']['joint_from']*6 == p['run']['steps']*5 and p['run']['batch_size'] == 64


@pytest.mark.parametrize('name', [n for n in EARLY if recipes.RECIPES[n].vgg])
def test_preset_paper_refuses_to_go_without_vgg(name, nets):
    given = {n: save_untrained(nets['d']/'pc.safetensors', 'partial_conv') for n in recipes.RECIPES[name].needs}
    with pytest.raises(InputError, match="preset 'paper' needs VGG"): recipes.build(name, 'paper', config=dict(vgg_weights='none'), checkpoints=given)


@pytest.mark.parametrize('name, config, says', [
    ('context_encoder.center', dict(region='random'), 'region=random: this recipe has region=center'),
    ('structural_inpainting', dict(region='center'), 'region=center: this recipe has region=random'),
    ('partial_conv', dict(freeze_bn=True), 'freeze_bn=True: this recipe has freeze_bn=False'),
    ('partial_conv.finetune', dict(freeze_bn=False), 'freeze_bn=False: this recipe has freeze_bn=True'),
    ('partial_conv.finetune', {}, "needs the network 'generator'"),
])
def test_what_makes_a_recipe_is_not_an_option(name, config, says):
    with pytest.raises(InputError, match=says) as e: recipes.build(name, config=without_vgg(name, **config))
    assert '\n' not in str(e.value)


def test_changes_to_the_preset_are_deviations():
    recipe, run, _ = recipes.build('structural_inpainting', config=dict(vgg_weights='none', lr=1e-3, rec_on='hole'), run=dict(steps=100),
                                   data=dict(masks='bins'))
    text = '; '.join(recipe.deviations)
    assert 'lr=0.001 (preset: 0.0005)' in text and 'rec_on=hole (preset: output)' in text and 'no adversary: joint_from=250 of 100 steps' in text
    assert 'vgg_weights=none' in text and 'masks=bins (preset: random_region)' in text and 'size' not in text
    assert not any('preset' in d for d in recipes.build('context_encoder')[0].deviations)


@pytest.mark.parametrize('name, size', [('deepfill_v1', 60), ('deepfill_v2.sketch', 100), ('structure_flow.flow', 72)])
def test_sizes_that_no_network_of_the_recipe_takes(name, size):
    with pytest.raises(InputError, match=f'size is {size}; {name} expects a multiple of') as e: recipes.build(name, data=dict(size=size))
    assert '\n' not in str(e.value)


def test_the_critics_of_deepfill_v1_know_the_size_of_the_pictures():
    assert recipes.build('deepfill_v1', config=dict(width=1/16), data=dict(size=128))[0].config.size == 128
    assert recipes.build('deepfill_v1', config=dict(width=1/16, size=64))[0].config.size == 64
    with pytest.raises(InputError, match='size=256 among the options'): recipes.build('deepfill_v1', config=dict(size=256))


def test_a_loss_without_weight_needs_no_vgg():
    off = dict(lambda_perc=0., lambda_style_out=0., lambda_style_comp=0.)
    recipe, *_ = recipes.build('partial_conv', 'paper', config=off | dict(width=1/16))        # 'auto' would download
    assert recipe.vgg is None and recipe.config.vgg_weights == 'none'


def test_the_centre_holes_overlap_is_the_recipes():
    assert recipes.build('context_encoder.center', config=dict(overlap=7))[2].mask_options == dict(overlap=7)
    assert recipes.build('context_encoder')[2].mask_options == {}


@pytest.mark.parametrize('name, killed', [('structural_inpainting', 2), ('structural_inpainting', 3), ('context_encoder', 2), ('partial_conv', 2),
                                         ('structure_flow.structure', 2), ('structure_flow.joint', 2)])
def test_resume_is_exact_to_the_weights_file(name, killed, nets, tmp_path):
    "Across the step at which D joins, with averaged weights and batch norm measured anew"
    config = without_vgg(name, width=1/16) | (dict(bottleneck=8) if 'context' in name or 'structural' in name else {})
    given = {n: nets[n] for n in recipes.RECIPES[name].needs}
    if name == 'structural_inpainting': config['joint_from'] = 3
    def run(steps, out):
        recipe, _, data = recipes.build(name, config=config, checkpoints=given)
        data_set = images.PhotoDataset(images.open_source('builtin'), data.size, masks.mask_sampler(data.masks))
        samples = images.collate([data_set[9, i] for i in range(2)])
        numbers = training.TrainConfig(steps=steps, batch_size=3, ema=.9, device='cpu')
        recipe.deviations = []                                         # they name the number of steps
        training.train(recipe, data_set, numbers, out, samples=samples, progress=False)
    run(5, tmp_path/'whole'); run(killed, tmp_path/'parts')
    shutil.rmtree(tmp_path/'parts'/'samples'); run(5, tmp_path/'parts')
    a, b = (training.load_weights(tmp_path/k/'weights.safetensors') for k in ('whole', 'parts'))
    assert all(torch.equal(v, b[0][net][k]) for net in a[0] for k, v in a[0][net].items()) and a[1] == b[1]
    assert (tmp_path/'whole'/'weights.safetensors').read_bytes() == (tmp_path/'parts'/'weights.safetensors').read_bytes()


def test_averaged_batch_norm_fits_its_weights(tmp_path):
    "Statistics of the last weights would be those of another network: after `averaged` they are those of the averaged one"
    recipe, _, data = recipes.build('context_encoder', config=dict(width=1/16, bottleneck=8))
    data_set = images.PhotoDataset(images.open_source('builtin'), data.size, masks.mask_sampler(data.masks))
    up = training.Updater(recipe, training.TrainConfig(steps=4, batch_size=4, ema=.9, device='cpu')); up.dataset = data_set
    stream = training._batches(up, data_set)
    for _ in range(4): up.update(next(stream))
    with training.averaged(up) as r:
        got = {k: v.clone() for k, v in r.G.state_dict().items()}
    assert all(torch.equal(got[k], up.ema[k]) for k, _ in recipe.G.named_parameters())
    own = recipe.G.state_dict()
    stat = next(k for k in got if k.endswith('running_mean'))
    assert not torch.allclose(got[stat], up.ema[stat]) and torch.equal(own[stat], up.ema[stat])     # ema only copies them


def test_stages_of_structure_flow(nets):
    "The flow stage looks at correctness only; the joint stage keeps the structure network as it was and saves both"
    flow = recipes.build('structure_flow.flow', config=without_vgg('structure_flow.flow'))[0]
    assert flow.config.lambda_style == flow.config.lambda_perc == 0 and flow.config.lambda_correctness == .25
    given = {n: nets[n] for n in ('structure', 'flow')}
    joint = recipes.build('structure_flow.joint', config=without_vgg('structure_flow.joint', width=1/16), checkpoints=given)[0]
    assert (joint.config.lambda_style, joint.config.lambda_perc) == (250, .1) and joint.generators().keys() == {'structure', 'flow'}
    before = {k: v.clone() for k, v in joint.generators()['structure'].state_dict().items()}
    data_set = images.PhotoDataset(images.open_source('builtin'), 64, masks.mask_sampler('bins'))
    training.train(joint, data_set, training.TrainConfig(steps=2, batch_size=2, device='cpu'), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in joint.generators()['structure'].state_dict().items())
    with pytest.raises(InputError, match="needs the network 'structure'"): recipes.build('structure_flow.joint', checkpoints=dict(flow=nets['flow']))


def test_smoothed_photographs_are_for_a_guide_that_is_smoothed(tmp_path):
    given = dict(recipe='structure_flow.structure', guide_dir=str(tmp_path))
    assert recipes.build_run(recipes.TrainParameters(**given))[0].name == 'structure_flow.structure'
    with pytest.raises(InputError, match='guide=canny needs no smoothed photographs'): recipes.build_run(recipes.TrainParameters(**given, options='guide=canny'))


def test_options_are_of_the_papers_config_and_of_the_run():
    built = lambda **given: recipes.build_run(recipes.TrainParameters(vgg_weights='none', **given))
    recipe, run, _ = built(options='lr=0.001,log_every=5,channels_last=True,min_lr=0.0001,betas=0.5+0.9', save_every=7)
    assert (recipe.config.lr, recipe.config.betas) == (.001, (.5, .9)) and recipe.deviations == ['lr=0.001 (preset: 0.0003)', 'betas=(0.5, 0.9) (preset: (0.0, 0.9))']
    assert (run.log_every, run.channels_last, run.min_lr, run.save_every) == (5, True, 1e-4, 7)
    assert (run.weights, run.picture_every) == ('fp32', 100)                                  # TrainConfig's, and the preset's
    for name in ('steps', 'batch_size', 'seed', 'precision', 'device', 'workers', 'ema', 'save_every'):
        with pytest.raises(InputError, match=f"^options: found '{name}=1'; {name} is a parameter of its own$"): built(options=f'{name}=1')
    with pytest.raises(InputError, match=r"^options: found 'wieghts=fp16'; did you mean 'weights'\? expected NAME=VALUE with a name of "
                                         r'EdgeConnectConfig \(width, .*\), or of TrainConfig \(accumulate, .*tensorboard\)$'): built(options='wieghts=fp16')
    with pytest.raises(InputError, match="^weights is 'fp8'; expected one of fp32, fp16$"): built(options='weights=fp8')


@pytest.mark.parametrize('name', recipes.RECIPES)
def test_what_is_suggested_is_not_refused(name):
    "Each name of the config and of the trainer, misspelt as an option and given as a parameter"
    config, own = recipes.RECIPES[name].config, {f.name for f in dataclasses.fields(recipes.TrainParameters)}
    names = {f.name for s in (config, training.TrainConfig) for f in dataclasses.fields(s)}
    for k in names | own:
        for wrong in {k.upper(), k + 's', k[:-1]} - names - own:
            line = one_line(recipes.parse_options, f'{wrong}=1', config, training.TrainConfig)
            assert not (own & set(re.findall("did you mean '(.*?)'", line))), line
            if wrong == k.upper(): assert (f'; {k} is a parameter of its own; expected' if k in own else f"; did you mean '{k}'? expected") in line
    for k in own: assert one_line(recipes.parse_options, f'{k}=1', config) == f"options: found '{k}=1'; {k} is a parameter of its own"
    for k in names - own - set(recipes.RECIPES[name].fixed):
        line = one_line(recipes.check_parameters, {'recipe': name, k: 1}, recipes.TrainParameters)
        assert line == f"parameter '{k}' is unknown; expected it in options: options='{k}=1'"


def test_a_name_counts_once():
    assert one_line(recipes.build_run, recipes.TrainParameters(options='lr=0.1,lr=0.2')) == "options: found 'lr=0.2' after lr=0.1; expected each name once"
    assert recipes.stage_options('edge_connect:lr=0.1; edge_connect.joint:lr=0.2', 'edge_connect.joint') == dict(lr=.2)
    assert one_line(recipes.stage_options, 'edge_connect:lr=0.1,lr=0.2', 'edge_connect.joint').startswith("options: found 'lr=0.2' after lr=0.1")


def commands(file):
    "(section, words behind `inpaint`) for each training line of a page, with the variables that the page defines; a section's own definition first"
    known = {}
    for section in re.split('^## ', (ROOT/file).read_text(), flags=re.M):
        known |= dict(re.findall(r'`(\$[A-Z])` = `([^`]*)`', section))
        for line in '\n'.join(re.findall('^```\n(.*?)^```', section, re.M | re.S)).replace('\\\n', ' ').splitlines():
            while 'inpaint train' in line and '$' in line: line = re.sub(r'\$[A-Z]', lambda m: known[m[0]], line)
            if 'inpaint train' in line: yield section.splitlines()[0], shlex.split(line.partition('inpaint ')[2], comments=True)


def without_networks(monkeypatch, name):
    "All that `build` checks before it makes networks, reads files or looks for VGG"
    monkeypatch.setattr(recipes, 'read_net', lambda net, path: recipes.Net({}, {}, path))
    monkeypatch.setattr(recipes, 'fingerprint', str)
    monkeypatch.setattr(recipes, 'make_vgg', lambda config, preset, layers: (recipes.shorten(config, layers, preset)[0] if layers else config, None, []))
    made = lambda config, nets, vgg: types.SimpleNamespace(config=config, deviations=[])
    monkeypatch.setitem(recipes.RECIPES, name, dataclasses.replace(recipes.RECIPES[name], make=made))


@pytest.mark.parametrize('file, least', [('README.md', 2), ('data/weights/README.md', 35)])
def test_every_printed_training_line_can_be_run(file, least, monkeypatch, tmp_path):
    "Names, types, options, masks and networks; a network comes from a line above, and weights that ship are fp16"
    monkeypatch.chdir(tmp_path)                                            # words are no paths there
    found, folders, halves = list(commands(file)), {}, {}
    assert len(found) >= least
    for section, words in found:
        args = cli.build_parser().parse_args(words)
        p = recipes.TrainParameters(**cli.parameters(recipes.TrainParameters, dict(recipe=args.recipe, preset=args.preset), args.p))
        assert {str(n) for n in recipes.parse_nets(p.checkpoints).values()} <= folders.setdefault(section, set()), (section, words)
        folders[section].add(args.out)
        without_networks(monkeypatch, p.recipe)
        _, run, data = recipes.build_run(p)
        masks.mask_sampler(data.masks, **data.mask_options)
        halves[section] = run.weights
    assert set(halves.values()) == {'fp32' if file == 'README.md' else 'fp16'}
