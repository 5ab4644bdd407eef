"""The Triton kernels against the plain form: on a GPU, or else in Triton's interpreter.

The interpreter has to be asked for before Triton is imported, so without a GPU this file runs once
more in a process of its own.
"""

import logging
import os
import subprocess
import sys

import golden
import pytest
import torch
from conftest import Compare
from test_deformable_attention import (
    DTYPES,
    SAMPLINGS,
    Sampling,
    check_core,
    check_gradient,
    check_like_plain,
    core_case,
)
from torch import Tensor

from vidt.ops.deformable_attention import Levels, best_form, kernel_runs

pytest.importorskip("triton", reason="there is no Triton for this platform")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
somewhere = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU: see test_in_the_interpreter"
)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@pytest.mark.slow
@compiled_only
@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU itself runs them")
def test_in_the_interpreter() -> None:
    options = ["-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "no GPU" not in done.stdout


@somewhere
@golden.present
@core_case
def test_core(case: str, compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # one program after the other: let there be few
        monkeypatch.setattr("vidt.ops.deformable_triton.LANES", 4096)
    check_core(case, torch.float32, "triton", torch.device(DEVICE), compare)


@somewhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_kernel_equals_the_plain_form(sampling: Sampling, dtype: torch.dtype) -> None:
    check_like_plain(sampling, dtype, "triton", DEVICE)


@somewhere
def test_gradient_is_that_of_finite_differences() -> None:
    check_gradient("triton", DEVICE, fast_mode=INTERPRETED)


@somewhere
def test_what_is_not_a_number_is_not_hidden() -> None:
    sampling = Sampling()
    given = [tensor.detach() for tensor in sampling.tensors(torch.float32, DEVICE)]
    given[1][0, 1, 0, 0, 0, 0] = torch.nan
    output = sampling.call(*given, "triton")
    assert output[0, 1, : sampling.dim].isnan().all()
    assert output[0, 2:].isfinite().all() and output[1].isfinite().all()


@somewhere
def test_operators_keep_the_rules_of_torch() -> None:
    from vidt.ops import deformable_triton

    sampling = Sampling(batch=1, queries=2)
    value, locations, weights = sampling.tensors(torch.float32, DEVICE)
    levels = Levels.of(sampling.shapes, value.device).table
    torch.library.opcheck(deformable_triton.attend, (value, levels, locations, weights))


@somewhere
def test_compiles_whole_with_the_choice_of_form() -> None:
    sampling = Sampling(batch=1, queries=2)

    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        form = "triton" if kernel_runs(value.device) else "plain"
        return sampling.call(value, locations, weights, form)

    given = sampling.tensors(torch.float32, DEVICE)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*given), attend(*given)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(output.sum(), given) for output in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@compiled_only
@pytest.mark.skipif(DEVICE == "cuda", reason="they run on the GPU that is here")
@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_compiles_for_a_gpu_that_is_elsewhere(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory
) -> None:
    """The interpreter takes what the compiler does not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vidt.ops import deformable_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    kernel = getattr(deformable_triton, name)
    exact = "fp64" if dtype == "fp64" else "fp32"
    sizes = {"HEADS": 8, "DIM": 30, "LEVELS": 4, "POINTS": 3, "ROWS": 16, "CHANNELS": 32}
    fixed = sizes | {"FLOAT": getattr(triton.language, f"float{exact[2:]}")}
    types = dict.fromkeys(deformable_triton.SIZES, "i32") | dict.fromkeys(fixed, "constexpr")
    types |= {"levels": "*i64"} | dict.fromkeys(("value", "output", "grad"), f"*{dtype}")
    signature = {argument: types.get(argument, f"*{exact}") for argument in kernel.arg_names}
    source, target = ASTSource(kernel, signature, fixed), GPUTarget("cuda", 80, 32)
    made = triton.compile(source, target=target, options={"enable_fp_fusion": True})
    assert "cubin" in made.asm


@compiled_only
def test_a_kernel_that_does_not_run_is_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    """Compiled kernels cannot read what lies on the CPU."""
    with caplog.at_level(logging.WARNING):
        assert not kernel_runs(torch.device("cpu"))
    assert "runs without its Triton kernel" in caplog.text
    assert best_form(torch.device("cpu"), sums=1, positions=2) == "cpu"


def test_memory_that_ran_out_says_nothing_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call tries again: another program may have gone."""
    failures = [torch.OutOfMemoryError("CUDA out of memory")]

    def try_out(device: torch.device) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr("vidt.ops.deformable_triton.try_out", try_out)
    device = torch.device("cuda", 63)  # of which nothing is known yet
    with pytest.raises(torch.OutOfMemoryError):
        kernel_runs(device)
    assert kernel_runs(device)
