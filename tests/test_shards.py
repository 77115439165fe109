"""01_data.images: WebDataset shards, local and streamed: the same items as from a folder, whole or not at all"""
import contextlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import one_line
from inpaint_lib import recipes, training
from inpaint_lib.core import InputError, keyed_rng
from inpaint_lib.data import images, masks
from inpaint_lib.data.images import (
    BUILTIN_TRAIN, EndlessSampler, FolderImages, PhotoDataset, ShardError, ShardImages, Skipped, builtin_photograph, collate,
    loader, open_source, write_shards)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    "Three tries without the pauses between them, and no proxy on the way to this machine"
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(images, '_PAUSES', (.05, .05))


def pack(path, files):
    "A .tar of {name: bytes}, as the standard library writes it"
    with tarfile.open(path, 'w') as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name); info.size = len(data); t.addfile(info, io.BytesIO(data))
    return path


def forked(f, *args, **kw):
    "f(*args, **kw) in a process (and a process group) of its own, to be killed"
    p = multiprocessing.get_context('fork').Process(target=lambda: (os.setsid(), f(*args, **kw)))
    p.start()
    return p


def png(value=0, side=6):
    f = io.BytesIO(); Image.new('RGB', (side, side), (value, 1, 2)).save(f, 'PNG')
    return f.getvalue()


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    "A folder with 40 small pictures cut from the built-in photographs (JPEG and PNG, two folders), and its three shards"
    root = tmp_path_factory.mktemp('packed')
    for i in range(40):
        a = builtin_photograph(BUILTIN_TRAIN[i % 4])[6*i:6*i + 40 + i, 8*i:8*i + 60 - i//2]
        p = root/'photos'/('a' if i < 11 else 'b')/f'{i:02d}.{"jpg" if i % 3 else "png"}'; p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(a).save(p)
    folder = FolderImages(root/'photos')
    write_shards(folder, root/'shards', per_shard=15)
    return folder, root/'shards'


def need_curl():
    "webdataset opens URLs by it"
    if not shutil.which('curl'): pytest.skip('curl is not installed')


class Server:
    "A real HTTP server on a free port; `bad(path, how often before)` -> None, 'half', 'half, no length', 503"
    def __init__(self, folder, bad=lambda path, n: None):
        asked = self.asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args, **kw): super().__init__(*args, directory=folder, **kw)
            def log_message(self, *args): pass
            def do_GET(self):
                asked.append(self.path); how = bad(self.path, asked.count(self.path) - 1)
                if how is None: return super().do_GET()
                if how == 503: return self.send_error(404)
                data = (Path(folder)/self.path[1:]).read_bytes()
                self.send_response(200)
                if how == 'half': self.send_header('Content-Length', str(len(data)))
                self.end_headers(); self.wfile.write(data[:len(data)//2])

        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        self.thread = threading.Thread(target=self.http.serve_forever)

    def tars(self): return [p for p in self.asked if p.endswith('.tar')]
    def __enter__(self): need_curl(); self.thread.start(); return self
    def __exit__(self, *exc): self.http.shutdown(); self.thread.join(); self.http.server_close()


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def files(folder): return sorted(p.name for p in Path(folder).rglob('*') if p.is_file())


def stream(source, steps, *, workers=0, start=0, batch=4, groups=(15, 15, 10), **how):
    data = PhotoDataset(source, 24, masks.mask_sampler('bins'))
    with contextlib.closing(iter(loader(data, EndlessSampler(len(source), batch, start=start, groups=groups, **how), workers))) as batches:
        return list(islice(batches, steps))


# ---- the same pictures, wherever they lie

@pytest.mark.parametrize('place', ['', '/{000000..000002}.tar', '/index.json', 'pipe:cat '], ids=['folder', 'pattern', 'index', 'pipe'])
def test_shards_are_the_files(packed, place, tmp_path):
    folder, shards = packed
    word = f'pipe:cat {shards}/{{000000..000002}}.tar' if 'pipe' in place else f'{shards}{place}'
    s = open_source(word, root=tmp_path)
    assert isinstance(s, ShardImages) and s.names == folder.names and s.groups == [15, 15, 10] and len(s) == 40
    assert all(s.data(i) == p.read_bytes() for i, p in enumerate(folder.paths))
    assert all(np.array_equal(s.read(i), folder.read(i)) for i in range(40))
    one = ShardImages(shards/'000001.tar')
    assert one.names == folder.names[15:30] and one.data(3) == folder.data(18)


def test_items_are_those_of_the_folder(packed):
    "Same (epoch, index): same crop, mirror and mask, bit for bit, also in batches"
    folder, shards = packed
    a, b = (PhotoDataset(s, 24, masks.mask_sampler('bins'), seed=3) for s in (folder, ShardImages(shards)))
    for epoch in range(3):
        for i in range(40): same(a[epoch, i], b[epoch, i])
    for x, y in zip(stream(folder, 12), stream(ShardImages(shards), 12, workers=2), strict=True): same(x, y)


def test_entered_in_the_middle_of_a_shard_and_by_two_ranks(packed):
    s = ShardImages(packed[1])
    whole = stream(s, 15)                                             # epoch 0 ends within step 9
    for start in 2, 7, 9, 13: same(stream(s, 1, start=start)[0], whole[start])
    ranks = [stream(s, 15, batch=2, rank=r, world=2) for r in range(2)]
    for one, *two in zip(whole, *ranks): same(one, {k: torch.cat([t[k] for t in two]) if k != 'skipped' else [] for k in one})


def test_guides_match_by_name(packed, tmp_path):
    from inpaint_lib.data.structure import StructureCache
    folder, shards = packed
    s = ShardImages(shards)
    data = PhotoDataset(s, 24, edges=folder, structures=StructureCache(s, tmp_path, iterations=1))
    item, plain = data[0, 33], PhotoDataset(folder, 24)[0, 33]
    assert torch.equal(item['image'], plain['image']) and torch.equal(item['edge'], plain['image'][:1])
    assert item['structure'].shape == (3, 24, 24)


# ---- the order

def test_without_shards_the_order_is_as_before():
    for epoch in range(3):
        assert (EndlessSampler(9, 2, seed=4).order(epoch) == keyed_rng(4, epoch, 'order').permutation(9)).all()


@pytest.mark.parametrize('groups, mix', [([15, 15, 10], 2), ([1]*20, 4), ([7], 4), ([3, 0, 5], 2), ([50]*21, 4)])
def test_an_epoch_goes_through_the_shards_some_at_a_time(groups, mix):
    n = sum(groups); of = np.repeat(np.arange(len(groups)), groups)
    s = EndlessSampler(n, 5, seed=1, groups=groups, mix=mix)
    for epoch in range(3):
        order = s.order(epoch); first = list(dict.fromkeys(of[order].tolist())); turn = keyed_rng(1, epoch, 'order').permutation(len(groups)).tolist()
        assert sorted(order) == list(range(n)) and (order == s.order(epoch)).all()
        at = 0
        for a in range(0, len(turn), mix):
            window = turn[a:a+mix]; k = sum(groups[g] for g in window)
            assert set(of[order[at:at+k]]) <= set(window); at += k
        assert len(first) == np.count_nonzero(groups)
    if n > 100: assert (s.order(0) != s.order(1)).any() and (np.diff(s.order(0)[:200]) != 1).mean() > .9
    assert (EndlessSampler(n, 5, groups=groups, shuffle=False).order(3) == np.arange(n)).all()


def test_groups_that_do_not_add_up():
    for groups, mix in ([3, 3], 4), ([3, 4], 0): assert 'expected' in one_line(EndlessSampler, 7, 2, groups=groups, mix=mix)


# ---- streamed

@pytest.mark.parametrize('name', ['index.json', '', '{000000..000002}.tar?token=1'], ids=['index', 'folder', 'query'])
def test_streamed_with_two_loader_processes_and_room_for_one_shard(packed, tmp_path, name):
    folder, shards = packed
    with Server(shards) as server:
        s = pickle.loads(pickle.dumps(ShardImages(f'{server.url}/{name}', cache=tmp_path, keep=1)))   # as a spawned process gets it
        assert server.tars() == [] and s.names == folder.names and s.groups == [15, 15, 10]        # listed without a shard
        for x, y in zip(stream(folder, 12), stream(s, 12, workers=2), strict=True): same(x, y)
        assert len(list(s.shelf.cache.glob('*.tar'))) == 1 and not [f for f in files(tmp_path) if f.endswith('.tmp')]
        for x, y in zip(stream(folder, 3, start=7), stream(s, 3, start=7), strict=True): same(x, y)


def test_a_shard_is_fetched_once_by_all_processes(packed, tmp_path):
    with Server(packed[1]) as server:
        s = ShardImages(f'{server.url}/index.json', cache=tmp_path)
        stream(s, 20, workers=2)
        assert sorted(server.tars()) == ['/000000.tar', '/000001.tar', '/000002.tar']
        again = ShardImages(f'{server.url}/index.json', cache=tmp_path); again.read(0)              # another run finds them
        assert len(server.tars()) == 3


def test_the_shard_used_longest_ago_goes_first(packed, tmp_path):
    with Server(packed[1]) as server:
        s = ShardImages(f'{server.url}/index.json', cache=tmp_path, keep=2)
        for i in 0, 20, 1, 35, 2, 3, 36: s.read(i)
        assert server.tars() == ['/000000.tar', '/000001.tar', '/000002.tar']
        assert [p.name for p in sorted(s.shelf.cache.glob('*.tar'))] == ['000000.tar', '000002.tar']


def test_without_an_index_each_shard_is_streamed_once(packed, tmp_path, capsys):
    bare = tmp_path/'bare'; bare.mkdir()
    for p in packed[1].glob('*.tar'): shutil.copy(p, bare)
    with Server(bare) as server:
        for fetched in 3, 3:                                                                        # the lists are kept
            s = ShardImages(f'{server.url}/{{000000..000002}}.tar', cache=tmp_path/'cache', keep=1)
            assert s.names == packed[0].names and len(server.tars()) == fetched
        out = capsys.readouterr().out
        assert out.count('shards without an index.json: 3; each is streamed once') == 1
        assert np.array_equal(s.read(0), packed[0].read(0)) and len(server.tars()) == 4


def test_an_index_speaks_for_its_own_folder(tmp_path):
    "Two folders hold shards of the same name and size; one has an index"
    for d, value in ('a', 1), ('b', 2):
        (tmp_path/d).mkdir(); (tmp_path/d/f'{d}.png').write_bytes(png(value)); write_shards(FolderImages(tmp_path/d), tmp_path/'s'/d)
    (tmp_path/'s'/'b'/'index.json').unlink()
    with Server(tmp_path/'s') as server:
        s = ShardImages(f'{server.url}/{{a,b}}/000000.tar', cache=tmp_path/'cache')
        assert s.names == ['a.png', 'b.png'] and [s.read(i)[0, 0, 0] for i in range(2)] == [1, 2]


@pytest.mark.parametrize('how', ['half', 'half, no length'])
def test_a_server_that_dies_leaves_nothing_half(packed, tmp_path, how):
    with Server(packed[1], lambda path, n: how if path == '/000001.tar' else None) as server:
        s = ShardImages(f'{server.url}/index.json', cache=tmp_path)
        s.read(0)
        message = one_line(s.read, 20, error=ShardError)
        assert '000001.tar' in message and 'tried three times' in message and server.asked.count('/000001.tar') == 3
        assert [f for f in files(s.shelf.cache) if not f.endswith('lock')] == ['000000.tar']
        data = PhotoDataset(s, 24)
        assert one_line(data.__getitem__, (0, 20), error=ShardError) == message                    # a run stops, it skips no shard
        assert message in one_line(lambda: list(loader(data, [[(0, 20)]], workers=1)), error=ShardError)
        s = f'{server.url}/{{000000..000002}}.tar'
        (packed[1]/'index.json').rename(tmp_path/'index.json')
        try: assert '000001.tar' in one_line(ShardImages, s, cache=tmp_path)                        # also while listing
        finally: (tmp_path/'index.json').rename(packed[1]/'index.json')
        assert not [f for f in files(tmp_path) if f.endswith('.tmp')]


def test_a_server_that_fails_once_is_asked_again(packed, tmp_path):
    with Server(packed[1], lambda path, n: [503, 'half', None][min(n, 2)] if path.endswith('.tar') else None) as server:
        s = ShardImages(f'{server.url}/index.json', cache=tmp_path)
        assert np.array_equal(s.read(39), packed[0].read(39)) and server.tars() == ['/000002.tar']*3


def test_what_is_left_of_a_killed_download_is_removed(packed, tmp_path):
    "kill -9 while a shard comes in; the next reader fetches it and leaves no debris"
    p = forked(ShardImages, f'pipe:head -c 20000 {packed[1]}/000000.tar; sleep 30', cache=tmp_path)
    while not list(tmp_path.glob('*/.*.tmp')): assert p.is_alive(); time.sleep(.01)
    os.killpg(p.pid, signal.SIGKILL); p.join()
    left = list(tmp_path.glob('*/.*.tmp')); assert left and not list(tmp_path.glob('*/*.tar'))
    fast = f'pipe:cat {packed[1]}/000000.tar'
    s = images._Shelf([fast], left[0].parent, 0)                                                    # the same place in the cache
    with s.open(0) as f: f.seek(0); assert f.read() == (packed[1]/'000000.tar').read_bytes()
    assert not list(tmp_path.glob('*/.*.tmp'))


def test_a_damaged_shard_in_the_cache_is_fetched_again(packed, tmp_path):
    with Server(packed[1]) as server:
        s = ShardImages(f'{server.url}/index.json', cache=tmp_path); s.read(0)
        with open(s.shelf.cache/'000000.tar', 'r+b') as f: f.truncate(1000)
        assert np.array_equal(s.read(14), packed[0].read(14)) and len(server.tars()) == 2


def test_nobody_there(tmp_path):
    need_curl()
    assert 'no connection' in one_line(ShardImages, 'http://127.0.0.1:9/a.tar', cache=tmp_path, error=ShardError)
    assert 'ended with 3' in one_line(ShardImages, 'pipe:exit 3', cache=tmp_path)
    assert 'no gopen handler' in one_line(ShardImages, 'nonsense://a.tar', cache=tmp_path)
    (tmp_path/'file').touch(); assert "can't hold fetched shards" in one_line(ShardImages, 'pipe:echo', cache=tmp_path/'file')
    assert [f for f in files(tmp_path) if not f.endswith('lock')] == ['file']


# ---- bad input

def test_a_broken_picture_is_skipped_and_counted(tmp_path):
    s = ShardImages(pack(tmp_path/'a.tar', {'1.png': png(), '2.png': png(side=30)[:60], '3.png': png(), '4.jpg': b'<html>'}))
    data = PhotoDataset(s, 6)
    assert isinstance(data[0, 1], Skipped) and f'{tmp_path}/a.tar: 2.png: not a readable image' in data[0, 1].reason
    batch = collate([data[0, i] for i in range(4)])
    assert batch['index'].tolist() == [0, 2] and [line[:5] for line in batch['skipped']] == ['2.png', '4.jpg']


def test_a_shard_cut_off_anywhere_is_told(packed, tmp_path):
    whole, rng = (packed[1]/'000002.tar').read_bytes(), random.Random(0)
    names, path = ShardImages(packed[1]/'000002.tar').names, tmp_path/'cut.tar'
    end = max(o + k for o, k in ShardImages(packed[1]/'000002.tar')._at[:, 1:])                     # only padding comes after this
    for n in [0, 1, 511, 512, 1024, end - 1, len(whole)//2, *(rng.randrange(end) for _ in range(60))]:
        path.write_bytes(whole[:n]); assert f'{path}: not a whole .tar' in one_line(ShardImages, path, error=ShardError)
    path.write_bytes(whole[:-512]); assert ShardImages(path).names == names


def test_any_damage_is_one_line(packed, tmp_path):
    whole, rng, path, told = (packed[1]/'000002.tar').read_bytes(), random.Random(1), tmp_path/'bad.tar', 0
    for _ in range(150):
        b = bytearray(whole); at = rng.randrange(0, 2000) if rng.random() < .5 else rng.randrange(len(b)); b[at:at + 8] = rng.randbytes(8)
        path.write_bytes(bytes(b))
        try: s = ShardImages(path); [PhotoDataset(s, 8)[0, i] for i in range(len(s))]
        except InputError as e: told += 1; assert '\n' not in str(e)
    assert told > 20


def test_places_that_are_no_shards(packed, tmp_path):
    shards = packed[1]
    assert 'no such file' in one_line(ShardImages, shards/'000003.tar')
    assert '000003.tar' in one_line(ShardImages, f'{shards}/{{000000..000003}}.tar')
    (tmp_path/'two.tar').write_bytes((shards/'000000.tar').read_bytes()*2)
    assert 'more behind its end' in one_line(ShardImages, tmp_path/'two.tar')
    for pattern in '{000000..000002.tar', '{000000..}.tar}': assert 'not a pattern of shards' in one_line(open_source, f'{shards}/{pattern}')
    assert 'missing environment variable' in one_line(ShardImages, f'{shards}/${{NONE_SUCH}}.tar')
    (tmp_path/'none').mkdir(); assert 'no .tar in it' in one_line(ShardImages, tmp_path/'none')
    assert 'no image in it' in one_line(open_source, tmp_path/'none')
    assert 'no picture in it' in one_line(ShardImages, pack(tmp_path/'empty.tar', {}))
    assert 'no picture in it' in one_line(ShardImages, pack(tmp_path/'texts.tar', {'a.txt': b'a', 'a.json': b'{}'}))
    with tarfile.open(tmp_path/'small.tar.gz', 'w:gz') as t: t.add(shards/'index.json', 'a.png')
    shutil.copy(tmp_path/'small.tar.gz', tmp_path/'gz.tar')
    assert 'uncompressed' in one_line(ShardImages, tmp_path/'gz.tar')
    assert 'keep is -1' in one_line(ShardImages, shards, keep=-1)
    message = one_line(open_source, 'phtoos')
    assert all(word in message for word in ("'builtin'", 'a .tar', 'index.json', 'URL', 'folder of images', 'imagenette'))


def test_a_folder_is_images_or_shards_not_both(packed, tmp_path):
    assert isinstance(open_source(packed[0].folder), FolderImages)
    both = tmp_path/'both'; both.mkdir()
    shutil.copy(packed[1]/'000000.tar', both); assert open_source(both).names == packed[0].names[:15]
    (both/'x').mkdir(); (both/'x'/'a.png').write_bytes(png())
    assert 'holds .tar files and images, such as a.png' in one_line(open_source, both)


def test_names_come_once(packed, tmp_path):
    pack(tmp_path/'1.tar', {'a.png': png(), 'b.png': png()}); pack(tmp_path/'2.tar', {'c.png': png(), 'b.png': png()})
    assert f'{tmp_path}/1.tar and {tmp_path}/2.tar both hold b.png' in one_line(ShardImages, tmp_path)
    pack(tmp_path/'1.tar', {'a 1.5.png': png(), 'a 1.6.png': png()})
    assert 'a 1.5.png and a 1.6.png are one sample' in one_line(ShardImages, tmp_path/'1.tar')


def test_samples_as_webdataset_names_them(tmp_path):
    "Its own reader finds the same samples in the same order"
    import webdataset
    f = {'./x/1.jpg': png(1), './x/1.json': b'{}', './x/1.edges.png': png(2), 'x.y/2.PNG': png(3), 'x.y/2.cls': b'7', '._3.png': b'', 'd/.4.png': b'',
         '5.seg.png': png(5), 'README': b'text', 'ü'*60 + '/' + 'n'*90 + '.png': png(6)}
    s = ShardImages(pack(tmp_path/'a.tar', f))
    assert s.names == ['x/1.jpg', 'x.y/2.PNG', '5.seg.png', 'ü'*60 + '/' + 'n'*90 + '.png'] and [int(s.read(i)[0, 0, 0]) for i in range(4)] == [1, 3, 5, 6]
    theirs = list(webdataset.WebDataset(str(write_shards(s, tmp_path/'out', per_shard=9).shards[0]), shardshuffle=False))
    assert [t['__key__'] for t in theirs] == ['x/1', 'x.y/2', '5_seg', 'ü'*60 + '/' + 'n'*90]
    assert [next(v for k, v in t.items() if k[0] != '_') for t in theirs] == [s.data(i) for i in range(4)]


@pytest.mark.parametrize('change, says', [
    (lambda i: i.pop('shards'), "no 'shards'"), (lambda i: i.update(format=2), 'format 2, expected 1'),
    (lambda i: i['shards'][0].update(name='pipe:touch owned'), 'expected plain names'), (lambda i: i['shards'][0].update(name='../000000.tar'), 'plain names'),
    (lambda i: i['shards'][1].update(name='000000.tar'), 'each once'), (lambda i: i['shards'][0]['pictures'][0].__setitem__(1, -5), 'beyond its shard'),
    (lambda i: i['shards'][0]['pictures'][0].__setitem__(2, 10**9), 'beyond its shard'), (lambda i: i['shards'][0].update(size=7), 'beyond its shard'),
    (lambda i: i['shards'].clear(), 'expected plain names'), (lambda i: i['shards'][2].update(size=10**7), 'not as long as when'), (lambda i: i.update(shards='x'), 'not an index')])
def test_an_index_that_does_not_fit(packed, tmp_path, change, says):
    shutil.copytree(packed[1], tmp_path/'s'); path = tmp_path/'s'/'index.json'
    index = json.loads(path.read_text()); change(index); path.write_text(json.dumps(index))
    assert says in one_line(ShardImages, path) and not (tmp_path/'owned').exists()
    for text in '', '[]', '{', 'null', '<html>404</html>': path.write_text(text); assert 'not an index of shards' in one_line(ShardImages, path)
    path.unlink(); assert 'no such file' in one_line(ShardImages, path)


# ---- packing

def test_packing_twice_gives_equal_bytes(packed, tmp_path):
    folder, shards = packed
    time.sleep(1.1)                                                                                 # another second, for time stamps
    again = write_shards(ShardImages(shards), tmp_path/'again', per_shard=15)                       # and from shards to shards
    assert files(shards) == files(tmp_path/'again') == ['000000.tar', '000001.tar', '000002.tar', 'index.json']
    assert all((shards/f).read_bytes() == (tmp_path/'again'/f).read_bytes() for f in files(shards)) and again.names == folder.names
    with tarfile.open(shards/'000000.tar') as t: assert {(m.mtime, m.uid, m.uname) for m in t} == {(0, 0, 'bigdata')}


def test_other_sources_are_packed_as_png(tmp_path):
    s = write_shards(open_source('builtin', 'test'), tmp_path/'out')
    assert s.names == ['chelsea.png'] and np.array_equal(s.read(0), builtin_photograph('chelsea'))

    class Dark(FolderImages):
        "Reads otherwise than its files say"
        def read(self, i): return super().read(i)//2
    (tmp_path/'in').mkdir(); (tmp_path/'in'/'a.1.png').write_bytes(png(100))
    s = write_shards(Dark(tmp_path/'in'), tmp_path/'dark')
    assert s.names == ['a_1.png'] and s.read(0)[0, 0].tolist() == [50, 0, 1]


def test_packing_overwrites_nothing(packed, tmp_path):
    folder = packed[0]
    (tmp_path/'x').write_text('mine')
    assert 'holds something already' in one_line(write_shards, folder, tmp_path) and 'holds something' in one_line(write_shards, folder, tmp_path/'x')
    assert 'holds something already' in one_line(write_shards, folder, packed[1]) and (tmp_path/'x').read_text() == 'mine'
    assert '0 pictures in each shard' in one_line(write_shards, folder, tmp_path/'new', per_shard=0)
    (tmp_path/'in').mkdir()
    for name in 'a.png', 'a.jpg', 'b.png': (tmp_path/'in'/name).write_bytes(png())
    assert 'would both be called a;' in one_line(write_shards, FolderImages(tmp_path/'in'), tmp_path/'new') and not (tmp_path/'new').exists()


def test_a_killed_packing_leaves_only_whole_shards(packed, tmp_path):
    class Slow(FolderImages):
        def read(self, i): time.sleep(.02); return super().read(i)
    p = forked(write_shards, Slow(packed[0].folder), tmp_path/'out', per_shard=4)
    while len(list(tmp_path.glob('out/*.tar'))) < 3: assert p.is_alive(); time.sleep(.005)
    os.killpg(p.pid, signal.SIGKILL); p.join()
    tars = sorted(tmp_path.glob('out/*.tar'))
    assert 3 <= len(tars) < 10 and not (tmp_path/'out'/'index.json').exists()
    assert all(ShardImages(t).groups == [4] for t in tars) and 'interrupted' in one_line(write_shards, packed[0], tmp_path/'out')


# ---- runs

def run(folder, place, steps, workers=0, *, die_at=None, **source):
    "Edge stage on shards, batches of 3: step 5 is in the middle of a shard"
    recipe, c, _ = recipes.build('edge_connect.edge', 'tiny', config=dict(width=.05),
                                 run=dict(steps=steps, batch_size=3, device='cpu', workers=workers, save_every=5))
    terms = recipe.g_terms

    def deadly(batch, out):
        if recipe.step == die_at: os.killpg(0, signal.SIGKILL)                                      # and its loader processes
        return terms(batch, out)
    recipe.g_terms = deadly
    data = PhotoDataset(open_source(str(place), root=Path(folder).parent, **source), 24, masks.mask_sampler('bins'))
    return training.train(recipe, data, c, folder, progress=False)


def left_by(folder):
    s = training.read_checkpoint(folder/'checkpoint.pt')
    log = [{k: v for k, v in json.loads(line).items() if not k.endswith('_s')} for line in open(folder/'log.jsonl')]
    return {f'{n}.{k}': v for n in ('G', 'D') for k, v in s[n].items()}, log


@pytest.fixture
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def test_a_run_killed_within_a_shard_goes_on_as_if_nothing_had_been(packed, tmp_path, one_thread):
    "kill -9 in step 7, with 0 and with 2 workers; the checkpoint of step 5 (15 pictures of 40, from all three shards) is gone on from"
    code = ("import sys; sys.path.insert(0, 'tests'); import torch; torch.set_num_threads(1)\n"
            "from test_shards import *\n"
            "run(Path(sys.argv[1]), sys.argv[2], 10, int(sys.argv[3]), die_at=7)")
    killed = {w: subprocess.Popen([sys.executable, '-c', code, tmp_path/f'parts{w}', packed[1], str(w)], cwd=ROOT, start_new_session=True) for w in (0, 2)}
    run(tmp_path/'whole', packed[1], 10)
    a, log_a = left_by(tmp_path/'whole')
    for workers, p in killed.items():
        folder = tmp_path/f'parts{workers}'
        assert p.wait() == -signal.SIGKILL and training.read_checkpoint(folder/'checkpoint.pt')['step'] == 5
        run(folder, packed[1], 10, workers)
        b, log_b = left_by(folder)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and log_a == log_b and len(log_a) == 10


def test_the_trainer_hands_the_shards_to_the_sampler(packed, tmp_path, one_thread):
    "30 pictures from shards of 4, four mixed: two windows, eight shards, each fetched once though four find room"
    write_shards(packed[0], tmp_path/'shards', per_shard=4)
    with Server(tmp_path/'shards') as server:
        run(tmp_path/'run', f'{server.url}/index.json', 10, keep=4)
        assert len(server.tars()) == len(set(server.tars())) == 8
