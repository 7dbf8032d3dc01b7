"""Ada-SFT: a soft mask on linear weights is learnt, then the weights under it."""
