"""A site that shows what a run has found in its images: what it knows, and how that is written."""
