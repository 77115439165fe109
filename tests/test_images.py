"""01_data.images: bad files, exact bytes, and batches that do not depend on who loads them"""
import os
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from inpaint_lib.core import InputError
from inpaint_lib.data.images import (
    BUILTIN_TRAIN, BuiltinImages, Crop, EndlessSampler, FolderImages, PhotoDataset, Skipped, TorchvisionImages,
    builtin_photograph, collate, cut, list_images, loader, one_pass, open_image, open_source, to_rgb, to_tensor, to_uint8)
from inpaint_lib.data.masks import mask_sampler

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def one_line(f, *args, **kw):
    "The message of the InputError that `f` must raise"
    with pytest.raises(InputError) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)


@pytest.fixture
def photos(tmp_path):
    "Six pictures of different sizes, one of them truncated, in two folders"
    rng = np.random.default_rng(0)
    for i in range(6):
        p = tmp_path/'photos'/('a' if i % 2 else 'b')/f'{i}.{"jpg" if i < 3 else "png"}'; p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + 9*i, 70 - 7*i, 3), dtype=np.uint8)).save(p)
    bad = tmp_path/'photos'/'a'/'5.png'
    bad.write_bytes(bad.read_bytes()[:300])
    return tmp_path/'photos'


# ---- files

@pytest.mark.parametrize('form', ['L', 'LA', 'P', 'P transparent', 'RGBA', 'CMYK', '1', 'F', 'I', 'I;16'])
@pytest.mark.parametrize('ext', ['png', 'tiff'])
def test_every_mode_gives_the_same_grey(tmp_path, form, ext):
    rgb, want = Image.fromarray(GREY).convert('RGB'), GREY
    if form == 'I;16': img = Image.fromarray(GREY.astype(np.uint16)*257)
    elif form == 'I': img = Image.fromarray(GREY.astype(np.int32)*257)
    elif form == 'F': img = Image.fromarray(GREY/np.float32(255))
    elif form == '1': img, want = Image.fromarray(GREY > 99), np.where(GREY > 99, 255, 0)
    elif form.startswith('P'): img = rgb.quantize(256, method=Image.Quantize.MAXCOVERAGE); want = np.asarray(img.convert('L'))
    else: img = rgb.convert(form)
    if form in ('CMYK', 'F', 'I') and ext == 'png': pytest.skip('png has no such mode')
    if form == 'LA' or form == 'RGBA': img.putalpha(Image.fromarray(GREY[::-1].copy()))     # hides nothing
    if form == 'P transparent' and ext == 'png': img.info['transparency'] = bytes(range(256))
    img.save(tmp_path/f'a.{ext}')
    out = open_image(tmp_path/f'a.{ext}')
    assert out.mode == 'RGB' and (np.asarray(out) == want[..., None]).all()


def test_16_bit_rounds_to_the_nearest(tmp_path):
    v = np.array([[0, 128, 129, 65535, 32768, 257*7 + 128, 257*7 + 129, 40000]], np.uint16)
    Image.fromarray(v).save(tmp_path/'a.png')
    got = np.asarray(open_image(tmp_path/'a.png'))[0, :, 0]
    assert (got == np.rint(v[0]/257)).all() and len(set(got)) > 4              # not clipped to white


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    turn = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.T,
            6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90}
    exif = Image.Exif(); exif[0x0112] = orientation
    stored = GREY[:3, :5]
    Image.fromarray(stored).save(tmp_path/'a.png', exif=exif)
    assert (np.asarray(open_image(tmp_path/'a.png'))[..., 0] == turn[orientation](stored)).all()


def test_unreadable_files_are_named_in_one_line(tmp_path):
    Image.fromarray(GREY).save(tmp_path/'a.png'); Image.fromarray(GREY).save(tmp_path/'a.jpg'); Image.fromarray(GREY).save(tmp_path/'a.tiff')
    for name in 'a.png', 'a.jpg', 'a.tiff':
        f = tmp_path/f'cut_{name}'; f.write_bytes((tmp_path/name).read_bytes()[:-60])
        assert f'{f}: not a readable image' in one_line(open_image, f)
    (tmp_path/'page.jpg').write_text('<html>not found</html>'); (tmp_path/'empty.png').touch()
    for name in 'page.jpg', 'empty.png': assert 'unknown format' in one_line(open_image, tmp_path/name)
    assert 'no such file' in one_line(open_image, tmp_path/'none.png')
    assert 'no such file' in one_line(open_image, tmp_path)                    # a folder is not a file


