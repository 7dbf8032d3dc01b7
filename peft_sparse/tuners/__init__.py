"""Where an adapter meets a model: the four tuner types that this package adds to PEFT, and what they share."""
