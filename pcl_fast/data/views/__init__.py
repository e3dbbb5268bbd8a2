"""What a loader makes of an image: the random numbers of its views, and the views by PIL and by the kernels."""
