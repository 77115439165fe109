"""16_protocol: the same pixels everywhere or one line that says why not; two methods picture by picture"""
import json
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import one_line
from inpaint_lib import metrics, protocol
from inpaint_lib.core import checkout
from inpaint_lib.data import images, masks
from inpaint_lib.protocol import EvaluationSet, paired_table

GOLDEN = checkout()/'tests'/'golden'/'evaluation_builtin.json'
ALL = images.BUILTIN_TRAIN + images.BUILTIN_HELD_OUT


def same(a, b):
    "The same pictures, in the same order"
    return len(a) == len(b) and all(x['id'] == y['id'] and x['bin'] == y['bin'] and torch.equal(x['image'], y['image'])
                                    and torch.equal(x['mask'], y['mask']) for x, y in zip(a, b))


@pytest.fixture
def photos(tmp_path):
    "A folder with three photographs"
    (tmp_path/'photos').mkdir()
    for n in ('coffee', 'chelsea', 'rocket'): Image.fromarray(images.builtin_photograph(n)[50:210, 100:280]).save(tmp_path/'photos'/f'{n}.png')
    return tmp_path/'photos'


@pytest.fixture
def manifest(photos, tmp_path):
    "The manifest of 18 pictures of them"
    EvaluationSet.make(photos, size=32, per_bin=3).save(tmp_path/'set.json')
    return tmp_path/'set.json'


def test_the_golden_set_gives_the_same_pixels_here():
    golden = EvaluationSet.load(GOLDEN, 'builtin')
    assert golden.hash == json.loads(GOLDEN.read_text())['hash'] == '6c0b4276b66e'
    assert len({e['id'] for e in golden}) == 30 and len(golden.photos) == 5              # each pixel was compared on the way
    assert golden[0]['id'] == '60fb70f3d196' and golden[29]['id'] == '208c6557a590'
    assert same(golden, EvaluationSet.make(images.BuiltinImages(ALL), size=64, per_bin=5))


