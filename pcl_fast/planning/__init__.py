"""A model of what a run costs: formulas for every phase, of ours and of the official code.

constants.py (a number and where it comes from), machines.py (what a GPU can do), records.py (what was measured),
encoder.py (work, counted), job.py (what is to be done), costs.py (ours), official.py (the official way),
picture.py.
"""
