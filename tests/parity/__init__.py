"""Recomputes recorded cases of the published systems with this library: ``python -m tests.parity CASE.safetensors ...``."""
