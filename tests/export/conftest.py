"""torch's exporter to ONNX with one cost taken out: for every graph it reads the source of all its translations again.

That is a fifth of the time of a small export. What is patched returns the same table; nothing here writes into it.
"""

import functools

from torch.onnx._internal.exporter._registration import ONNXRegistry

ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
