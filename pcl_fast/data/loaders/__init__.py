"""Who makes batches: DALI or torchvision, with how much of the machine, in which order; and the cache."""
