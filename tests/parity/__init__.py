"""Every comparison with an implementation by somebody else."""
