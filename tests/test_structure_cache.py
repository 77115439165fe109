"""Cached structures: right after interruption, damage, concurrency, and a change of anything they depend on."""
import inspect
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import inpaint_lib.data.structure as S
from inpaint_lib.core import InputError, keyed_rng
from inpaint_lib.data.images import EndlessSampler, FolderImages, PhotoDataset, Skipped, loader, to_tensor
from inpaint_lib.data.structure import StructureCache, rtv_smooth, smooth_all


class Photos:
    "A source of small pictures that depend on their number alone"
    def __init__(self, n=4, size=24): self.names, self.size = [f'sub/{k}.jpg' for k in range(n)], size
    def __len__(self): return len(self.names)

    def read(self, i):
        blocks = keyed_rng(0, i, 'photo').integers(0, 256, (3, 4, 3)).astype(np.uint8)
        return np.kron(blocks, np.ones((self.size//3, self.size//3, 1), np.uint8))


@pytest.fixture
def smoothings(monkeypatch):
    "Counts calls of rtv_smooth after the cache was set up"
    calls = []
    real = S.rtv_smooth

    def counted(*a, **kw): calls.append(kw); return real(*a, **kw)
    counted.__signature__ = inspect.signature(real)
    monkeypatch.setattr(S, 'rtv_smooth', counted)
    return calls


def pngs(folder): return sorted(folder.rglob('*.png'))
def leftovers(folder): return list(folder.rglob('.*.tmp'))


def test_is_the_structure_in_bytes_and_is_made_once(tmp_path, smoothings):
    cache = StructureCache(Photos(), tmp_path)
    del smoothings[:]
    first = cache.read(2)
    exact = rtv_smooth(to_tensor(Photos().read(2))[None])[0]
    assert first.dtype == np.uint8 and first.shape == (24, 32, 3)
    assert (to_tensor(first) - exact).abs().max() <= .5/255 + 1e-6
    assert (cache.read(2) == first).all() and len(smoothings) == 1
    assert (StructureCache(Photos(), tmp_path).read(2) == first).all() and len(pngs(tmp_path)) == 1


def test_order_of_reading_does_not_matter(tmp_path):
    forth, back = StructureCache(Photos(), tmp_path/'a'), StructureCache(Photos(), tmp_path/'b')
    a = [forth.read(i) for i in range(4)]
    b = [back.read(i) for i in (3, 1, 0, 2)]
    for i, k in enumerate((3, 1, 0, 2)): assert (a[k] == b[i]).all()
    assert [p.name for p in pngs(forth.folder)] == [p.name for p in pngs(back.folder)]
    assert forth.names == Photos().names and len(forth) == 4


def test_changed_content_is_another_file(tmp_path):
    Image.fromarray(Photos().read(0)).save(tmp_path/'x.png')
    cache = StructureCache(FolderImages(tmp_path), tmp_path.parent/'cache')
    old = cache.read(0)
    stamp = os.stat(tmp_path/'x.png')
    Image.fromarray(Photos().read(1)).save(tmp_path/'x.png')          # the same name, size in pixels and times
    os.utime(tmp_path/'x.png', ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    new = cache.read(0)
    assert (new != old).any() and (new == StructureCache(Photos(), tmp_path.parent/'other').read(1)).all()


@pytest.mark.parametrize('change', [dict(lam=.02), dict(sigma=2), dict(sharpness=.01), dict(iterations=3), dict(solver='direct'),
                                    dict(side=12)], ids=str)
def test_changed_parameter_is_another_file(tmp_path, change):
    a, b = StructureCache(Photos(), tmp_path), StructureCache(Photos(), tmp_path, **change)
    photo = Photos().read(0)
    assert a.path(photo) != b.path(photo)
    a.read(0)
    assert not b.path(photo).exists()


def test_defaults_written_out_are_the_same_file(tmp_path):
    a = StructureCache(Photos(), tmp_path)
    b = StructureCache(Photos(), tmp_path, lam=.015, sigma=3., sharpness=.02, iterations=4, solver='fast')
    assert a.folder == b.folder


def test_side_reduces_before_smoothing(tmp_path):
    small = StructureCache(Photos(), tmp_path, side=12).read(0)
    assert small.shape == (12, 16, 3)
    reduced = np.asarray(Image.fromarray(Photos().read(0)).resize((16, 12), Image.Resampling.BICUBIC))
    assert (to_tensor(small) - rtv_smooth(to_tensor(reduced)[None])[0]).abs().max() <= .5/255 + 1e-6
    assert StructureCache(Photos(), tmp_path, side=500).read(0).shape == (24, 32, 3)          # never enlarged


@pytest.mark.parametrize('keep', [0, 8, 60, .5, -60], ids=str)
def test_truncated_file_is_made_again_with_a_warning(tmp_path, keep):
    cache = StructureCache(Photos(), tmp_path)
    good, path = cache.read(0), cache.path(Photos().read(0))
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole)*keep) if 0 < keep < 1 else keep])
    with pytest.warns(UserWarning, match='made again') as said: again = cache.read(0)
    assert str(path) in str(said[0].message)
    assert (again == good).all() and path.read_bytes() == whole


