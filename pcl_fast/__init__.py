"""Prototypical Contrastive Learning, trained as fast as the hardware allows."""

from pcl_fast.user import give_name_and_home

give_name_and_home()  # before anything else is imported