def test_an_item_keeps_the_contract_of_images_and_masks():
    evaluation = EvaluationSet.make('builtin', size=40, per_bin=2, crop='random', seed=4)
    for k, e in enumerate(evaluation):
        assert e['image'].shape == (3, 40, 40) and e['image'].dtype == torch.float32 and 0 <= e['image'].min() <= e['image'].max() <= 1
        assert e['mask'].shape == (1, 40, 40) and e['mask'].unique().tolist() == [0, 1] and e['name'] == 'chelsea'
        assert (e['mask'][0].numpy() == masks.sample_bin_mask(k//2, k % 2, size=40, seed=4)).all()
        low, high = masks.HOLE_BINS[k//2]
        assert e['bin'] == f'{100*low:.0f}-{100*high:.0f}%'
    with pytest.raises(IndexError): evaluation[12]


def test_random_squares_are_those_of_the_data_set():
    source = images.BuiltinImages(ALL)
    evaluation, data = EvaluationSet.make(source, size=32, per_bin=7, crop='random', seed=5), images.PhotoDataset(source, 32, seed=5)
    assert all(torch.equal(evaluation[k]['image'], data[k, k % 5]['image']) for k in range(0, 42, 5))
    assert any(i.crop[3] for i in evaluation.items) and not all(i.crop[3] for i in evaluation.items)      # mirrored ones too


def test_hash_depends_on_pixels_and_not_on_order_or_names(photos):
    evaluation = EvaluationSet.make(photos, size=32, per_bin=3)
    items = list(evaluation.items); random.Random(0).shuffle(items)
    assert items != list(evaluation.items) and protocol._set_hash(evaluation.spec, items) == evaluation.hash
    (photos/'coffee.png').rename(photos/'chelsea2.png')                                 # still between the other two
    again = EvaluationSet.make(photos, size=32, per_bin=3)
    assert {p.name for p in again.photos.values()} == {'chelsea2.png', 'chelsea.png', 'rocket.png'}
    swapped = dict(zip(sorted(p.content for p in evaluation.photos.values()), range(3)))
    assert swapped.keys() == again.photos.keys()
    others = [dict(size=33), dict(per_bin=2), dict(seed=1), dict(crop='random'), dict(bins=(0, 1)), dict(kind='free_form')]
    hashes = [EvaluationSet.make(photos, **{**dict(size=32, per_bin=3), **o}).hash for o in others]
    assert len({evaluation.hash, *hashes}) == 7


@pytest.mark.parametrize('to', ['.png', '.bmp', '.tif', '.webp'])
def test_found_by_content_whatever_the_names_the_order_and_the_format(to, photos, manifest, tmp_path):
    (tmp_path/'other'/'below').mkdir(parents=True)
    for name, new in (('coffee', 'z'), ('chelsea', 'below/y'), ('rocket', 'a')):
        Image.open(photos/f'{name}.png').save(tmp_path/'other'/f'{new}{to}', lossless=True)
    Image.fromarray(images.builtin_photograph('astronaut')).save(tmp_path/'other'/'more.png')
    (tmp_path/'other'/'broken.jpg').write_text('<html>')                                # neither is in the set
    ours, theirs = EvaluationSet.load(manifest, photos), EvaluationSet.load(manifest, tmp_path/'other')
    assert ours.hash == theirs.hash and same(ours, theirs)
    theirs.save(tmp_path/'again.json')
    assert (tmp_path/'again.json').read_text() == manifest.read_text()                  # the names of those who made it


def test_an_unchanged_folder_is_not_decoded(photos, manifest, monkeypatch):
    read = []
    monkeypatch.setattr(images, 'open_image', lambda path: read.append(path))
    EvaluationSet.load(manifest, photos)
    assert not read


def test_what_is_missing_or_changed_is_named(photos, manifest):
    (photos/'coffee.png').unlink(); Image.fromarray(images.builtin_photograph('rocket')[:99, :99]).save(photos/'rocket.png')
    assert one_line(EvaluationSet.load, manifest, photos).endswith(
        '2 of 3 files of the manifest are not there: coffee.png (missing), rocket.png (changed)')
    many = [protocol.Photo(f'{i}.png', f'{i:016x}') for i in range(9)]
    assert '9 of 9 files' in (line := one_line(protocol._located, many, images.FolderImages(photos), 'here')) and line.endswith('4.png (missing) and 4 more')


@pytest.mark.parametrize('change', [
    lambda m: m.update(size=48), lambda m: m.update(hash='0123456789ab'), lambda m: m.update(seed=1), lambda m: m['pictures'].pop(),
    lambda m: m['pictures'][3].update(mask=9), lambda m: m['pictures'][3].update(bin=5), lambda m: m['pictures'][0]['crop'].__setitem__(0, 3),
    lambda m: m['photographs'].pop(), lambda m: m.pop('pictures'), lambda m: m['pictures'][0].pop('hole'),
    lambda m: m['pictures'][0].update(more=1), lambda m: m.update(pictures=3), lambda m: m.update(masks='mask files'),
])
def test_a_changed_manifest_is_refused(change, photos, manifest):
    m = json.loads(manifest.read_text()); change(m); manifest.write_text(json.dumps(m))
    assert 'nobody has changed' in one_line(EvaluationSet.load, manifest, photos)


@pytest.mark.parametrize('text', ['', '[]', '{"psnr": 30}', '{"manifest": "inpaint_lib evaluation set, format 2"}', '\x89PNG'])
def test_another_file_is_no_manifest(text, photos, tmp_path):
    (tmp_path/'x.json').write_text(text)
    assert 'x.json: not a manifest' in one_line(EvaluationSet.load, tmp_path/'x.json', photos)
    assert 'not a manifest' in one_line(EvaluationSet.load, tmp_path, photos)


def test_a_machine_that_makes_other_pixels_says_at_which_step(photos, manifest, monkeypatch):
    evaluation = EvaluationSet.load(manifest, photos)
    def off_by_one(f):
        def changed(*args, **kw): out = np.array(f(*args, **kw)); middle = tuple(n//2 for n in out.shape[:2]); out[middle] ^= 128 if out.dtype == np.uint8 else True; return out
        return changed
    for place, name, says in ((images, 'open_image', 'the file decodes to other pixels'), (images, 'cut', 'its square is resized to other pixels'),
                              (masks, 'sample_bin_mask', 'its hole has other pixels')):
        with monkeypatch.context() as m:
            m.setattr(place, name, off_by_one(getattr(place, name)))
            line = one_line(lambda: EvaluationSet.load(manifest, photos)[0])
        assert says in line and evaluation.hash in line and 'Pillow' in line and line.startswith('chelsea.png')
    assert evaluation[0]['id'] == EvaluationSet.load(manifest, photos)[0]['id']
    a = np.array(images.open_image(photos/'chelsea.png')); a[0, 0] ^= 1; Image.fromarray(a).save(photos/'chelsea.png')
    assert 'chelsea.png (changed)' in one_line(EvaluationSet.load, manifest, photos)             # a pixel outside the square: still another file


def test_doubles_are_refused(photos):
    shutil.copy(photos/'coffee.png', photos/'copy.png')
    assert one_line(EvaluationSet.make, photos, size=32, per_bin=4) == 'coffee.png and copy.png are the same photograph; expected each once'
    line = one_line(EvaluationSet.make, 'builtin', size=32, per_bin=2, kind='center')
    assert 'pictures 0 and 1 are the same: chelsea' in line
    assert len(EvaluationSet.make('builtin', size=32, per_bin=2, kind='center', crop='random')) == 2


def test_mask_files_are_found_by_content(photos, tmp_path):
    (tmp_path/'masks').mkdir()
    for i in range(4): Image.fromarray(masks.sample_bin_mask(i, i, size=70)).save(tmp_path/'masks'/f'{i}.png')
    made = EvaluationSet.make(photos, size=32, masks_dir=tmp_path/'masks')
    assert len(made) == 4 and made.hash == EvaluationSet.make(photos, size=32, masks_dir=tmp_path/'masks', seed=9).hash     # nothing is drawn
    assert all((e['mask'][0].numpy() == masks.load_mask(tmp_path/'masks'/f'{i}.png', 32)).all() for i, e in enumerate(made))
    made.save(tmp_path/'set.json'); before = list(made)
    for i, new in enumerate('dcba'): (tmp_path/'masks'/f'{i}.png').rename(tmp_path/'masks'/f'{new}.png')
    assert same(before, EvaluationSet.load(tmp_path/'set.json', photos, tmp_path/'masks'))
    assert 'expected their folder (mask_dir)' in one_line(EvaluationSet.load, tmp_path/'set.json', photos)
    (tmp_path/'masks'/'a.png').unlink()
    assert '1 of 4 files of the manifest are not there: 3.png (missing)' in one_line(EvaluationSet.load, tmp_path/'set.json', photos, tmp_path/'masks')


@pytest.mark.parametrize('kind, options', [('context_encoder', dict(overlap=7)), ('partial_conv_drawn', dict(dilate=(9, 20))), ('free_form', {})])
def test_other_kinds_of_masks_survive_the_file(kind, options, photos, tmp_path):
    made = EvaluationSet.make(photos, size=64, per_bin=3, kind=kind, options=options, seed=2)
    made.save(tmp_path/'set.json')
    loaded = EvaluationSet.load(tmp_path/'set.json', photos)
    assert loaded.hash == made.hash and same(made, loaded)


def test_a_set_can_be_loaded_by_worker_processes(photos):
    evaluation = EvaluationSet.make(photos, size=32, per_bin=2)
    assert same(evaluation, pickle.loads(pickle.dumps(evaluation)))
    batches = list(torch.utils.data.DataLoader(evaluation, batch_size=5, num_workers=2))
    assert [len(b['bin']) for b in batches] == [5, 5, 2] and torch.equal(batches[1]['image'][2], evaluation[7]['image'])


def test_bad_arguments():
    for kw, says in ((dict(crop='centre'), "crop 'centre'; expected center or random"), (dict(kind='squares'), "no masks 'squares'"), (dict(kind='mask files'), 'mask files without a folder'),
                     (dict(bins=(7,)), 'no hole-ratio bin 7')):
        assert says in one_line(EvaluationSet.make, 'builtin', **{**dict(size=32, per_bin=1), **kw})


def test_photographs_of_the_training_data_are_named(photos, tmp_path):
    evaluation = EvaluationSet.make(photos, size=32, per_bin=3)
    (tmp_path/'train').mkdir(); shutil.copy(photos/'rocket.png', tmp_path/'train'/'1.png')
    Image.open(photos/'coffee.png').save(tmp_path/'train'/'2.bmp'); Image.fromarray(images.builtin_photograph('rocket')).save(tmp_path/'train'/'3.png')
    assert protocol.seen_in(evaluation, tmp_path/'train') == ['coffee.png', 'rocket.png'] and protocol.seen_in(evaluation, 'builtin') == []
    assert '2 of 3 photographs are in the training data too: coffee.png, rocket.png' in one_line(protocol.check_held_out, evaluation, tmp_path/'train')
    assert protocol.seen_in(EvaluationSet.load(GOLDEN, 'builtin'), 'builtin') == list(images.BUILTIN_TRAIN)


def rows(seed, n=12, seeds=1, shift=0.):
    "Invented rows of a method"
    rng = np.random.default_rng(seed)
    return [dict(protocol='p', id=str(i), picture=f'{i % 3}.png', bin=f'bin {i % 2}', psnr=20 + i + shift + float(rng.normal()), l1=float(rng.random()))
            for _ in range(seeds) for i in range(n)]


def test_pairs_are_those_of_paired_interval():
    a, b = rows(0, shift=1), rows(1)
    random.Random(0).shuffle(b)                                        # joined by id, not by place
    table, by_id = paired_table(a, b), {r['id']: r for r in b}
    assert list(table) == ['bin 0', 'bin 1', 'all']
    for bin, t in table.items():
        group = [r for r in a if bin in ('all', r['bin'])]
        for k in ('psnr', 'l1'):
            want = metrics.paired_interval([[r[k] for r in group]], [[by_id[r['id']][k] for r in group]])
            assert (t[k]['mean'], t[k]['lo'], t[k]['hi']) == want and t[k]['n'] == len(group) and t[k]['left_out'] == 0
    back = paired_table(b, a)['all']['psnr']
    assert back['mean'] == pytest.approx(-table['all']['psnr']['mean']) and back['lo'] == pytest.approx(-table['all']['psnr']['hi'])
    apart = [metrics.summarize_metrics(x)['all']['psnr'] for x in (a, b)]
    assert table['all']['psnr']['hi'] - table['all']['psnr']['lo'] < .7*max(s['hi'] - s['lo'] for s in apart)     # hard pictures drop out
    assert paired_table(a, b, level=.5)['all']['psnr']['hi'] < table['all']['psnr']['hi']


def test_several_seeds():
    a, b = rows(0, seeds=3, shift=1), rows(1, seeds=3)
    value = lambda rows, k: np.reshape([r[k] for r in rows], (3, 12))
    t = paired_table(a, b)['all']['psnr']
    assert (t['mean'], t['lo'], t['hi']) == pytest.approx(metrics.paired_interval(value(a, 'psnr'), value(b, 'psnr')))
    assert 'rows of a picture; expected one for each seed' in one_line(paired_table, a, rows(1))


def test_photographs_as_units():
    a, b = rows(0, seeds=2, shift=1), rows(1, seeds=2)
    t = paired_table(a, b, unit='picture')
    value = lambda rows: np.reshape([r['psnr'] for r in rows], (2, 4, 3)).mean(1)          # picture i is of photograph i % 3
    want = metrics.paired_interval(value(a), value(b))
    assert (t['all']['psnr']['mean'], t['all']['psnr']['lo'], t['all']['psnr']['hi']) == pytest.approx(want) and t['all']['psnr']['n'] == 3
    assert t['all']['psnr']['mean'] == pytest.approx(paired_table(a, b)['all']['psnr']['mean'])


def test_undefined_values_are_left_out_and_counted():
    a, b = rows(0), rows(1)
    for r in a[:3] + b[2:4]: del r['l1']
    t = paired_table(a, b)['all']['l1']
    assert (t['n'], t['left_out']) == (8, 4)
    for r in a: r.pop('l1', None)
    assert list(paired_table(a, b)['all']) == ['psnr']
    one = paired_table(a[:1], b[:1])['all']['psnr']
    assert one['lo'] is one['hi'] is None and one['n'] == 1            # one picture has no interval
    a[0]['psnr'] = float('inf')
    assert 'infinite' in one_line(paired_table, a, b)


def test_different_protocols_are_refused_in_one_line():
    other = [r | dict(protocol='q') for r in rows(1)]
    assert one_line(paired_table, rows(0), other) == 'rows of protocol p and of q; expected one evaluation set for both'
    for b in rows(1)[:6] + other[6:], [{k: v for k, v in r.items() if k != 'protocol'} for r in rows(1)], []:
        assert 'expected one evaluation set for both' in one_line(paired_table, rows(0), b)
    assert '12 pictures and 11, 11 in both' in one_line(paired_table, rows(0), rows(1)[1:])


def test_rows_of_a_file(tmp_path):
    protocol.write_rows(tmp_path/'rows.jsonl', rows(0))
    assert protocol.read_rows(tmp_path/'rows.jsonl') == rows(0)
    for text in '', '3\n', '{"psnr": 3}\n', 'psnr':
        (tmp_path/'bad.jsonl').write_text(text)
        assert 'bad.jsonl' in one_line(protocol.read_rows, tmp_path/'bad.jsonl')
    assert 'none.jsonl' in one_line(protocol.read_rows, tmp_path/'none.jsonl')
