"The command `inpaint`: what it writes, its exit codes, and one line for each mistake"
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from inpaint_lib import cli
from inpaint_lib.papers.edge_connect import EdgeGenerator, InpaintGenerator
from tiny_weights import save_tiny, save_untrained

H, W = 93, 118
YY, XX = np.mgrid[:H, :W]
BASE = np.stack([(XX*2) % 256, (YY*2) % 256, (XX + YY) % 256], -1).astype(np.uint8)
HOLE = np.zeros((H, W), bool)
HOLE[30:60, 40:80] = True


@pytest.fixture(scope='module')
def weights(tmp_path_factory): return save_tiny(tmp_path_factory.mktemp('w')/'w.safetensors')


@pytest.fixture()
def files(tmp_path):
    "One picture, one mask"
    Image.fromarray(BASE).save(tmp_path/'a.png'); Image.fromarray((HOLE*255).astype(np.uint8)).save(tmp_path/'m.png')
    return tmp_path


def same_outside(a, b):
    a, b = (np.asarray(Image.open(p).convert('RGBA')) for p in (a, b))
    return a.shape == b.shape and (a[~HOLE] == b[~HOLE]).all() and (a[HOLE] != b[HOLE]).any()


def test_fill_two_files(files, weights, run):
    modes = {'rgb': Image.fromarray(BASE), 'grey': Image.fromarray(BASE[..., 0]), 'rgba': Image.fromarray(np.dstack([BASE, 255 - BASE[..., :1]]))}
    for name, im in modes.items():
        im.save(files/f'{name}.png')
        code, out, err = run('fill', files/f'{name}.png', files/'m.png', '--method', 'edge_connect', '--checkpoint', weights, '--out', files/f'{name}_o.png')
        assert (code, err) == (0, '') and f'{name}_o.png' in out
        assert same_outside(files/f'{name}.png', files/f'{name}_o.png') and Image.open(files/f'{name}_o.png').mode == im.mode


def test_fill_into_a_folder_that_exists(files, weights, run):
    (files/'out').mkdir(); Image.fromarray(BASE).save(files/'b.jpg')
    assert run('fill', files/'b.jpg', files/'m.png', '--checkpoint', weights, '--out', files/'out')[0] == 0
    assert same_outside(files/'b.jpg', files/'out'/'b.png')                   # a JPEG becomes a lossless file


def test_jpeg_is_written_with_a_note(files, weights, run):
    code, _, err = run('fill', files/'a.png', files/'m.png', '--checkpoint', weights, '--out', files/'o.jpg')
    assert code == 0 and 'JPEG is lossy' in err and (files/'o.jpg').exists()


def test_fill_two_folders(files, weights, run):
    for d in ('in', 'masks'): (files/d).mkdir()
    for name in ('one.png', 'two.jpg', 'three.png'): Image.fromarray(BASE).save(files/'in'/name)
    for name in ('one.png', 'two.png', 'three.bmp'): Image.fromarray((HOLE*255).astype(np.uint8)).save(files/'masks'/name)
    code, out, _ = run('fill', files/'in', files/'masks', '--checkpoint', weights, '--out', files/'out')
    assert code == 0 and sorted(p.name for p in (files/'out').iterdir()) == ['one.png', 'three.png', 'two.png']
    assert all(same_outside(p, files/'out'/f'{p.stem}.png') for p in (files/'in').iterdir())


def test_one_mask_for_all_and_bad_pictures_are_named(files, weights, run):
    (files/'in').mkdir()
    Image.fromarray(BASE).save(files/'in'/'good.png'); Image.fromarray(BASE[:50]).save(files/'in'/'small.png')
    (files/'in'/'broken.png').write_text('no picture')
    code, out, err = run('fill', files/'in', files/'m.png', '--checkpoint', weights, '--out', files/'out')
    assert code == 2 and '2 of 3 pictures not filled' in err and 'broken.png' in err and '118 x 93' in err
    assert [p.name for p in (files/'out').iterdir()] == ['good.png']


def test_a_picture_without_mask_is_named(files, weights, run):
    for d in ('in', 'masks'): (files/d).mkdir()
    for name in ('one', 'two'): Image.fromarray(BASE).save(files/'in'/f'{name}.png')
    Image.fromarray((HOLE*255).astype(np.uint8)).save(files/'masks'/'one.png')
    code, _, err = run('fill', files/'in', files/'masks', '--checkpoint', weights, '--out', files/'out')
    assert code == 2 and 'no mask called two' in err and (files/'out'/'one.png').exists()


