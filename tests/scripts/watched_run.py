"""A run with inverted masks that a `health.Watch` looks on, in FOLDER, in one process or under torchrun."""
import os
import sys

import torch
from accelerate.state import PartialState

from inpaint_lib import health, recipes, training
from inpaint_lib.data import images, masks

torch.set_num_threads(1)
strokes = masks.mask_sampler('bins')
recipe, run, data = recipes.build('edge_connect.edge', 'smoke', config=dict(width=.05), run=dict(steps=4, batch_size=4, device='cpu'))
data.size = 32
watch = health.watch_run(recipe, data, 'smoke', sys.argv[1])
dataset = images.PhotoDataset(images.open_source('builtin'), 32, lambda rng, i, size: ~strokes(rng, i, size))
training.train(recipe, dataset, run, sys.argv[1], watch=watch, progress=False)
sys.stdout.flush()
PartialState().destroy_process_group()
os._exit(0)   # gloo's threads now and then abort while the interpreter is taken down
