"""`make film`: figures/demo.webp, from real painting in a headless Chromium before Voila, and figures/round_trip_cpu.json.

    python tests/film.py [figures/demo.webp]

Nothing is drawn into the frames but a mouse pointer, which screenshots leave out.
"""
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from browser import ROOT, Painter, Server, chromium, long_trips, missing, round_trips

WIDTH, HEIGHT, WIDE = 1000, 690, 760        # the window, and the film's width
POINTER = """() => { const p = document.createElement('div'); p.id = 'film-pointer';
    p.style.cssText = 'position:fixed;left:0;top:0;z-index:99999;pointer-events:none;width:22px;height:22px;transform:translate(-99px,0)';
    p.innerHTML = '<svg viewBox="0 0 22 22"><path d="M3 2v16l4.3-4 2.6 6 2.6-1.1-2.6-5.9h6z" fill="#fff" stroke="#000" stroke-width="1.3"/></svg>';
    document.body.append(p);
    addEventListener('pointermove', e => { p.style.transform = `translate(${e.clientX - 3}px,${e.clientY - 2}px)` }, true) }"""
FIND = 'import gc, inpaint_lib.demo as _d\npainter = next(o for o in gc.get_objects() if isinstance(o, _d.MaskPainter))'
PAGE = "from inpaint_lib.demo import MaskPainter\nMaskPainter(chosen=['edge_connect', 'deepfill_v2', 'telea'])"


SCROLLER = """() => { let n = document.querySelector('.ip-painter');
    while (n && !(n.scrollHeight > n.clientHeight + 1 && /auto|scroll/.test(getComputedStyle(n).overflowY))) n = n.parentElement;
    return n ?? document.scrollingElement }"""


class Film:
    "Frames of a page with a hand that moves"
    def __init__(self, page): self.page, self.frames, self.spot = page, [], (WIDTH*.55, HEIGHT*.6)

    def snap(self, ms):
        "One frame; one that equals the last makes that one longer"
        path = Path(tempfile.gettempdir())/f'film-{os.getpid()}.png'
        self.page.screenshot(path=path)
        with Image.open(path) as im: frame = im.convert('RGB').resize((WIDE, round(HEIGHT*WIDE/WIDTH)), Image.Resampling.LANCZOS)
        path.unlink()
        if self.frames and np.array_equal(frame, self.frames[-1][0]): self.frames[-1][1] += ms
        else: self.frames.append([frame, ms])

    def go(self, x, y, steps=4, ms=70):
        "Moves the mouse there, slower at both ends"
        (a, b), at = self.spot, lambda t: t*t*(3 - 2*t)
        for k in range(1, steps + 1):
            self.page.mouse.move(a + (x - a)*at(k/steps), b + (y - b)*at(k/steps)); self.snap(ms)
        self.spot = x, y

    def click(self, what, pause=150, steps=4):
        box = what.bounding_box()
        self.go(box['x'] + box['width']/2, box['y'] + box['height']/2, steps)
        self.page.mouse.down(); self.page.mouse.up(); self.page.wait_for_timeout(60); self.snap(pause)

    def draw(self, painter, points, each=3, ms=60):
        "A stroke along a smooth curve through image points"
        t = np.linspace(0, len(points) - 1, each*(len(points) - 1) + 1)
        curve = [painter.at(*p) for p in np.stack([np.interp(t, range(len(points)), c) for c in zip(*points)], 1)]
        self.go(*curve[0]); self.page.mouse.down()
        for x, y in curve[1:]: self.page.mouse.move(x, y); self.snap(ms)
        self.page.mouse.up(); self.spot = curve[-1]; self.snap(ms)

    def scroll(self, what, gap, steps=5):
        "Scrolls until an element's upper edge is `gap` pixels below the window's"
        box = self.page.evaluate_handle(SCROLLER)
        now = box.evaluate('b => b.scrollTop')
        way = what.evaluate('e => e.getBoundingClientRect().top') - gap
        for k in range(1, steps + 1):
            t = k/steps
            box.evaluate('(b, y) => b.scrollTo({top: y, behavior: "instant"})', now + way*t*t*(3 - 2*t)); self.snap(50)

    def wait(self, painter, state='ready', ms=100):
        end = time.time() + 60
        while painter.data('state') != state and time.time() < end: self.snap(ms)

    def save(self, path, quality=55, limit=1_500_000):
        images, ms = zip(*self.frames)
        while True:
            images[0].save(path, save_all=True, append_images=images[1:], duration=list(ms), loop=0, quality=quality, method=4, minimize_size=True)
            if Path(path).stat().st_size <= limit or quality < 20: return
            quality -= 10