@pytest.mark.parametrize('argv, message', [
    (('fill', 'none.png', 'm.png', '--out', 'o.png'), 'none.png: no such file'),
    (('fill', 'a.png', 'none.png', '--out', 'o.png'), 'none.png: no such file'),
    (('fill', 'a.png', 'a.png', '--out', 'a.png'), 'is an input'),
    (('fill', 'a.png', 'm.png', '--out', 'm.png'), 'is an input'),
    (('fill', 'a.png', 'm.png', '--out', 'o.xyz'), "can't write '.xyz'"),
    (('fill', 'a.png', 'm.png', '--out', 'o.png', '--method', 'magic'), "no method 'magic'"),
    (('fill', 'a.png', 'm.png', '--out', 'o.png', '--device', 'cuda:99'), "device 'cuda:99'"),
    (('fill', 'a.png', 'empty', '--out', 'o.png'), 'expected two files or two folders'),
    (('fill', 'empty', 'm.png', '--out', 'out'), 'no image in it'),
    (('fill', 'a.png', 'm.png'), '--out'),
    (('paint',), "invalid choice: 'paint'"), ((), 'required'),
    (('train', 'edge_connect.edge', '-p', 'stepps', '3'), "parameter 'stepps' is unknown; did you mean 'steps'?"),
    (('train', 'edge_connect.edge', '-p', 'tensorboard', 'true'), "parameter 'tensorboard' is unknown; expected it in options: options='tensorboard=true'"),
    (('train', 'edge_connect.edge', '-p', 'lr', '0.01'), "parameter 'lr' is unknown; expected it in options: options='lr=0.01'"),
    (('train', 'edge_connect.edge', '-p', 'steps', 'many'), "parameter 'steps' is 'many' (str); expected int"),
    (('evaluate', 'telea', '-p', 'mask', 'bins'), "parameter 'mask' is unknown; did you mean 'masks'?"),
    (('train', 'nosuch'), "recipe 'nosuch' is unknown; expected one of edge_connect.edge"),
    (('train', 'edge_connect.edge', '--preset', 'huge'), "invalid choice: 'huge'"),
    (('fill', 'a.png', 'm.png', '--out', 'o.png', '--option', 'composit=1'), "no option 'composit'; expected one of: composite_edges (True)"),
    (('fill', 'a.png', 'm.png', '--out', 'o.png', '--option', 'composite_edges=perhaps'), "composite_edges is 'perhaps', expected bool"),
    (('fill', 'a.png', 'm.png', '--out', 'o.png', '--option', 'composite_edges'), 'expected NAME=VALUE'),
    (('evaluate', 'nothing'), "'nothing' is no file and no method"),
    (('import', 'magic', 'a', '--out', 'w.safetensors'), "'magic'"),
    (('import', 'edge_connect', 'a', '--out', 'w.safetensors'), '1 files; expected 2'),
    (('import', 'edge_connect', 'a', 'b', '--out', 'w.pth'), 'ends in .safetensors'),
    (('import', 'edge_connect', 'none.pth', 'b', '--out', 'w.safetensors'), 'none.pth: no such file'),
    (('import', 'deepfill_v2', 'a', 'b', '--out', 'w.safetensors'), '2 files; expected 1'),
    (('import', 'structure_flow', 'a', '--out', 'w.safetensors'), '1 files; expected 2: net_s_gen.pth net_f_gen.pth'),
    (('import', 'deepfill_v2', 'a', '--out', 'w.safetensors', '--option', 'bgr'), '--option bgr: expected NAME=VALUE'),
])
def test_mistakes_are_one_line(argv, message, files, weights, run, monkeypatch):
    monkeypatch.chdir(files); (files/'empty').mkdir()
    if argv[:1] == ('fill',) and '--method' not in argv and '--out' in argv: argv += ('--checkpoint', weights)
    before = (files/'a.png').read_bytes(), (files/'m.png').read_bytes()
    code, _, err = run(*argv)
    assert code == 2 and message in err
    assert before == ((files/'a.png').read_bytes(), (files/'m.png').read_bytes()) and not (files/'o.png').exists()
    assert not (files/'runs').exists()                                # refused before anything was started