def test_listing(tmp_path):
    assert 'no such folder' in one_line(list_images, tmp_path/'none')
    (tmp_path/'notes.txt').touch(); (tmp_path/'.hidden').mkdir(); (tmp_path/'.hidden'/'a.png').touch(); (tmp_path/'._a.png').touch()
    assert 'no image in it' in (m := one_line(list_images, tmp_path)) and '.jpeg' in m
    assert 'is a file' in one_line(list_images, tmp_path/'notes.txt')
    elsewhere = tmp_path/'elsewhere'; (elsewhere/'in').mkdir(parents=True); (elsewhere/'in'/'B.JPEG').touch(); (elsewhere/'c.PnG').touch()
    data = tmp_path/'data'; data.mkdir(); (data/'a.webp').touch()
    os.symlink(elsewhere, data/'b'); os.symlink(data, elsewhere/'loop')
    assert [p.relative_to(data).as_posix() for p in list_images(data)] == ['a.webp', 'b/c.PnG', 'b/in/B.JPEG']


# ---- bytes

def test_bytes_survive():
    a = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    x = to_tensor(a)
    assert x.shape == (3, 50, 40) and x.dtype == torch.float32 and x.is_contiguous() and x.min() >= 0 and x.max() <= 1
    assert (to_uint8(x) == a).all() and (to_uint8(x.double()) == a).all()
    assert to_tensor(Image.fromarray(GREY)).shape == (1, 16, 16)
    assert to_uint8(torch.tensor([[[-1., 2., .5]]])).ravel().tolist() == [0, 255, 128]
    assert 'NaN' in one_line(to_uint8, torch.full((3, 2, 2), float('nan')))
    assert 'float64' in one_line(to_tensor, a/255) and '(3,)' in one_line(to_tensor, a[0, 0])


# ---- sources

def test_sources(photos, tmp_path):
    s = open_source(photos)
    assert isinstance(s, FolderImages) and s.names == ['a/1.jpg', 'a/3.png', 'a/5.png', 'b/0.jpg', 'b/2.jpg', 'b/4.png']
    assert s.read(3).shape == (40, 70, 3) and 'a/5.png' in one_line(s.read, 2)
    assert open_source('builtin').names == list(BUILTIN_TRAIN) and open_source('builtin', 'test').names == ['chelsea']
    m = one_line(open_source, tmp_path/'nowhere')
    assert 'nowhere' in m and "'builtin'" in m and 'folder' in m and 'places365' in m
    assert 'train or test' in one_line(open_source, 'builtin', 'val')
    assert 'astronaut' in one_line(builtin_photograph, 'cat') and 'astronaut' in one_line(BuiltinImages, ['cat'])
    with pytest.raises(ValueError): builtin_photograph('chelsea')[0, 0, 0] = 1          # shared, so read-only


def test_torchvision_by_name(tmp_path):
    "A data set in torchvision's own layout is found without a download"
    root = tmp_path/'dtd'/'dtd'
    for f in 'images/dotted', 'labels': (root/f).mkdir(parents=True)
    for i in range(3): Image.fromarray(GREY + np.uint8(i)).save(root/'images'/'dotted'/f'dotted_{i}.jpg')
    (root/'labels'/'train1.txt').write_text('dotted/dotted_0.jpg\ndotted/dotted_1.jpg\n')
    (root/'labels'/'test1.txt').write_text('dotted/dotted_2.jpg\n')
    s, t = open_source('dtd', root=tmp_path), open_source('dtd', 'test', root=tmp_path)
    assert len(s) == 2 and len(t) == 1 and s.read(1).shape == (16, 16, 3) and t.names == ['dtd/test/000000']
    (root/'images'/'dotted'/'dotted_2.jpg').write_bytes(b'no')
    assert 'dtd/test/000000' in one_line(t.read, 0)
    assert 'flowers102' in one_line(TorchvisionImages, 'flowers', tmp_path)
    assert "'celeba' is not there" in one_line(TorchvisionImages, 'celeba', tmp_path/'x', download=False)


