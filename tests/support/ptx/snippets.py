"""A few instructions of PTX as a kernel, for the machine's own tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptx.counts import Counts
from ptx.driver import extent, pack
from ptx.machine import Launch
from ptx.translation import translate

KERNEL = """
.version 8.7
.target sm_{capability}
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet({parameters})
.reqntid {threads}
{{
    .reg .pred %p<32>;
    .reg .b16 %rs<32>;
    .reg .b32 %r<64>;
    .reg .b64 %rd<64>;
    {loads}
    mov.u32 %r0, %tid.x;
    {body}
    ret;
}}
"""


def run(
    body: str, *tensors: Tensor, threads: int = 32, blocks: int = 1, shared: int = 0,
    capability: int = 70, **options: Any,
) -> Counts:  # fmt: skip
    """Runs instructions with the tensors' addresses in %rd0, %rd1, … and the thread in %r0."""
    names = [f"p{index}" for index in range(len(tensors))]
    ptx = KERNEL.format(
        capability=capability,
        parameters=",\n".join(f".param .u64 {name}" for name in names) + "\n",
        threads=threads,
        loads="\n".join(f"ld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names)),
        body=body,
    )
    parameters = [pack("*", tensor) for tensor in tensors]
    extents = [extent(tensor) for tensor in tensors]
    return Launch(translate(ptx), (blocks, 1, 1), shared, parameters, extents, **options).run()


def lanes(body: str, *inputs: Any, result: str = "%r9", **options: Any) -> np.ndarray[Any, Any]:
    """The 32-bit `result` of each lane of a warp; its element of each input is in %r1, %r2, …."""
    arrays = [np.ascontiguousarray(values).view(np.int32) for values in inputs]
    tensors = [torch.from_numpy(array.copy()) for array in arrays]
    found = torch.zeros(32, dtype=torch.int32)
    loads = "".join(
        f"mad.wide.u32 %rd20, %r0, 4, %rd{index + 1}; ld.global.b32 %r{index + 1}, [%rd20];\n"
        for index in range(len(tensors))
    )
    store = f"mad.wide.u32 %rd21, %r0, 4, %rd0; st.global.b32 [%rd21], {result};"
    run(loads + body + store, found, *tensors, **options)
    return found.numpy().view(np.uint32)
