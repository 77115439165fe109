"""The papermill notebooks as a scheduler runs them: subprocesses, parameters by name, exit codes."""
import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from inpaint_lib.data.images import builtin_photograph

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def trained(papermill, tmp_path_factory):
    "A folder with a smoke run of the image stage (from true edges) and of the edge stage"
    out = tmp_path_factory.mktemp('runs')
    for name in ('edge', 'inpaint'):
        code, err, target = papermill('40_train', out, recipe=f'edge_connect.{name}', steps=4, vgg_weights='none', options='width=0.05',
                                      out_dir=out/name)
        assert code == 0, err
        target.rename(out/name/'40_train.ipynb')
    return out


def test_train_leaves_everything(trained):
    for name in ('edge', 'inpaint'):
        left = {p.name for p in (trained/name).iterdir()}
        assert {'40_train.ipynb', 'checkpoint.pt', 'weights.safetensors', 'log.jsonl', 'run.json', 'curves.png', 'samples.png'} <= left
    run = json.loads((trained/'inpaint'/'run.json').read_text())
    assert run['deviations'] and 'VGG' in run['deviations'][0].upper() and run['config']['vgg_weights'] == 'none'
    executed = nbformat.read(trained/'inpaint'/'40_train.ipynb', as_version=4)
    pictures = [o for c in executed.cells for o in c.get('outputs', []) if any(k.startswith('image/') for k in o.get('data', {}))]
    assert len(pictures) == 3                      # what it sees, curves, sample rows
    assert 'DEVIATION' in ''.join(str(c.get('outputs', '')) for c in executed.cells)
    assert len((trained/'inpaint'/'log.jsonl').read_text().splitlines()) == 4


def test_joint_stage_takes_both_then_evaluation(trained, papermill, tmp_path):
    nets = f"edge={trained/'edge'},inpaint={trained/'inpaint'}"
    code, err, _ = papermill('40_train', tmp_path, recipe='edge_connect.joint', steps=3, vgg_weights='none', options='width=0.05',
                             checkpoints=nets, out_dir=tmp_path/'joint')
    assert code == 0, err
    code, err, target = papermill('41_evaluate', tmp_path, checkpoint=tmp_path/'joint'/'weights.safetensors', size=48, per_bin=2,
                                  out_dir=tmp_path/'eval')
    assert code == 0, err
    report = json.loads((tmp_path/'eval'/'metrics.json').read_text())
    assert report['metrics']['all']['l1']['n'] == 12 and len(report['metrics']) == 7            # six bins and all
    for s in report['metrics'].values(): assert s['psnr']['lo'] <= s['psnr']['mean'] <= s['psnr']['hi']
    assert report['deviations'] and (tmp_path/'eval'/'rows.png').stat().st_size > 10_000
    assert report['photographs'] == 1 and report['checkpoint'] == 'joint/weights.safetensors'
    assert str(tmp_path) not in (tmp_path/'eval'/'metrics.json').read_text()                     # no machine paths


@pytest.mark.parametrize('name, measures', [('edge', {'precision', 'recall'}), ('inpaint', {'psnr_hole', 'l1', 'ssim_hole'})])
def test_a_single_stage_is_measured_by_its_recipe(name, measures, trained, papermill, tmp_path):
    photos, masks = tmp_path/'photos', tmp_path/'masks'
    for folder in (photos, masks): folder.mkdir()
    for i, which in enumerate(('coffee', 'chelsea')): Image.fromarray(builtin_photograph(which)[:200, 100:300]).save(photos/f'{i}.png')
    for i in range(3):
        mask = np.zeros((64, 64), np.uint8); mask[10:30 + 8*i, 10:40] = 255
        Image.fromarray(mask).save(masks/f'{i}.png')
    code, err, _ = papermill('41_evaluate', tmp_path, run=trained/name, size=48, data_dir=photos, mask_dir=masks, batch_size=2, out_dir=tmp_path/'eval')
    assert code == 0, err
    text = (tmp_path/'eval'/'metrics.json').read_text(); report = json.loads(text)
    assert report['recipe'] == f'edge_connect.{name}' and report['measured_as'] == 'run' and len(report['rows']) == 3   # each mask once
    assert measures <= set(report['metrics']['all']) and report['photographs'] == 2
    n = report['metrics']['all'][min(measures)]['n'] + report['undefined'].get(min(measures), 0)
    assert n == 3 and str(tmp_path) not in text and report['parameters']['run'] == name


@pytest.mark.parametrize('name, options, masks', [('context_encoder.center', 'overlap=7,bottleneck=8', 'context_encoder'),
                                                  ('structural_inpainting', 'bottleneck=8,joint_from=2', 'random_region'),
                                                  ('partial_conv', 'l1_space=unit', 'partial_conv_drawn')])