def test_failed_download_is_one_line(tmp_path, monkeypatch):
    from torchvision import datasets
    def fail(self, **kw): raise RuntimeError('not found' if not kw['download'] else 'no\nnetwork')
    monkeypatch.setattr(datasets.Flowers102, '__init__', fail)
    assert 'was not fetched' in (m := one_line(open_source, 'flowers102', root=tmp_path)) and 'no network' in m


# ---- data set

def test_a_crop_is_the_very_pixels_where_nothing_is_resized():
    a = builtin_photograph('rocket')
    assert (cut(a, Crop(5, 9, 64, True), size=64) == a[9:73, 5:69][:, ::-1]).all()


def test_small_pictures_are_enlarged():
    class Small:
        names = ['s']
        def __len__(self): return 1
        def read(self, i): return np.full((20, 30, 3), 77, np.uint8)
    for train in True, False:
        item = PhotoDataset(Small(), 64, train=train)[(4, 0)]
        assert item['image'].shape == (3, 64, 64) and (item['image'] == 77/255).all()


def test_items_depend_on_the_key_alone():
    data = PhotoDataset(BuiltinImages(), 48, mask_sampler('free_form'), seed=3)
    a = data[(2, 1)]; _ = data[(0, 0)], np.random.rand(), torch.rand(1)
    b = data[(2, 1)]
    assert all(torch.equal(a[k], b[k]) for k in ('image', 'mask')) and (a['epoch'], a['index']) == (2, 1)
    for other in data[(3, 1)], PhotoDataset(BuiltinImages(), 48, mask_sampler('free_form'), seed=4)[(2, 1)]:
        assert not torch.equal(a['image'], other['image']) and not torch.equal(a['mask'], other['mask'])
    assert data[1]['epoch'] == 0
    center = PhotoDataset(BuiltinImages(), 48, train=False)
    assert torch.equal(center[(0, 2)]['image'], center[(9, 2)]['image']) and 'mask' not in center[0]


def test_edges_get_the_same_square():
    class Twice(BuiltinImages):
        def read(self, i): return np.asarray(Image.fromarray(super().read(i)).resize((200, 160)))
    class Grey(BuiltinImages):
        def read(self, i): return np.asarray(Image.fromarray(super().read(i)).convert('L').convert('RGB'))
    names = ['coffee']
    for e in range(4):                                                # both mirror states occur
        item = PhotoDataset(BuiltinImages(names), 64, edges=Grey(names))[(e, 0)]
        grey = (item['image']*torch.tensor([.299, .587, .114])[:, None, None]).sum(0, keepdim=True)
        assert item['edge'].shape == (1, 64, 64) and (item['edge'] - grey).abs().max() < .02
    item = PhotoDataset(BuiltinImages(names), 64, edges=Twice(names))[(0, 0)]
    assert isinstance(item, Skipped) and '200 x 160' in item.reason and '600 x 400' in item.reason
    assert item.name == 'edge map coffee'                             # whose fault it is
    assert '1 edge maps for 4 pictures' in one_line(PhotoDataset, BuiltinImages(), 64, edges=Grey(names))


