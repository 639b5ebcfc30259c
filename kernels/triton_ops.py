"""All Triton kernels under the names of their operations; imported at the first dispatch to one, since it imports Triton."""

from vargen.kernels.diffusion_step_triton import adaln_linear, adaln_mlp_block, ddpm_update
from vargen.kernels.nearest_triton import nearest_code
from vargen.kernels.sample_triton import guided_sample

__all__ = ["adaln_linear", "adaln_mlp_block", "ddpm_update", "guided_sample", "nearest_code"]