def test_flipped_bit_is_noticed(tmp_path):
    cache = StructureCache(Photos(), tmp_path)
    good, path = cache.read(0), cache.path(Photos().read(0))
    data = bytearray(path.read_bytes()); data[len(data)//2] ^= 4; path.write_bytes(data)
    with pytest.warns(UserWarning, match='made again'): assert (cache.read(0) == good).all()


def test_file_of_another_size_is_made_again(tmp_path):
    cache = StructureCache(Photos(), tmp_path)
    good, path = cache.read(0), cache.path(Photos().read(0))
    Image.fromarray(good[:5]).save(path)
    with pytest.warns(UserWarning, match='not 32 x 24'): assert (cache.read(0) == good).all()


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    cache = StructureCache(Photos(), tmp_path)

    def half(self, file, format):
        file.write_bytes(b'\x89PNG half'); raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', half)
        with pytest.raises(KeyboardInterrupt): cache.read(0)
    assert not pngs(tmp_path) and not leftovers(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cache.read(0); cache.read(0)


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    cache = StructureCache(Photos(), tmp_path)

    def full(self, file, format): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(InputError, match='No space left on device'): cache.read(0)
    with pytest.raises(InputError, match='No space left on device'): smooth_all(cache, progress=False)
    assert not pngs(tmp_path) and not leftovers(tmp_path)


CHILD = """
import sys, time, pathlib
sys.path.insert(0, {tests!r})
from test_structure_cache import Photos
import inpaint_lib.data.structure as S
root, me = pathlib.Path({root!r}), sys.argv[1]
cache = S.StructureCache(Photos(12), root/'cache')
if me == 'slow':                                       # writes half a file, then waits to be killed
    def half(self, file, format):
        file.write_bytes(b'half'); (root/'half').touch(); time.sleep(60)
    S.Image.Image.save = half
(root/me).touch()
while not (root/'go').exists(): time.sleep(.002)
for i in range(12): cache.read(i)
"""


def start(root, me):
    code = CHILD.format(tests=os.path.dirname(__file__), root=str(root))
    return subprocess.Popen([sys.executable, '-c', code, me], stderr=subprocess.PIPE, text=True,
                            cwd=os.path.dirname(os.path.dirname(__file__)))


def wait_for(*paths):
    until = time.time() + 60
    while not all(p.exists() for p in paths):
        assert time.time() < until, f'waited in vain for {paths}'
        time.sleep(.005)


def test_two_processes_at_once_and_one_that_is_killed(tmp_path):
    a, b, slow = (start(tmp_path, me) for me in ('a', 'b', 'slow'))
    wait_for(*(tmp_path/me for me in ('a', 'b', 'slow')))
    (tmp_path/'go').touch()
    while a.poll() is None or b.poll() is None:                       # whatever has its real name is whole, at any time
        for p in pngs(tmp_path): np.asarray(Image.open(p))
    wait_for(tmp_path/'half')
    os.kill(slow.pid, signal.SIGKILL); slow.communicate()
    assert a.communicate()[1] == b.communicate()[1] == '' and a.returncode == b.returncode == 0     # nor any warning
    assert len(pngs(tmp_path)) == 12 and len(leftovers(tmp_path)) == 1
    ours, theirs = StructureCache(Photos(12), tmp_path/'own'), StructureCache(Photos(12), tmp_path/'cache')
    for i in range(12): assert (ours.read(i) == theirs.read(i)).all()


def test_smooth_all_with_workers_names_what_it_skips(tmp_path):
    for i in range(3): Image.fromarray(Photos().read(i)).save(tmp_path/f'{i}.png')
    (tmp_path/'1.png').write_bytes(b'no picture')
    cache = StructureCache(FolderImages(tmp_path), tmp_path.parent/'out')
    report = smooth_all(cache, workers=2, progress=False)
    assert (report['made'], report['found']) == (2, 0) and len(report['skipped']) == 1
    assert report['skipped'][0].startswith('1.png: ') and 'not a readable image' in report['skipped'][0]
    assert smooth_all(cache, progress=False) | {'skipped': 0} == dict(made=0, found=2, skipped=0)
    with pytest.raises(InputError, match='workers=0 with a GPU'): smooth_all(cache, workers=1, device='cuda')


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(3); before = torch.random.get_rng_state()
    smooth_all(StructureCache(Photos(), tmp_path), progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize('workers', [0, 2])
def test_in_a_data_set(tmp_path, workers):
    photos = Photos(size=48)
    data = PhotoDataset(photos, 16, structures=StructureCache(photos, tmp_path/str(workers)))
    batch = next(iter(loader(data, EndlessSampler(4, 4), workers)))
    again = [PhotoDataset(photos, 16, structures=StructureCache(photos, tmp_path/'one'))[(0, int(i))] for i in batch['index']]
    off = batch['structure'] - torch.stack([i['structure'] for i in again])
    assert batch['structure'].shape == (4, 3, 16, 16) and off.abs().max() < 2.5/255     # a worker has one thread: sums are rounded otherwise
    near, other = batch['structure'] - batch['image'], batch['structure'].roll(1, 0) - batch['image']
    assert near.abs().mean() < .5*other.abs().mean()                  # its own photograph's, the same square


def test_unreadable_photograph_in_a_data_set_is_skipped(tmp_path):
    Image.fromarray(Photos(size=48).read(0)).save(tmp_path/'a.png'); (tmp_path/'b.png').write_bytes(b'')
    source = FolderImages(tmp_path)
    data = PhotoDataset(source, 16, structures=StructureCache(source, tmp_path.parent/'c'))
    assert isinstance(data[1], Skipped) and data[1].name == 'b.png' and data[0]['structure'].shape == (3, 16, 16)


@pytest.mark.parametrize('given, words', [
    (dict(lamda=.1), "no parameter 'lamda'"), (dict(mask=1), "no parameter 'mask'"), (dict(lam=-1), 'lam'),
    (dict(sigma=0), 'sigma'), (dict(sharpness=float('nan')), 'sharpness'), (dict(iterations=0), 'iterations'),
    (dict(solver='quick'), 'quick'), (dict(side=3), 'side 3')], ids=str)
def test_bad_parameters(tmp_path, given, words):
    with pytest.raises(InputError, match=words): StructureCache(Photos(), tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(InputError, match='not written'): StructureCache(Photos(), tmp_path/'file')


def test_complete_cache_can_be_read_only(tmp_path):
    cache = StructureCache(Photos(), tmp_path)
    smooth_all(cache, progress=False)
    for p in [*tmp_path.rglob('*'), tmp_path]: p.chmod(0o555 if p.is_dir() else 0o444)
    try: assert (StructureCache(Photos(), tmp_path).read(1) == cache.read(1)).all()
    finally:
        for p in [tmp_path, *tmp_path.rglob('*')]: p.chmod(0o755 if p.is_dir() else 0o644)
