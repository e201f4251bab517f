"""The fused decode kernel, in Triton's interpreter, against attention in PyTorch; and that it compiles for CUDA."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")

SHAPES = """
import sys
sys.path.insert(0, {tests!r})
import torch
from niwaki.kv import Call, Segment, attend, fused
from niwaki.kv.dense import Dense

torch.manual_seed(0)
CASES = [  # batch, heads, group, width, key channels, value channels, old, new tokens, cap, masked, type, tolerance
    (1, 1, 1, 16, 9, 16, 70, 5, None, False, torch.float32, 1e-5),
    (2, 2, 3, 24, 11, 7, 600, 33, None, True, torch.float32, 1e-5),
    (2, 2, 2, 32, 32, 32, 0, 40, 5.0, True, torch.float32, 1e-5),
    (1, 2, 1, 8, 5, 3, 130, 520, 7.0, True, torch.float32, 1e-5),
    (1, 2, 4, 64, 39, 64, 1100, 3, None, False, torch.float16, 2e-3),
]
for batch, heads, group, width, thin, thin_values, old, new, cap, masked, kind, tolerance in CASES:
    def channels(count):
        if count == width:
            return None
        return torch.rand(batch, heads, width).argsort(-1)[..., :count].sort(-1).values.to(torch.int16)

    def segment(tokens, keys, values, start):
        rows = [Dense(torch.randn(batch, heads, tokens, count).to(kind)) for count in (keys, values)]
        return Segment(*rows, width=width, start=start, key_channels=channels(keys), value_channels=channels(values))

    parts = [segment(new, width, width, old)]
    if old:
        parts = [segment(old, thin, thin_values, 0), *parts]
    mask = None
    if masked:
        mask = torch.ones(batch, 1, 1, old + new, dtype=torch.bool)
        mask[-1, :, :, : min(old + new - 1, 520)] = False  # whole spans of padding
    query = torch.randn(batch, heads * group, 1, width).to(kind)
    key = torch.randn(batch, heads, 1, width).to(kind)
    call = Call(query, key, key, mask, width**-0.5, cap, None)
    assert fused.suits(call, parts)
    found, expected = fused.decode(call, parts), attend(call, parts)[0]
    assert found.shape == expected.shape and found.dtype == expected.dtype
    off = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    assert off < tolerance, (batch, heads, group, width, off)

import kv_zoo
from niwaki.kv import SnapKV, Compression, ThinK, compressed

calls, plain = [], fused.decode
fused.decode = lambda *given: calls.append(1) or plain(*given)
model = kv_zoo.llama()
batch = kv_zoo.padded([kv_zoo.prompt(40, seed=1), kv_zoo.prompt(52, seed=2)])
for tokens in (None, SnapKV(keep=45)):
    told = []
    for kernel in (False, True):
        how = Compression(channels=ThinK(keep=0.5, values=0.7), tokens=tokens, fused=kernel)
        with compressed(model, how):
            told.append(kv_zoo.generate(model, batch, new=4))
    assert torch.equal(*told)
assert len(calls) == 2 * 3 * 3, len(calls)  # two settings, three layers, three decoded tokens
"""


DEPRECATED = "Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"


def _loops_fail() -> bool:
    """Older interpreters of Triton take a loop's bounds from arrays of one element; NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    old = "int(self.handle.data)" in inspect.getsource(interpreter)
    return old and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


def test_it_is_attention() -> None:
    if _loops_fail():
        pytest.skip(f"the interpreter of Triton {triton.__version__} can't loop with NumPy {np.__version__}")
    code = SHAPES.format(tests=str(Path(__file__).parents[1]))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", f"ignore:{DEPRECATED}", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]


COMPILED = """
import warnings
import triton
from triton.backends.compiler import GPUTarget
from niwaki.kv import fused

numbers = dict(scaling="fp32", cap="fp32", old="i32", new="i32", spans_old="i32", spans="i32")
tables = dict(key_channels="*i16", value_channels="*i16", hidden="*u8", top="*fp32", total="*fp32", mixed="*fp32")
for kind, step in (("fp16", 64), ("bf16", 64), ("fp32", 32)):
    rows = {name: f"*{kind}" for name in ("query", "old_keys", "old_values", "new_keys", "new_values")}
    fixed = dict(
        KEYS=77, VALUES=128, WIDTH=128, GROUP=4, CHANNELS=128, QUERIES=16, STEP=step, LENGTH=512,
        THIN_KEYS=True, THIN_VALUES=False, MASKED=True, CAPPED=True,
    )
    signature = {**rows, **tables, **numbers, **{name: "constexpr" for name in fixed}}
    made = triton.compile(
        triton.compiler.ASTSource(fn=fused._attend, signature=signature, constexprs=fixed),
        target=GPUTarget("cuda", 80, 32),
    )
    assert made.metadata.shared <= 99 * 1024, (kind, made.metadata.shared)  # what small GPUs have
"""


@pytest.mark.slow
def test_it_compiles_for_cuda(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
