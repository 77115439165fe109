"Weights files of untrained networks: for tests only, never shipped"
import dataclasses

import torch

from inpaint_lib.papers.edge_connect import EdgeConnectConfig, EdgeGenerator, InpaintGenerator
from inpaint_lib.training import save_weights


def save_tiny(path, width=1/16, nets=('edge', 'inpaint'), **meta):
    "A weights file with untrained networks, for tests only"
    torch.manual_seed(0)
    made = dict(edge=EdgeGenerator(width=width), inpaint=InpaintGenerator(width=width))
    config = dataclasses.asdict(EdgeConnectConfig(width=width))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, {n: made[n].state_dict() for n in nets}, dict(method='edge_connect', recipe='test', config=config) | meta)
    return path
