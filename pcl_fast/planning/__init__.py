"""A model of what a run costs: formulas for every phase, of ours and of the official code.

figures.py (numbers that say where they come from; the benchmarks' records), machines.py (what is published, as data),
rates.py (what a GPU can do), encoder.py (work, counted), job.py (what is to be done), ours.py, official.py, picture.py.
"""
