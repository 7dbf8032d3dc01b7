"""Pure tensors: no nn.Module, no PEFT, no Trainer, no config."""
