"""What the tuner types share: configs, layers, tuners, targets, names and files."""
