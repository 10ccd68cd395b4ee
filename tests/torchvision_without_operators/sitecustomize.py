"""Lets a torchvision wheel for CUDA be imported beside torch for the CPU, in a process of its own.

Its compiled operators cannot be loaded there, and its import stops at those that it describes to
torch. So they are declared here, without an implementation: datasets, models and transforms need
none. A process finds this file where PYTHONPATH names its folder.
"""

import torch

OPERATORS = torch.library.Library("torchvision", "DEF")
OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
