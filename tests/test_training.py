"""Runs that are interrupted: mid-epoch, with workers, refused when they would go on wrongly. (Killed at any moment: test_scheduled.py.)"""
import fcntl
import json
import random
import threading

import pytest
import torch

from inpaint_lib import recipes, training
from inpaint_lib.core import InputError
from inpaint_lib.data import images, masks

EDGE = dict(name='edge_connect.edge', config=dict(width=.05))
INPAINT = dict(name='edge_connect.inpaint', config=dict(width=.05, vgg_weights='none'))


@pytest.fixture(autouse=True)
def one_thread():
    "Same number of threads in every run that is compared; restored afterwards"
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def go(folder, steps, *, name, config, workers=0, **run):
    recipe, c, _ = recipes.build(name, 'tiny', config=config,
                                 run=dict(steps=steps, batch_size=3, device='cpu', workers=workers, save_every=5, ema=.9, **run))
    data = images.PhotoDataset(images.open_source('builtin'), 24, masks.mask_sampler('bins'))
    return training.train(recipe, data, c, folder, progress=False)


def state(folder):
    s = training.read_checkpoint(folder/'checkpoint.pt')
    return {f'{n}.{k}': v for n in ('G', 'D', 'ema') for k, v in s[n].items()}


def log(folder): return [{k: v for k, v in json.loads(line).items() if not k.endswith('_s')} for line in open(folder/'log.jsonl')]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('stage', [EDGE, INPAINT], ids=['edge', 'inpaint'])
def test_ten_and_ten_steps_are_twenty(stage, workers, tmp_path):
    "Batches of 3 from 4 photographs: step 10 is in the middle of an epoch"
    go(tmp_path/'whole', 20, **stage)
    go(tmp_path/'parts', 10, workers=workers, **stage)
    go(tmp_path/'parts', 20, workers=workers, **stage)
    a, b = state(tmp_path/'whole'), state(tmp_path/'parts')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log(tmp_path/'whole') == log(tmp_path/'parts') and len(log(tmp_path/'parts')) == 20


def refused(says, f, *args, **kw):
    with pytest.raises(InputError, match=says) as e: f(*args, **kw)
    assert '\n' not in str(e.value)


def test_checkpoints_that_do_not_fit(tmp_path):
    go(tmp_path, 5, **EDGE)
    refused("recipe 'edge_connect.edge', expected 'edge_connect.inpaint'", go, tmp_path, 6, **INPAINT)
    refused('config width was 0.05, now 0.1', go, tmp_path, 6, name=EDGE['name'], config=dict(width=.1))
    refused('seed was 0, now 1', go, tmp_path, 6, seed=1, **EDGE)
    path = tmp_path/'checkpoint.pt'
    whole = torch.load(path, weights_only=True)
    torch.save(whole | dict(format=99), path)
    refused('checkpoint format 99, expected 1', go, tmp_path, 6, **EDGE)
    torch.save(whole, path); path.write_bytes(path.read_bytes()[:-5000])
    refused('not a whole checkpoint', go, tmp_path, 6, **EDGE)


