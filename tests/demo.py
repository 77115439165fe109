"""`make demo`: a small EdgeConnect trained by papermill on real photographs, stage by stage, then evaluated.

Four headless notebooks, one after the other; each continues where it was interrupted. Everything lands in runs/demo/.
"""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT/'runs'/'demo'
COMMON = dict(preset='tiny', vgg_weights='none', data_dir='builtin')
EDGE, INPAINT, JOINT = (f'runs/demo/{k}' for k in ('edge', 'inpaint', 'joint'))
STAGES = [  # notebook, folder, parameters
    ('40_train', 'edge', dict(COMMON, recipe='edge_connect.edge', steps=500)),
    ('40_train', 'inpaint', dict(COMMON, recipe='edge_connect.inpaint', steps=500)),
    ('40_train', 'joint', dict(COMMON, recipe='edge_connect.joint', steps=100, checkpoints=f'edge={EDGE},inpaint={INPAINT}')),
    ('41_evaluate', 'evaluate', dict(method='edge_connect', checkpoint=f'{JOINT}/weights.safetensors', data_dir='builtin',
                                     size=64, per_bin=8, batch_size=8)),
]


def papermill(notebook, folder, parameters):
    "Execute one notebook into runs/demo/<folder>/<notebook>.ipynb; ends the demo with papermill's words if it fails"
    target = OUT/folder/f'{notebook}.ipynb'
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'papermill', '--cwd', str(ROOT/'nbs'), '--no-progress-bar', '--log-level', 'ERROR',
               str(ROOT/'nbs'/f'{notebook}.ipynb'), str(target)]
    for k, v in {**parameters, 'out_dir': f'runs/demo/{folder}'}.items(): command += ['-p', k, str(v)]
    env = dict(os.environ, MPLBACKEND='module://matplotlib_inline.backend_inline')
    start = time.time()
    r = subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    if r.returncode: sys.exit(f'{notebook} ({folder}) failed:\n{r.stderr[-2000:]}')
    print(f'{notebook:12} {folder:9} {time.time() - start:5.0f} s   {target.relative_to(ROOT)}', flush=True)


def main():
    start = time.time()
    print('Training a small EdgeConnect on four photographs (astronaut, coffee, rocket, motorcycle); chelsea is held out.', flush=True)
    for stage in STAGES: papermill(*stage)
    for name, source in {'metrics.json': 'evaluate/metrics.json', 'rows.png': 'evaluate/rows.png', 'samples.png': 'joint/samples.png',
                         'curves_edge.png': 'edge/curves.png', 'curves_inpaint.png': 'inpaint/curves.png',
                         'curves_joint.png': 'joint/curves.png'}.items(): shutil.copyfile(OUT/source, OUT/name)
    print(f"""
Done in {time.time() - start:.0f} s. In runs/demo:
  rows.png        held-out pictures: image | masked | edges known and hallucinated | pred | comp
  curves_*.png    each loss term of the three stages
  metrics.json    L1, PSNR, SSIM by hole ratio, with intervals
  edge/ inpaint/ joint/ evaluate/   executed notebooks, checkpoints, weights, logs
Open the notebooks: make lab, then runs/demo/evaluate/41_evaluate.ipynb
Fill a picture:     .venv/bin/inpaint fill PHOTO MASK --method edge_connect --checkpoint {JOINT}/weights.safetensors --out filled.png""")


if __name__ == '__main__': main()
