"""Settings of the whole suite."""

import torch

# the models under test are tiny: one thread is faster than two, and results do not depend on the number of cores
torch.set_num_threads(1)
