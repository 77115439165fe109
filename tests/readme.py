"""README's table of all methods, from figures/compare.json. `python tests/readme.py` writes it; a test compares."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = '<!-- compare: written by tests/readme.py from figures/compare.json -->', '<!-- /compare -->'
TITLES = dict(context_encoder='Context Encoder', structural_inpainting='Structural Inpainting', partial_conv='Partial Convolution',
              deepfill_v1='DeepFill v1', deepfill_v2='DeepFill v2', edge_connect='EdgeConnect', structure_flow='StructureFlow',
              copy_mean='mean colour', telea='Telea', navier_stokes='Navier-Stokes', biharmonic='biharmonic', patch='patches')


def cell(s, times=1, digits=2):
    "Mean and interval of a measure"
    if s is None: return '-'
    mean, lo, hi = (x if x is None else f'{times*x:.{digits}f}' for x in (s['mean'], s['lo'], s['hi']))
    return mean if lo is None else f'{mean} [{lo}, {hi}]'


def of(table, method, measure):
    "The measure over all bins, or None where the table lacks the method"
    return table.get('methods', {}).get(method, {}).get('bins', {}).get('all', {}).get(measure)


def row(report, method):
    "A method's line: equal pictures, equal seconds, the shipped weights, cost"
    images, seconds, files = report['tables'].get('images', {}), report['tables'].get('seconds', {}), report['shipped']
    c = report['costs'].get(method, {})
    cost = [f"{c['parameters']/1e6:.2f} M" if c.get('parameters') else '-', f"{c['gmac']:.2f}" if c.get('gmac') else '-',
            f"{1000*c['seconds_per_picture']:.1f}" if c else '-', str(c.get('peak_mib', '-'))]
    found = [cell(of(images, method, 'l1_hole'), 100), cell(of(seconds, method, 'l1_hole'), 100), cell(of(seconds, method, 'psnr_hole')),
             cell(of(files, method, 'l1_hole'), 100), cell(of(files, method, 'psnr_hole')), cell(of(files, method, 'ssim_hole'), 1, 3)]
    return f"| {TITLES[method]} | {' | '.join(found + cost)} |"


def block(report):
    "What stands between the markers"
    images, seconds, files = report['tables']['images'], report['tables']['seconds'], report['shipped']
    names = [m for m in TITLES if m in images['methods']]
    head = ['method', f"L1 %, {images['amount']:g} pictures each", f"L1 %, {seconds['amount']:g} s each", f"PSNR, {seconds['amount']:g} s each",
            'L1 %, weights included', 'PSNR, weights included', 'SSIM, weights included', 'parameters', 'GMAC', 'ms', 'MiB']
    lines = ['| ' + ' | '.join(head) + ' |', '|---'*len(head) + '|', *(row(report, m) for m in names)]
    note = (f"In the hole, mean and 95 % interval. Equal budgets: {images['seeds']} seeds, {report['pictures']} held-out pictures of "
            f"{report['size']}x{report['size']} (protocol `{report['protocol']}`), preset `{report['settings']['preset']}`, "
            f"{report['settings']['precision']}, {report['device']}. Weights included: one training each, with unequal budgets, "
            f"{files['pictures']} pictures of {files['size']}x{files['size']} from {files['photographs']} photographs of Kodak "
            f"(protocol `{files['protocol']}`). Cost: of filling one picture of {report['size']}x{report['size']} on the same device.")
    return '\n'.join([*lines, '', note])


def written(text, report):
    "README with the block of this report"
    pattern = re.compile(re.escape(BEGIN) + '.*?' + re.escape(END), re.S)
    if len(pattern.findall(text)) != 1: raise SystemExit(f'README.md: expected once: {BEGIN} ... {END}')
    return pattern.sub(lambda _: f'{BEGIN}\n{block(report)}\n{END}', text)


if __name__ == '__main__':
    path, report = ROOT/'README.md', json.loads((ROOT/'figures'/'compare.json').read_text())
    path.write_text(written(path.read_text(), report))
    print('README.md: table of', len(report['tables']['images']['methods']), 'methods written')