def test_any_damaged_checkpoint_is_one_line(tmp_path):
    go(tmp_path, 5, **EDGE)
    whole, rng, path = (tmp_path/'checkpoint.pt').read_bytes(), random.Random(0), tmp_path/'damaged.pt'
    damaged = [b'', b'hello', whole[:100], whole[:len(whole)//2]]
    for _ in range(40):
        b = bytearray(whole); at = rng.randrange(min(len(b), 4000)); b[at:at + 8] = rng.randbytes(8); damaged.append(bytes(b))
    for content in damaged:
        path.write_bytes(content)
        try: training.read_checkpoint(path)
        except InputError as e: assert '\n' not in str(e)
    torch.save(dict(format=1), path)
    refused('checkpoint without', training.read_checkpoint, path)


def test_a_run_goes_on_only_with_the_same_data_and_not_backwards(tmp_path):
    recipe, c, _ = recipes.build(preset='tiny', run=dict(steps=4, batch_size=2, device='cpu'), **EDGE)
    data = images.PhotoDataset(images.open_source('builtin'), 24, masks.mask_sampler('bins'))
    start = lambda steps, size: training.train(recipes.build(preset='tiny', run=dict(steps=steps, batch_size=2, device='cpu'), **EDGE)[0], data,
                                               training.TrainConfig(**{**vars(c), 'steps': steps}), tmp_path, identity=dict(size=size), progress=False)
    start(4, 24)
    refused('identity size was 24, now 32', start, 6, 32)
    refused('already at step 4', start, 2, 24)
    before = (tmp_path/'run.json').read_text(), (tmp_path/'weights.safetensors').stat().st_mtime_ns
    assert len(start(4, 24).records) == 4                                       # nothing left to do, nothing rewritten
    assert before == ((tmp_path/'run.json').read_text(), (tmp_path/'weights.safetensors').stat().st_mtime_ns)


def test_an_extended_run_that_is_interrupted_has_no_stale_weights(tmp_path):
    go(tmp_path, 5, **EDGE)
    assert (tmp_path/'weights.safetensors').exists()
    recipe, c, _ = recipes.build(name=EDGE['name'], preset='tiny', config=EDGE['config'],
                                 run=dict(steps=20, batch_size=3, device='cpu', workers=0, save_every=5, ema=.9))
    terms = recipe.g_terms
    recipe.g_terms = lambda batch, out: terms(batch, out) | (dict(x=out['pred'].sum()*float('nan')) if recipe.step == 7 else {})
    data = images.PhotoDataset(images.open_source('builtin'), 24, masks.mask_sampler('bins'))
    refused("step 7: loss term 'x'", training.train, recipe, data, c, tmp_path, progress=False)
    assert not (tmp_path/'weights.safetensors').exists() and training.read_checkpoint(tmp_path/'checkpoint.pt')['step'] == 5


def test_rows_show_the_generator_that_is_saved(tmp_path):
    "Averaged weights: the pictures at the end and weights.safetensors are the same network"
    recipe, c, _ = recipes.build(preset='tiny', run=dict(steps=6, batch_size=2, device='cpu', ema=.9), **INPAINT)
    data = images.PhotoDataset(images.open_source('builtin'), 24, masks.mask_sampler('bins'))
    samples = images.collate([data[9, 0], data[9, 1]])
    result = training.train(recipe, data, c, tmp_path, samples=samples, progress=False)
    nets, _ = training.load_weights(tmp_path/'weights.safetensors')
    other, *_ = recipes.build(preset='tiny', **INPAINT)
    other.G.load_state_dict(nets['inpaint']); other.eval()
    with torch.no_grad(): pred = other(samples)['pred']
    assert all(torch.equal(row['pred'], p) for row, p in zip(result.rows, pred))
    with torch.no_grad(): raw = result.recipe.eval()(samples)['pred']
    assert not torch.equal(raw, pred)                                           # the test would notice the raw generator


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    recipe, c, _ = recipes.build(preset='tiny', run=dict(steps=20, batch_size=2, device='cpu', save_every=2), **INPAINT)
    terms = recipe.g_terms
    recipe.g_terms = lambda batch, out: terms(batch, out) | (dict(style=out['pred'].sum()*float('inf')) if recipe.step == 5 else {})
    data = images.PhotoDataset(images.open_source('builtin'), 24, masks.mask_sampler('bins'))
    refused("step 5: loss term 'style' is", training.train, recipe, data, c, tmp_path, progress=False)
    assert training.read_checkpoint(tmp_path/'checkpoint.pt')['step'] == 4
    assert not (tmp_path/'weights.safetensors').exists()


def test_unreadable_files_are_skipped_counted_and_named(tmp_path, capsys):
    from PIL import Image
    folder = tmp_path/'photos'; folder.mkdir()
    for n in range(3): Image.fromarray(images.builtin_photograph('coffee')[:64, n*64:n*64+64]).save(folder/f'{n}.png')
    (folder/'cut.png').write_bytes((folder/'0.png').read_bytes()[:500])
    recipe, c, _ = recipes.build(preset='tiny', run=dict(steps=6, batch_size=4, device='cpu'), **EDGE)
    data = images.PhotoDataset(images.open_source(folder), 24, masks.mask_sampler('bins'))
    result = training.train(recipe, data, c, tmp_path/'run', progress=False)
    assert len(result.skipped) == 1 and 'cut.png' in result.skipped[0]
    assert '1 unreadable files were skipped' in capsys.readouterr().out
    assert json.loads((tmp_path/'run'/'run.json').read_text())['skipped'] == result.skipped


def test_a_part_without_a_readable_file_is_left_out(tmp_path):
    "batch 2 in two parts of one picture: a bad file empties a part; the run goes on, and the count survives a resume"
    from PIL import Image
    folder = tmp_path/'photos'; folder.mkdir()
    for n in range(3): Image.fromarray(images.builtin_photograph('coffee')[:64, n*64:n*64+64]).save(folder/f'{n}.png')
    (folder/'cut.png').write_bytes((folder/'0.png').read_bytes()[:500])
    def start(steps):
        recipe, c, _ = recipes.build(preset='tiny', run=dict(steps=steps, batch_size=2, accumulate=2, device='cpu', save_every=2, seed=1), **INPAINT)
        data = images.PhotoDataset(images.open_source(folder), 24, masks.mask_sampler('bins'))
        return training.train(recipe, data, c, tmp_path/'run', progress=False)
    assert len(start(6).skipped) == 1
    assert len(start(7).skipped) == 1 and len(start(7).records) == 7


def test_resume_never_refuses_to_overwrite(tmp_path):
    go(tmp_path, 5, **EDGE)
    recipe, c, _ = recipes.build(preset='tiny', **EDGE)
    refused('already holds a checkpoint', training.train, recipe, None, c, tmp_path, resume='never')


def test_bf16_trains(tmp_path):
    result = go(tmp_path, 6, precision='bf16', **INPAINT)
    assert all(torch.isfinite(torch.tensor(r['g_total'])) for r in result.records)
    assert all(p.dtype == torch.float32 for p in result.recipe.parameters())        # float32 master weights


@pytest.mark.parametrize('bad, says', [(dict(precision='fp16'), 'precision is .fp16.; expected one of fp32, bf16'), (dict(steps=0), 'steps is 0'),
                                       (dict(device='banana'), "device is 'banana'"), 
                                       (dict(ema=5), 'ema is 5'), (dict(workers=-7), 'workers is -7'),
                                       (dict(batch_size=3, accumulate=2), 'does not divide')])
def test_bad_run_numbers(bad, says, tmp_path):
    def attempt():
        recipe, c, _ = recipes.build(preset='tiny', run=dict(dict(steps=2, batch_size=2, device='cpu'), **bad), **EDGE)
        training.train(recipe, images.PhotoDataset(images.open_source('builtin'), 24, masks.mask_sampler('bins')), c, tmp_path, progress=False)
    refused(says, attempt)


def test_paper_preset_refuses_to_run_without_vgg():
    refused("preset 'paper' needs VGG", recipes.build, 'edge_connect.inpaint', 'paper', config=dict(vgg_weights='none'))


def test_partial_vgg_file_names_the_missing_layer(tmp_path):
    "A file that ends at conv1_2 gives relu1_1; the losses can be shortened to it, on purpose"
    from safetensors.torch import save_file
    shapes = {'features.0': (64, 3), 'features.2': (64, 64)}
    save_file({f'{k}.{p}': torch.randn((o, i, 3, 3) if p == 'weight' else (o,))*.1 for k, (o, i) in shapes.items() for p in ('weight', 'bias')},
              tmp_path/'vgg.safetensors')
    with_file = dict(config=dict(width=.05, vgg_weights=str(tmp_path/'vgg.safetensors')), name='edge_connect.inpaint')
    refused('vgg.safetensors', recipes.build, **with_file)
    recipe, *_ = recipes.build(vgg_layers='relu1_1', **with_file)
    assert tuple(recipe.config.content_layers) == ('relu1_1',) and not recipe.config.style_layers


def test_tensorboard_has_each_step_once_and_the_sample_rows(tmp_path):
    "A run that is stopped behind its last checkpoint repeats steps; the board forgets those that were repeated"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    recipe, run, dataset = made(tmp_path, 9)
    samples = images.collate([dataset[0, i] for i in range(2)])
    def stop(record, draws):
        if record['step'] == 5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): training.train(recipe, dataset, run, tmp_path, samples=samples, watch=stop, progress=False)
    recipe, run, dataset = made(tmp_path, 9)
    training.train(recipe, dataset, run, tmp_path, samples=samples, progress=False)
    board = EventAccumulator(str(tmp_path/'tensorboard')).Reload()
    assert [e.step for e in board.Scalars('g_total')] == list(range(1, 10)) and {'lr', 'd_adv', 'fm', 'm_recall'} <= set(board.Tags()['scalars'])
    assert [e.value for e in board.Scalars('g_total')] == pytest.approx([r['g_total'] for r in log(tmp_path)], rel=1e-6)
    assert [e.step for e in board.Images('samples')] == [9]


def made(folder, steps):
    recipe, run, data = recipes.build('edge_connect.edge', 'smoke', config=dict(width=.05), run=dict(steps=steps, save_every=4, device='cpu', tensorboard=True))
    return recipe, run, images.PhotoDataset(images.open_source('builtin'), 24, masks.mask_sampler(data.masks))


def test_a_folder_in_use_is_refused_and_nothing_in_it_changes(tmp_path):
    go(tmp_path, 2, **EDGE)
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with training.locked(tmp_path):
        assert training.in_use(tmp_path)
        refused('another process is training in this folder', go, tmp_path, 4, **EDGE)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} and not training.in_use(tmp_path)