def test_edge_maps_belong_to_photographs_by_name(tmp_path):
    def folder(name, **pictures):
        for stem, (suffix, grey) in pictures.items():
            path = tmp_path/name/stem.replace('__', '/'); path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('L', (40, 40), grey).save(path.with_suffix(suffix))
        return FolderImages(tmp_path/name)
    photos = folder('photos', a__one=('.jpg', 10), b=('.png', 20))
    edges = folder('edges', a__one=('.png', 100), b=('.bmp', 200))
    edges.names, edges.paths = edges.names[::-1], edges.paths[::-1]   # another order: the names decide
    data = PhotoDataset(photos, 32, edges=edges)
    assert [round(float(data[i]['edge'].mean())*255) for i in range(2)] == [100, 200]
    wrong = folder('wrong', a__one=('.png', 1), c=('.png', 1))
    assert "no edge map called 'b'" in one_line(PhotoDataset, photos, 32, edges=wrong)
    (tmp_path/'edges'/'b.bmp').write_text('no picture')
    item = data[1]
    assert isinstance(item, Skipped) and item.name == 'edge map b.bmp' and 'not a readable image' in item.reason


# ---- batches

def test_broken_files_are_skipped_and_named(photos):
    data = PhotoDataset(FolderImages(photos), 32, mask_sampler('block'))
    batch = collate([data[i] for i in range(6)])
    assert batch['image'].shape == (5, 3, 32, 32) and batch['index'].tolist() == [0, 1, 3, 4, 5]
    assert len(batch['skipped']) == 1 and batch['skipped'][0].startswith('a/5.png: ') and 'not a readable' in batch['skipped'][0]
    for workers in 0, 2:
        m = one_line(lambda: list(loader(data, [[(0, 2)]], workers)))
        assert m.startswith('none of the 1 pictures of a batch could be read; the first: a/5.png')
    assert collate([data[0]])['skipped'] == []


@pytest.mark.parametrize('workers', [1, 2])
def test_any_number_of_workers_gives_the_same_batches(photos, workers):
    data = PhotoDataset(FolderImages(photos), 32, mask_sampler('free_form'), seed=1)
    state = torch.get_rng_state()
    run = lambda w, **kw: list(islice(loader(data, EndlessSampler(len(data), 4, seed=1, **kw), w), 5))
    alone, shared = run(0), run(workers)
    for a, b in zip(alone, shared):
        assert all(torch.equal(a[k], b[k]) for k in ('image', 'mask', 'epoch', 'index')) and a['skipped'] == b['skipped']
    tail = run(workers, start=2)
    assert all(torch.equal(a['image'], b['image']) and torch.equal(a['mask'], b['mask']) for a, b in zip(alone[2:], tail))
    assert torch.equal(state, torch.get_rng_state())


take = lambda k, *a, **kw: list(islice(EndlessSampler(*a, **kw), k))


@pytest.mark.parametrize('n,batch', [(1, 3), (4, 6), (7, 2), (10, 10)])
def test_stream(n, batch):
    whole = take(20, n, batch, seed=5)
    for k in 0, 1, 7: assert take(20 - k, n, batch, seed=5, start=k) == whole[k:]
    flat = sum(whole, [])
    for epoch in range(20*batch//n): assert sorted(i for e, i in flat if e == epoch) == list(range(n))
    assert [e for e, _ in flat] == sorted(e for e, _ in flat)
    assert [i for _, i in sum(take(20, n, batch, shuffle=False), [])] == [k % n for k in range(20*batch)]
    if n > 4: assert whole != take(20, n, batch, seed=6) and [i for e, i in flat if e == 0] != [i for e, i in flat if e == 1]


@pytest.mark.parametrize('world', [2, 3])
def test_ranks_together_equal_one(world):
    one = take(8, 7, 4*world, seed=2, start=3)
    ranks = [take(8, 7, 4, seed=2, start=3, rank=r, world=world) for r in range(world)]
    assert [sum(parts, []) for parts in zip(*ranks)] == one


def test_one_pass_and_empty():
    assert sum(one_pass(7, 3), []) == [(0, i) for i in range(7)] and [len(b) for b in one_pass(7, 3)] == [3, 3, 1]
    assert 'at least 1' in one_line(EndlessSampler, 0, 4) and 'at least 1' in one_line(EndlessSampler, 4, 0)


def test_palette_and_array_modes_do_not_warn(recwarn):
    img = Image.fromarray(GREY).convert('RGB').quantize(16); img.info['transparency'] = b'\x00\xff\x20'
    assert to_rgb(img).mode == 'RGB' and not recwarn.list
