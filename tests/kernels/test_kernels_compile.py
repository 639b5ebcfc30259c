"""The kernels compile to machine code, for GPUs that need not be there: the interpreter would take what the compiler refuses."""

import json
import subprocess
import sys

# shared memory of one block on the smallest of the GPUs: 99 KiB on sm_86, sm_89 and sm_120
SHARED_MEMORY = 99 * 1024


def test_kernels_compile_and_fit_the_device(tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout)
    assert sorted(shared) == ["_adaln_linear", "_ddpm_update", "_gated_linear", "_guided_sample", "_nearest_code"]
    assert max(shared.values()) <= SHARED_MEMORY


def main() -> None:
    """Calls the launchers with a driver that names a GPU and launches nothing; prints each kernel's shared memory."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class AbsentGPU:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    shared: dict[str, int] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        assert compiled.asm["cubin"]
        shared[self.fn.__name__] = max(compiled.metadata.shared, shared.get(self.fn.__name__, 0))

    driver.set_active(AbsentGPU())
    JITFunction.run = compile_only

    from vargen.kernels.triton_ops import adaln_mlp_block, ddpm_update, guided_sample, nearest_code

    def half(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    nearest_code(torch.zeros(100, 256), torch.zeros(5000, 256))
    guided_sample(half(1, 1, 16384), half(1, 1, 16384), 2.0, torch.zeros(1, 1), 0.9, 100, 0.9)
    for rows, zeros in ((2, half), (256, torch.zeros)):
        h, vector, matrix = zeros(rows, 1024), zeros(1024), zeros(1024, 1024)
        adaln_mlp_block(h, h, h, h, vector, vector, matrix, vector, matrix, vector)
    x = half(2, 16)
    ddpm_update(x, x, x, x, torch.zeros(7), x, 2.0)
    print(json.dumps(shared))


if __name__ == "__main__":
    main()