def test_readers_do_not_take_each_other_for_a_trainer(tmp_path):
    "Somebody else asks at the same moment: still not in use. A trainer that starts then waits for the moment to pass"
    with training.locked(tmp_path): pass
    reader = open(tmp_path/'.lock', 'rb')
    fcntl.flock(reader, fcntl.LOCK_SH)
    assert not training.in_use(tmp_path)
    refused('another process is training', lambda: training.locked(tmp_path, wait=.1).__enter__())
    leaves = threading.Timer(.2, reader.close); leaves.start()
    with training.locked(tmp_path, wait=5.): assert training.in_use(tmp_path)
    leaves.join(); assert not training.in_use(tmp_path)


def test_a_damaged_record_of_starts_does_not_stop_a_run(tmp_path, capsys):
    go(tmp_path, 2, **EDGE); (tmp_path/'started.json').write_text('{"starts": [')
    go(tmp_path, 4, **EDGE)
    assert 'its earlier starts are lost' in capsys.readouterr().out
    assert [s['step'] for s in json.loads((tmp_path/'started.json').read_text())['starts']] == [2]


def test_a_refusal_takes_nothing_from_a_finished_run(tmp_path):
    "More steps are wanted, but the log is damaged: weights, pictures and run.json stay"
    go(tmp_path, 2, **EDGE); (tmp_path/'samples.png').touch()
    (tmp_path/'log.jsonl').write_text('{"step": 1}\nno json\n{"step": 2}\n')
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    refused('log.jsonl', go, tmp_path, 4, **EDGE)
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before


def test_temporary_files_of_other_runs_stay(tmp_path):
    (tmp_path/'inner').mkdir(); others, own = tmp_path/'inner'/'.checkpoint.pt.x.tmp', tmp_path/'.checkpoint.pt.y.tmp'
    others.touch(); own.touch(); go(tmp_path, 2, **EDGE)
    assert others.exists() and not own.exists()