def test_an_option_of_the_method(files, weights, run):
    for name, option in (('o.png', ()), ('same.png', ('--option', 'composite_edges=true')), ('test.png', ('--option', 'composite_edges=false'))):
        assert run('fill', files/'a.png', files/'m.png', '--checkpoint', weights, '--out', files/name, *option)[0] == 0
    ours, same, raw = (np.asarray(Image.open(files/n)) for n in ('o.png', 'same.png', 'test.png'))
    assert (ours == same).all() and (ours[HOLE] != raw[HOLE]).any() and (ours[~HOLE] == raw[~HOLE]).all()


def test_a_sketch_as_a_file_and_as_a_folder(files, weights, run):
    lines = np.zeros((H, W), np.uint8); lines[45] = 255
    (files/'lines').mkdir(); Image.fromarray(lines).save(files/'lines'/'a.png')
    (files/'in').mkdir(); Image.fromarray(BASE).save(files/'in'/'a.png'); Image.fromarray(BASE).save(files/'in'/'b.png')
    guided = save_untrained(files/'s.safetensors', 'deepfill_v2.sketch')
    how = ('--method', 'deepfill_v2', '--checkpoint', guided)
    code, _, err = run('fill', files/'a.png', files/'m.png', *how, '--sketch', files/'lines'/'a.png', '--out', files/'o.png')
    assert (code, err) == (0, '') and same_outside(files/'a.png', files/'o.png')
    code, out, err = run('fill', files/'in', files/'m.png', *how, '--sketch', files/'lines', '--out', files/'out')      # b has none
    assert code == 0 and len(list((files/'out').iterdir())) == 2
    assert err == f"inpaint: {files/'in'/'b.png'}: no sketch called b; filled without\n"
    Image.fromarray(0*lines).save(files/'lines'/'b.png')
    code, out, err = run('fill', files/'in', files/'m.png', *how, '--sketch', files/'lines', '--out', files/'out')
    assert code == 0 and err.count('\n') == 1 and f"{files/'lines'/'b.png'}: no line of the sketch lies in the hole" in err
    code, _, err = run('fill', files/'a.png', files/'m.png', '--checkpoint', weights, '--sketch', files/'lines'/'a.png', '--out', files/'no.png')
    assert code == 2 and 'a sketch needs weights of recipe deepfill_v2.sketch' in err and not (files/'no.png').exists()
    for wrong, says in ((files/'nothing.png', 'no such file'), (files/'in', 'is an input')):
        code, _, err = run('fill', files/'in'/'a.png', files/'m.png', *how, '--sketch', wrong, '--out', files/'in'/'a.png')
        assert code == 2 and says in err


def test_edges_and_a_structure_as_files(files, weights, run):
    lines = np.zeros((H, W), np.uint8); lines[45] = 255
    Image.fromarray(lines).save(files/'e.png'); Image.fromarray(255 - BASE).save(files/'s.png')
    joint = save_untrained(files/'sf.safetensors', 'structure_flow.joint')
    for flag, guide, how in (('--edges', 'e.png', ('--checkpoint', weights)), ('--structure', 's.png', ('--method', 'structure_flow', '--checkpoint', joint))):
        fill = ('fill', files/'a.png', files/'m.png', *how, '--device', 'cpu', '--out')
        assert run(*fill, files/'plain.png')[0] == 0
        code, _, err = run(*fill, files/'led.png', flag, files/guide)
        assert (code, err) == (0, '') and same_outside(files/'a.png', files/'led.png')
        assert (np.asarray(Image.open(files/'led.png')) != np.asarray(Image.open(files/'plain.png'))).any()
        code, _, err = run(*fill, files/'no.png', '--sketch', files/'e.png', flag, files/guide)
        assert code == 2 and f'--sketch and {flag}: expected one guide' in err
    code, _, err = run('fill', files/'a.png', files/'m.png', '--method', 'telea', '--edges', files/'e.png', '--out', files/'no.png')
    assert code == 2 and 'first network of --method edge_connect' in err and not (files/'no.png').exists()


