"""README's tables of all methods and of all claims, from figures/compare.json and claims.json. `python tests/readme.py`
writes them; tests compare."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
            'L1 %, weights included', 'PSNR, weights included', 'SSIM, weights included', 'parameters', 'GMAC', 'ms', 'MiB beside the weights']
    lines = ['| ' + ' | '.join(head) + ' |', '|---'*len(head) + '|', *(row(report, m) for m in names)]
    used = [r['seconds'] for r in seconds['methods'].values() if r['stages']]
    note = (f"In the hole, mean and 95 % interval. Equal budgets: {images['seeds']} seeds, {report['pictures']} held-out pictures of "
            f"{report['size']}x{report['size']} (protocol `{report['protocol']}`), preset `{report['settings']['preset']}` "
            f"(changed: {report['settings']['options'].replace(';', ',')}; features of {report['settings']['vgg_weights']}), "
            f"{report['settings']['precision']}, {report['device']}. Seconds are planned from a measured pace; {min(used):.0f} to {max(used):.0f} "
            f"were used. Weights included: one training each, with unequal budgets, "
            f"{files['pictures']} pictures of {files['size']}x{files['size']} from {files['photographs']} photographs of Kodak "
            f"(protocol `{files['protocol']}`). Cost: of filling one picture of {report['size']}x{report['size']} on the same device.")
    return '\n'.join([*lines, '', note])


def verdicts(rows):
    "One line for each claim of the ledger: its first deciding row stands for it"
    lines = ['| | claim | note | verdict | by |', '|---|---|---|---|---|']
    for n in sorted({r['number'] for r in rows}):
        r = next(r for r in rows if r['number'] == n and r['decides'])
        if r.get('exact'): by = f"exact, {r['n']} cases"
        elif r['interval']:
            numbers = '{:+.3g} [{:+.3g}, {:+.3g}]'.format(r['value'], *r['interval'])
            more = sum(q['number'] == n and q['decides'] for q in rows) - 1
            by = f"{r['experiment']}: {r['measure']} {numbers}, {r['n']} x {r['seeds']}" + f' (and {more} more)'*bool(more)
        else: by = ''
        if r['overall'] == 'undecided':
            said = {q['verdict'] for q in rows if q['number'] == n and q['decides']}
            why = dict.fromkeys(q['reason'] for q in rows if q['number'] == n and q['decides'] and 'reason' in q)
            by = '; '.join(filter(None, [by, *why, 'measures contradict each other'*({'reproduced', 'not reproduced'} <= said)]))
        if r['denied']: by += ' (the note denies it, and so does the measurement)'
        lines.append(f"| {n} | {r['claim']} | {r['source']} | {'**' + r['overall'] + '**' if r['overall'] != 'undecided' else 'undecided'} | {by} |")
    return '\n'.join(lines)


def marks(name): return f'<!-- {name}: written by tests/readme.py from figures/{name}.json -->', f'<!-- /{name} -->'


def written(text, **blocks):
    "README with these blocks between their markers"
    for name, block_ in blocks.items():
        begin, end = marks(name); pattern = re.compile(re.escape(begin) + '.*?' + re.escape(end), re.S)
        if len(pattern.findall(text)) != 1: raise SystemExit(f'README.md: expected once: {begin} ... {end}')
        text = pattern.sub(lambda _: f'{begin}\n{block_}\n{end}', text)
    return text


def committed(name): return json.loads((ROOT/'figures'/f'{name}.json').read_text())


if __name__ == '__main__':
    path = ROOT/'README.md'
    path.write_text(written(path.read_text(), compare=block(committed('compare')), claims=verdicts(committed('claims'))))
    print('README.md: both tables written')
