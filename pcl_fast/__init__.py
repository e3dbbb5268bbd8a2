"""Prototypical Contrastive Learning, trained as fast as the hardware allows."""