def test_a_sketch_without_checkpoint_takes_the_weights_for_sketches(files, run, monkeypatch):
    from inpaint_lib import inference
    monkeypatch.setattr(inference, 'checkout', lambda: files)
    lines = np.zeros((H, W, 4), np.uint8); lines[45, :, 3] = 255                       # black on nothing
    Image.fromarray(lines).save(files/'s.png'); save_untrained(files/'plain.safetensors', 'deepfill_v2')
    how = ('fill', files/'a.png', files/'m.png', '--sketch', files/'s.png', '--out', files/'o.png', '--device', 'cpu')
    code, _, err = run(*how, '--method', 'deepfill_v2')
    assert code == 2 and 'inpaint train deepfill_v2.sketch ' in err and not (files/'o.png').exists()
    (files/'data'/'weights').mkdir(parents=True); save_untrained(files/'data'/'weights'/'deepfill_v2.sketch.safetensors', 'deepfill_v2.sketch')
    code, _, err = run(*how, '--method', 'deepfill_v2')
    assert code == 0 and 'turned round' in err and err.count('\n') == 1 and same_outside(files/'a.png', files/'o.png')
    for other in ('edge_connect', 'telea'):
        code, _, err = run(*how, '--method', other)
        assert code == 2 and 'a sketch needs weights of recipe deepfill_v2.sketch' in err and f'found method {other}' in err
    for option in ('device=cpu', 'sketch=true', 'method=telea'):
        code, _, err = run(*how, '--method', 'deepfill_v2', '--option', option)
        assert code == 2 and f"no option '{option.split('=')[0]}'" in err


def test_more_than_one_picture_in_a_file(files, weights, run):
    for name in ('pages.tif', 'moves.gif'):
        Image.fromarray(BASE).save(files/name, save_all=True, append_images=[Image.fromarray(255 - BASE)])
        code, _, err = run('fill', files/name, files/'m.png', '--checkpoint', weights, '--out', files/'o.png')
        assert code == 0 and '2 frames or pages; only the first is used' in err
    assert not run('fill', files/'a.png', files/'m.png', '--checkpoint', weights, '--out', files/'o.png')[2]


def test_one_name_in_two_subfolders(files, weights, run):
    for d in ('x', 'y'): (files/'in'/d).mkdir(parents=True); Image.fromarray(BASE).save(files/'in'/d/'a.png')
    code, _, err = run('fill', files/'in', files/'m.png', '--checkpoint', weights, '--out', files/'out')
    assert code == 2 and 'x/a.png and y/a.png have one name' in err


def test_import_then_fill(files, run):
    G1, G2 = EdgeGenerator(width=1/16), InpaintGenerator(width=1/16)
    torch.save({'iteration': 1, 'generator': {'module.' + k: v for k, v in G1.state_dict().items()}}, files/'EdgeModel_gen.pth')
    torch.save({'iteration': 1, 'generator': G2.state_dict()}, files/'InpaintingModel_gen.pth')
    code, out, _ = run('import', 'edge_connect', files/'EdgeModel_gen.pth', files/'InpaintingModel_gen.pth', '--out', files/'w.safetensors')
    assert code == 0 and 'width 0.0625' in out
    assert run('fill', files/'a.png', files/'m.png', '--checkpoint', files/'w.safetensors', '--out', files/'o.png')[0] == 0
    assert same_outside(files/'a.png', files/'o.png')


def test_import_deepfill_with_options(files, run):
    "Published names of every layer, tiny widths (weights times 3: untrained gates answer too quietly to be seen in bytes); what the file does not say comes as options"
    from inpaint_lib.official import LAYOUTS, our_names
    from inpaint_lib.papers.deepfill_v2 import DeepFillV2Generator
    torch.manual_seed(0); G, layout = DeepFillV2Generator(1/12), LAYOUTS['networks_tf']
    names = [f'{n}.conv.{w}' for n in layout.layers for w in ('weight', 'bias')]
    back = {v: k for k, v in zip(names, our_names(dict.fromkeys(names), layout))}
    torch.save({'G': {back[k]: 3*v for k, v in G.state_dict().items()}, 'n_iter': 3}, files/'v2.pth')
    for name, options in (('rgb', ()), ('bgr', ('channels=bgr',)), ('plain', ('fuse=false', 'mask_steps=2'))):
        words = [w for o in options for w in ('--option', o)]
        code, out, _ = run('import', 'deepfill_v2', files/'v2.pth', '--out', files/f'{name}.safetensors', *words)
        assert code == 0 and 'deepfill_v2, width 0.0833333' in out
        weights = ('--checkpoint', files/f'{name}.safetensors', '--method', 'deepfill_v2')
        assert run('fill', files/'a.png', files/'m.png', *weights, '--out', files/f'{name}.png')[0] == 0
        assert same_outside(files/'a.png', files/f'{name}.png')
    rgb, bgr = (np.asarray(Image.open(files/f'{n}.png').convert('RGB')) for n in ('rgb', 'bgr'))
    assert (rgb[HOLE] != bgr[HOLE]).any()
    for option, message in (('fuse=perhaps', "fuse is 'perhaps'"), ('channel=bgr', "no option 'channel'; known: padding, channels")):
        code, _, err = run('import', 'deepfill_v2', files/'v2.pth', '--out', files/'x.safetensors', '--option', option)
        assert code == 2 and message in err and not (files/'x.safetensors').exists()