def play(film, p):
    "What a person does"
    page = film.page
    film.scroll(p.root, 8, steps=1); film.frames.clear(); film.snap(500)
    p.width(24)
    film.draw(p, [(70, 205), (110, 195), (150, 208), (195, 190)])                     # cheek and whiskers
    film.draw(p, [(262, 48), (262, 95), (272, 140), (268, 175)])                      # the forehead's stripes
    film.click(p.button('Fill')); page.wait_for_timeout(50); film.wait(p); film.snap(200)
    cards = p.root.get_by_role('region', name='Results')
    film.scroll(cards, 12); film.snap(500)
    film.click(p.card('edge_connect').locator('.ip-look')); page.wait_for_timeout(700)
    wipe = p.root.locator('.ip-wipe'); film.scroll(p.root.get_by_role('region', name='Compare'), 120)
    box = wipe.bounding_box()
    film.go(box['x'] + box['width']/2, box['y'] + box['height']/2)
    page.mouse.down()
    for part in (.2, .85, .5): film.go(box['x'] + box['width']*part, box['y'] + box['height']*.5, steps=6)
    page.mouse.up(); film.snap(250)
    film.scroll(p.root, 8)
    film.click(p.root.locator('.ip-layers label', has_text='Edges'), pause=450)
    p.press('Brush'); p.width(1)
    film.draw(p, [(256, 44), (256, 80), (260, 120), (258, 170)], each=3)
    film.draw(p, [(268, 44), (270, 80), (280, 120), (277, 170)], each=3)
    film.draw(p, [(72, 207), (110, 197), (150, 210), (194, 191)], each=2)
    p.press('Eraser'); p.width(12); film.draw(p, [(282, 128), (278, 165)], each=4)
    p.choose('EdgeConnect'); film.snap(150)
    film.click(p.button('Fill')); page.wait_for_timeout(50); film.wait(p); film.scroll(cards, 12); film.snap(200)
    p.root.get_by_label('Left picture').select_option('edge_connect')
    film.click(p.card('edge_connect:edited').locator('.ip-look')); page.wait_for_timeout(700)
    film.scroll(p.root.get_by_role('region', name='Compare'), 120); film.snap(1600)


def measure(browser, server, path):
    "The round trip on a page of its own"
    page = browser.new_page(viewport=dict(width=WIDTH, height=HEIGHT))
    page.goto(server.address()); p = Painter(page).wait().until(state='ready')
    trips = round_trips(p, 40)
    kernel = server.kernel()
    kernel.run(FIND); long = long_trips(p, kernel, 25); kernel.close()
    cores, load = os.cpu_count(), os.getloadavg()[0]
    report = dict(median_ms=round(float(np.median(trips)), 1), p90_ms=round(float(np.percentile(trips, 90)), 1), strokes=len(trips),
                  median_300_ms=round(float(np.median(long)), 1),
                  browser=f'Chromium {browser.version}, headless, Voila', machine=f'{cores} cores, load {load:.1f}')
    Path(path).write_text(json.dumps(report, indent=1) + '\n'); print(path, report)
    page.close()


def main(target):
    import nbformat
    if missing(): raise SystemExit(f'no film: {missing()}')
    with tempfile.TemporaryDirectory() as d:
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PAGE)])
        nb.metadata.kernelspec = dict(display_name='python3', language='python', name='python3')
        nbformat.write(nb, f'{d}/film.ipynb')
        with Server('voila', d, 'film.ipynb') as server, chromium() as browser:
            measure(browser, server, ROOT/'figures'/'round_trip_cpu.json')
            page = browser.new_page(viewport=dict(width=WIDTH, height=HEIGHT))
            page.goto(server.address()); p = Painter(page).wait().until(state='ready')
            page.evaluate(POINTER); page.wait_for_timeout(500)
            film = Film(page)
            play(film, p)
            film.save(target)
    print(f'{target}: {len(film.frames)} frames, {sum(ms for _, ms in film.frames)/1000:.1f} s, {Path(target).stat().st_size/1e6:.2f} MB')


if __name__ == '__main__': main(*(sys.argv[1:] or [ROOT/'figures'/'demo.webp']))
