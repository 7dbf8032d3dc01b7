"""First phases: dense training (LT-SFT, DeFT-X), masks (Ada-SFT), selection by gradients, and their checkpoints."""