def test_every_paper_trains_and_its_weights_fill(name, options, masks, papermill, tmp_path):
    "D comes in the middle of the second one; masks and their options reach the data"
    given = dict(vgg_weights='none') if name != 'context_encoder.center' else {}
    code, err, _ = papermill('40_train', tmp_path, recipe=name, steps=4, options='width=0.05,' + options, out_dir=tmp_path/'run', **given)
    assert code == 0, err
    run = json.loads((tmp_path/'run'/'run.json').read_text())
    assert run['recipe'] == name and run['method'] == name.removesuffix('.center') and run['identity']['masks'] == masks
    assert run['identity']['mask_options'] == (dict(overlap=7) if 'overlap' in options else {})
    log = [json.loads(line) for line in (tmp_path/'run'/'log.jsonl').read_text().splitlines()]
    if 'joint_from' in options: assert ['g_adv' in r for r in log] == [False, False, True, True] and log[2]['lr'] < log[1]['lr']
    from inpaint_lib.inference import load_inpainter
    image, hole = builtin_photograph('chelsea')[:128, :128], np.zeros((128, 128), bool); hole[50:80, 50:80] = True
    filled = load_inpainter(run['method'], tmp_path/'run', 'cpu')(image, hole).image
    assert (filled[~hole] == image[~hole]).all() and (filled[hole] != image[hole]).any()


def test_structures_of_whole_files_are_kept_and_the_report_names_its_guide(papermill, tmp_path):
    "StructureFlow's first stage from a cache of smoothed photographs, then measured: it is shown the true structure, and the report says so"
    code, err, _ = papermill('40_train', tmp_path, recipe='structure_flow.structure', steps=2, batch_size=2, options='width=0.05',
                             guide_dir=tmp_path/'smooth', out_dir=tmp_path/'run')
    assert code == 0, err
    kept = list((tmp_path/'smooth').rglob('*.png'))
    assert 1 <= len(kept) <= 4 and json.loads((tmp_path/'run'/'run.json').read_text())['identity']['structures'] == 'of whole files'
    code, err, _ = papermill('41_evaluate', tmp_path, run=tmp_path/'run', size=64, per_bin=1, out_dir=tmp_path/'eval')
    assert code == 0, err
    report = json.loads((tmp_path/'eval'/'metrics.json').read_text())
    assert report['recipe'] == 'structure_flow.structure' and report['guide'] == 'structure of the whole picture, cut at the hole'


def test_an_evaluation_leaves_its_protocol_and_can_be_repeated(papermill, tmp_path):
    "From the manifest alone, in a folder with other names: the same hash, the same rows; another method can be compared pairwise"
    from inpaint_lib.protocol import EvaluationSet, paired_table, read_rows
    for folder, names in (('photos', 'ab'), ('renamed', 'zy')):
        (tmp_path/folder).mkdir()
        for new, which in zip(names, ('coffee', 'chelsea')): Image.fromarray(builtin_photograph(which)[:200, 100:300]).save(tmp_path/folder/f'{new}.png')
    code, err, target = papermill('41_evaluate', tmp_path, method='copy_mean', size=32, per_bin=1, seed=3, data_dir=tmp_path/'photos', out_dir=tmp_path/'a')
    assert code == 0, err
    report, rows, path = json.loads((tmp_path/'a'/'metrics.json').read_text()), read_rows(tmp_path/'a'/'rows.jsonl'), tmp_path/'a'/'manifest.json'
    evaluation = EvaluationSet.load(path, tmp_path/'renamed')
    assert report['protocol'] == evaluation.hash and f'protocol {evaluation.hash}' in target.read_text() and str(tmp_path) not in path.read_text()
    assert [(r['protocol'], r['id'], r['picture'], r['bin']) for r in rows] == [(evaluation.hash, e['id'], e['name'], e['bin']) for e in evaluation]
    assert [{k: r[k] for k in report['rows'][0]} for r in rows] == report['rows']
    for name, method in (('b', 'copy_mean'), ('c', 'telea')):
        code, err, _ = papermill('41_evaluate', tmp_path, method=method, manifest=path, data_dir=tmp_path/'renamed', out_dir=tmp_path/name)
        assert code == 0, err
    again = json.loads((tmp_path/'b'/'metrics.json').read_text())
    assert all(again[k] == report[k] for k in ('protocol', 'metrics', 'rows', 'photographs')) and again['parameters']['manifest'] == 'manifest.json'
    assert (tmp_path/'b'/'manifest.json').read_bytes() == path.read_bytes() and again['parameters']['size'] == 32
    assert (tmp_path/'b'/'rows.png').read_bytes() == (tmp_path/'a'/'rows.png').read_bytes()
    table = paired_table(read_rows(tmp_path/'c'/'rows.jsonl'), rows)
    assert table['all']['psnr_hole']['n'] == 6 and table['all']['l1_hole']['mean'] < 0


