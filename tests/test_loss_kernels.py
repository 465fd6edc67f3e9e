"""The kernels of the loss without a GPU: run by Triton's interpreter, and compiled for several GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is there on Linux alone")

TESTS = Path(__file__).parent
#: What only the loss in chunks does, what the interpreter takes long for, and what it does otherwise: it cuts bfloat16
#: off, and maps operators over a further axis.
ELSEWHERE = " and not ".join(
    ["not bad_input", "threads", "memory", "finite_differences", "chunks", "half_precision", "vectorized"]
)


def test_the_tests_of_the_loss_in_tritons_interpreter() -> None:
    # Triton asks for its interpreter when it is imported, which some test before may have done.
    files = [str(TESTS / name) for name in ("test_losses.py", "test_losses_in_use.py", "loss_kernel_cases.py")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-k", ELSEWHERE, *files],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=TESTS.parent, capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("name", ["_sum_kernel", "_gradient_kernel"])
def test_kernels_compile_for_gpus(name: str, capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stunet import loss_kernels

    kernel: Any = getattr(loss_kernels, name)
    types = {"logits": "*fp16", "target": "*i16", "out": "*fp32" if name == "_sum_kernel" else "*fp16"}
    types |= dict.fromkeys(("counts_as", "owner"), "*i64") | dict.fromkeys(("nu", "alpha", "beta"), "*fp64")
    constants = {"ignore_label": 105, "dtype": triton.language.float32, "ROWS": 128, "VOXELS": 32}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert compiled.metadata.shared <= 48 * 1024  # bytes, that every GPU has
