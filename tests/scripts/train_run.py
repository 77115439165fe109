"""`training.train` for each FOLDER STEPS given, in one process or under torchrun."""
import os
import sys

import torch
from accelerate.state import PartialState

from inpaint_lib import recipes, training
from inpaint_lib.data import images, masks

torch.set_num_threads(1)
for folder, steps in zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True):
    recipe, run, _ = recipes.build('edge_connect.inpaint', 'tiny', config=dict(vgg_weights='none', width=.05),
                                   run=dict(steps=steps, batch_size=4, device='cpu', ema=.9, save_every=2))
    dataset = images.PhotoDataset(images.open_source('builtin'), 24, masks.mask_sampler('bins'))
    training.train(recipe, dataset, run, folder, progress=False)
PartialState().destroy_process_group()
os._exit(0)   # gloo's threads now and then abort while the interpreter is taken down ('terminate called without ...')
