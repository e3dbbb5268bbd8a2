"""What lies in a run's folder: checkpoint.py, metrics.py, report.py."""
