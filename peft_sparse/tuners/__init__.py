"""The tuner types that this package adds to PEFT."""
