"""The pass over the images with fused convolutions on a pretended GPU, as a program. Prints a JSON object."""

from __future__ import annotations

import json

import torch
from gpu import DEVICE, PretendedGPU
from pcl_fast.kernels import switches
from torch import nn

from pcl_fast.clustering import FeatureShard
from pcl_fast.config import ModelConfig
from pcl_fast.nn.batch_norm import fold_batch_norm
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.feature_pass import BiasReLU, find_difference, fused_encoder, fused_layers, unfit_layers
from pcl_fast.nn.precision import encoder_dtype

ROWS, SIDE, WIDTH = 6, 32, 16


def measure(gpu: PretendedGPU) -> dict:
    torch.manual_seed(0)
    encoder, dtype = Encoder(ModelConfig(arch="resnet18", dim=WIDTH)), encoder_dtype(DEVICE)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -1, 1)
    encoder.to(DEVICE, memory_format=torch.channels_last)
    images = torch.randn(ROWS, 3, SIDE, SIDE).to(DEVICE, dtype, memory_format=torch.channels_last)
    usual, fused = fold_batch_norm(encoder).to(dtype), fused_encoder(encoder).to(dtype)
    gpu.forget()
    features, _ = FeatureShard(ROWS, WIDTH, DEVICE).fill(fused, images.split(4))
    seen = gpu.seen()
    with torch.inference_mode():
        error = float((features.float() - usual(images)).abs().max().cpu())
    return {
        **seen,
        "layers": fused_layers(fused),
        "pooled first": sum(isinstance(module, BiasReLU) for module in fused.modules()),
        "plain biases": [n for n, m in fused.named_modules() if type(m) is nn.Conv2d and m.bias is not None],
        "error": error,
        "difference": find_difference(encoder, images),
        "unfit": unfit_layers(encoder, images),
    }


if __name__ == "__main__":
    switches.switch_off(("max_pool", "stem"))  # Triton's kernels do nothing here
    gpu = PretendedGPU()
    with gpu:
        print(json.dumps(measure(gpu)))