def test_methods_lists_them(run):
    code, out, err = run('methods')
    assert code == 0 and not err and out.splitlines()[0].split() == ['method', 'paper', 'weights']
    assert any(line.startswith('edge_connect ') and '1901.00212' in line for line in out.splitlines())


@pytest.mark.parametrize('command', ['fill', 'train', 'evaluate', 'runs', 'shards', 'import', 'methods'])
def test_help(command, run):
    code, out, err = run(command, '--help')
    assert code == 0 and out.startswith(f'usage: inpaint {command}') and not err


@pytest.fixture()
def notebooks(tmp_path, monkeypatch):
    "Stand-ins for 40_train and 41_evaluate that only store or refuse their parameters"
    nbs = tmp_path/'nbs'; nbs.mkdir()
    for name, params in {'40_train': "recipe, preset, out_dir, ema, data_dir, checkpoints = '', '', '', 0., '', ''",
                         '41_evaluate': "method, checkpoint, run, data_dir, out_dir, manifest = '', '', '', 'builtin', '', ''"}.items():
        params = '\n'.join(f'{k.strip()} = {v.strip()}' for k, v in zip(*(s.split(',') for s in params.split(' = '))))
        keep = "import json, os, pathlib\nnames = {k: v for k, v in globals().items() if isinstance(v, (str, int, float)) and k[0] != '_'}\n" \
               "class InputError(ValueError): pass\nif names.get('ema') == 14: names['nothing']\n" \
               "if names.get('ema') == 13: raise InputError('ema is 13\\nand that is unlucky')\nprint('working in', os.path.basename(os.getcwd()))\n" \
               "pathlib.Path(out_dir, 'got.json').write_text(json.dumps(names))"
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(params, metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(keep)])
        nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
        nbformat.write(nb, nbs/f'{name}.ipynb')
    monkeypatch.setattr(cli, 'notebook', lambda name: nbs/f'{name}.ipynb')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def got(path):
    import json
    return json.loads((Path(path)/'got.json').read_text())


def test_train_runs_the_notebook(notebooks, run):
    (notebooks/'photos').mkdir(); (notebooks/'e.safetensors').write_bytes(b'')
    code, out, err = run('train', 'edge_connect.edge', '-p', 'ema', '1e-4', '-p', 'data_dir', 'photos', '-p', 'checkpoints', 'edge=e.safetensors', '--out', 'r')
    assert code == 0 and 'working in nbs' in out and (notebooks/'r'/'40_train.ipynb').exists(), err
    g = got('r')
    assert (g['recipe'], g['preset'], g['ema'], g['out_dir']) == ('edge_connect.edge', 'tiny', 1e-4, str(notebooks/'r'))
    assert g['data_dir'] == str(notebooks/'photos') and g['checkpoints'] == f'edge={notebooks}/e.safetensors'
    code, _, err = run('train', 'edge_connect.edge', '-p', 'ema', '13')
    assert code == 2 and 'ema is 13 (InputError' in err and (notebooks/'runs'/'edge_connect.edge-tiny'/'40_train.ipynb').exists()


def test_a_bug_in_a_notebook_is_shown_as_one(notebooks, run):
    code, _, err = run('train', 'edge_connect.edge', '-p', 'ema', '14')
    assert code == 1 and 'a bug in 40_train.ipynb, not in your input: KeyError' in err
    assert "names['nothing']" in err and "KeyError: 'nothing'" in err and '\x1b' not in err and err.count('\n') < 20


