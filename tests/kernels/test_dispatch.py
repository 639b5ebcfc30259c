import inspect
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vargen.errors import VargenError
from vargen.kernels import dispatch
from vargen.kernels.dispatch import OPS, choice, kernel, kernels


@pytest.fixture
def launches(monkeypatch):
    """Names of the operations whose kernels were taken, on a device that passes for a GPU."""
    taken = []

    def launcher(name):
        taken.append(name)
        return OPS[name].reference

    monkeypatch.setattr(dispatch, "triton_function", launcher)
    monkeypatch.setattr(dispatch, "device_class", lambda device: "sm_90")
    monkeypatch.delenv("VARGEN_KERNELS", raising=False)
    return taken


def search():
    return kernel("nearest_code")(torch.tensor([[1.0], [4.0]]), torch.tensor([[5.0], [0.0]])).tolist()


def test_reference_is_the_default_and_triton_is_opt_in(launches, monkeypatch):
    assert search() == [1, 0]
    assert launches == []
    with kernels("triton"):
        assert search() == [1, 0]
    monkeypatch.setenv("VARGEN_KERNELS", "triton")
    search()
    with kernels("reference"):
        search()
    assert launches == ["nearest_code"] * 2


def test_a_measured_kernel_is_taken_on_its_device_only(monkeypatch, launches):
    monkeypatch.setitem(OPS, "nearest_code", replace(OPS["nearest_code"], faster_on=frozenset({"sm_90"})))
    assert choice("nearest_code", "sm_90") == "triton"
    assert choice("nearest_code", "sm_80") == "reference"
    assert choice("nearest_code", "sm_90", "reference") == "reference"
    search()
    assert launches == ["nearest_code"]


@pytest.mark.parametrize("name", OPS)
def test_asking_for_triton_leaves_the_cpu_its_reference(name):
    assert choice(name, "cpu", "triton") == "reference"
    assert choice(name, "sm_80", "triton") == "triton"


def test_a_call_to_be_differentiated_takes_the_reference(launches):
    h = torch.randn(2, 3, requires_grad=True)
    modulation, weight, bias = torch.zeros(2, 3), torch.randn(4, 3), torch.zeros(4)
    with kernels("triton"):
        kernel("adaln_linear")(h, modulation, modulation, None, None, weight, bias).sum().backward()
        assert launches == []
        assert h.grad is not None
        with torch.no_grad():
            kernel("adaln_linear")(h, modulation, modulation, None, None, weight, bias)
    assert launches == ["adaln_linear"]


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(VargenError, match="did you mean 'nearest_code'"):
        kernel("nearest_codes")
    with pytest.raises(VargenError, match="expected one of auto, reference, triton"), kernels("cuda"):
        pass
    monkeypatch.setenv("VARGEN_KERNELS", "fast")
    with pytest.raises(VargenError, match=r"kernels 'fast' \(VARGEN_KERNELS\)"):
        search()


def test_triton_is_imported_by_the_first_dispatch_to_a_kernel_only():
    program = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "from vargen.kernels.dispatch import kernel; kernel('nearest_code')(torch.ones(1, 1), torch.ones(1, 1))\n"
        "assert ('triton' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_kernels_have_the_signatures_of_their_references():
    from vargen.kernels import triton_ops

    assert sorted(triton_ops.__all__) == sorted(OPS)
    for name, op in OPS.items():
        assert inspect.signature(getattr(triton_ops, name)) == inspect.signature(op.reference)


def test_dispatch_compiles_into_the_callers_graph():
    compiled = torch.compile(lambda *args: kernel("guided_sample")(*args), fullgraph=True, backend="eager")
    args = (torch.randn(2, 1, 9), torch.randn(2, 1, 9), 2.0, torch.rand(2, 1), 0.9, 5, 0.8)
    assert torch.equal(compiled(*args), OPS["guided_sample"].reference(*args))
