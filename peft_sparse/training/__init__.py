"""Training in any loop and any Hugging Face trainer: first phases, SpIEL's reselection, data in several languages."""