def test_resume_goes_on_and_does_not_begin_again(trained, papermill, tmp_path):
    "The second call has a kernel as papermill starts it, which shares no random numbers with the first one's"
    import shutil
    shutil.copytree(trained/'edge', tmp_path/'edge')
    code, err, target = papermill('40_train', tmp_path, forked_kernel=False, recipe='edge_connect.edge', steps=6, options='width=0.05', out_dir=tmp_path/'edge')
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path/'edge'/'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in lines] == [1, 2, 3, 4, 5, 6]
    before = (trained/'edge'/'log.jsonl').read_text().splitlines()
    assert (tmp_path/'edge'/'log.jsonl').read_text().splitlines()[:4] == before                 # not trained again


@pytest.mark.parametrize('stem, bad, says', [
    ('40_train', dict(step=5), "parameter 'step' is unknown; did you mean 'steps'?"),
    ('40_train', dict(steps='many'), "parameter 'steps' is 'many' (str); expected int"),
    ('40_train', dict(recipe='edge_connect.joint', vgg_weights='none'), "needs the network 'edge'"),
    ('41_evaluate', dict(methods='edge_connect'), "parameter 'methods' is unknown; did you mean 'method'?"),
    ('41_evaluate', dict(metrics='X'), "parameter 'metrics' is unknown"),
    ('41_evaluate', dict(recipes='X'), "parameter 'recipes' is unknown"),
    ('41_evaluate', dict(per_bin=0), "parameter 'per_bin' is 0; expected 1 or more"),
    ('41_evaluate', dict(batch_size=0), "parameter 'batch_size' is 0; expected 1 or more"),
    ('41_evaluate', dict(size=20), "parameter 'size' is 20; expected 24 or more"),
    ('41_evaluate', dict(masks='squares', method='telea'), "no masks 'squares'; expected one of"),
    ('40_train', dict(recipe='partial_conv', vgg_weights='none', size=50), '50x50 pixels; 6 layers need multiples of 64'),
    ('40_train', dict(mask_options='overlap'), "mask_options: found 'overlap', expected NAME=NUMBER"),
    ('41_evaluate', dict(manifest='nowhere.json', method='telea'), 'nowhere.json: not a manifest'),
    ('41_evaluate', dict(manifest='tests/golden/evaluation_builtin.json', seed=3), "parameter 'seed' is 3; expected 0 with a manifest, which says it"),
    ('41_evaluate', dict(run='nowhere'), 'nowhere: no such file; expected the folder of a finished run'),
])
def test_bad_parameters_end_with_a_clear_line_and_exit_code_1(stem, bad, says, papermill, tmp_path):
    code, err, _ = papermill(stem, tmp_path, **bad)
    assert code == 1
    assert says in err, err[-1500:]


def test_the_first_cells_of_41_can_be_run_again():
    "In JupyterLab: names of later cells are no parameters, a changed parameter counts, a hidden module is noticed"
    from inpaint_lib.core import InputError
    code = [''.join(c['source']) for c in nbformat.read(ROOT/'nbs'/'41_evaluate.ipynb', as_version=4).cells if c['cell_type'] == 'code']
    first, parameters, look = code[:3]
    assert 'per_bin = -1' in parameters and '_check_parameters(' in look
    space = {'__name__': '__main__'}
    for cell in (first, parameters, look): exec(cell, space)
    assert space['p'].size == 64
    space.update(rows=[], image=1)                                    # what later cells define
    for cell in (first, parameters, 'size = 32', look): exec(cell, space)
    assert space['p'].size == 32
    space = {'__name__': '__main__'}
    with pytest.raises(InputError, match="parameter 'images' is unknown"):
        for cell in (first, parameters, "images = '/photos'", look): exec(cell, space)


def test_evaluation_with_a_network_of_ones_own(papermill, tmp_path):
    "LPIPS on AlexNet's layers from a file (random ones here: no number of this test is an LPIPS)"
    from safetensors.torch import save_file
    from torchvision.models import alexnet
    save_file({k: v for k, v in alexnet().state_dict().items() if k.startswith('features')}, tmp_path/'alexnet.safetensors')
    code, err, _ = papermill('41_evaluate', tmp_path, method='telea', lpips=tmp_path/'alexnet.safetensors', per_bin=1, out_dir=tmp_path/'out')
    assert code == 0, err
    report = json.loads((tmp_path/'out'/'metrics.json').read_text())
    assert report['metrics']['all']['lpips']['mean'] > 0 and report['sets'] == {} and report['parameters']['lpips'] == 'alexnet.safetensors'
    assert {'edge_precision', 'edge_recall', 'edge_f1', 'gradient_error', 'chroma_error', 'boundary_jump'} <= report['metrics']['all'].keys()