def test_evaluate_takes_a_method_or_weights(notebooks, weights, run):
    assert run('evaluate', 'edge_connect', '--out', 'e')[0] == 0
    assert (got('e')['method'], got('e')['checkpoint'], got('e')['data_dir']) == ('edge_connect', '', 'builtin')
    assert run('evaluate', weights, '--data', notebooks/'nbs')[0] == 0
    g = got('runs/evaluate-edge_connect')
    assert (g['method'], g['checkpoint'], g['data_dir']) == ('edge_connect', str(weights), str(notebooks/'nbs'))


def test_evaluate_takes_a_manifest_seen_from_here(notebooks, run):
    (notebooks/'a').mkdir(); (notebooks/'a'/'manifest.json').write_text('{}'); (notebooks/'photos').mkdir()
    assert run('evaluate', 'telea', '--data', 'photos', '-p', 'manifest', 'a/manifest.json', '--out', 'e')[0] == 0
    assert (got('e')['manifest'], got('e')['data_dir']) == (str(notebooks/'a'/'manifest.json'), str(notebooks/'photos'))


def test_evaluate_takes_a_single_stage(notebooks, run):
    from inpaint_lib.training import save_weights
    (notebooks/'edge').mkdir()
    save_weights(notebooks/'edge'/'weights.safetensors', dict(edge=EdgeGenerator(width=1/16).state_dict()),
                 dict(method='edge_connect', recipe='edge_connect.edge'))
    assert run('evaluate', 'edge')[0] == 0
    g = got('runs/evaluate-edge_connect.edge')
    assert (g['run'], g['checkpoint'], g['method']) == (str(notebooks/'edge'), '', '')


def test_without_a_checkout_one_line_says_so(run, monkeypatch):
    monkeypatch.setattr('inpaint_lib.core.checkout', lambda: None)
    code, _, err = run('train', 'edge_connect.edge')
    assert code == 2 and 'need a checkout' in err


def test_types_of_values():
    cases = {'8': 8, '-1': -1, '0.5': .5, '1e-4': 1e-4, '1E5': 1e5, 'true': True, 'False': False, 'null': None, '': '', 'none': 'none',
             'edge_connect.edge': 'edge_connect.edge', 'a: b: c': 'a: b: c', '[1]': '[1]', 'nan-like': 'nan-like', 'lr=1e-3,d2g=.1': 'lr=1e-3,d2g=.1'}
    for text, value in cases.items(): assert cli.typed(text) == value and type(cli.typed(text)) is type(value), text


def test_the_installed_command_helps_without_torch():
    exe = Path(sys.executable).parent/'inpaint'
    r = subprocess.run([sys.executable, '-X', 'importtime', exe, 'fill', '--help'], capture_output=True, text=True)
    assert r.returncode == 0 and 'usage: inpaint fill' in r.stdout
    assert not [line for line in r.stderr.splitlines() if line.split('|')[-1].strip() in ('torch', 'numpy', 'PIL', 'papermill')]


def test_the_installed_command_answers_in_one_line(tmp_path):
    r = subprocess.run([Path(sys.executable).parent/'inpaint', 'fill', tmp_path/'no.png', tmp_path/'m.png', '--method', 'edge_connect',
                        '--out', tmp_path/'o.png'], capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'Traceback' not in r.stderr


def test_the_page_is_served_on_a_free_port_to_those_with_its_token():
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0)); taken.listen(); port = taken.getsockname()[1]
        p = subprocess.Popen([Path(sys.executable).with_name('inpaint'), 'demo', '--no-browser', '--port', str(port)], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            address = next(word for word in p.stdout.readline().split() if word.startswith('http'))
            for line in p.stdout:
                if 'running at' in line: break
            assert f':{port}/' not in address and 'token=' in address
            root, token = address.split('?')
            with urllib.request.urlopen(root, timeout=20) as r: assert '/login' in r.url                       # nobody without the token
            with urllib.request.urlopen(f'{root}api/kernels', timeout=20) as r: assert '/login' in r.url
            with pytest.raises(urllib.error.HTTPError, match='403'): urllib.request.urlopen(f'{root}api/kernels?{token}', timeout=20)   # let in; Voila lists none
        finally:
            os.killpg(p.pid, signal.SIGTERM); p.wait(20)
