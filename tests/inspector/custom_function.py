"""A function that torch's overrides do not see."""

from __future__ import annotations

import torch


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2
