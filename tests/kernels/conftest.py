"""Kernels run natively on CUDA; on CPU under Triton's interpreter, in a process of its own since the choice is made at import."""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch

from vargen.kernels.dispatch import kernel, kernels

INTERPRETER = {"TRITON_INTERPRET": "1", "VARGEN_KERNELS": "triton", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def run_triton(device):
    """``run_triton(name, *args, **kwargs)``: the Triton kernel of an operation, through the dispatcher."""
    if device == "cuda":

        def native(name, *args, **kwargs):
            with kernels("triton"):
                return kernel(name)(*args, **kwargs)

        yield native
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as interpreter:
        outside = {key: os.environ.get(key) for key in INTERPRETER}
        os.environ.update(INTERPRETER)
        try:
            interpreter.submit(os.getpid).result()
        finally:
            for key, value in outside.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
        yield lambda name, *args, **kwargs: interpreter.submit(partial(kernel(name), *args, **kwargs)).result()
