"""The measurements of Kim et al. (arXiv 2603.24472): what privileged text does to length and to
words of doubt. No torch at import.
"""
